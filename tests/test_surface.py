"""The public surface: signatures, documentation, examples, and what an import brings along."""

from __future__ import annotations

import doctest
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import omniadam
from omniadam import Adam, AdamW, IndexedSlices, Optimizer

# --- Signatures ----------------------------------------------------------------------------------

# The line of the documentation of TensorFlow's tf.keras.optimizers.Adam, to the letter.
DOCUMENTED = (
    "(learning_rate=0.001, beta_1=0.9, beta_2=0.999, epsilon=1e-07, amsgrad=False, "
    "weight_decay=None, clipnorm=None, clipvalue=None, global_clipnorm=None, use_ema=False, "
    "ema_momentum=0.99, ema_overwrite_frequency=None, loss_scale_factor=None, "
    "gradient_accumulation_steps=None, name='adam', **kwargs)"
)
METHODS = {
    "build": "(variables)",
    "apply": "(grads, trainable_variables=None)",
    "apply_gradients": "(grads_and_vars)",
    "update_step": "(gradient, variable, learning_rate)",
    "stateless_apply": "(optimizer_variables, grads, trainable_variables)",
    "minimize": "(loss, var_list, grad_loss=None)",
    "get_gradients": "(loss, params)",
    "scale_loss": "(loss)",
    "exclude_from_weight_decay": "(var_list=None, var_names=None)",
    "finalize_variable_values": "(var_list)",
    "get_config": "()",
    "from_config": "(config, custom_objects=None)",
    "get_weights": "()",
    "set_weights": "(weights)",
    "save_own_variables": "(store)",
    "load_own_variables": "(store)",
    "add_variable": (
        "(shape, initializer='zeros', dtype=None, aggregation='none', layout=None, name=None)"
    ),
    "add_variable_from_reference": "(reference_variable, name=None, initializer='zeros')",
    "add_optimizer_variables": "(trainable_variables, name, initializer='zeros')",
    "assign": "(variable, value)",
    "assign_add": "(variable, value)",
    "assign_sub": "(variable, value)",
}
BEYOND_KERAS = {"minimize", "get_gradients", "get_weights"}  # of the older generations
PROPERTIES = ("iterations", "learning_rate", "variables", "weights")
SETTINGS = tuple(inspect.signature(Adam).parameters)


def spelled(function: Callable[..., Any]) -> str:
    """A signature without its annotations and without self."""
    signature = inspect.signature(function)
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    bare = [p for p in bare if p.name != "self"]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))


def test_adam_is_what_the_documentation_shows() -> None:
    assert spelled(Adam) == DOCUMENTED.replace("**kwargs", "*, epsilon_hat=True")


@pytest.mark.needs("keras")
@pytest.mark.parametrize("ours", [Adam, AdamW, Optimizer])
def test_constructors_are_those_of_keras(ours: type) -> None:
    import keras

    theirs = inspect.signature(getattr(keras.optimizers, ours.__name__)).parameters
    want = {name: p for name, p in theirs.items() if name != "kwargs"}
    got = dict(inspect.signature(ours).parameters)
    if ours is not Optimizer:
        assert is_ours(got.popitem())
    assert list(got) == list(want)
    for name in want.keys() - {"name"}:  # "adam" as documented; Keras counts: adam, adam_1, ...
        assert (got[name].kind, got[name].default) == (want[name].kind, want[name].default), name


def is_ours(parameter: tuple[str, inspect.Parameter]) -> bool:
    """What Keras has not: the last one, by its name only, and by default what Keras does."""
    name, of = parameter
    return (name, of.kind, of.default) == ("epsilon_hat", inspect.Parameter.KEYWORD_ONLY, True)


@pytest.mark.needs("keras")
@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
def test_constructors_of_the_drop_in_are_those_of_keras(kind: str) -> None:
    import keras

    import omniadam.keras

    got, want = (
        {name: (p.kind, p.default) for name, p in inspect.signature(each).parameters.items()}
        for each in (getattr(omniadam.keras, kind), getattr(keras.optimizers, kind))
    )
    assert got.pop("epsilon_hat") == (inspect.Parameter.KEYWORD_ONLY, True)
    got["name"] = want["name"]  # None; in older versions of Keras what it makes of that
    assert list(got.items()) == list(want.items())


@pytest.mark.parametrize("name", METHODS)
def test_method(name: str) -> None:
    assert spelled(getattr(Adam, name)) == METHODS[name]


