"""Each library's own Adam, for the table of `omniadam train --framework all`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from time import perf_counter
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from omniadam.cli.digits import Array, Examples
from omniadam.cli.frameworks import FRAMEWORKS, Framework, Jax, silence
from omniadam.cli.run import USUAL, Run, Settings

# What is left to do after a step, and is not the optimizer's work.
Rest = Callable[[], object]


class NotComparable(Exception):
    """The library's own Adam has no such setting, or is not for these variables."""


class Peer(ABC):
    """A library's own Adam, for one run.

    Args:
        adam: the settings, under omniadam's names; the learning rate may be a schedule.
        framework: the library.
        variables: that it makes steps of.
    """

    label: ClassVar[str]
    package: ClassVar[str]
    # Settings that need not be as they are by default, beside the rate, the betas and epsilon.
    takes: ClassVar[frozenset[str]] = frozenset({"amsgrad", "weight_decay"})

    def __init__(
        self, adam: dict[str, Any], framework: Framework, variables: Sequence[Any]
    ) -> None:
        self.framework, self.variables = framework, variables
        self.make(adam)

    @property
    def title(self) -> str:
        """Its name and its library's version."""
        return f"{self.label} {version(self.package)}"

    @classmethod
    def framework_of(cls, name: str) -> type[Framework]:
        """What the run's variables are."""
        return FRAMEWORKS[name]

    @abstractmethod
    def make(self, adam: dict[str, Any]) -> None:
        """Make the optimizer."""

    @abstractmethod
    def step(self, gradients: Sequence[Any]) -> Rest:
        """Make a step, and return when it is done."""


def nothing() -> None:
    """No rest."""


class OfTorch(Peer):
    """torch.optim.Adam as it comes, or AdamW where there is weight decay."""

    label, package = "torch.optim.Adam", "torch"
    takes = Peer.takes | {"epsilon_hat"}  # its own form, which is compared with either

    def make(self, adam: dict[str, Any]) -> None:
        import torch

        self._rate, self._step = adam["learning_rate"], 0
        settings = {
            "lr": 0.0,
            "betas": (adam["beta_1"], adam["beta_2"]),
            "eps": adam["epsilon"],
            "amsgrad": adam["amsgrad"],
        }
        if adam["weight_decay"] is None:
            self._optimizer: Any = torch.optim.Adam(self.variables, **settings)
        else:
            decay = adam["weight_decay"]
            self._optimizer = torch.optim.AdamW(self.variables, **settings, weight_decay=decay)

    def step(self, gradients: Sequence[Any]) -> Rest:
        for variable, gradient in zip(self.variables, gradients, strict=True):
            variable.grad = gradient
        (group,) = self._optimizer.param_groups
        group["lr"] = float(self._rate(self._step)) if callable(self._rate) else self._rate
        self._optimizer.step()
        self._step += 1
        return nothing


class Arrays(Jax):
    """Arrays of JAX, each in a place of its own, as optax updates them."""

    def variable(self, value: Array) -> Any:
        return SimpleNamespace(value=self._jax.numpy.array(value))

    def numpy(self, variable: Any) -> Array:
        return np.array(variable.value)

    def loss_and_gradients(
        self, variables: list[Any], batch: Examples
    ) -> tuple[float, Sequence[Any]]:
        return super().loss_and_gradients([v.value for v in variables], batch)


class OfOptax(Peer):
    """optax.adam, or its relatives, in a compiled function that is given its memory."""

    label, package = "optax.adam", "optax"
    takes = OfTorch.takes

    @classmethod
    def framework_of(cls, name: str) -> type[Framework]:
        return Arrays

    def make(self, adam: dict[str, Any]) -> None:
        import jax
        import optax

        scale = optax.scale_by_amsgrad if adam["amsgrad"] else optax.scale_by_adam
        decay = adam["weight_decay"]
        # As optax.adam, amsgrad and adamw are made.
        own = optax.chain(
            scale(b1=adam["beta_1"], b2=adam["beta_2"], eps=adam["epsilon"]),
            optax.identity() if decay is None else optax.add_decayed_weights(decay),
            optax.scale_by_learning_rate(adam["learning_rate"]),
        )

        @partial(jax.jit, donate_argnums=(0, 1))
        def apply(values: Any, state: Any, gradients: Any) -> Any:
            updates, state = own.update(gradients, state, values)
            return optax.apply_updates(values, updates), state

        self._jax, self._apply = jax, apply
        self._state = own.init([v.value for v in self.variables])

    def step(self, gradients: Sequence[Any]) -> Rest:
        values = [v.value for v in self.variables]
        new = self._jax.block_until_ready(self._apply(values, self._state, list(gradients)))
        return lambda: self._take(*new)

    def _take(self, values: Sequence[Any], state: Any) -> None:
        self._state = state
        for variable, value in zip(self.variables, values, strict=True):
            variable.value = value


