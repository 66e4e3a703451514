"""What users write, with and without mistakes: test_typed.py has type checkers look at it.

A line with a comment that names checkers after "expect" is a mistake that these find; on all other
lines they find none. Nobody runs this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, assert_type

import jax
import keras
import numpy as np
import optax
import torch

import omniadam
import omniadam.keras
import omniadam.optax
import omniadam.torch
from omniadam import Adam, AdamW, IndexedSlices, Optimizer, migrate, schedules
from omniadam.compat import contrib_keras, optimizer_v2
from omniadam.schedules import LearningRate

# --- omniadam.Adam ---

w, b = np.ones(3), np.zeros(())


def halved() -> float:
    return 0.5


class Descent(Optimizer):
    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        self.assign_sub(variable, learning_rate * gradient)


class InverseRoot(schedules.LearningRateSchedule):
    def __call__(self, step: Any) -> Any:
        return 0.1 / (step + 1) ** 0.5


def made(rate: LearningRate) -> Adam:
    return Adam(rate)


decay = schedules.CosineDecay(0.1, decay_steps=1000)
opt = Adam()
for rate in (1e-3, 1, np.float32(0.1), np.array(0.1), decay, InverseRoot(), halved, lambda: 0.5):
    made(rate)
Adam(1e-3, 0.9, 0.99, 1e-8, True, clipnorm=1.0, gradient_accumulation_steps=4, name="adam")
Adam(beta_1=halved, epsilon=lambda: 1e-7)
Adam(epsilon=1e-8, epsilon_hat=False)
AdamW(1e-3, weight_decay=0.01, epsilon_hat=False)
Descent(0.1, weight_decay=None, ema_overwrite_frequency=10)
Adam(keras.optimizers.schedules.CosineDecay(0.1, 1000))
Adam(torch.tensor(0.1))
Adam(jax.numpy.float32(0.1))

Adam("0.001")  # expect: mypy, pyright
Adam([1e-3])  # expect: mypy, pyright
Adam(None)  # expect: mypy, pyright
Adam(lambda step: 0.1)  # expect: mypy, pyright
Adam(lr=1e-3)  # expect: mypy, pyright
Adam(learning_rte=1e-3)  # expect: mypy, pyright
Adam(beta_1="0.9")  # expect: mypy, pyright
Adam(beta_1=(0.9, 0.999))  # expect: mypy, pyright
Adam(amsgrad="yes")  # expect: mypy, pyright
Adam(epsilon_hat="no")  # expect: mypy, pyright
Adam(clipnorm="1.0")  # expect: mypy, pyright
Adam(clipvalue=(-1.0, 1.0))  # expect: mypy, pyright
Adam(global_clipnorm=halved)  # expect: mypy, pyright
Adam(gradient_accumulation_steps=2.5)  # expect: mypy, pyright
Adam(ema_overwrite_frequency="never")  # expect: mypy, pyright
Adam(name=3)  # expect: mypy, pyright
AdamW(weight_decay=None)  # expect: mypy, pyright
Optimizer()  # expect: mypy, pyright

opt.build([w, b])
opt.build({"w": w, "b": b})
opt.apply([w, b])
opt.apply([w, b], {"w": w, "b": b})
opt.apply_gradients(zip([w, b], [w, b], strict=True))
opt.minimize(lambda w, b: (w * w).sum() + b, {"w": w, "b": b})
opt.minimize(lambda: 0.0, lambda: [w, b])
opt.exclude_from_weight_decay(var_names=["bias"])
steps: int = opt.apply_gradients([(w, w)])
count: int = opt.iterations
rate_now: float = opt.learning_rate
opt.learning_rate = 0.1
opt.learning_rate = decay
assert_type(opt.clipnorm, float | None)
opt.clipnorm = None
assert_type(opt.use_ema, bool)
assert_type(opt.name, str)
assert_type(opt.get_config(), dict[str, Any])
assert_type(Adam.from_config(opt.get_config()), Adam)
assert_type(Descent.from_config({}), Descent)
assert_type(decay(3), float)
assert_type(migrate(opt), Adam)
assert_type(opt.scale_loss("loss"), str)
new, state = opt.stateless_apply(opt.variables, [w], [w])
new[0].sum()
weights: list[np.ndarray[Any, Any]] = opt.get_weights()
IndexedSlices(np.ones((1, 2)), [0], (4, 2)).to_dense().sum()

opt.apply_gradients(w, w)  # expect: mypy, pyright
opt.apply_gradients([w, b])  # expect: mypy, pyright
opt.minimize(0.0, [w])  # expect: mypy, pyright
opt.minimize(lambda: 0.0)  # expect: mypy, pyright
opt.exclude_from_weight_decay(var_names=[w])  # expect: mypy, pyright
opt.learning_rate = "fast"  # expect: mypy, pyright
opt.clipnorm = "1"  # expect: mypy, pyright
opt.use_ema = None  # expect: mypy, pyright
text: str = opt.apply_gradients([(w, w)])  # expect: mypy, pyright
text = opt.learning_rate  # expect: mypy, pyright
text = opt.iterations  # expect: mypy, pyright
text = opt.get_config()  # expect: mypy, pyright
text = opt.global_clipnorm  # expect: mypy, pyright
text = migrate(opt)  # expect: mypy, pyright
text = decay(3)  # expect: mypy, pyright
opt.step()  # expect: mypy, pyright
opt.zero_grad()  # expect: mypy, pyright
opt.aply([w])  # expect: mypy, pyright
schedules.CosineDecay(0.1)  # expect: mypy, pyright
schedules.CosineDecay("0.1", 10)  # expect: mypy, pyright
schedules.PolynomialDecay(0.1, 10, powr=2.0)  # expect: mypy, pyright
omniadam.Adamm()  # expect: mypy, pyright

# --- omniadam.torch ---

model = torch.nn.Linear(2, 1)


def closure() -> torch.Tensor:
    return model(torch.ones(2)).sum()  # type: ignore[no-any-return,unused-ignore]


topt = omniadam.torch.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.99), fused=True)
omniadam.torch.Adam(model.named_parameters(), torch.tensor(1e-3), clipnorm=1.0, use_ema=True)
omniadam.torch.AdamW([{"params": model.parameters(), "lr": 0.1}], weight_decay=0.1)
topt.zero_grad()
topt.step()
assert_type(topt.step(), None)  # type: ignore[func-returns-value,unused-ignore]
loss: torch.Tensor = topt.step(closure)
with topt.averaged():
    model(torch.ones(2))
torch.optim.lr_scheduler.StepLR(topt, 10)
topt.load_state_dict(topt.state_dict())

omniadam.torch.Adam()  # expect: mypy, pyright
omniadam.torch.Adam(model)  # expect: pyright
omniadam.torch.Adam(1e-3)  # expect: pyright
omniadam.torch.Adam(model.parameters(), learning_rate=1e-3)  # expect: mypy, pyright
omniadam.torch.Adam(model.parameters(), lr="1e-3")  # expect: pyright
omniadam.torch.Adam(model.parameters(), betas=0.9)  # expect: mypy, pyright
omniadam.torch.Adam(model.parameters(), betas=(0.9, 0.99, 0.999))  # expect: mypy, pyright
omniadam.torch.Adam(model.parameters(), beta=(0.9, 0.99))  # expect: mypy, pyright
omniadam.torch.Adam(model.parameters(), clipnorm="1")  # expect: mypy, pyright
omniadam.torch.Adam(model.parameters(), amsgrad=None)  # expect: mypy, pyright
omniadam.torch.AdamW(model.parameters(), decoupled_weight_decay=True)  # expect: mypy, pyright
topt.step(1.0)  # expect: mypy, pyright
topt.apply_gradients([])  # expect: pyright
text = topt.step(halved)  # expect: mypy, pyright

# --- omniadam.keras ---

kopt = omniadam.keras.Adam(1e-3, beta_1=0.9, clipnorm=1.0, name="mine")
omniadam.keras.Adam(decay)
omniadam.keras.Adam(keras.optimizers.schedules.CosineDecay(0.1, 1000))
omniadam.keras.AdamW(1e-3, 0.01, use_ema=True, epsilon_hat=False)
keras.Sequential([keras.layers.Dense(1)]).compile(kopt, "mse")
assert_type(kopt.get_config(), dict[str, Any])

omniadam.keras.Adam("fast")  # expect: mypy, pyright
omniadam.keras.Adam(lr=1e-3)  # expect: mypy, pyright
omniadam.keras.Adam(clipnrm=1.0)  # expect: mypy, pyright
omniadam.keras.Adam(beta_1=[0.9])  # expect: mypy, pyright
omniadam.keras.Adam(clipnorm="1")  # expect: mypy, pyright
omniadam.keras.AdamW(weight_decay="0.1")  # expect: mypy, pyright
text = kopt.get_config()  # expect: mypy, pyright

# --- omniadam.optax ---

solver = optax.chain(optax.clip(1.0), omniadam.optax.scale_by_adam(), optax.scale(-0.1))
omniadam.optax.adam(0.1, eps_root=1e-8, mu_dtype="bfloat16", epsilon_hat=True)
omniadam.optax.adam(optax.cosine_decay_schedule(0.1, 100))
omniadam.optax.adam(decay)
omniadam.optax.adamw(1e-3, weight_decay=0.1, mask={"w": True})
run: Callable[..., tuple[Any, Any]] = omniadam.optax.step(solver)

omniadam.optax.adam()  # expect: mypy, pyright
omniadam.optax.adam(0.1, beta1=0.9)  # expect: mypy, pyright
omniadam.optax.adam("0.1")  # expect: pyright
omniadam.optax.adam(0.1, b1=[0.9])  # expect: pyright
omniadam.optax.adam(0.1, nesterov="yes")  # expect: mypy, pyright
omniadam.optax.step(0.1)  # expect: pyright
text = omniadam.optax.adam(0.1)  # expect: pyright

# --- omniadam.compat ---

v2 = optimizer_v2.Adam(lr=1e-3, decay=1e-4, clipnorm=1.0, clipvalue=0.5)
optimizer_v2.Adam(decay, epsilon=None, amsgrad=True)
contrib = contrib_keras.Adam(lr=1e-3, clipnorm=1.0)
assert_type(migrate(v2), Adam)
assert_type(contrib.get_config(), dict[str, Any])

optimizer_v2.Adam("fast")  # expect: mypy, pyright
optimizer_v2.Adam(lr="fast")  # expect: mypy, pyright
optimizer_v2.Adam(clipnrm=1.0)  # expect: mypy, pyright
contrib_keras.Adam(learning_rate=1e-3)  # expect: mypy, pyright
contrib_keras.Adam(clipvalue="1")  # expect: mypy, pyright
text = v2.get_config()  # expect: mypy, pyright
