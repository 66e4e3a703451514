"""Bad input: what the error says, that nothing moved, and that the optimizer goes on working."""

from __future__ import annotations

import copy
import math
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

import omniadam
from cases import gradients, variables
from omniadam import Adam, AdamW, IndexedSlices, Optimizer, schedules
from omniadam.compat import contrib_keras, optimizer_v2
from reference import Array

SHAPES = {"kernel": (3, 4), "bias": (4,), "scale": ()}
Arrays = dict[str, Array]
# A step with most of its parts: weight decay, averages, and (see `accumulating`) accumulators.
SETTINGS: dict[str, Any] = {"learning_rate": 0.5, "weight_decay": 0.25, "use_ema": True}


def arrays() -> Arrays:
    return dict(zip(SHAPES, variables("float32", 0, tuple(SHAPES.values())), strict=True))


def grads(step: int = 0) -> list[Any]:
    return gradients(step, tuple(SHAPES.values()))


def pairs(params: Arrays, step: int = 0, /, **instead: Any) -> list[tuple[Any, Any]]:
    """What a step is given, with another gradient for some of the variables."""
    given = dict(zip(SHAPES, grads(step), strict=True)) | instead
    return [(given[name], params[name]) for name in SHAPES]


class Case(NamedTuple):
    """A call that must fail, its error, and what the message must have in it.

    In `parts`, {kernel}, {bias} and {scale} stand for the names that the variables have by then.
    """

    call: Callable[[Any, Arrays], Any]
    error: type[Exception]
    parts: tuple[str, ...]


class World:
    """An optimizer, fresh or after two steps, and a twin that never meets anything bad."""

    def __init__(self, state: str, settings: dict[str, Any] = SETTINGS, kind: Any = Adam) -> None:
        self.opt, self.params = kind(**settings), arrays()
        self.twin, self.twins = kind(**settings), arrays()
        self.names = dict(zip(SHAPES, ("variable", "variable_1", "variable_2"), strict=True))
        self.steps = 0
        if state == "built":
            self.names = {name: f"layer/{name}" for name in SHAPES}
            self.opt.build({f"layer/{name}": w for name, w in self.params.items()})
            self.twin.build({f"layer/{name}": w for name, w in self.twins.items()})
            self.step()
            self.step()

    def step(self) -> None:
        self.opt.apply_gradients(pairs(self.params, self.steps))
        self.twin.apply_gradients(pairs(self.twins, self.steps))
        self.steps += 1

    def everything(self, opt: Any, params: Arrays) -> dict[str, Any]:
        held = {**params, **dict(zip(opt.named_variables(), opt.get_weights(), strict=True))}
        return {name: (v.dtype, v.shape, v.tobytes()) for name, v in held.items()} | {
            "built": opt.built,
            "settings": repr(opt),
            "iterations": opt.iterations,
        }

    def refuses(self, case: Case) -> None:
        before = self.everything(self.opt, self.params)
        with pytest.raises(case.error) as info:
            case.call(self.opt, self.params)
        assert type(info.value) is case.error
        message = str(info.value)
        for part in case.parts:
            assert part.format(**{k: f"'{v}'" for k, v in self.names.items()}) in message, message
        assert self.everything(self.opt, self.params) == before
        self.goes_on()

    def goes_on(self) -> None:
        self.step()
        self.step()
        mine, its = self.everything(self.opt, self.params), self.everything(self.twin, self.twins)
        assert mine == its


fresh_and_built = pytest.mark.parametrize("state", ["fresh", "built"])
each = pytest.mark.parametrize


@pytest.fixture(autouse=True)
def _without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel matters, the fixture `kernel` says otherwise."""
    monkeypatch.setenv("OMNIADAM_KERNEL", "numpy")


# --- What a step is given ------------------------------------------------------------------------


def slices(rows: int = 3, **later: Any) -> IndexedSlices:
    """Rows of the kernel's gradient, one field of which was changed since."""
    made = IndexedSlices(np.ones((2, 4), np.float32), np.array([0, 2]), (rows, 4))
    for name, value in later.items():
        setattr(made, name, np.asarray(value))
    return made


def gradient(bad: Any, error: type[Exception], *parts: str, of: str = "kernel") -> Case:
    return Case(lambda opt, w: opt.apply_gradients(pairs(w, **{of: bad})), error, parts)


GRADIENTS = {
    "shape": gradient(
        np.ones((4, 3), np.float32),
        ValueError,
        "The gradient of variable {kernel} must have the variable's shape (3, 4) (dtype float32). "
        "Received shape (4, 3) (dtype float32)",
    ),
    "shape, of another dtype": gradient(np.ones((4, 3)), ValueError, "(4, 3) (dtype float64)"),
    "rank": gradient(np.ones(12), ValueError, "{kernel}", "(3, 4)", "(12,)"),
    "would broadcast": gradient(np.ones((1, 4)), ValueError, "{kernel}", "(3, 4)", "(1, 4)"),
    "0-d for 1-d": gradient(np.ones(()), ValueError, "{bias}", "(4,)", "shape ()", of="bias"),
    "1-d for 0-d": gradient(np.ones(1), ValueError, "{scale}", "()", "shape (1,)", of="scale"),
    "NumPy scalar": gradient(np.float32(1), ValueError, "{kernel}", "(3, 4)", "shape ()"),
    "empty": gradient(np.ones((0, 4)), ValueError, "{kernel}", "(3, 4)", "(0, 4)"),
    "sparse shape": gradient(slices(5), ValueError, "{kernel}", "(3, 4)", "(5, 4)"),
    "list": gradient(
        [1.0] * 4,
        TypeError,
        "The gradient of variable {bias} must be a NumPy array or omniadam.IndexedSlices. "
        "Received: list. The variable has shape (4,) and dtype float32",
        of="bias",
    ),
    "number": gradient(1.0, TypeError, "{scale}", "Received: 1.0 (float)", of="scale"),
    "text": gradient("g", TypeError, "{scale}", "Received: 'g' (str)", of="scale"),
    "object": gradient(object(), TypeError, "{kernel}", "Received: object."),
    "masked": gradient(
        np.ma.masked_equal(np.ones((3, 4)), 0), TypeError, "{kernel}", "numpy.ma.MaskedArray"
    ),
    "complex": gradient(
        np.ones((3, 4), complex),
        TypeError,
        "The gradient of variable {kernel} must hold real numbers. Received dtype complex128; the "
        "variable has dtype float32",
    ),
    "bool": gradient(np.ones((3, 4), bool), TypeError, "{kernel}", "dtype bool", "float32"),
    "objects": gradient(np.ones((3, 4), object), TypeError, "{kernel}", "dtype object"),
    "index grew": gradient(slices(indices=[0, 3]), ValueError, "from 0 to 2", "index 3"),
    "index became negative": gradient(slices(indices=[-1, 0]), ValueError, "0 to 2", "index -1"),
    "index became a float": gradient(slices(indices=[0.0, 1.0]), TypeError, "float64"),
    "rows became fewer": gradient(slices(values=np.ones((1, 4))), ValueError, "(1, 4)", "(2,)"),
    "values became whole": gradient(slices(values=[[1] * 4] * 2), TypeError, "dtype int64"),
}


@fresh_and_built
@each("name", GRADIENTS)
def test_gradient(name: str, state: str, kernel: str) -> None:
    World(state).refuses(GRADIENTS[name])


def apply(what: Callable[[Arrays], Any], error: type[Exception], *parts: str) -> Case:
    return Case(lambda opt, w: opt.apply_gradients(what(w)), error, parts)