class OfKeras(Peer):
    """keras.optimizers.Adam, compiled as Keras's own training compiles it."""

    label, package = "keras.optimizers.Adam", "keras"
    takes = Peer.takes | {
        "clipnorm",
        "clipvalue",
        "global_clipnorm",
        "loss_scale_factor",
        "gradient_accumulation_steps",
    }

    def make(self, adam: dict[str, Any]) -> None:
        with silence():
            import keras

        library, rate = keras.backend.backend(), adam["learning_rate"]
        if library != self.framework.name != "keras":
            raise NotComparable(
                f"Keras runs on {library} here: set KERAS_BACKEND={self.framework.name}"
            )
        if callable(rate):
            kind = getattr(keras.optimizers.schedules, type(rate).__name__)
            rate = kind.from_config(rate.get_config())
        settings = {**adam, "learning_rate": rate}
        del settings["epsilon_hat"]
        self._optimizer = own = keras.optimizers.Adam(**settings)
        own.build(self.variables)
        ways = {"jax": self._stateless, "tensorflow": self._in_a_function}
        self._apply = ways.get(library, self._eager)()

    def step(self, gradients: Sequence[Any]) -> Rest:
        return self._apply(gradients)

    def _eager(self) -> Callable[[Sequence[Any]], Rest]:
        def step(gradients: Sequence[Any]) -> Rest:
            self._optimizer.apply(gradients, self.variables)
            return nothing

        return step

    def _in_a_function(self) -> Callable[[Sequence[Any]], Rest]:
        import tensorflow as tf

        own, variables = self._optimizer, self.variables
        apply = tf.function(lambda gradients: own.apply(gradients, variables), autograph=False)

        def step(gradients: Sequence[Any]) -> Rest:
            apply(list(gradients))
            return nothing

        return step

    def _stateless(self) -> Callable[[Sequence[Any]], Rest]:
        import jax

        own = self._optimizer
        apply = jax.jit(own.stateless_apply, donate_argnums=(0, 2))

        def step(gradients: Sequence[Any]) -> Rest:
            held = [*own.variables, *self.variables]
            state, values = [v.value for v in own.variables], [v.value for v in self.variables]
            values, state = jax.block_until_ready(apply(state, list(gradients), values))

            def put() -> None:
                for variable, value in zip(held, [*state, *values], strict=True):
                    variable.assign(value)

            return put

        return step


# By the library whose run they are compared with.
PEERS: dict[str, type[Peer]] = {
    "torch": OfTorch,
    "jax": OfOptax,
    "tensorflow": OfKeras,
    "keras": OfKeras,
}


class PeerRun(Run):
    """A run whose steps are made by a library's own Adam. It is not saved.

    Args:
        kind: the library's own Adam.
        settings: of omniadam's run.
        learn: what is learned from.
        test: what is tested on.

    Raises:
        NotComparable: it has no such setting.
    """

    def __init__(
        self, kind: type[Peer], settings: Settings, learn: Examples, test: Examples
    ) -> None:
        self._kind = kind
        super().__init__(settings, learn, test)

    def _library(self) -> type[Framework]:
        return self._kind.framework_of(self.settings.framework)

    def _begin(self, adam: dict[str, Any]) -> None:
        takes = self._kind.takes | {"learning_rate", "beta_1", "beta_2", "epsilon"}
        for name, value in self.settings.adam.items():
            # What an average is like does not matter without one.
            if name not in takes and not name.startswith("ema_") and value != USUAL[name]:
                raise NotComparable(f"has no --{name.replace('_', '-')}")
        self._peer = self._kind(adam, self.framework, self.variables)

    @property
    def title(self) -> str:
        """The peer and its version."""
        return self._peer.title

    def _update(self, gradients: Sequence[Any]) -> None:
        start = perf_counter()
        rest = self._peer.step(gradients)
        self.optimizer_seconds.append(perf_counter() - start)
        rest()

    def final_weights(self) -> list[Array]:
        """The weights as they are: nothing is averaged."""
        return self.weights()