@pytest.mark.needs("keras")
@pytest.mark.parametrize("name", [name for name in METHODS if name not in BEYOND_KERAS])
def test_method_of_keras(name: str) -> None:
    import keras

    assert spelled(getattr(keras.optimizers.Optimizer, name)) == METHODS[name]


def test_attributes() -> None:
    opt = Adam()
    assert (opt.built, opt.name) == (False, "adam")
    for name in PROPERTIES:
        assert isinstance(inspect.getattr_static(Adam, name), property)
    assert AdamW().name == "adamw"
    assert Optimizer(0.1).name == "optimizer"
    for name in SETTINGS:
        assert hasattr(opt, name), name


def test_names_of_the_package() -> None:
    assert sorted(omniadam.__all__) == PUBLIC["omniadam"]
    assert issubclass(AdamW, Adam) and issubclass(Adam, Optimizer)
    assert (Path(omniadam.__file__).parent / "py.typed").exists()
    assert re.fullmatch(r"\d+\.\d+\.\d+", omniadam.__version__)


PUBLIC = {
    "omniadam": [
        "Adam",
        "AdamW",
        "IndexedSlices",
        "Optimizer",
        "Table",
        "from_file",
        "info",
        "load",
        "migrate",
        "save",
        "schedules",
        "state_hash",
    ],
    "omniadam.compat": ["contrib_keras", "optimizer_v2"],
    "omniadam.compat.contrib_keras": ["Adam"],
    "omniadam.compat.optimizer_v2": ["Adam", "VariableAggregation", "VariableSynchronization"],
    "omniadam.keras": ["Adam", "AdamW"],
    "omniadam.optax": ["adam", "adamw", "scale_by_adam", "step"],
    "omniadam.schedules": [
        "CosineDecay",
        "CosineDecayRestarts",
        "ExponentialDecay",
        "InverseTimeDecay",
        "LearningRate",
        "LearningRateSchedule",
        "PiecewiseConstantDecay",
        "PolynomialDecay",
        "deserialize",
        "serialize",
    ],
    "omniadam.torch": ["Adam", "AdamW", "Embedding", "EmbeddingBag", "defer"],
}


@pytest.mark.needs("keras", "optax", "torch")
@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_module_shows_nothing_else(name: str) -> None:
    module = import_module(name)
    assert sorted(module.__all__) == PUBLIC[name]
    assert sorted({*dir(module)} - {"__version__"}) == PUBLIC[name]
    assert all(hasattr(module, each) for each in dir(module))


# --- Methods that no other file tests ------------------------------------------------------------


def loss(w: Any, b: Any) -> Any:
    """Its gradients are 2 w b and the sum of w * w."""
    return (w * w).sum() * b


def variables() -> list[Any]:
    return [np.array([1.0, -2.0]), np.array(3.0)]


@pytest.mark.needs("autograd")
@pytest.mark.parametrize("settings", [{}, {"clipvalue": 2.5}, {"loss_scale_factor": 64.0}])
def test_minimize_applies_the_gradients_of_the_loss(settings: dict[str, Any]) -> None:
    want, by_minimize, by_hand = [[6.0, -12.0], 5.0], variables(), variables()
    one, two = Adam(0.5, **settings), Adam(0.5, **settings)
    assert [g.tolist() for g in one.get_gradients(loss, by_minimize)] == want
    assert not one.built
    for call, var_list in enumerate([by_minimize, lambda: by_minimize, tuple(by_minimize)]):
        assert one.minimize(loss, var_list) == call + 1
        grads = two.get_gradients(loss, by_hand)
        two.apply([two.scale_loss(g) for g in grads], by_hand)
    assert [w.tolist() for w in by_minimize] == [w.tolist() for w in by_hand]
    assert [w.tolist() for w in one.variables] == [w.tolist() for w in two.variables]


NAMES = ["iteration", "learning_rate", "layer_w_momentum", "layer_w_velocity"]


@pytest.mark.needs("autograd")
def test_variables_with_names_keep_them() -> None:
    def named() -> dict[str, Any]:
        return dict(zip(("layer/w", "layer/b"), variables(), strict=True))

    held, same, again, unnamed = named(), named(), named(), variables()
    one, two, three, plain = Adam(0.5), Adam(0.5), Adam(0.5), Adam(0.5)
    one.exclude_from_weight_decay(var_names=["b$"])
    for _ in range(2):
        one.minimize(loss, held)
        two.minimize(loss, lambda: same)
        three.apply(three.get_gradients(loss, again), again)
        plain.minimize(loss, unnamed)
    for opt, params in ((one, held), (two, same), (three, again)):
        assert [*opt.named_variables()][:4] == NAMES
        assert [w.tolist() for w in params.values()] == [w.tolist() for w in unnamed]
    assert [entry.decayed for entry in one._state.entries] == [True, False]
    one.minimize(lambda w: w.sum(), {"another name": held["layer/w"]})  # of one that it knows
    assert one.iterations == 3 and [*one.named_variables()][:4] == NAMES