NOT_PAIRS = "`grads_and_vars` must be an iterable of pairs (gradient, variable). Received: "
PAIRS = {
    "None": apply(lambda w: None, TypeError, NOT_PAIRS, "None"),
    "number": apply(lambda w: 3, TypeError, NOT_PAIRS, "3 (int)"),
    "array": apply(lambda w: w["kernel"], TypeError, NOT_PAIRS, "numpy.ndarray"),
    "gradients only": apply(lambda w: grads(), TypeError, NOT_PAIRS, "list"),
    "a pair, not in a list": apply(lambda w: pairs(w)[1], TypeError, NOT_PAIRS, "tuple"),
    "singles": apply(lambda w: [(g,) for g, _ in pairs(w)], TypeError, NOT_PAIRS),
    "triples": apply(lambda w: [(g, v, 1) for g, v in pairs(w)], TypeError, NOT_PAIRS),
    "one is no pair": apply(lambda w: [*pairs(w)[:2], None], TypeError, NOT_PAIRS),
    "zip of unlike lengths": apply(
        lambda w: zip(grads(), list(w.values())[:2], strict=True), TypeError, NOT_PAIRS, "zip"
    ),
    "empty": apply(lambda w: [], ValueError, "No gradients provided for any variable"),
    "empty iterator": apply(lambda w: iter(()), ValueError, "`grads_and_vars` is empty"),
    "all None": apply(
        lambda w: [(None, v) for v in w.values()],
        ValueError,
        "No gradients provided for any variable. Received None for all of",
        "{kernel}, {bias}, {scale}",
    ),
}


@fresh_and_built
@each("name", PAIRS)
def test_pairs(name: str, state: str) -> None:
    World(state).refuses(PAIRS[name])


def test_swapped_pairs() -> None:
    swapped = Case(lambda opt, w: opt.apply([w["scale"]], [1.0]), TypeError, ("Received: 1.0 (",))
    World("fresh").refuses(swapped)
    World("built").refuses(Case(swapped.call, ValueError, ("Unknown variable: 1.0 (float)",)))


@fresh_and_built
def test_apply(state: str) -> None:
    w = World(state)
    w.refuses(
        Case(
            lambda opt, w: opt.apply(grads()[:2], list(w.values())),
            ValueError,
            ("one gradient a variable. Received 2 gradients for 3 variables",),
        )
    )
    if state == "built":
        part = "Received 1 gradients for 3 variables: [{kernel}, {bias}, {scale}]"
        w.refuses(Case(lambda opt, w: opt.apply(grads()[:1]), ValueError, (part,)))
    else:
        part = "`apply(grads)` without variables needs a built optimizer. Call build(variables)"
        World("fresh").refuses(Case(lambda opt, w: opt.apply(grads()), ValueError, (part,)))


@fresh_and_built
def test_no_gradients_at_all_is_no_step(state: str) -> None:
    w = World(state)
    before = w.everything(w.opt, w.params)
    w.opt.apply([])
    w.opt.apply([], [])
    assert w.everything(w.opt, w.params) == before
    w.goes_on()


@fresh_and_built
def test_some_none_is_a_warning_that_names_them(state: str, kernel: str) -> None:
    w = World(state, {"learning_rate": 0.5})
    kept = {name: value.copy() for name, value in w.params.items()}
    with pytest.warns(UserWarning, match="Gradients do not exist for variables") as caught:
        w.opt.apply_gradients(pairs(w.params, bias=None, scale=None))
    assert str([w.names["bias"], w.names["scale"]]) in str(caught[0].message)
    assert caught[0].filename == __file__
    assert [np.array_equal(kept[n], w.params[n]) for n in SHAPES] == [False, True, True]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        w.twin.apply_gradients(pairs(w.twins, bias=None, scale=None))
    w.goes_on()


@fresh_and_built
def test_a_warning_that_is_an_error_comes_before_anything_moves(state: str) -> None:
    case = gradient(None, UserWarning, "Gradients do not exist for variables [{bias}]", of="bias")
    World(state).refuses(case)


UNKNOWN = {
    "another": (lambda w: np.zeros((3, 4)), "numpy.ndarray of shape (3, 4)"),
    "a copy": (lambda w: w["kernel"].copy(), "numpy.ndarray of shape (3, 4)"),
    "a view": (lambda w: w["kernel"][:], "numpy.ndarray of shape (3, 4)"),
    "a number": (lambda w: 1.0, "1.0 (float)"),
    "None": (lambda w: None, "None"),
}
KNOWN = "This optimizer was built with 3 variables: [{kernel}, {bias}, {scale}]"


@each("name", UNKNOWN)
def test_variable_that_the_optimizer_was_not_built_with(name: str, kernel: str) -> None:
    make, part = UNKNOWN[name]
    World("built").refuses(
        Case(
            lambda opt, w: opt.apply_gradients([*pairs(w)[1:], (np.zeros((3, 4)), make(w))]),
            ValueError,
            ("Unknown variable: ", part, KNOWN),
        )
    )


@fresh_and_built
def test_the_same_variable_twice_in_one_step(state: str, kernel: str) -> None:
    twice = Case(
        lambda opt, w: opt.apply_gradients([*pairs(w), (np.ones(4, np.float32), w["bias"])]),
        ValueError,
        ("A variable is given twice in one step", "{kernel}, {bias}, {scale}, {bias}"),
    )
    if state == "fresh":
        twice = twice._replace(parts=("are the same object, of shape (4,). Pass each variable",))
    World(state).refuses(twice)


# --- Variables -----------------------------------------------------------------------------------


def read_only() -> Array:
    w = np.zeros((2, 3))
    w.flags.writeable = False
    return w


BASE = np.zeros(12, np.float32)
VARIABLES: dict[str, tuple[Any, type[Exception], tuple[str, ...]]] = {
    "integers": (
        np.zeros(3, np.int32),
        TypeError,
        ("float16, float32 or float64", "int32", "(3,)"),
    ),
    "booleans": (np.zeros(3, bool), TypeError, ("dtype bool",)),
    "complex": (np.zeros(3, complex), TypeError, ("dtype complex128",)),
    "objects": (np.zeros(3, object), TypeError, ("dtype object",)),
    "text": (np.array(["w"]), TypeError, ("dtype <U1",)),
    "longdouble": (np.zeros(3, np.longdouble), TypeError, (f"dtype {np.dtype(np.longdouble)}",)),
    "byte-swapped": (
        np.zeros(3, ">f4"),
        TypeError,
        ("byte order of another machine (dtype >f4)", "astype(variable.dtype.newbyteorder('='))"),
    ),
    "read-only": (
        read_only(),
        ValueError,
        ("of shape (2, 3) is read-only, so it cannot be updated in place. Pass a writable copy",),
    ),
    "broadcast": (np.broadcast_to(np.zeros(3), (2, 3)), ValueError, ("is read-only",)),
    "writable broadcast": (
        np.lib.stride_tricks.as_strided(BASE, (2, 3), (0, 4)),
        ValueError,
        ("of shape (2, 3) has elements that share memory (strides (0, 4))", "Pass a copy of it"),
    ),
    "windows": (
        np.lib.stride_tricks.sliding_window_view(BASE, 4, writeable=True),
        ValueError,
        ("of shape (9, 4) has elements that share memory (strides (4, 4))",),
    ),
    "masked": (np.ma.zeros(3), TypeError, ("must be a writable NumPy array", "MaskedArray")),
    "NumPy scalar": (
        np.float32(1),
        TypeError,
        ("must be a writable NumPy array. Received: np.float32(1.0)", "use np.array(value)"),
    ),
    "number": (1.0, TypeError, ("must be a variable of one of these libraries", "1.0 (float)")),
    "whole number": (1, TypeError, ("must be a variable", "Received: 1 (int)")),
    "None": (None, TypeError, ("must be a variable of one of these libraries", "None")),
    "list": ([1.0], TypeError, ("must be a variable of one of these libraries", "list")),
    "str": ("w", TypeError, ("must be a variable of one of these libraries", "'w' (str)")),
}


@each("how", ["build", "named", "apply", "minimize"])
@each("name", VARIABLES)
def test_variable(name: str, how: str) -> None:
    bad, error, parts = VARIABLES[name]
    if how == "minimize":
        pytest.importorskip("autograd")
    call: dict[str, Callable[[Any, Arrays], Any]] = {
        "build": lambda opt, w: opt.build([w["kernel"], bad]),
        "named": lambda opt, w: opt.build({"kernel": w["kernel"], "my/bad": bad}),
        "apply": lambda opt, w: opt.apply(grads()[:2], [w["kernel"], bad]),
        "minimize": lambda opt, w: opt.minimize(lambda *each: 1 / 0, [w["kernel"], bad]),
    }
    if how == "named":
        parts = ("Variable 'my/bad'", *parts)
    World("fresh").refuses(Case(call[how], error, parts))


