"""The order of a step, once, for everybody: which passes go over which entries, with which numbers.

What a pass does to an element is in `rule.make_element`. Here settings, counters and norms become
what passes need: their coefficients, and the factors of clipping. An `Engine` makes its step by
`Step.advance`; a drop-in that counts steps or takes norms by itself (`omniadam.torch`) makes its
groups by the functions that `advance` is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

from .backends.base import Backend, Entry, Group, Part, Selection
from .rule import (
    NOTHING,
    Pass,
    PassCoefficients,
    Rule,
    clip_factor,
    clip_factor_global,
)

# Functions of a number of a backend, a learning rate, t = 1, 2, ... and the rule's own numbers.
RuleCoefficients = Callable[..., Sequence[Any]]


class StepSettings(NamedTuple):
    """The numbers of a step that are of no rule."""

    scale: Any = 1.0  # what gradients are divided by
    clipvalue: Any = 0.0
    weight_decay: Any = 0.0
    momentum: Any = 0.0  # of the average
    fresh: Any = 1.0  # what the variable weighs in it
    threshold: Any = 0.0  # of a norm


class Passes(NamedTuple):
    """The passes of one optimizer. Equal ones are one object, which backends know them by."""

    step: Pass
    micro_step: Pass  # of a call in which gradients only accumulate
    average: Pass  # of a variable without a gradient
    norm: Pass  # over the gradients that are to be applied, for their norms


@cache
def passes_of(step: Pass) -> Passes:
    """All passes, by the one that makes a step."""
    average = Pass(gradient=False, averaged=step.averaged, overwritten=step.overwritten)
    micro_step = average._replace(gradient=True, scaled=step.scaled, accumulated=step.accumulated)
    norm = Pass(
        gradient=True,
        updates=True,
        scaled=step.scaled,
        accumulated=step.accumulated,
        clipped_by_value=step.value_first,
        value_first=step.value_first,
        measured=("gradient",),
        measures_only=True,
    )
    return Passes(*map(_only, (step, micro_step, average, norm)))


@cache
def _only(kind: Pass) -> Pass:
    return kind


@cache
def known(rule: Rule) -> Rule:
    """The rule that stands for all that are equal to it: what was prepared for it is found by it.

    Raises:
        ValueError: if it is made by a function that was made anew, perhaps, and equals no other.
    """
    if "<" in getattr(rule.make, "__qualname__", "<"):
        raise ValueError(
            "A rule must be made by a function at the top level of a module, so that its source "
            f"and its settings say all that it does. Received: {rule.make!r}."
        )
    return rule


class NormClip(NamedTuple):
    """By which norms gradients are clipped."""

    joint: bool = False  # by that over all of them together
    factor: Callable[[Any, Any, Any], Any] = clip_factor_global  # then

    def factors(self, functions: Any, norms: Iterable[Any], threshold: Any) -> list[Any]:
        """What gradients are multiplied by: one each, or one for all."""
        factor = self.factor if self.joint else clip_factor
        return [factor(functions, norm, threshold) for norm in norms]


def pass_coefficients(
    functions: Any,
    kind: Pass,
    settings: StepSettings,
    rate: Any,
    updates: Any,
    steps: int | None = None,
    overwrite_every: int | None = None,
) -> PassCoefficients:
    """The coefficients of the pass that makes a step, and of the others beside it.

    Args:
        functions: of numbers, the backend's.
        kind: what a step does.
        settings: its numbers.
        rate: the learning rate.
        updates: how many steps there were before this one.
        steps: how many gradients accumulate for a step.
        overwrite_every: after so many steps each, variables are set to their averages.
    """
    momentum, fresh, overwrite = 0.0, 1.0, 0.0
    if kind.averaged:
        momentum, fresh = average_weights(functions, settings, updates)
        if overwrite_every is not None:
            overwrite = functions.where((updates + 1) % overwrite_every < 1, 1.0, 0.0)
    decay = settings.weight_decay * rate if kind.decayed else 0.0
    # By position: this is done at every step.
    return PassCoefficients(
        settings.scale,
        float(steps or 1),
        settings.clipvalue,
        settings.weight_decay if kind.penalised else decay,
        momentum,
        fresh,
        overwrite,
        0.0,
    )


def average_weights(functions: Any, settings: StepSettings, steps: Any) -> tuple[Any, Any]:
    """What an average weighs in the next one, and its variable, after so many steps."""
    # The first average is the variable itself, not a step from zero towards it.
    momentum = functions.where(steps < 1, 0.0, settings.momentum)
    return momentum, functions.where(steps < 1, 1.0, settings.fresh)


def updates_since(functions: Any, updates: Any, since: Any) -> Any:
    """How many steps there were, of those since the `iterations` when variables were added.

    None, too, where a count was set back to before that, or where it is not known yet: see
    `Backend.begun`.
    """
    # Divided, so that a traced count becomes a float in every library.
    after = functions.maximum((updates - since) / 1, 0.0)
    return functions.where(since < 0, 0.0, after)


class Share(NamedTuple):
    """The part of a step that is of variables which were added at once."""

    selection: Selection
    gradients: Any  # as they were gathered
    pass_c: PassCoefficients
    updates: Any  # how many steps of them there were before this one
    positions: Sequence[int]  # in the whole, of those with gradients


def checked(rule: Rule, coefficients: Sequence[Any]) -> Sequence[Any]:
    """Coefficients, as many as the rule takes."""
    if len(coefficients) != len(rule.coefficients):
        raise ValueError(
            f"The rule of {rule.make.__qualname__} takes the coefficients {rule.coefficients}. "
            f"Received {len(coefficients)}."
        )
    return coefficients


class Step(NamedTuple):
    """What a step is made of, beside gradients, variables and counts.

    What is compiled for a `version` serves every step of that version: the numbers are its
    arguments, and `by` gives a step others.
    """

    version: tuple[Any, ...]
    passes: Passes
    rule: Rule
    coefficients: RuleCoefficients  # of the rule
    clip: NormClip
    settings: StepSettings
    rule_numbers: tuple[Any, ...]
    numbers: tuple[Any, ...]  # both
    steps: int | None = None  # gradients that accumulate for a step
    overwrite_every: int | None = None
    # Of a user who updates each variable by a function of a gradient, an entry and the rate.
    update: Callable[[Any, Entry, Any], None] | None = None

    def by(self, numbers: Sequence[Any]) -> Step:
        """The same step with other numbers, which may be traced."""
        count = len(StepSettings._fields)
        settings, rule_numbers = StepSettings(*numbers[:count]), tuple(numbers[count:])
        return self._replace(settings=settings, rule_numbers=rule_numbers, numbers=tuple(numbers))

    def advance(
        self,
        backend: Backend,
        selection: Selection,
        gradients: Any,
        calls: Any,
        rate: Any,
    ) -> None:
        """Make a step, or the part of one that a call makes while gradients accumulate.

        Args:
            backend: of the variables.
            selection: the entries with gradients.
            gradients: what the backend gathered.
            calls: how many there were before.
            rate: the learning rate.
        """
        n, passes, functions = self.steps, self.passes, backend.functions
        updates = calls // n if n else calls
        pass_c = pass_coefficients(
            functions, passes.step, self.settings, rate, updates, n, self.overwrite_every
        )
        shares: Sequence[Share] = ()
        if parts := selection.parts:
            shares = [self._share(backend, part, gradients, pass_c, updates) for part in parts]

        def update() -> None:
            factors = self.factors(backend, selection, gradients, pass_c)
            if not shares:
                self._update(backend, selection, gradients, pass_c, updates, factors, rate)
            for share in shares:
                chosen = [factors[i] for i in share.positions] if len(factors) else factors
                if share.selection.entries:
                    self._update(backend, *share[:4], chosen, rate)
            # As in Keras, what had accumulated for a variable that now has no gradient is dropped.
            if n:
                backend.clear(selection, gradients)

        def sweep(kind: Pass) -> None:
            if not shares:
                backend.sweep(Group(kind, NOTHING, selection, (), pass_c), gradients)
            for share in shares:
                group = Group(kind, NOTHING, share.selection, (), share.pass_c)
                if group.entries:
                    backend.sweep(group, share.gradients)

        if n:
            backend.branch(
                (calls + 1) % n < 1,  # in a graph of TensorFlow 1, == compares objects
                update,
                lambda: sweep(passes.micro_step),
            )
        else:
            update()
        if passes.step.averaged and selection.rest:
            sweep(passes.average)
        if selection.constrained:
            backend.constrain_within(selection.constrained)

    def _update(
        self,
        backend: Backend,
        selection: Selection,
        gradients: Any,
        pass_c: PassCoefficients,
        updates: Any,
        factors: Sequence[Any],
        rate: Any,
    ) -> None:
        """The pass that makes a step, after so many others."""
        kind, one = self.passes.step, self.update
        if one is None:
            # Divided, so that a traced count becomes a float in every library.
            t = (updates + 1) / 1
            rule_c = self.coefficients(backend.functions, rate, t, *self.rule_numbers)
            rule_c = checked(self.rule, rule_c)
            backend.sweep(Group(kind, self.rule, selection, rule_c, pass_c, factors), gradients)
        else:
            group = Group(kind, NOTHING, selection, (), pass_c, factors)
            backend.update_each(group, gradients, lambda g, entry: one(g, entry, rate))

    def _share(
        self,
        backend: Backend,
        part: Part,
        gradients: Any,
        pass_c: PassCoefficients,
        updates: Any,
    ) -> Share:
        """What is of a part of the selection: its steps are counted from when it was added."""
        own, functions = backend.part(gradients, part), backend.functions
        if part.since is not None:
            since = backend.begun(part.since, updates, own)
            updates = updates_since(functions, updates, since)
            if self.passes.step.averaged:
                momentum, fresh = average_weights(functions, self.settings, updates)
                pass_c = pass_c._replace(momentum=momentum, one_minus_momentum=fresh)
        return Share(part.selection, own, pass_c, updates, part.positions)

    def factors(
        self, backend: Backend, selection: Selection, gradients: Any, pass_c: PassCoefficients
    ) -> Sequence[Any]:
        """What each gradient is multiplied by, if a norm clips."""
        if not self.passes.step.clipped_by_factor:
            return ()
        group = Group(self.passes.norm, NOTHING, selection, (), pass_c)
        return backend.clip_factors(group, gradients, self.clip, self.settings.threshold)