@pytest.mark.needs("autograd")
def test_a_step_that_fails_leaves_no_names() -> None:
    w, opt = np.ones(2), Adam(0.5)
    bad = np.ones(3)
    with pytest.raises(TypeError, match="Names of variables must be"):
        opt.minimize(lambda w: 1 / 0, {3: w})
    with pytest.raises(ZeroDivisionError):
        opt.minimize(lambda w: 1 / 0, {"w": w})
    with pytest.raises(ValueError, match="gradient of variable 'w'"):
        opt.apply([bad], {"w": w})
    with pytest.raises(ValueError, match="one gradient a variable"):
        opt.apply([bad, bad], {"w": w})
    assert not opt.built and w.tolist() == [1.0, 1.0]
    opt.apply([w], [w])
    assert "variable_momentum" in opt.named_variables()


def test_state_of_variables_with_names() -> None:
    class Own(Optimizer):
        def build(self, variables: Any) -> None:
            super().build(variables)
            self.add_optimizer_variables(variables, "sum")

    opt = Own(0.1)
    opt.build({"w": np.ones(2)})
    assert [*opt.named_variables()] == ["iteration", "learning_rate", "w_sum"]


@pytest.mark.needs("autograd")
def test_minimize_with_grad_loss_and_a_single_variable() -> None:
    one, two = np.array([1.0, -2.0]), np.array([1.0, -2.0])
    Adam(0.5).minimize(lambda w: w * w, one, grad_loss=np.array([0.5, 0.0]))
    Adam(0.5).apply([np.array([1.0, 0.0])], [two])
    assert one.tolist() == two.tolist()


@pytest.mark.needs("autograd")
def test_a_variable_that_the_loss_does_not_use_has_gradient_zero() -> None:
    used, unused = np.ones(2), np.ones(3)
    Adam(0.5).minimize(lambda a, b: a.sum(), [used, unused])
    assert used[0] != 1 and unused.tolist() == [1.0] * 3


def test_scale_loss() -> None:
    assert Adam().scale_loss(3.0) == 3.0
    assert Adam(loss_scale_factor=4.0).scale_loss(3.0) == 12.0


def test_finalize_variable_values() -> None:
    opt, (w, b) = Adam(0.5, use_ema=True, ema_momentum=0.5), variables()
    for g in (1.0, -3.0):
        opt.apply([np.full(2, g), np.array(g)], [w, b])
    average, _ = (v.copy() for k, v in opt.named_variables().items() if k.endswith("_average"))
    kept = b.copy()
    assert w.tolist() != average.tolist()
    opt.finalize_variable_values([w])
    assert (w.tolist(), b) == (average.tolist(), kept)
    without, (w, b) = Adam(), variables()
    without.finalize_variable_values([w, np.ones(1)])
    assert [w.tolist(), b] == [v.tolist() for v in variables()]


def test_assign() -> None:
    opt, (w, b) = Adam(), variables()
    opt.build([w, b])
    state = opt.named_variables()["variable_momentum"]
    for variable in (w, state):
        opt.assign(variable, np.array([4.0, 5.0]))
        opt.assign_add(variable, np.array([2.0, 0.0]))
        opt.assign_sub(variable, np.array([0.0, 1.0]))
        assert variable.tolist() == [6.0, 4.0]
    opt.assign(opt.variables[0], 7)
    assert opt.iterations == 7


# --- Documentation -------------------------------------------------------------------------------


def section(documentation: str, title: str) -> str:
    """The indented lines under `Title:`."""
    found = re.search(rf"^ *{title}:\n((?: *\n|  +.*(?:\n|$))+)", documentation, re.M)
    return found[1] if found else ""


def described(documentation: str) -> set[str]:
    """The names before the colons of the section Args; several may share a description."""
    names = re.findall(r"^ *((?:\w+,\s+)*\w+):", section(documentation, "Args"), re.M)
    return {name for each in names for name in re.split(r",\s+", each)}