SHARED: dict[str, Callable[[Array], list[Array]]] = {
    "the same": lambda w: [w, w],
    "all of it": lambda w: [w, w[:]],
    "reshaped": lambda w: [w, w.reshape(3, 4)],
    "a part": lambda w: [w, w[3:5]],
    "one element": lambda w: [w[:7], w[6:]],
    "reversed": lambda w: [w[:7], w[::-1][:6]],
    "strided": lambda w: [w[::2], w[::3]],
    "columns": lambda w: [w.reshape(3, 4)[:, :2], w.reshape(3, 4)[2, 1:]],
    "of another type": lambda w: [w, w.view(np.float64)],
    "in between": lambda w: [w[8:], w[:2], w[4:6], w[1:9:7]],
}


@each("name", SHARED)
@each("how", ["build", "apply"])
def test_variables_that_share_memory(name: str, how: str) -> None:
    views = SHARED[name](np.zeros(12, np.float32))
    shapes = [] if name == "in between" else [str(v.shape) for v in views]
    parts: tuple[str, ...] = ("are the same object, of shape (12,). Pass each variable once",)
    if name != "the same":
        parts = ("must not share memory", "Pass each variable once, or pass the array", *shapes)
    World("fresh").refuses(
        Case(
            lambda opt, w: (
                opt.build(views) if how == "build" else opt.apply([v * 0 for v in views], views)
            ),
            ValueError,
            parts,
        )
    )


DISJOINT: dict[str, Callable[[Array], list[Array]]] = {
    "halves": lambda w: [w[:6], w[6:]],
    "interleaved": lambda w: [w[1::2], w[::2]],
    "interleaved, one backwards": lambda w: [w[::-2], w[::2]],
    "columns": lambda w: [w.reshape(3, 4)[:, :1], w.reshape(3, 4)[:, 1:]],
    "corners": lambda w: [w.reshape(3, 4)[:2, :2], w.reshape(3, 4)[1:, 2:]],
    "empty": lambda w: [w[:0], w, w[12:], w[5:5]],
    "transposed": lambda w: [w[:6].reshape(2, 3).T, w[6:].reshape(2, 3)],
    "fields": lambda w: [w.view("f4,f4")["f0"], w.view("f4,f4")["f1"]],
}


@each("name", DISJOINT)
def test_disjoint_views_of_one_array_are_variables(name: str, kernel: str) -> None:
    start = variables("float32", 0, ((12,),))[0]
    views = DISJOINT[name](start.copy())
    alone, before = [v.copy() for v in views], DISJOINT[name](start)
    one, two = Adam(**SETTINGS), Adam(**SETTINGS)
    for step in range(3):
        given = gradients(step, tuple(v.shape for v in views))
        one.apply(given, views)
        two.apply(given, alone)
    assert [v.tolist() for v in views] == [v.tolist() for v in alone]
    assert [v.tolist() for v in one.variables] == [v.tolist() for v in two.variables]
    assert not any(v.size and v.tolist() == w.tolist() for v, w in zip(views, before, strict=True))


@pytest.mark.needs("torch")
def test_variables_of_two_libraries() -> None:
    import torch

    for second, name in ((torch.zeros(3), "torch"), (torch.nn.Parameter(torch.zeros(3)), "torch")):
        World("fresh").refuses(
            Case(
                lambda opt, w, second=second: opt.build([w["kernel"], second]),
                TypeError,
                ("All variables of an optimizer must be of one library. Received variable 0 of "
                 f"numpy and variable 1 of {name}. Use one optimizer for each",),
            )
        )  # fmt: skip
    gradient(torch.zeros(3, 4), TypeError, "{kernel}", "Received: torch.Tensor")
    World("built").refuses(gradient(torch.zeros(3, 4), TypeError, "{kernel}", "torch.Tensor"))


def test_a_variable_that_became_read_only(kernel: str) -> None:
    w = World("built")
    for value in (*w.params.values(), *w.twins.values()):
        value.flags.writeable = False
    part = "Variable {kernel} of shape (3, 4) is read-only"
    before = w.everything(w.opt, w.params)
    for _ in range(2):
        with pytest.raises(ValueError, match=re.escape(part.format(kernel="'layer/kernel'"))):
            w.opt.apply_gradients(pairs(w.params))
    assert w.everything(w.opt, w.params) == before
    for value in (*w.params.values(), *w.twins.values()):
        value.flags.writeable = True
    w.goes_on()


def test_a_variable_that_was_resized(kernel: str) -> None:
    w = World("built")
    w.params["kernel"].resize((2, 2), refcheck=False)
    before = w.everything(w.opt, w.params)
    part = r"must stay as it was built, of shape \(3, 4\) and dtype float32. It now has .*\(2, 2\)"
    for bad in (np.ones((3, 4), np.float32), np.ones((2, 2), np.float32)):
        with pytest.raises(ValueError, match=part):
            w.opt.apply_gradients(pairs(w.params, kernel=bad))
    assert w.everything(w.opt, w.params) == before


@each("steps", [0, 1, 2])
def test_state_that_may_not_be_written_to(steps: int, kernel: str) -> None:
    w = World("built")
    for _ in range(steps):
        w.opt.apply_gradients(pairs(w.params))
    before = w.everything(w.opt, w.params)
    for i in (2, 5, 6):  # an average, a momentum, a velocity
        w.opt.variables[i].flags.writeable = False
        with pytest.raises(ValueError, match="'layer/kernel' must stay writable"):
            w.opt.apply_gradients(pairs(w.params))
        assert w.everything(w.opt, w.params) == before
        w.opt.variables[i].flags.writeable = True
    w.opt.apply_gradients(pairs(w.params))


NO_VARIABLES: dict[str, tuple[Callable[[Arrays], Any], type[Exception], str]] = {
    "None": (lambda w: None, TypeError, "must be given as a list, or a mapping from names"),
    "number": (lambda w: 3, TypeError, "or a mapping from names. Received: 3 (int)"),
    "text": (lambda w: "kernel", TypeError, "Received: 'kernel' (str)"),
    "names are numbers": (
        lambda w: dict(enumerate(w.values())),
        TypeError,
        "Names of variables must be non-empty strings. Received: [0, 1, 2]",
    ),
    "empty name": (
        lambda w: {"": w["kernel"]},
        TypeError,
        "Names of variables must be non-empty strings. Received: ['']",
    ),
}


@each("name", NO_VARIABLES)
def test_build_on_what_are_no_variables(name: str) -> None:
    make, error, part = NO_VARIABLES[name]
    World("fresh").refuses(Case(lambda opt, w: opt.build(make(w)), error, (part,)))


REBUILDS: dict[str, Callable[[Arrays], Any]] = {
    "others": lambda w: [v.copy() for v in w.values()],
    "fewer": lambda w: list(w.values())[:2],
    "more": lambda w: [*w.values(), np.zeros(2)],
    "another order": lambda w: list(w.values())[::-1],
    "none": lambda w: [],
}


@each("name", REBUILDS)
def test_build_again_on_others(name: str) -> None:
    parts = (KNOWN.replace("This optimizer", "optimizer"), "create a new optimizer for them")
    World("built").refuses(Case(lambda opt, w: opt.build(REBUILDS[name](w)), ValueError, parts))


def test_build_again_on_the_same_is_nothing() -> None:
    w = World("built")
    before = w.everything(w.opt, w.params)
    w.opt.build(list(w.params.values()))
    w.opt.build({name: value for name, value in w.params.items()})
    assert w.everything(w.opt, w.params) == before
    w.goes_on()


# --- A gradient in the memory of a variable or of the state --------------------------------------

