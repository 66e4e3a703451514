"""The constructor's settings: what each may be, and what is said when it is not.

Defaults stand in signatures: of `Settings`, and of the optimizers.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

Check = Callable[[str, Any], Any]
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


class Option(Generic[T]):
    """A checked attribute: assigning it, in a constructor or later, checks and converts.

    It has no `__get__`, so that reading it is reading an ordinary attribute.

    Args:
        check: returns the value to store, or raises.
        structural: whether it decides which slots exist or what they mean, so that it cannot
            change once they do.
        or_callable: whether a callable without arguments will do, too; what it returns is checked
            when it is called.
    """

    def __init__(
        self, check: Check, *, structural: bool = False, or_callable: bool = False
    ) -> None:
        self._check = check
        self._structural = structural
        self._or_callable = or_callable

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    if TYPE_CHECKING:  # an ordinary attribute, and not every checker sees that

        def __get__(self, instance: Any, owner: type | None = None) -> T: ...

    def __set__(self, instance: Any, value: T) -> None:
        name, held = self._name, instance.__dict__
        if not (self._or_callable and callable(value)):
            value = self._check(name, value)
        if self._structural and held.get("built") and value != held[name]:
            raise ValueError(
                f"`{name}` decides what the optimizer's state means, so it cannot be changed after "
                f"the optimizer was built. Received: {name}={value!r}, built with {held[name]!r}. "
                "Create a new optimizer instead."
            )
        held[name] = value
        instance._settings_changed(name)


def present(instance: Any, name: str) -> Any:
    """The value of a setting at this step: what a callable returns is checked as a number is."""
    value = getattr(instance, name)
    if not callable(value):
        return value
    option = getattr(type(instance), name, None)
    return option._check(name, value()) if isinstance(option, Option) else value()


def check_overrides(kind: type, base: type, never_called: frozenset[str], instead: str) -> None:
    """Refuse a subclass that overrides what its original calls, and nobody calls here: it would
    make another step without a word.
    """
    kind = getattr(kind, "_untracked", kind)
    if kind is base:
        return
    for each in kind.__mro__:
        if each not in base.__mro__ and (names := never_called.intersection(vars(each))):
            raise TypeError(
                f"{each.__name__} overrides {', '.join(f'`{name}`' for name in sorted(names))}, "
                f"which {base.__name__} of {base.__module__} never calls: a step is made as a "
                f"whole. {instead}"
            )


def number(must: str, accepts: Callable[[float], bool], *, optional: bool = False) -> Check:
    """A real number, converted to float: `must` says in words what `accepts` demands."""
    also = ", or None" if optional else ""

    def check(name: str, value: Any) -> Any:
        if optional and value is None:
            return value
        converted = as_float(value)
        if converted is None or not accepts(converted):
            raise ValueError(f"`{name}` must be a number with {must}{also}. Received: {value!r}")
        return converted

    return check


def as_float(value: Any) -> float | None:
    """A Python float of a real number or an array of one element, else None."""
    kind = getattr(getattr(value, "dtype", None), "kind", "f")
    if isinstance(value, (bool, str, bytes)) or kind in "bcOSU":
        return None
    if tuple(getattr(value, "shape", ())) not in ((), (1,)):
        return None
    try:
        return float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, OverflowError):
        return None


def boolean(name: str, value: Any) -> bool:
    if (isinstance(value, int) and value in (0, 1)) or type(value).__name__ in ("bool_", "bool"):
        return bool(value)
    raise ValueError(f"`{name}` must be True or False. Received: {value!r}")


def whole(minimum: int) -> Check:
    """An integer of at least `minimum`, or None."""

    def check(name: str, value: Any) -> int | None:
        if value is None:
            return None
        try:
            converted = operator.index(value)
        except TypeError:
            converted = None
        if converted is None or isinstance(value, bool) or converted < minimum:
            raise ValueError(
                f"`{name}` must be an integer >= {minimum}, or None. Received: {value!r}"
            )
        return converted

    return check


def count(name: str, value: Any, most: int = 2**63 - 1) -> int:
    """How often something was done, of any type that can say so."""
    number = as_float(value)
    if number is not None and number.is_integer():
        exact = int(value.item() if hasattr(value, "item") else value)
        if 0 <= exact <= most:
            return exact
    raise ValueError(f"`{name}` must be a whole number from 0 to {most}. Received: {value!r}")


def text(name: str, value: Any) -> str:
    if isinstance(value, str) and value:
        return value
    raise ValueError(f"`{name}` must be a non-empty string. Received: {value!r}")


def _fraction(x: float) -> bool:
    return 0.0 <= x < 1.0


def _not_negative(x: float) -> bool:
    return 0.0 <= x < math.inf


def _positive(x: float) -> bool:
    return x > 0.0


rate = number("0 <= value < infinity", _not_negative)
decay_rate = number("0 <= value < 1", _fraction)
small_constant = number("0 <= value < infinity", _not_negative)
weight_decay = number("0 <= value < infinity", _not_negative, optional=True)
# Infinity is a threshold that never clips.
threshold = number("value > 0", _positive, optional=True)
# The older generations take 0, which leaves no gradient at all.
limit = number("value >= 0", lambda x: x >= 0.0, optional=True)
scale = number("0 < value < infinity", lambda x: 0.0 < x < math.inf, optional=True)
momentum = number("0 <= value <= 1", lambda x: 0.0 <= x <= 1.0)

CLIPS = ("clipnorm", "clipvalue", "global_clipnorm")


def check_clips(given: dict[str, Any], exclusive: Sequence[str] = CLIPS) -> None:
    """Raise `ValueError` if more than one of the ways of clipping that exclude others is set."""
    if sum(given.get(name) is not None for name in exclusive) > 1:
        names = [f"`{name}`" for name in exclusive]
        received = ", ".join(f"{name}={given.get(name)}" for name in exclusive)
        raise ValueError(
            f"Only one of {', '.join(names[:-1])} and {names[-1]} can be set. Received: {received}"
        )


# --- what other interfaces have, and where it is here ---

# Of each its name, and how it is called here: ? stands for nothing, or for the W of AdamW.
_INTERFACES = {
    "keras": ("Keras", "import omniadam", "omniadam.Adam?(learning_rate=1e-3)"),
    "torch": (
        "PyTorch",
        "import omniadam.torch",
        "omniadam.torch.Adam?(model.parameters(), lr=1e-3)",
    ),
    "optax": ("optax", "import omniadam.optax", "omniadam.optax.adam?(learning_rate=1e-3)"),
    "older": (
        "TensorFlow 2.0",
        "from omniadam.compat import optimizer_v2",
        "optimizer_v2.Adam(learning_rate=1e-3, decay=0.01)",
    ),
}
# An argument of each interface, or None where it has none like it.
_SAME: tuple[dict[str, str | None], ...] = tuple(
    dict(zip(_INTERFACES, (*names, None), strict=False))
    for names in (
        ("learning_rate", "lr", "learning_rate"),
        ("beta_1", "betas", "b1"),
        ("beta_2", "betas", "b2"),
        ("epsilon", "eps", "eps"),
        (None, "params", None),
        (None, "maximize", None),
        (None, "foreach", None),
        (None, "fused", None),
        (None, "capturable", None),
        (None, "differentiable", None),
        (None, "decoupled_weight_decay", None),
        (None, None, "eps_root"),
        (None, None, "mu_dtype"),
        (None, None, "mask"),
        (None, None, "nesterov"),
        (None, None, None, "decay"),
    )
)


def instead(interface: str, kind: str = "Adam") -> str:
    """Where the interface of another library is, for messages about a class of this name."""
    library, imported, call = _INTERFACES[interface]
    is_adamw = kind.partition(".")[0].lower() == "adamw"
    call = call.replace("?", ("w" if interface == "optax" else "W") if is_adamw else "")
    return f"For {library}'s interface, `{imported}`: {call}."


def leads_on(interface: str, *also: str) -> Callable[[F], F]:
    """Let a function of one interface say what an argument of another's is called here.

    Args:
        interface: whose names it has: "keras", "torch" or "optax".
        *also: what it takes beside the arguments that its signature names.
    """

    def decorate(function: F) -> F:
        known = {
            name
            for name, each in inspect.signature(function).parameters.items()
            if each.kind is not each.VAR_KEYWORD
        }.union(also)

        @wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            for name in kwargs:
                if name not in known and (hint := _meant(name, interface, function)):
                    raise TypeError(
                        f"{function.__qualname__}() got an unexpected keyword argument '{name}'. "
                        f"{hint}"
                    )
            return function(*args, **kwargs)

        return checked  # type: ignore[return-value]

    return decorate


def _meant(argument: str, interface: str, function: Callable[..., Any]) -> str:
    """What is said of an argument that another interface has; empty if none has it."""
    # Who writes for a framework has chosen its interface.
    is_chosen = function.__module__ in ("omniadam.keras", "omniadam.optax")
    for other in _INTERFACES:
        rows = [row for row in _SAME if row[other] == argument]
        if other != interface and rows:
            own = [f"`{name}`" for row in rows if (name := row[interface])]
            here = f"Its name here is {' and '.join(dict.fromkeys(own))}." if own else ""
            if own and is_chosen:
                return here
            return f"{here} {instead(other, function.__qualname__)}".strip()
    return ""


class Elsewhere:
    """A name that another interface has and this one has not: asked for it, one is told where.

    `hasattr` is False. A `__getattr__` would say the same, and make every other attribute slower.

    Args:
        interface: which has it.
        hint: what does it here, if anything does.
    """

    def __init__(self, interface: str, hint: str = "") -> None:
        self._interface, self._hint = interface, hint

    def __repr__(self) -> str:
        return f"<none here. {self._hint or instead(self._interface)}>"

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> NoReturn:
        kind = owner or type(instance)
        what = f"type object '{kind.__name__}'" if instance is None else f"'{kind.__name__}' object"
        hint = self._hint or instead(self._interface, kind.__name__)
        raise AttributeError(f"{what} has no attribute '{self._name}'. {hint}")


class LeadsOn:
    """What optimizers of PyTorch and optax have, and one with Keras's interface has not.

    `load_state_dict` is left out: who looks without asking, as `isinstance` does with a protocol,
    would take an object with both it and `state_dict` for one that saves itself by them.
    """

    if not TYPE_CHECKING:
        step = Elsewhere("torch")
        zero_grad = Elsewhere("torch")
        param_groups = Elsewhere("torch")
        add_param_group = Elsewhere("torch")
        state_dict = Elsewhere("torch")
        init = Elsewhere("optax")
        update = Elsewhere("optax")

    def __dir__(self) -> list[str]:
        return [
            name for name in object.__dir__(self) if name not in _ELSEWHERE or hasattr(self, name)
        ]


_ELSEWHERE = frozenset(name for name, each in vars(LeadsOn).items() if isinstance(each, Elsewhere))
