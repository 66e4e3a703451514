"""The settings of an optimizer, and what a step is made of by them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import isfunction
from typing import Any, ClassVar, NamedTuple

from . import options
from .options import Option
from .rule import NOTHING, Pass, Rule, clip_factor_global
from .step import NormClip, Passes, Step, StepSettings, known, passes_of


class Clips(NamedTuple):
    """Thresholds of clipping; None where there is none."""

    norm: float | None
    value: float | None
    global_norm: float | None


class Settings:
    """All settings but the learning rate, which is state if it is a number: see `Engine`."""

    weight_decay = Option[float | None](options.weight_decay)
    clipnorm = Option[float | None](options.threshold)
    clipvalue = Option[float | None](options.threshold)
    global_clipnorm = Option[float | None](options.threshold)
    use_ema = Option[bool](options.boolean, structural=True)
    ema_momentum = Option[float](options.momentum)
    ema_overwrite_frequency = Option[int | None](options.whole(1))
    loss_scale_factor = Option[float | None](options.scale)
    gradient_accumulation_steps = Option[int | None](options.whole(2), structural=True)
    name = Option[str](options.text)

    # What `get_config` holds beside the learning rate; a subclass adds its own.
    _option_names: ClassVar[tuple[str, ...]] = (
        "name",
        "weight_decay",
        "clipnorm",
        "global_clipnorm",
        "clipvalue",
        "use_ema",
        "ema_momentum",
        "ema_overwrite_frequency",
        "loss_scale_factor",
        "gradient_accumulation_steps",
    )
    # The older generations clip in another order, and in more than one way at once.
    _exclusive_clips: ClassVar[tuple[str, ...]] = options.CLIPS
    _value_first: ClassVar[bool] = False
    _clip_factor_of_all: ClassVar[Callable[[Any, Any, Any], Any]] = staticmethod(clip_factor_global)
    # Of the settings that are callables, which are called at each step.
    _called: frozenset[str] = frozenset()

    def __init__(
        self,
        *,
        weight_decay: float | None = None,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        name: str | None = None,
    ) -> None:
        self.built = False
        # The rule's settings of the latest step, and what was made of them.
        self._latest: tuple[tuple[Any, ...], Step] | None = None
        self._version = 0  # of what a compiled step calls
        options.check_clips(
            {"clipnorm": clipnorm, "clipvalue": clipvalue, "global_clipnorm": global_clipnorm},
            self._exclusive_clips,
        )
        self.weight_decay = weight_decay
        self.clipnorm, self.clipvalue = clipnorm, clipvalue
        self.global_clipnorm = global_clipnorm
        self.use_ema, self.ema_momentum = use_ema, ema_momentum
        self.ema_overwrite_frequency = ema_overwrite_frequency
        self.loss_scale_factor = loss_scale_factor
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.name = type(self).__name__.lower() if name is None else name

    def _settings_changed(self, name: str) -> None:
        self._latest = None
        self._note_called(name, self.__dict__[name])
        exclusive = self._exclusive_clips
        if name in exclusive:
            held = self.__dict__
            if held[name] is not None and sum(held.get(n) is not None for n in exclusive) > 1:
                rejected = {n: held.get(n) for n in exclusive}
                held[name] = None
                options.check_clips(rejected, exclusive)

    def _note_called(self, name: str, value: Any) -> None:
        """Note whether a setting is a callable, which is called at each step."""
        others = self._called - {name}
        self._called = others | {name} if callable(value) else others

    # --- the rule ---

    @property
    def rule(self) -> Rule | None:
        """The update rule, which is compiled and fused with all else that a step does; None if
        `update_step` is the rule. A subclass sets it: a `Rule`, or a property.
        """
        return None

    # The settings that the rule's coefficients are computed from: names of attributes that hold a
    # number, or a callable without arguments that returns it at each step.
    hyperparameters: ClassVar[tuple[str, ...]] = ()

    def numbers(self, functions: Any, *hyperparameters: Any) -> tuple[Any, ...]:
        """What `coefficients` needs of the hyperparameters, in double precision.

        A step of JAX computes in single precision, in which 1 - 0.999 has four digits: what loses
        digits is computed here, on the host.

        Args:
            functions: `sqrt`, `expm1`, `log`, `maximum` and `where` of numbers.
            *hyperparameters: the values of `hyperparameters` at this step.

        Returns:
            Numbers, as many for all values; the hyperparameters themselves by default.
        """
        return hyperparameters

    def coefficients(
        self, functions: Any, learning_rate: Any, t: Any, *numbers: Any
    ) -> Sequence[Any]:
        """The rule's coefficients at step t = 1, 2, ..., one for each name in `rule.coefficients`.

        Args:
            functions: as of `numbers`. Its arguments may be traced, so that Python's `if` and
                `math` are none for them.
            learning_rate: a number.
            t: the number of the step, a float.
            *numbers: what `numbers` returned.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must override `coefficients(functions, learning_rate, t, "
            "*numbers)`, as it has a `rule`."
        )

    def _rule_of(self, hyperparameters: Sequence[Any]) -> Rule:
        """The rule of a step with these values of its settings; it has the slots of `rule`."""
        return self.rule or NOTHING

    def _hyperparameters(self) -> tuple[Any, ...]:
        """The values of `hyperparameters` at this step: numbers, of callables too."""
        return tuple([options.present(self, name) for name in self.hyperparameters])

    # --- a step ---

    @property
    def _update(self) -> Callable[[Any, Any, Any], None] | None:
        """What updates a variable by a gradient, an entry and the rate, instead of a rule."""
        return None

    def _step_by(self, functions: Any, hyperparameters: tuple[Any, ...]) -> Step:
        latest = self._latest
        if latest is None or latest[0] != hyperparameters:
            latest = self._latest = hyperparameters, self._make_step(functions, hyperparameters)
        return latest[1]

    def _make_step(self, functions: Any, hyperparameters: tuple[Any, ...]) -> Step:
        numbers = tuple(self.numbers(functions, *hyperparameters))
        return self._step_with(self._clips(), known(self._rule_of(hyperparameters)), numbers)

    def _clips(self) -> Clips:
        return Clips(self.clipnorm, self.clipvalue, self.global_clipnorm)

    def _step_with(self, clips: Clips, rule: Rule, numbers: tuple[Any, ...]) -> Step:
        """A step of a rule, with these clips instead of those that are set."""
        passes = self._passes_with(clips)
        threshold = clips.global_norm if clips.norm is None else clips.norm
        settings = StepSettings(
            self.loss_scale_factor or 1.0,
            clips.value or 0.0,
            self.weight_decay or 0.0,
            float(self.ema_momentum),
            1.0 - self.ema_momentum,
            threshold or 0.0,
        )
        version = (
            # What a callable returns is an argument, whichever it is.
            self._version if "learning_rate" not in self._called else None,
            *map(id, passes),  # each kept for ever, as the rule is
            id(rule),
            clips.norm is None,
            self.ema_overwrite_frequency,
            self.gradient_accumulation_steps,
        )
        return Step(
            version,
            passes,
            rule,
            self.coefficients,
            NormClip(clips.norm is None, type(self)._clip_factor_of_all),
            settings,
            numbers,
            (*settings, *numbers),
            self.gradient_accumulation_steps,
            self.ema_overwrite_frequency,
            self._update,
        )

    def _passes_with(self, clips: Clips) -> Passes:
        return passes_of(
            Pass(
                gradient=True,
                updates=True,
                scaled=self.loss_scale_factor is not None,
                accumulated=self.gradient_accumulation_steps is not None,
                clipped_by_factor=clips.norm is not None or clips.global_norm is not None,
                clipped_by_value=clips.value is not None,
                value_first=clips.value is not None and self._value_first,
                decayed=self.weight_decay is not None,
                averaged=self.use_ema,
                overwritten=self.use_ema and self.ema_overwrite_frequency is not None,
            )
        )


def as_it_is(kind: type) -> None:
    """Keep AutoGraph, which rewrites what a tf.function calls, from the methods of a class."""
    for method in [each for each in vars(kind).values() if isfunction(each)]:
        vars(method)["autograph_info__"] = {}


as_it_is(Settings)