ALIASES: dict[str, Callable[[Arrays, dict[str, Array]], dict[str, Array]]] = {
    "its own variable": lambda w, s: {"kernel": w["kernel"], "bias": w["bias"]},
    "backwards": lambda w, s: {"kernel": w["kernel"][::-1], "bias": w["bias"][::-1]},
    "another's": lambda w, s: {"bias": w["kernel"][1]},
    "each other's": lambda w, s: {"bias": w["kernel"][1], "scale": w["bias"][2, ...]},
    "momentum": lambda w, s: {"kernel": s["layer_kernel_momentum"]},
    "velocity": lambda w, s: {"kernel": s["layer_kernel_velocity"]},
    "velocity backwards": lambda w, s: {"kernel": s["layer_kernel_velocity"][:, ::-1]},
    "another's momentum": lambda w, s: {"bias": s["layer_kernel_momentum"][2]},
    "across another's velocity": lambda w, s: {"bias": s["layer_kernel_velocity"].ravel()[::3]},
    "average": lambda w, s: {"kernel": s["layer_kernel_average"]},
    "accumulator": lambda w, s: {"kernel": s["layer_kernel_gradient_accumulator"]},
    "another's accumulator": lambda w, s: {"bias": s["layer_kernel_gradient_accumulator"][0]},
}
EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "average": SETTINGS
    | {"global_clipnorm": 0.5, "ema_momentum": 0.5, "ema_overwrite_frequency": 1},
    "average and accumulator": SETTINGS | {"gradient_accumulation_steps": 2},
}


class Through(Adam):
    """Adam variable by variable, as a subclass written for Keras."""

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        super().update_step(gradient, variable, learning_rate)


@each("kind", [Adam, Through])
@each(
    ("name", "extras"),
    [
        (name, extras)
        for name in ALIASES
        for extras in EXTRAS
        if not {"average", "accumulator"} & {*name.split()} or name.split()[-1] in extras
    ],
)
def test_gradient_that_shares_memory(name: str, extras: str, kind: type[Adam], kernel: str) -> None:
    w = World("built", EXTRAS[extras], kind)
    for _ in range(3):
        found = ALIASES[name](w.params, w.opt.named_variables())
        kept = copy.deepcopy(found)
        w.opt.apply_gradients(pairs(w.params, **found))
        w.twin.apply_gradients(pairs(w.twins, **kept))
        assert w.everything(w.opt, w.params) == w.everything(w.twin, w.twins)
    w.goes_on()


@each("extras", EXTRAS)
def test_first_gradient_that_is_the_variable(extras: str, kernel: str) -> None:
    w = World("fresh", EXTRAS[extras])
    w.opt.apply_gradients([(v, v) for v in w.params.values()])
    w.twin.apply_gradients([(v.copy(), v) for v in w.twins.values()])
    w.goes_on()


def test_gradients_that_share_memory_with_each_other(kernel: str) -> None:
    w = World("built")
    shared = np.ones(12, np.float32)
    views = {"kernel": shared.reshape(3, 4), "bias": shared[2:6], "scale": shared[3, ...]}
    w.opt.apply_gradients(pairs(w.params, **views))
    w.twin.apply_gradients(pairs(w.twins, **copy.deepcopy(views)))
    w.goes_on()


@each("kind", [Adam, Through])
@each("dtype", [">f4", ">f8", ">f2", np.longdouble, np.float16, np.int8, np.uint64])
def test_gradients_of_other_types_are_converted(dtype: Any, kind: Any, kernel: str) -> None:
    """A gradient is only read, so that its byte order and type are no reason to refuse it."""
    w = World("built", SETTINGS | {"clipnorm": 2.0}, kind)
    whole = np.arange(12, dtype=np.float32).reshape(3, 4)
    both: list[tuple[Any, ...]] = [(whole.astype(dtype), whole)]
    if np.dtype(dtype).kind == "f":
        both.append(tuple(IndexedSlices(g[:2], [2, 0], (3, 4)) for g in both[0]))
    for other, same in both * 2:
        w.opt.apply_gradients(pairs(w.params, kernel=other))
        w.twin.apply_gradients(pairs(w.twins, kernel=same))
    w.goes_on()


# --- Sparse gradients ----------------------------------------------------------------------------

ROWS = np.ones((2, 4), np.float32)
MASKED = ("must not be masked", "filled(0)")
SPARSE: dict[str, tuple[tuple[Any, Any, Any], type[Exception], tuple[str, ...]]] = {
    "negative": ((ROWS, [-1, 0], (3, 4)), ValueError, ("0 to 2", "(3, 4)", "index -1")),
    "out of range": (
        (ROWS, [0, 3], (3, 4)),
        ValueError,
        ("must be from 0 to 2, the rows of dense_shape (3, 4). Received index 3. Drop padding",),
    ),
    "floats": ((ROWS, [0.0, 1.0], (3, 4)), TypeError, ("must be integers", "float64")),
    "booleans": ((ROWS, [True, False], (3, 4)), TypeError, ("must be integers", "dtype bool")),
    "scalar": ((ROWS, 1, (3, 4)), ValueError, ("indices of shape ()", "(2, 4)", "(3, 4)")),
    "matrix": ((ROWS, [[0, 1]], (3, 4)), ValueError, ("indices of shape (1, 2)",)),
    "too few": ((ROWS, [0], (3, 4)), ValueError, ("(1,)", "values of shape (2, 4)")),
    "too wide": ((ROWS, [0, 1], (3, 5)), ValueError, ("values of shape (2, 4)", "(3, 5)")),
    "flat": ((ROWS.ravel(), [0, 1], (3, 4)), ValueError, ("values of shape (8,)",)),
    "no shape": ((ROWS, [0, 1], ()), ValueError, ("at least one dimension",)),
    "fractional shape": ((ROWS, [0, 1], (2.5, 4)), TypeError, ("float",)),
    "shape is a number": ((ROWS[:, 0], [0, 1], 3), TypeError, ("int",)),
    "whole values": ((ROWS.astype(int), [0, 1], (3, 4)), TypeError, ("dtype int64",)),
    "complex values": ((ROWS * 1j, [0, 1], (3, 4)), TypeError, ("dtype complex64",)),
    "no values": ((None, [0, 1], (3, 4)), TypeError, ("dtype object",)),
    "masked values": ((np.ma.array(ROWS, mask=ROWS > 2), [0, 1], (3, 4)), TypeError, MASKED),
    "masked indices": ((ROWS, np.ma.array([0, 1], mask=[0, 1]), (3, 4)), TypeError, MASKED),
    "list of masked rows": (([*np.ma.array(ROWS, mask=True)], [0, 1], (3, 4)), TypeError, MASKED),
    "empty table": ((ROWS, [0, 1], (0, 4)), ValueError, ("(0, 4)", "index 1")),
}


@each("name", SPARSE)
def test_indexed_slices(name: str) -> None:
    arguments, error, parts = SPARSE[name]
    with pytest.raises(error) as info:
        IndexedSlices(*arguments)
    for part in parts:
        assert part in str(info.value)


# --- Settings ------------------------------------------------------------------------------------

