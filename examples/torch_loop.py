"""A PyTorch module in a loop of one's own: trained, saved, and gone on with: the same numbers."""

import io

import torch
from torch import nn

from omniadam import AdamW, schedules

torch.manual_seed(0)
points = torch.rand(512, 2) * 2 - 1
labels = (points.prod(dim=1) > 0).long()  # like signs or not: no line separates them


def network():
    return nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 2))


def optimizer(model):
    rate = schedules.CosineDecay(0.03, decay_steps=200)
    opt = AdamW(rate, weight_decay=0.01, global_clipnorm=1.0, use_ema=True, ema_momentum=0.9)
    opt.exclude_from_weight_decay(var_names=["bias"])
    opt.build(dict(model.named_parameters()))  # a mapping: the names that "bias" is looked for in
    return opt


def step(model, opt):
    nn.functional.cross_entropy(model(points), labels).backward()
    opt.apply([weight.grad for weight in model.parameters()])
    model.zero_grad()


model = network()
opt = optimizer(model)
for _ in range(100):
    step(model, opt)

file = io.BytesIO()
torch.save({"model": model.state_dict(), "optimizer": opt.variables}, file)

for _ in range(100):
    step(model, opt)

file.seek(0)
saved = torch.load(file)
resumed = network()
resumed.load_state_dict(saved["model"])
again = optimizer(resumed)
again.set_weights(saved["optimizer"])
for _ in range(100):
    step(resumed, again)
pairs = zip(model.parameters(), resumed.parameters(), strict=True)
assert all(torch.equal(weight, other) for weight, other in pairs)

opt.finalize_variable_values(model.parameters())  # the averages are the weights to use
accuracy = (model(points).argmax(dim=1) == labels).float().mean()
print(f"PyTorch: {opt.iterations} steps, accuracy {accuracy:.1%}")
assert accuracy > 0.9
