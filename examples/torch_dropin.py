"""A PyTorch training loop as it stands everywhere, with one import changed."""

import io

import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from omniadam.torch import AdamW  # was: from torch.optim import AdamW

torch.manual_seed(0)
points = torch.rand(512, 2) * 2 - 1
labels = (points.prod(dim=1) > 0).long()  # like signs or not: no line separates them


def made():
    model = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 2))
    weights = [p for p in model.named_parameters() if p[0].endswith("weight")]
    biases = [p for p in model.named_parameters() if p[0].endswith("bias")]
    groups = [{"params": weights, "weight_decay": 0.01}, {"params": biases, "weight_decay": 0.0}]
    # Beside torch's own settings: clipping and averaging, in the same pass over memory.
    opt = AdamW(groups, lr=0.03, global_clipnorm=1.0, use_ema=True, ema_momentum=0.9)
    return model, opt, OneCycleLR(opt, 0.03, total_steps=200)


def train(model, opt, schedule, steps):
    for _ in range(steps):
        opt.zero_grad()
        nn.functional.cross_entropy(model(points), labels).backward()
        opt.step()
        schedule.step()


one = made()
train(*one, 100)
file = io.BytesIO()
torch.save([each.state_dict() for each in one], file)
train(*one, 100)

file.seek(0)
other = made()
for each, state in zip(other, torch.load(file), strict=True):
    each.load_state_dict(state)
train(*other, 100)
pairs = zip(one[0].parameters(), other[0].parameters(), strict=True)
assert all(torch.equal(weight, again) for weight, again in pairs)

model, opt, _ = one
with opt.averaged():  # the parameters have the values of their averages in here
    accuracy = (model(points).argmax(dim=1) == labels).float().mean()
print(f"PyTorch, drop-in: accuracy {accuracy:.1%}")
assert accuracy > 0.9