INFINITY, NAN = math.inf, math.nan
NEVER = [True, np.True_, "1", [1.0], np.ones(2), np.array([[0.5]]), 1j, np.complex64(1), ...]
NUMBER = "`{name}` must be a number with "
OPTIONS: dict[str, tuple[str, list[Any]]] = {
    "learning_rate": (NUMBER + "0 <= value < infinity", [-0.5, INFINITY, NAN, None, *NEVER]),
    "beta_1": (NUMBER + "0 <= value < 1", [1, 1.0, -0.1, NAN, None, *NEVER]),
    "beta_2": (NUMBER + "0 <= value < 1", [1, 1.5, -0.1, NAN, None, *NEVER]),
    "epsilon": (
        NUMBER + "0 <= value < infinity",
        [-1e-9, INFINITY, NAN, None, *NEVER],
    ),
    "weight_decay": (NUMBER + "0 <= value < infinity, or None", [-0.1, INFINITY, NAN, *NEVER]),
    "clipnorm": (NUMBER + "value > 0, or None", [0, -1.0, NAN, *NEVER]),
    "clipvalue": (NUMBER + "value > 0, or None", [0, -1.0, NAN, *NEVER]),
    "global_clipnorm": (NUMBER + "value > 0, or None", [0, -1.0, NAN, *NEVER]),
    "loss_scale_factor": (NUMBER + "0 < value < infinity, or None", [0, -1, INFINITY, NAN, *NEVER]),
    "ema_momentum": (NUMBER + "0 <= value <= 1", [-0.1, 1.01, NAN, None, *NEVER]),
    "ema_overwrite_frequency": (
        "`{name}` must be an integer >= 1, or None",
        [0, -1, 1.0, 2.5, NAN, True, "1", [1]],
    ),
    "gradient_accumulation_steps": (
        "`{name}` must be an integer >= 2, or None",
        [0, 1, -2, 2.0, True, "2", [2]],
    ),
    "amsgrad": ("`{name}` must be True or False", [None, 2, 1.0, "yes", [True], np.ones(2)]),
    "use_ema": ("`{name}` must be True or False", [None, 2, 1.0, "yes", [True], np.ones(2)]),
    "epsilon_hat": ("`{name}` must be True or False", [None, "no"]),
    "name": ("`{name}` must be a non-empty string", ["", 3, ["adam"]]),
}
BAD_OPTIONS = [(name, value) for name, (_, values) in OPTIONS.items() for value in values]


@each(("name", "value"), BAD_OPTIONS)
def test_setting(name: str, value: Any) -> None:
    """In a constructor, in `from_config`, and as an attribute before and after building."""
    message = OPTIONS[name][0].format(name=name)
    for kind in (Adam, AdamW):
        with pytest.raises(ValueError, match=re.escape(message)) as info:
            kind(**{name: value})
        assert f"Received: {value!r}" in str(info.value)
    with pytest.raises(ValueError, match=re.escape(message)):
        Adam.from_config({name: value})
    case = Case(lambda opt, w: setattr(opt, name, value), ValueError, (message, repr(value)))
    for state in ("fresh", "built"):
        World(state).refuses(case)


GOOD: dict[str, list[tuple[Any, Any]]] = {
    "learning_rate": [(0, 0.0), (1, 1.0), (np.float32(0.5), 0.5), (np.array([0.5]), 0.5)],
    "beta_1": [(0, 0.0), (np.float64(0.5), 0.5), (np.array(0.5), 0.5)],
    "epsilon": [(0, 0.0), (1, 1.0)],
    "weight_decay": [(None, None), (0, 0.0), (1, 1.0)],
    "clipnorm": [(None, None), (INFINITY, INFINITY), (1, 1.0)],
    "ema_momentum": [(0, 0.0), (1, 1.0)],
    "ema_overwrite_frequency": [(None, None), (1, 1), (np.int64(3), 3)],
    "gradient_accumulation_steps": [(None, None), (2, 2), (np.int32(3), 3)],
    "amsgrad": [(1, True), (np.False_, False)],
    "name": [(None, "adam"), ("a", "a")],
}


@each(("name", "value", "want"), [(name, *each) for name, pair in GOOD.items() for each in pair])
def test_setting_at_the_edge_of_what_it_may_be(name: str, value: Any, want: Any) -> None:
    got = getattr(Adam(**{name: value}), name)
    assert got == want and type(got) is type(want)