@pytest.mark.parametrize("name", [*METHODS, *PROPERTIES])
def test_is_documented(name: str) -> None:
    member = inspect.getattr_static(Adam, name)
    function = getattr(member, "__func__", None) or getattr(member, "fget", None) or member
    documentation = inspect.getdoc(function) or ""
    signature = inspect.signature(function)
    arguments = [p for p in signature.parameters if p not in ("self", "cls")]
    assert re.match(r"[A-Z].*\.", documentation, re.S)
    assert set(arguments) <= described(documentation)
    if name in METHODS and signature.return_annotation not in (None, "None"):
        assert section(documentation, "Returns")


@pytest.mark.parametrize("kind", [Adam, Optimizer, IndexedSlices])
def test_class_is_documented(kind: type) -> None:
    assert set(inspect.signature(kind).parameters) <= described(inspect.getdoc(kind) or "")


def modules() -> list[str]:
    found = pkgutil.walk_packages(omniadam.__path__, "omniadam.", onerror=lambda name: None)
    return ["omniadam", *(m.name for m in found)]


@pytest.mark.parametrize("name", modules())
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where examples save what they save
    try:
        module = import_module(name)
    except ModuleNotFoundError as missing:
        assert not (missing.name or "omniadam").startswith("omniadam")
        pytest.skip(f"{missing.name} is not installed")
    failed, attempted = doctest.testmod(module)
    assert failed == 0
    if name in ("omniadam.adam", "omniadam.optimizer", "omniadam.sparse", "omniadam.schedules"):
        assert attempted > 0


# --- What is imported ----------------------------------------------------------------------------

FOREIGN = ("autograd", "jax", "keras", "scipy", "sklearn", "tensorflow", "tf_keras", "torch")
COMPILERS = ("numba", "llvmlite")
STEP = """
import numpy as np
from omniadam import Adam, AdamW, IndexedSlices, schedules
w, table = np.ones(3, np.float32), np.ones((4, 2), np.float32)
opt = Adam(schedules.CosineDecay(0.1, 10))
rows = IndexedSlices([[1.0, 2.0]], [1], (4, 2))
opt.apply_gradients([(np.ones(3, np.float32), w), (rows, table)])
assert w[0] != 1 and table[1, 0] != 1
opt.get_config(), opt.get_weights()
"""


def imported(code: str, *names: str, **environment: str) -> set[str]:
    """Which of these top-level packages a new process has after running the code."""
    report = "import sys; print(*{m.partition('.')[0] for m in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{code}\n{report}"],
        env=os.environ
        | {"PYTHONPATH": str(Path(omniadam.__file__).parents[1]), "OMNIADAM_KERNEL": ""}
        | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return set(names) & set(done.stdout.split())


def test_importing_imports_no_library() -> None:
    assert not imported("import omniadam", *FOREIGN, *COMPILERS)


def test_a_step_on_numpy_imports_no_compiler_and_no_library() -> None:
    assert not imported(STEP, *FOREIGN, *COMPILERS, OMNIADAM_KERNEL="numpy")


def test_a_warm_first_step_imports_no_compiler_and_no_library(tmp_path: Path) -> None:
    cache = {"OMNIADAM_CACHE_DIR": str(tmp_path)}
    assert imported(STEP, *FOREIGN, *COMPILERS, **cache) >= {"numba", "llvmlite"}
    assert imported(STEP, *FOREIGN, *COMPILERS, **cache) == {"llvmlite"}


@pytest.mark.needs("autograd")
def test_that_the_tests_above_can_fail() -> None:
    assert imported(f"import autograd{STEP}", *FOREIGN, OMNIADAM_KERNEL="numpy") == {"autograd"}


def test_a_step_of_nothing() -> None:
    """Without variables nothing happens, and what is built then is built on others."""
    opt, w = Adam(0.1), np.ones(2)
    for nothing in ([], {}, (), iter(())):
        opt.build(nothing)
    opt.apply([], [])
    state = opt.variables
    variables, same = opt.stateless_apply(state, [], [])
    assert variables == [] and all(a is b for a, b in zip(same, state, strict=True))
    assert not opt.built and opt.iterations == 0
    opt.build(iter([w]))
    assert opt.stateless_apply(opt.variables, [], [])[0] == []
    assert opt.apply_gradients([(np.ones(2), w)]) == 1
    np.testing.assert_allclose(w, 0.9, rtol=1e-6)
