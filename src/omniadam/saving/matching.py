"""Which state of a file is which of an optimizer's, or all that speaks against it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from . import snapshot as snapshots
from .snapshot import Snapshot, Tensor, Variable


class Left(NamedTuple):
    """What `load` left as it was, for its caller to look at: nothing, unless `strict=False`."""

    # State of the optimizer that the file has not.
    missing: tuple[str, ...] = ()
    # State in the file that the optimizer has not.
    unexpected: tuple[str, ...] = ()
    # State of both, of different shapes or types, in words.
    different: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return any(map(len, self))


class Plan(NamedTuple):
    """What is to be set: the name of a tensor of the optimizer, and the one to set it to."""

    pairs: tuple[tuple[str, Tensor], ...]
    left: Left
    # What the optimizer has not, by the names that it would have there.
    rest: Mapping[str, Tensor]


def plan(given: Snapshot, own: Snapshot, *, by: str, strict: bool, may_grow: bool = False) -> Plan:
    """What to set of an optimizer, so that it has the state of a file.

    Args:
        given: what was read.
        own: of the optimizer as it is, of which the forms of tensors are used.
        by: "name", or "position": the order of variables in both.
        strict: whether all must fit.
        may_grow: whether the optimizer is to have further state, of which nothing is known yet.

    Raises:
        ValueError: if the state means something else; if the variables cannot be told by what `by`
            says; if something does not fit and `strict`, with all that does not.
    """
    check_meaning(given, own)
    partners = list(_partners(given, own, by))
    pairs: list[tuple[str, Tensor]] = []
    missing: list[str] = []
    unexpected: list[str] = []
    different: list[str] = []
    rest: dict[str, Tensor] = {}

    def compare(theirs: str | None, ours: str | None, what: str, new: str) -> None:
        if theirs is None:
            missing.append(what)
        elif ours is None:
            unexpected.append(what)
            rest[new] = given.tensors[theirs]
        else:
            found, wanted = given.tensors[theirs], own.tensors[ours]
            if (found.shape, found.dtype) == (wanted.shape, wanted.dtype):
                pairs.append((ours, found))
            else:
                different.append(
                    f"{what}: {found.dtype} of shape {found.shape} in the file, {wanted.dtype} of "
                    f"shape {wanted.shape} in the optimizer"
                )

    # Of an extension of the optimizer, the one in the file that its variables were added by.
    counts: dict[int, int] = {}
    for theirs, ours in partners:
        name = _shown(theirs, ours)
        if theirs is not None and ours is not None:
            begun = counts.setdefault(ours.extension, theirs.extension)
            if theirs.extension != begun or bool(begun) != bool(ours.extension):
                # Its count of steps would be another's.
                different.append(
                    f"'{name}': {_since(theirs)} in the file, {_since(ours)} in the optimizer"
                )
                continue
        if theirs is None:
            missing.append(f"'{name}'")
            continue
        if ours is None:
            unexpected.append(f"'{name}'")
            rest |= {f"{name}.{word}": given.tensors[at] for word, at in theirs.slots.items()}
            continue
        for word in dict.fromkeys([*ours.slots, *theirs.slots]):
            new = f"{ours.name}.{word}"
            compare(theirs.slots.get(word), ours.slots.get(word), f"{word} of '{name}'", new)
    for number in sorted({v.extension for v in own.variables} - {0}):
        if number in counts:  # else its variables are missing, and were named
            at = f"extension.{counts[number]}"
            compare(at, f"extension.{number}", f"the count of extension {number}", at)
    of_variables = {name for v in (*given.variables, *own.variables) for name in v.slots.values()}
    of_variables |= {f"extension.{v.extension}" for v in (*given.variables, *own.variables)}
    others = dict.fromkeys(n for n in (*own.tensors, *given.tensors) if n not in of_variables)
    for name in others:
        compare(
            name if name in given.tensors else None,
            name if name in own.tensors else None,
            f"'{name}'",
            name,
        )
    left = Left(tuple(missing), tuple(unexpected), tuple(different))
    if strict and (left._replace(unexpected=()) if may_grow else left):
        raise ValueError(_refusal(left, by))
    return Plan(tuple(pairs), left, rest)


def _partners(
    given: Snapshot, own: Snapshot, by: str
) -> Iterator[tuple[Variable | None, Variable | None]]:
    """Variables of the file and of the optimizer, which are the same ones; None where one lacks."""
    check_by(by)
    if by == "position":
        count = max(len(given.variables), len(own.variables))
        for i in range(count):
            yield (
                given.variables[i] if i < len(given.variables) else None,
                own.variables[i] if i < len(own.variables) else None,
            )
        return
    check_named(given, own)
    found = {variable.name: variable for variable in given.variables}
    for variable in own.variables:
        yield found.pop(variable.name, None), variable
    for variable in found.values():
        yield variable, None


def check_by(by: str) -> None:
    """Raise ValueError for what is no way to tell variables."""
    if by not in ("name", "position"):
        raise ValueError(f"`by` must be 'name' or 'position'. Received: {by!r}")


def check_named(given: Snapshot, own: Snapshot | None = None) -> None:
    """Raise ValueError if variables of a file, or of an optimizer, have no names of their user."""
    for each, whose in ((given, "the file"), (own, "the optimizer")):
        made_up = [v.name for v in (() if each is None else each.variables) if not v.is_named]
        if made_up:
            raise ValueError(
                f"The variables of {whose} have no names by which they could be told again: "
                f"{_some(made_up)} {'was' if len(made_up) == 1 else 'were'} made up by a library, "
                "or say where a variable stood in a list. Give them names (a mapping for build(), "
                "named_parameters(), `name=` of layers); or, if they come in the order in which "
                "they were saved, load(..., by='position')."
            )


def check_meaning(given: Snapshot, own: Snapshot) -> None:
    """Raise ValueError if state of one generation, or of other structure, would be another's."""
    if given.generation != own.generation:
        raise ValueError(
            f"The file is of {given.kind}, an Adam of {given.generation}, and the optimizer "
            f"{own.kind} is of {own.generation}: what they keep does not mean the same. Translate "
            f"the file: omniadam convert --as {own.kind} IN OUT."
        )
    theirs, ours = meaning(given), meaning(own)
    wrong = {name for name in theirs.keys() & ours.keys() if theirs[name] != ours[name]}
    if wrong:
        rows = "; ".join(
            f"`{name}` is {theirs[name]!r} in the file, {ours[name]!r} in the optimizer"
            for name in sorted(wrong)
        )
        raise ValueError(
            f"The state in the file means something else than that of this optimizer: {rows}. "
            "Create the optimizer with the settings of the file, or with omniadam.from_file."
        )