@each("keyword", ["lr", "decay", "momentum", "var_list"])
@each("kind", [Adam, AdamW, Optimizer])
def test_unknown_keyword(kind: Any, keyword: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{keyword}'"):
        kind(learning_rate=0.1, **{keyword: 0.5})
    with pytest.raises(ValueError, match=f"does not fit {kind.__name__}: .*'{keyword}'"):
        kind.from_config({"learning_rate": 0.1, keyword: 0.5})


def test_adamw_needs_weight_decay() -> None:
    with pytest.raises(ValueError, match="`weight_decay` of AdamW must be a number"):
        AdamW(weight_decay=None)
    later = AdamW()
    later.weight_decay = None
    assert AdamW.from_config(later.get_config()).get_config() == later.get_config()


CLIPS = ("clipnorm", "clipvalue", "global_clipnorm")
ONE_CLIP = "Only one of `clipnorm`, `clipvalue` and `global_clipnorm` can be set. Received: "


@each("second", CLIPS)
@each("first", CLIPS)
def test_two_clips(first: str, second: str) -> None:
    if first == second:
        opt = Adam(**{first: 1.0})
        setattr(opt, first, 2.0)
        assert getattr(opt, first) == 2.0
        return
    both: dict[str, Any] = {first: 1.0, second: 2.0}
    received = ", ".join(f"{name}={both.get(name)}" for name in CLIPS)
    with pytest.raises(ValueError, match=re.escape(ONE_CLIP + received)):
        Adam(**both)
    for state in ("fresh", "built"):
        w = World(state, {first: 1.0})
        w.refuses(
            Case(lambda opt, w: setattr(opt, second, 2.0), ValueError, (ONE_CLIP + received,))
        )
        setattr(w.opt, first, None)
        setattr(w.opt, second, 2.0)
        assert (getattr(w.opt, first), getattr(w.opt, second)) == (None, 2.0)


@each(
    ("name", "value", "built"),
    [
        *[("use_ema", False, True), ("amsgrad", True, False)],
        *[("gradient_accumulation_steps", 2, None), ("epsilon_hat", False, True)],
    ],
)
def test_settings_that_decide_which_state_there_is(name: str, value: Any, built: Any) -> None:
    parts = (
        f"`{name}` decides what the optimizer's state means, so it cannot be changed after",
        f"Received: {name}={value!r}, built with {built!r}. Create a new optimizer instead",
    )
    World("built").refuses(Case(lambda opt, w: setattr(opt, name, value), ValueError, parts))
    w = World("built")
    setattr(w.opt, name, built)  # no change
    w.goes_on()
    opt = Adam(**SETTINGS)
    setattr(opt, name, value)
    opt.build([np.zeros(3)])
    assert getattr(opt, name) == value


@fresh_and_built
def test_number_in_place_of_a_schedule(state: str) -> None:
    w = World(state, {"learning_rate": schedules.ExponentialDecay(0.5, 2, 0.5)})
    parts = ("created with a `LearningRateSchedule` as its `learning_rate`", "Received: 0.25.")
    w.refuses(Case(lambda opt, w: setattr(opt, "learning_rate", 0.25), TypeError, parts))


# --- Callables -----------------------------------------------------------------------------------


class Rate(schedules.LearningRateSchedule):
    def __init__(self, value: list[Any]) -> None:
        self.value = value

    def __call__(self, step: Any) -> Any:
        return self.value[0]


RETURNED: dict[str, tuple[str, list[Any], float]] = {
    "learning_rate": ("0 <= value < infinity", [-1.0, NAN, None, "1", np.ones(2)], 0.5),
    "schedule": ("0 <= value < infinity", [-1.0, INFINITY, None], 0.5),
    "beta_1": ("0 <= value < 1", [1.0, -0.1, NAN, None, lambda: 0.5], 0.75),
    "beta_2": ("0 <= value < 1", [1.0, "0.9", np.ones(2)], 0.75),
    "epsilon": ("0 <= value < infinity", [-1.0, INFINITY, None], 0.25),
}


@each("kind", [Adam, Through])
@each(("state", "steps"), [("fresh", None), ("built", None), ("built", 3)])  # the third updates
@each(("name", "bad"), [(name, bad) for name, (_, values, _) in RETURNED.items() for bad in values])
def test_callable_that_returns_what_it_must_not(
    name: str, bad: Any, state: str, steps: int | None, kind: type[Adam], kernel: str
) -> None:
    must, _, good = RETURNED[name]
    value = [good]
    setting: Any = Rate(value) if name == "schedule" else lambda: value[0]
    shown = "learning_rate" if name == "schedule" else name
    settings: Any = SETTINGS | {"gradient_accumulation_steps": steps, shown: setting}

    def call(opt: Adam, params: Arrays) -> None:
        value[0] = bad
        try:
            opt.apply_gradients(pairs(params))
        finally:
            value[0] = good

    parts = (f"`{shown}` must be a number with {must}", repr(bad))
    World(state, settings, kind).refuses(Case(call, ValueError, parts))


def test_callable_that_raises(kernel: str) -> None:
    failing = [False]

    def beta() -> float:
        if failing[0]:
            raise KeyError("mine")
        return 0.5

    for state in ("fresh", "built"):
        for name in ("learning_rate", "beta_1"):

            def call(opt: Adam, params: Arrays) -> None:
                failing[0] = True
                try:
                    opt.apply_gradients(pairs(params))
                finally:
                    failing[0] = False

            World(state, SETTINGS | {name: beta}).refuses(Case(call, KeyError, ("mine",)))


# --- Weight decay exclusion, sets of weights, stores, stateless_apply ----------------------------


def method(name: str, *arguments: Any, error: type[Exception] = ValueError) -> Any:
    """A row of METHODS: arguments that are functions are called with (opt, params)."""
    *given, parts = arguments

    def call(opt: Any, params: Arrays) -> Any:
        return getattr(opt, name)(*(a(opt, params) if callable(a) else a for a in given))

    return Case(call, error, parts if isinstance(parts, tuple) else (parts,))


def weights(change: Callable[[list[Any]], Any]) -> Callable[[Any, Arrays], Any]:
    def changed(opt: Any, params: Arrays) -> Any:
        values = opt.get_weights()
        replaced = change(values)
        return values if replaced is None else replaced

    return changed


def at(index: int, value: Any) -> Callable[[Any, Arrays], Any]:
    def change(values: list[Any]) -> None:
        values[index] = value

    return weights(change)


def store(change: Callable[[dict[str, Any]], Any]) -> Callable[[Any, Arrays], Any]:
    def changed(opt: Any, params: Arrays) -> Any:
        values: dict[str, Any] = {}
        opt.save_own_variables(values)
        change(values)
        return values

    return changed


def state_of(opt: Any, params: Arrays) -> list[Any]:
    return opt.get_weights()


def values_of(opt: Any, params: Arrays) -> list[Array]:
    return [w.copy() for w in params.values()]


# State: iteration, learning_rate, 3 averages, 3 * (momentum, velocity).
COUNT = "'iteration' must be set to whole numbers of shape () (its dtype is int64)"
COUNTED = "'iteration' must be set to whole numbers from 0 to 9223372036854775807"
SLOT = "State variable 'layer_kernel_average' must be set to real numbers of shape (3, 4)"
SAME = "Pass what get_weights() returned for the same variables and settings"
BUILT = {
    "too few": method("set_weights", weights(lambda v: v[:-1]), ("needs 11 arrays", "Received 10")),
    "too many": method("set_weights", weights(lambda v: [*v, v[0]]), ("Received 12",)),
    "none": method("set_weights", [], ("needs 11 arrays", "'learning_rate'", "Received 0")),
    "shape": method("set_weights", at(2, np.ones((4, 3))), (SLOT, "Received shape (4, 3)", SAME)),
    "would broadcast": method("set_weights", at(2, np.ones(4)), (SLOT, "Received shape (4,)")),
    "last shape": method("set_weights", at(-1, np.ones(1)), ("'layer_scale_velocity'", "(1,)")),
    "complex": method("set_weights", at(2, np.ones((3, 4), complex)), (SLOT, "complex128")),
    "bool": method("set_weights", at(2, np.ones((3, 4), bool)), (SLOT, "dtype bool")),
    "text": method("set_weights", at(2, np.full((3, 4), "1")), (SLOT, "dtype <U1")),
    "None": method("set_weights", at(2, None), (SLOT, "shape () and dtype object")),
    "part of a count": method("set_weights", at(0, 1.5), (COUNT, "dtype float64")),
    "infinite count": method("set_weights", at(0, INFINITY), (COUNT, "dtype float64")),
    "no count": method("set_weights", at(0, NAN), (COUNT, "dtype float64")),
    "count that is too large": method("set_weights", at(0, 1e19), (COUNTED, "Received: 10000")),
    "count that is one too large": method(
        "set_weights", at(0, np.array(2**63, np.uint64)), (COUNTED, "Received: 9223372036854775808")
    ),
    "count below zero": method("set_weights", at(0, np.array(-1)), (COUNTED, "Received: -1")),
    "rate below zero": method("set_weights", at(1, -5.0), ("`learning_rate` must be", "(-5.)")),
    "no rate": method("set_weights", at(1, NAN), ("`learning_rate` must be", "nan")),
    "infinite rate": method("set_weights", at(1, INFINITY), ("`learning_rate` must be", "inf")),
    "masked": method("set_weights", at(2, np.ma.ones((3, 4))), (SLOT, "shape (3, 4)")),
    "stored count below zero": method(
        "load_own_variables", store(lambda s: s.update({"0": -2})), (COUNTED, "Received: -2")
    ),
    "stored and masked": method(
        "load_own_variables",
        store(lambda s: s.update({"2": np.ma.ones((3, 4))})),
        (SLOT, "shape (3, 4)"),
    ),
    "assigned count below zero": method(
        "assign", lambda o, w: o.variables[0], -1, ("`iteration` must be", "Received: -1")
    ),
    "subtracted from a count": method(
        "assign_sub", lambda o, w: o.variables[0], 1000, ("`iteration` must be", "-998")
    ),
    "assigned rate": method(
        "assign", lambda o, w: o.variables[1], NAN, ("`learning_rate` must be", "nan")
    ),
    "added to the rate": method(
        "assign_add", lambda o, w: o.variables[1], -5.0, ("`learning_rate` must be", "-")
    ),
    "rate of two": method("set_weights", at(1, np.ones(2)), ("'learning_rate'", "(2,)")),
    "key missing": method(
        "load_own_variables",
        store(lambda s: s.pop("3")),
        ("must have the keys '0' to '10', the state of optimizer 'adam'", "Received 10 keys"),
    ),
    "key added": method("load_own_variables", store(lambda s: s.update(x=1)), ("Received 12",)),
    "key renamed": method(
        "load_own_variables",
        store(lambda s: s.update({"12": s.pop("3")})),
        ("must have the keys '0' to '10'", "Received 11"),
    ),
    "stored shape": method(
        "load_own_variables", store(lambda s: s.update({"2": np.ones(3)})), (SLOT, "(3,)")
    ),
    "exclude": method(
        "exclude_from_weight_decay", None, ["bias"], ("before the optimizer is built",)
    ),
    "stateless, state": method(
        "stateless_apply",
        lambda o, w: state_of(o, w)[:-1],
        lambda o, w: grads(),
        values_of,
        ("`optimizer_variables` must have one value for each of the 11", "Received 10"),
    ),
    "stateless, gradients": method(
        "stateless_apply",
        state_of,
        lambda o, w: grads()[:1],
        values_of,
        ("one gradient a variable. Received 1 gradients for 3 variables",),
    ),
    "stateless, values": method(
        "stateless_apply",
        state_of,
        lambda o, w: grads(),
        lambda o, w: values_of(o, w)[:1],
        ("`trainable_variables` must have one value for each of the 3", "Received 1"),
    ),
    "stateless, state of other shapes": method(
        "stateless_apply", at(2, np.ones(3)), lambda o, w: grads(), values_of, (SLOT, "(3,)")
    ),
    "stateless, gradient of another shape": method(
        "stateless_apply", state_of, lambda o, w: [*grads()[:2], np.ones(3)], values_of, ("(3,)",)
    ),
    "stateless, values of other shapes": method(
        "stateless_apply", state_of, lambda o, w: grads(), lambda o, w: values_of(o, w)[::-1],
        ("(3, 4)",),
    ),
    "update_step, unknown": method(
        "update_step", np.ones(3), lambda o, w: np.ones(3), 0.5, ("Unknown variable", "(3,)", KNOWN)
    ),
    "update_step, shape": method(
        "update_step", np.ones(3), lambda o, w: w["bias"], 0.5, ("{bias}", "(4,)", "(3,)")
    ),
    "update_step, rate": method(
        "update_step", np.ones(4), lambda o, w: w["bias"], -0.5, ("`learning_rate` must be",)
    ),
    "finalize": method(
        "finalize_variable_values", lambda o, w: [np.ones(3)], ("Unknown variable", "(3,)", KNOWN)
    ),
    "slot of an unknown variable": method(
        "add_variable_from_reference", lambda o, w: np.ones(3), "s", ("Unknown variable", KNOWN)
    ),
    "unlike initializers": method(
        "add_optimizer_variables",
        lambda o, w: list(w.values()),
        ["a", "b"],
        ["zeros"],
        ("one initializer for all names, or one for each", "2 names, ['a', 'b'], and 1 init"),
    ),
    "initializer": method(
        "add_variable", lambda o, w: (2,), "random", ("must be 'zeros', 'ones' or a callable",)
    ),
}  # fmt: skip
FRESH = {
    "set_weights, without a rate": method(
        "set_weights", [3], ("needs ['iteration', 'learning_rate'] first", "Received 1 arrays")
    ),
    "set_weights, count": method("set_weights", [1.5, 0.1, np.ones(3)], (COUNT, "dtype float64")),
    "set_weights, rate": method("set_weights", [1, -0.5, np.ones(3)], ("`learning_rate` must be",)),
    "set_weights, text": method(
        "set_weights", [1, 0.1, "one"], ("Number 2 of the weights must hold real numbers", "<U3")
    ),
    "load_own_variables, gap": method(
        "load_own_variables",
        store(lambda s: s.update({"3": np.ones(3)})),
        ("the keys '0' to '2'", "Received 3 keys: ['0', '1', '3']"),
    ),
    "stateless_apply": method(
        "stateless_apply", state_of, lambda o, w: grads(), values_of, ("needs a built optimizer",)
    ),
    "add_variable": method(
        "add_variable", lambda o, w: (2,), ("`build`, after super().build(variables)",)
    ),
    "no expression": method(
        "exclude_from_weight_decay", None, ["a", "("], ("must hold regular expressions", "'('")
    ),
    "no text": method(
        "exclude_from_weight_decay", None, [3], ("must hold regular expressions", "Received: 3")
    ),
    "no variables": method(
        "exclude_from_weight_decay", 3, ("must be given as a list",), error=TypeError
    ),
    "finalize": method(
        "finalize_variable_values", lambda o, w: list(w.values()), ("built with 0 variables",)
    ),
}


@each("name", BUILT)
def test_method_of_a_built_optimizer(name: str) -> None:
    World("built").refuses(BUILT[name])


@each("name", FRESH)
def test_method_of_a_fresh_optimizer(name: str) -> None:
    World("fresh").refuses(FRESH[name])


def test_state_of_other_variables_is_refused_by_the_build() -> None:
    """What cannot be checked before: the number of slots, their shapes and types."""
    params = arrays()
    built = Adam()
    built.build(params)
    state = built.get_weights()
    for wrong, parts in (
        (state[:-1], "needs 8 arrays.* Received 7"),
        ([*state, state[2]], "needs 8 arrays.* Received 9"),
        ([*state[:2], *state[:1:-1]], r"'kernel_momentum' .* shape \(3, 4\) .* shape"),
        ([*state[:2], state[2].astype(np.int8), state[3].view("V8"), *state[4:]], "dtype"),
    ):
        opt = Adam()
        opt.set_weights(wrong)
        kept = copy.deepcopy(params)
        for begin in (opt.build, lambda w, opt=opt: opt.apply(grads(), w)):
            with pytest.raises(ValueError, match=f"before the build belongs to other .*{parts}"):
                begin(params)
            assert not opt.built and list(opt.named_variables()) == ["iteration", "learning_rate"]
            assert all(np.array_equal(kept[name], params[name]) for name in params)
        opt.set_weights(state)  # which takes the place of what was wrong
        opt.build(params)
        assert all(np.array_equal(a, b) for a, b in zip(state, opt.get_weights(), strict=True))


def test_there_is_no_average_before_the_first_step() -> None:
    opt, params = Adam(use_ema=True), arrays()
    opt.build(params)
    kept = copy.deepcopy(params)
    with pytest.raises(ValueError, match="no moving average before the first step"):
        opt.finalize_variable_values(list(params.values()))
    assert all(np.array_equal(kept[name], params[name]) for name in params)


def test_excluded_variables_have_no_names_before_the_optimizer_is_built() -> None:
    opt = AdamW()
    opt.exclude_from_weight_decay(var_list=[np.zeros(3)])
    for carry in (Adam.get_config, copy.deepcopy, copy.copy):
        with pytest.raises(ValueError, match=r"`var_list`.* Build the optimizer first"):
            carry(opt)


def test_base_class_has_no_rule() -> None:
    w = np.ones(3)
    opt = Optimizer(0.5)
    with pytest.raises(NotImplementedError, match="Optimizer must override `update_step"):
        opt.apply([w * 1], [w])
    assert w.tolist() == [1.0] * 3 and opt.iterations == 0


def test_build_that_does_not_build() -> None:
    class Own(Adam):
        def build(self, variables: Any) -> None:
            pass

    with pytest.raises(RuntimeError, match=r"Own.build must call super\(\).build\(variables\)"):
        Own().apply([np.ones(3)], [np.ones(3)])


def test_build_that_fails() -> None:
    class Own(Adam):
        fails = True

        def build(self, variables: Any) -> None:
            super().build(variables)
            self.extra = self.add_optimizer_variables(variables, "extra")
            if self.fails:
                raise KeyError("mine")

    def call(opt: Any, params: Arrays) -> None:
        opt.fails = True
        try:
            opt.apply_gradients(pairs(params))
        finally:
            opt.fails = False

    w = World("fresh", SETTINGS, Own)
    w.opt.fails = w.twin.fails = False
    w.refuses(Case(call, KeyError, ("mine",)))


# --- Losses --------------------------------------------------------------------------------------


def minimize(loss: Any, error: type[Exception], *parts: str, grad_loss: Any = None) -> Case:
    return Case(
        lambda opt, w: opt.minimize(loss, list(w.values()), grad_loss=grad_loss), error, parts
    )


NO_SCALAR = "`loss` must return a real scalar. Received: "
LOSSES = {
    "no callable": minimize(
        1.5, TypeError, "must be a callable with one argument a variable", "1.5 (float)"
    ),
    "vector": minimize(lambda k, b, s: b * s, ValueError, NO_SCALAR, "(4,)", "mean or sum"),
    "one element": minimize(lambda k, b, s: b[:1], ValueError, NO_SCALAR, "shape (1,)"),
    "None": minimize(lambda k, b, s: None, ValueError, NO_SCALAR + "None"),
    "text": minimize(lambda k, b, s: "loss", ValueError, NO_SCALAR + "'loss' (str)"),
    "whole": minimize(lambda k, b, s: 3, ValueError, NO_SCALAR + "3 (int)"),
    "complex": minimize(lambda k, b, s: s * 1j, ValueError, NO_SCALAR, "complex"),
    "list": minimize(lambda k, b, s: [s], ValueError, NO_SCALAR + "list"),
    "raises": minimize(lambda k, b, s: SHAPES["mine"], KeyError, "mine"),
    "of fewer variables": minimize(lambda k: 1.0, TypeError, "positional argument"),
    "grad_loss": minimize(
        lambda k, b, s: b * s,
        ValueError,
        "`grad_loss` must have the shape of the loss, (4,). Received shape (3,)",
        grad_loss=np.ones(3),
    ),
}


@pytest.mark.needs("autograd")
@each("scale", [None, 2.0])
@fresh_and_built
@each("name", LOSSES)
def test_loss(name: str, state: str, scale: float | None) -> None:
    World(state, SETTINGS | {"loss_scale_factor": scale}).refuses(LOSSES[name])


@pytest.mark.needs("autograd")
def test_minimize_on_unknown_variables() -> None:
    World("built").refuses(
        Case(
            lambda opt, w: opt.minimize(lambda v: (v * v).sum(), [w["kernel"].copy()]),
            ValueError,
            ("Unknown variable", KNOWN),
        )
    )


def test_differentiation_without_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "autograd", None)
    for state in ("fresh", "built"):
        World(state).refuses(
            minimize(lambda *w: 0.0, ModuleNotFoundError, "pip install 'omniadam[autograd]'")
        )


