"""An optimizer of one's own: Lion (https://arxiv.org/abs/2302.06675), fused and compiled."""

import numpy as np

from omniadam import Optimizer
from omniadam.rule import Rule


def make_lion(functions):
    sign = functions.sign

    def lion(w, g, slots, coefficients):
        learning_rate, weight_1, weight_2 = coefficients
        (m,) = slots
        direction = sign(m + (g - m) * weight_1)
        return w - learning_rate * direction, (m + (g - m) * weight_2,)

    return lion


class Lion(Optimizer):
    rule = Rule(make_lion, ("momentum",), ("learning_rate", "weight_1", "weight_2"))
    hyperparameters = ("beta_1", "beta_2")

    def __init__(self, learning_rate=1e-4, beta_1=0.9, beta_2=0.99, name="lion", **settings):
        super().__init__(learning_rate, name=name, **settings)
        self.beta_1, self.beta_2 = beta_1, beta_2

    def numbers(self, functions, beta_1, beta_2):
        return 1 - beta_1, 1 - beta_2

    def coefficients(self, functions, learning_rate, t, weight_1, weight_2):
        return learning_rate, weight_1, weight_2


if __name__ == "__main__":
    w = np.array([1.0, -2.0, 3.0], np.float32)
    opt = Lion(0.1, weight_decay=0.01, global_clipnorm=1.0, use_ema=True)
    for _ in range(25):
        opt.apply_gradients([(2 * w, w)])
    print("Lion:", w.round(3), list(opt.named_variables())[2:])
    assert abs(w).max() < 1