# Settings that decide what state means, with what is meant where a file does not tell.
STRUCTURE = {
    "amsgrad": False,
    "use_ema": False,
    "gradient_accumulation_steps": None,
    "epsilon_hat": True,
}


def meaning(snapshot: Snapshot) -> Mapping[str, Any]:
    """The settings that decide what its state means; none where settings are not known."""
    if snapshot.generation == snapshots.KERAS and snapshot.settings:
        return {
            name: snapshot.settings.get(name, usual)
            for name, usual in STRUCTURE.items()
            if snapshot.is_complete or name in snapshot.settings
        }
    if snapshot.generation == snapshots.OPTIMIZER_V2 and snapshot.settings:
        return {"amsgrad": snapshot.settings.get("amsgrad", False)}
    return {}


# Settings that are no state, and what is not a setting of a step.
_RESTORED = {"learning_rate", "lr", "name", "extensions", *STRUCTURE}
# What configs leave out where it is not set.
_EXCLUSION = "exclude_from_weight_decay"
_LEFT_OUT = {_EXCLUSION, "clipnorm", "clipvalue", "global_clipnorm"}


def warn_of_settings(given: Snapshot, own: Snapshot, stacklevel: int) -> None:
    """Warn, once, of settings that the file has otherwise: they stay as the optimizer has them."""
    theirs, ours = given.settings, own.settings
    told = {*ours} & {*theirs}
    if given.is_complete:
        told |= _LEFT_OUT & ({*ours} | {*theirs})
    rows = [
        f"`{name}` is {theirs.get(name)!r} in the file, {ours.get(name)!r} in the optimizer"
        for name in dict.fromkeys((*ours, *theirs))
        if name in told - _RESTORED and theirs.get(name) != ours.get(name)
        # One may name them, and the other say what their names are like.
        if name != _EXCLUSION or _excluded(given, theirs) != _excluded(given, ours)
    ]
    rates = theirs.get("learning_rate"), ours.get("learning_rate")
    is_restored = all(isinstance(rate, (int, float)) for rate in rates)
    if "learning_rate" in theirs and rates[0] != rates[1] and not is_restored:
        rows.insert(0, f"`learning_rate` is {rates[0]!r} in the file, {rates[1]!r} here")
    if rows:
        warnings.warn(
            f"The state was loaded, and settings stay as they are: {'; '.join(rows)}.",
            stacklevel=stacklevel,
        )


def _excluded(given: Snapshot, settings: Mapping[str, Any]) -> set[str]:
    """Which variables of a file are excluded from weight decay by settings."""
    said = settings.get(_EXCLUSION) or {}
    names = [variable.name for variable in given.variables]
    try:
        patterns, exact = said.get("var_names", ()), said.get("variables", ())
        return {n for n in names if n in exact or any(re.search(p, n) for p in patterns)}
    except (AttributeError, TypeError, re.error):  # of a file that somebody else has made
        return set()


def _named(*variables: Variable | None) -> str:
    return next(variable.name for variable in variables if variable is not None)


def _shown(theirs: Variable | None, ours: Variable | None) -> str:
    if theirs is None or ours is None or theirs.name == ours.name:
        return _named(ours, theirs)
    return f"{theirs.name}' -> '{ours.name}"


def _since(variable: Variable) -> str:
    return (
        f"added by extension {variable.extension}" if variable.extension else "there from the build"
    )


def _refusal(left: Left, by: str) -> str:
    parts = [
        f"{title}: {_some(rows)}"
        for title, rows in (
            ("The file lacks", left.missing),
            ("The optimizer has no", left.unexpected),
            ("Different", left.different),
        )
        if rows
    ]
    if any("by extension" in row for row in left.different):
        parts.append(
            "Variables that came later have a count of their own: load before the build, use "
            "from_file, or build with the first ones and extend() by the others, as it was done"
        )
    hint = (
        "Variables are told by their names."
        if by == "name"
        else "Variables are told by their position."
    )
    return (
        f"The state in the file does not fit the optimizer, and nothing was loaded. "
        f"{'. '.join(parts)}. {hint} Where that is meant, strict=False loads what fits."
    )


def _some(rows: Sequence[str]) -> str:
    return ", ".join(rows)