# --- What was meant ------------------------------------------------------------------------------


def of_torch() -> Any:
    return pytest.importorskip("torch").nn.Linear(2, 1)


def of_keras() -> Any:
    layer = pytest.importorskip("keras").layers.Dense(1)
    layer.build((None, 2))
    return layer


TORCH = "omniadam.torch.Adam(model.parameters(), lr=1e-3)."
STEPS = "opt.apply_gradients([(gradient, variable), ...])"
NO_RATE: dict[str, tuple[Callable[[], Any], str]] = {
    "torch's parameters": (lambda: of_torch().parameters(), TORCH),
    "a list of them": (lambda: [*of_torch().parameters()], TORCH),
    "with names": (lambda: [*of_torch().named_parameters()], TORCH),
    "groups": (lambda: [{"params": [*of_torch().parameters()], "lr": 0.1}], TORCH),
    "a state_dict": (lambda: of_torch().state_dict(), TORCH),
    "a module": (of_torch, TORCH),
    "a generator": (lambda: (w for w in arrays().values()), TORCH),
    "a layer of Keras": (of_keras, "omniadam.keras.Adam()."),
    "variables of Keras": (lambda: of_keras().trainable_variables, "omniadam.keras.Adam()."),
    "arrays": (lambda: [*arrays().values()], STEPS),
    "a tuple of arrays": (lambda: (*arrays().values(),), STEPS),
    "a tree of arrays": (lambda: {"layer": arrays()}, STEPS),
}


