"""One training run: its settings, its state between two epochs, and the way to and from a file."""

import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omniadam import Adam, schedules
from omniadam.cli import checkpoint, digits
from omniadam.cli.digits import Array, Examples
from omniadam.cli.frameworks import FRAMEWORKS, Framework
from omniadam.schedules import LearningRateSchedule

# Adam's settings where nothing else is said.
USUAL: dict[str, Any] = {
    name: parameter.default
    for name, parameter in inspect.signature(Adam).parameters.items()
    if name != "name"
}
FORMAT = 1  # of the checkpoint; a file with another number is not read


@dataclass(frozen=True)
class Settings:
    """Everything that a run's numbers depend on."""

    epochs: int
    batch_size: int
    seed: int
    schedule: str
    schedule_epochs: int
    adam: Mapping[str, Any]
    framework: str = "numpy"

    def flat(self) -> dict[str, Any]:
        """The settings under the names of the command's options."""
        settings = asdict(self)
        del settings["adam"]
        return {**settings, **self.adam}


def cosine_restarts(rate: float, steps: int) -> LearningRateSchedule:
    """Three periods: one, two and four sevenths of the steps."""
    return schedules.CosineDecayRestarts(rate, first_decay_steps=math.ceil(steps / 7))


def piecewise(rate: float, steps: int) -> LearningRateSchedule:
    """A tenth of the rate for the third quarter of the steps, a hundredth for the last."""
    half = math.ceil(steps / 2)
    boundaries = [half, half + math.ceil(steps / 4)]
    return schedules.PiecewiseConstantDecay(boundaries, [rate, rate / 10, rate / 100])


# Each starts from a rate and comes down within a number of steps.
SCHEDULES: dict[str, Callable[[float, int], float | LearningRateSchedule]] = {
    "none": lambda rate, steps: rate,
    "exponential": lambda rate, steps: schedules.ExponentialDecay(rate, steps, decay_rate=0.01),
    "polynomial": lambda rate, steps: schedules.PolynomialDecay(rate, steps, rate / 100),
    "inverse-time": lambda rate, steps: schedules.InverseTimeDecay(rate, steps, decay_rate=9.0),
    "cosine": lambda rate, steps: schedules.CosineDecay(rate, steps),
    "cosine-restarts": cosine_restarts,
    "piecewise": piecewise,
}


class Run:
    """Parameters, optimizer and history of a run after some number of whole epochs."""

    def __init__(self, settings: Settings, learn: Examples, test: Examples) -> None:
        self.settings = settings
        self.learn = learn
        self.test = test
        self.steps_per_epoch = math.ceil(len(learn) / settings.batch_size)
        Adam(**settings.adam)  # checks the rate also where it goes into a schedule
        schedule = SCHEDULES[settings.schedule]
        steps = settings.schedule_epochs * self.steps_per_epoch
        rate = schedule(settings.adam["learning_rate"], steps)
        adam = {**settings.adam, "learning_rate": rate}
        self.optimizer = Adam(**adam)
        library = self._library()
        self.framework = library(self.optimizer.scale_loss)
        self.parameters = {
            name: self.framework.variable(value)
            for name, value in digits.initial_parameters(settings.seed).items()
        }
        self._begin(adam)
        self.optimizer_seconds: list[float] = []  # of each step made here
        # An epoch a row: loss and accuracy on what is learned from, loss and accuracy on the test.
        self.history: list[tuple[float, float, float, float]] = []

    def _library(self) -> type[Framework]:
        return FRAMEWORKS[self.settings.framework]

    def _begin(self, adam: dict[str, Any]) -> None:
        """Make ready what makes the steps: here the optimizer, of these settings."""
        self.optimizer.build(self.parameters)

    @property
    def title(self) -> str:
        """What makes the steps, and its version."""
        return self.framework.title

    @property
    def variables(self) -> list[Any]:
        """What the optimizer updates."""
        return list(self.parameters.values())

    def weights(self) -> list[Array]:
        """Copies of the variables' values."""
        return [self.framework.numpy(variable) for variable in self.variables]

    @property
    def epoch(self) -> int:
        """How many epochs are done."""
        return len(self.history)

    def step(self, batch: Examples) -> float:
        """One update from one batch. Returns the loss before it."""
        loss, gradients = self.framework.loss_and_gradients(self.variables, batch)
        self._update(gradients)
        return loss / (self.settings.adam["loss_scale_factor"] or 1.0)

    def _update(self, gradients: Sequence[Any]) -> None:
        variables = self.variables
        start = perf_counter()
        self.optimizer.apply_gradients(zip(gradients, variables, strict=True))
        self.framework.numpy(variables[-1])  # a library may work on when it has returned
        self.optimizer_seconds.append(perf_counter() - start)

    def train_epoch(self, progress: Callable[[float], object]) -> None:
        """Go through the examples once, and tell `progress` the loss of each step."""
        batches = digits.batches(
            self.learn, self.settings.batch_size, self.settings.seed, self.epoch
        )
        # A run that diverges is stopped below, in words.
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            for batch in batches:
                progress(self.step(batch))
            weights = self.final_weights()
            learned = digits.loss_and_accuracy(weights, self.learn)
            tested = digits.loss_and_accuracy(weights, self.test)
        if not math.isfinite(learned[0]):
            raise FloatingPointError(
                f"The loss became {learned[0]} in epoch {self.epoch + 1}: the run diverged. "
                "A smaller --learning-rate or --global-clipnorm 1 may hold it (with --overwrite)."
            )
        self.history.append((*learned, *tested))

    def final_weights(self) -> list[Array]:
        """The weights to use: with use_ema their averages, else as they are. Copies."""
        trained = self.weights()
        self.optimizer.finalize_variable_values(self.variables)
        final = self.weights()
        self._assign(trained)
        return final

    def _assign(self, weights: list[Array]) -> None:
        for variable, weight in zip(self.variables, weights, strict=True):
            self.optimizer.assign(variable, weight)

    def save(self, path: Path) -> None:
        """Write all that `resume` needs to go on as if there had been no interruption."""
        state: dict[str, NDArray[Any]] = {}
        self.optimizer.save_own_variables(state)
        checkpoint.save(
            path,
            {
                "format": np.array(FORMAT),
                "settings": np.array(json.dumps(asdict(self.settings))),
                "history": np.array(self.history, np.float64).reshape(-1, 4),
                **{
                    f"model/{name}": weight
                    for name, weight in zip(self.parameters, self.weights(), strict=True)
                },
                **{f"optimizer/{name}": value for name, value in state.items()},
            },
        )

    def save_model(self, path: Path) -> None:
        """Write the final weights alone, under their names."""
        checkpoint.save(path, dict(zip(self.parameters, self.final_weights(), strict=True)))

    def load(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take the state of a run with these settings, as `save` wrote it."""
        self._assign([arrays[f"model/{name}"] for name in self.parameters])
        prefix = "optimizer/"
        self.optimizer.load_own_variables(
            {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
        )
        self.history = [tuple(row) for row in arrays["history"].tolist()]


def stored_settings(arrays: Mapping[str, NDArray[Any]]) -> Settings:
    """The settings of the run that `Run.save` wrote."""
    if "format" not in arrays or arrays["format"] != FORMAT:
        raise ValueError("it was written by another version of omniadam, or by something else")
    settings = json.loads(str(arrays["settings"]))
    # A setting that there was not yet is as it was.
    return Settings(**settings | {"adam": USUAL | settings["adam"]})