@each("name", NO_RATE)
def test_variables_for_a_learning_rate(name: str) -> None:
    make, lead = NO_RATE[name]
    for kind in (Adam, Optimizer, contrib_keras.Adam, optimizer_v2.Adam):
        with pytest.raises(TypeError, match="`learning_rate` comes first") as info:
            kind(make())
        assert lead in str(info.value)
    with pytest.raises(TypeError) as info:
        AdamW(make())
    assert ("AdamW" in str(info.value)) is (lead != STEPS)


def test_a_list_of_numbers_for_a_learning_rate() -> None:
    for rate in ([], [0.1], (), {}, [[]], {"a": 0.1}):
        with pytest.raises(ValueError, match="`learning_rate` must be a number with"):
            Adam(rate)


# Arguments of other interfaces, what they are called here, and where those interfaces are.
ELSEWHERE: dict[str, tuple[dict[str, Any], str, str]] = {
    "lr": ({"lr": 0.1}, "Its name here is `learning_rate`. ", TORCH),
    "params": ({"params": [], "lr": 0.1}, "", TORCH),
    "betas": ({"betas": (0.9, 0.999)}, "Its name here is `beta_1` and `beta_2`. ", TORCH),
    "eps": ({"eps": 1e-8}, "Its name here is `epsilon`. ", TORCH),
    "fused": ({"fused": True}, "", TORCH),
    "b1": ({"b1": 0.9}, "Its name here is `beta_1`. ", "omniadam.optax.adam(learning_rate=1e-3)."),
    "eps_root": ({"eps_root": 0.1}, "", "omniadam.optax.adam(learning_rate=1e-3)."),
}


def test_what_newcomers_give() -> None:
    """Each names what was meant."""
    torch = pytest.importorskip("torch")
    import omniadam.torch

    model = torch.nn.Linear(2, 1)
    with pytest.raises(TypeError, match=r"optimizer_v2.Adam\(learning_rate=1e-3, decay=0.01\)"):
        Adam(0.1, decay=0.01)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"dict\(named_parameters\(\)\)"):
        Adam().build(model.named_parameters())
    for wrong in (model, 1e-3):
        with pytest.raises(TypeError, match=r"model.parameters\(\) or"):
            omniadam.torch.Adam(wrong)
    with (
        pytest.raises(RuntimeError, match="use_ema=True"),
        omniadam.torch.Adam(model.parameters()).averaged(),
    ):
        pass
    before = model.weight.detach().clone()
    Adam(0.1).minimize(lambda: model(torch.ones(2)).sum(), model.parameters())  # a generator
    assert not torch.equal(before, model.weight)


@each("name", ELSEWHERE)
def test_arguments_of_other_interfaces(name: str) -> None:
    given, here, there = ELSEWHERE[name]
    for kind in (Adam, AdamW, optimizer_v2.Adam):
        if kind is optimizer_v2.Adam and "lr" in given:  # which it has
            continue
        with pytest.raises(TypeError) as info:
            kind(**given)
        start = (
            f"{kind.__name__}.__init__() got an unexpected keyword argument '{name}'. {here}For "
        )
        end = there.replace("dam(", "damW(" if "torch" in there else "damw(")
        assert str(info.value).startswith(start)
        assert str(info.value).endswith(end if kind is AdamW else there)
    assert contrib_keras.Adam(lr=0.5).lr == optimizer_v2.Adam(lr=0.5).lr == 0.5


def test_arguments_of_other_interfaces_in_the_drop_ins() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("keras")
    pytest.importorskip("optax")
    import omniadam.keras
    import omniadam.optax
    import omniadam.torch

    keras = "For Keras's interface, `import omniadam`: omniadam.Adam"
    for make, given, here, there in (
        (omniadam.torch.Adam, {"params": [], "learning_rate": 0.1}, "`lr`", keras),
        (omniadam.torch.AdamW, {"params": [], "beta_1": 0.9}, "`betas`", keras),
        (omniadam.keras.Adam, {"lr": 0.1}, "`learning_rate`", ""),
        (omniadam.keras.AdamW, {"betas": (0.9, 0.99)}, "`beta_1` and `beta_2`", ""),
        (omniadam.optax.adam, {"lr": 0.1}, "`learning_rate`", ""),
        (omniadam.optax.adamw, {"learning_rate": 0.1, "epsilon": 0.1}, "`eps`", ""),
        (omniadam.optax.scale_by_adam, {"betas": 0.1}, "`b1` and `b2`", ""),
    ):
        with pytest.raises(TypeError, match="unexpected keyword argument") as info:
            make(**given)
        assert f"Its name here is {here}. {there}".strip() in str(info.value)
        assert ("interface" in str(info.value)) == bool(there)


ATTRIBUTES = {
    **dict.fromkeys(
        ["step", "zero_grad", "param_groups", "add_param_group", "state_dict"], "torch"
    ),
    **dict.fromkeys(["init", "update"], "optax"),
}


@each("kind", [Adam, AdamW, contrib_keras.Adam, optimizer_v2.Adam])
def test_attributes_of_other_interfaces(kind: Any) -> None:
    opt = kind()
    for name, library in ATTRIBUTES.items():
        for owner in (opt, type(opt)):
            assert not hasattr(owner, name) and getattr(owner, name, None) is None
            with pytest.raises(AttributeError, match=f"no attribute '{name}'. For .*{library}"):
                getattr(owner, name)
        assert name not in dir(opt)
    with pytest.raises(AttributeError, match=r"no attribute 'stepp'$"):
        opt.stepp  # noqa: B018
    assert "get_config" in dir(opt)
    assert type(copy.deepcopy(opt)) is type(pickle.loads(pickle.dumps(opt))) is type(opt)
    assert type(copy.copy(opt)) is type(opt)


def test_attributes_of_other_interfaces_may_be_ones_own() -> None:
    class Own(Adam):
        def step(self) -> int:
            return 3

    opt = Own()
    opt.param_groups = []
    assert opt.step() == 3 and opt.param_groups == []
    assert {"step", "param_groups"} <= {*dir(opt)}


@each("name", ["torch", "keras", "optax", "nothing"])
def test_a_drop_in_that_was_not_imported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(omniadam, name, raising=False)
    hint = "" if name == "nothing" else f": it is there after `import omniadam.{name}`"
    with pytest.raises(
        AttributeError, match=f"^module 'omniadam' has no attribute '{name}'{hint}$"
    ):
        getattr(omniadam, name)
