"""The CPU kernels and the cache of their machine code: each trap of the architecture by name."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import tracemalloc
import warnings
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import omniadam
from cases import (
    BEYOND_KERAS,
    CASES,
    PART,
    WHOLE,
    Case,
    assert_close,
    gradients,
    variables,
    with_missing,
)
from omniadam import Adam, IndexedSlices, Optimizer
from omniadam.adam import ADAM, AMSGRAD
from omniadam.backends.base import FLOATS
from omniadam.fast import ndarrays
from omniadam.fast.ndarrays import Inspector
from omniadam.kernels import cpu, jit, layout
from omniadam.kernels.cpu import Sweep
from omniadam.rule import NOTHING, Pass, Rule
from omniadam.tuned import CHUNK
from reference import Array, Reference

# Several chunks of the kernels, the last one no multiple of a vector's width.
LONG = (3 * CHUNK + 1237,)
SHAPES = ((), (7,), (3, 5), (0, 3), LONG)
FULL: dict[str, Any] = {"amsgrad": True, "weight_decay": 0.5, "global_clipnorm": 2.0}
FULL |= {"use_ema": True, "ema_overwrite_frequency": 2, "loss_scale_factor": 300.0}
STEP = Pass(gradient=True, updates=True)
FLAGS = [name for name in Pass._fields if name not in ("measured", "measures_only")]
EVERYTHING = Pass(*[True] * len(FLAGS))
NORM = STEP._replace(measured=("gradient",), measures_only=True)


def fresh(code: str, **environment: str) -> str:
    """What a new interpreter prints."""
    path = os.pathsep.join([str(Path(omniadam.__file__).parents[1]), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


cached_gradients = cache(gradients)


def train(settings: dict[str, Any], dtype: str = "float32", steps: int = 3) -> list[Array]:
    """Variables and state after some steps."""
    params = variables(dtype, shapes=SHAPES)
    opt = Adam(**settings)
    for step in range(steps):
        opt.apply_gradients(zip(cached_gradients(step, SHAPES, dtype=dtype), params, strict=True))
    return [*params, *opt.variables]


def digest(arrays: Sequence[Array]) -> str:
    return hashlib.sha256(b"".join(each.tobytes() for each in arrays)).hexdigest()


# --- No specialisation is mistaken for another --------------------------------------------


def make_momentum(functions: Any, *, nesterov: bool) -> Any:
    """A second rule: another number of slots, and a setting of its own."""

    def momentum(w: Any, g: Any, slots: Any, c: Any) -> Any:
        rate, decay = c
        trace = decay * slots[0] + g
        return w - rate * (g + decay * trace if nesterov else trace), (trace,)

    return momentum


def make_descent(functions: Any) -> Any:
    return lambda w, g, slots, c: (w - c[0] * g, ())


MOMENTUM, NESTEROV = (
    Rule(make_momentum, ("trace",), ("rate", "decay"), (("nesterov", nesterov),))
    for nesterov in (False, True)
)
DESCENT = Rule(make_descent, (), ("rate",))


class Custom(Optimizer):
    """An optimizer that is nothing but its rule."""

    rule: Any = None

    def __init__(self, rule: Rule, **settings: Any) -> None:
        super().__init__(0.25, **settings)
        self.rule = rule

    def coefficients(
        self, functions: Any, learning_rate: Any, t: Any, *numbers: Any
    ) -> Sequence[Any]:
        return (learning_rate, 0.5)[: len(self.rule.coefficients)]


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The cache keys of the kernels that are asked for, none of which is compiled."""
    asked: list[str] = []

    def read(key: str) -> bytes:
        asked.append(key)
        return b""

    monkeypatch.setattr(jit, "_read", read)
    monkeypatch.setattr(jit, "_load", lambda code, prototype: None)
    return asked


def ask_for_pass(
    kind: Pass = STEP, rule: Rule = ADAM, dtype: str = "float32", gradient: str = "float32"
) -> Any:
    return cpu._kernel.__wrapped__(kind, rule, dtype, gradient)


def ask_for_norm(kind: Pass = NORM, dtype: str = "float32", gradient: str = "float32") -> Any:
    return ask_for_pass(kind, NOTHING, dtype, gradient)


def test_every_specialisation_has_its_own_key(keys: list[str]) -> None:
    toggled = [STEP._replace(**{f: not getattr(STEP, f)}) for f in FLAGS]
    toggled += [NORM, STEP._replace(measured=("change",)), STEP._replace(measured=("gradient",))]
    rules = [ADAM, AMSGRAD, MOMENTUM, NESTEROV, DESCENT, ADAM._replace(slots=("a", "b"))]
    for kind, dtype, gradient in product([STEP, *toggled, EVERYTHING], FLOATS, FLOATS):
        for rule in rules:
            ask_for_pass(kind, rule, dtype, gradient)
    ndarrays._kernel.__wrapped__()
    assert len(set(keys)) == len(keys) > 1000
    ask_for_pass()
    assert keys[-1] == keys[0]


@pytest.mark.parametrize("module", [jit.__name__, cpu.__name__, "omniadam.rule", __name__])
def test_an_edited_source_has_another_key(
    module: str, keys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = jit.source_of
    ask_for_pass(rule=MOMENTUM)
    monkeypatch.setattr(jit, "source_of", lambda name: text(name) + "#" * (name == module))
    environment = jit._environment.__wrapped__()  # which the process caches
    monkeypatch.setattr(jit, "_environment", lambda: environment)
    ask_for_pass(rule=MOMENTUM)
    assert keys[0] != keys[1]


def test_another_compiler_or_processor_has_another_key(
    keys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = jit._environment()
    llvm = pytest.importorskip("llvmlite.binding")
    assert {jit.version("numba"), jit.version("llvmlite"), llvm.get_host_cpu_name()} <= {*real}
    for changed in ((*real[:i], "other", *real[i + 1 :]) for i in range(-1, len(real))):
        monkeypatch.setattr(jit, "_environment", lambda changed=changed: changed)
        ask_for_pass()
    assert len(set(keys)) == len(real) + 1


def test_kernels_are_shared_across_processes(tmp_path: Path) -> None:
    """The second process takes both kernels from the disk, in the other order."""
    code = """
        import json, sys
        from test_kernels import digest, train
        settings = {settings}
        digests = [digest(train({{"amsgrad": each}})) for each in settings]
        print(json.dumps(["numba" in sys.modules, *digests]))
    """
    runs = [
        json.loads(fresh(code.format(settings=each), OMNIADAM_CACHE_DIR=str(tmp_path / "cache")))
        for each in ([False, True], [True, False])
    ]
    here = [digest(train({"amsgrad": each})) for each in (False, True)]
    assert here[0] != here[1]
    assert runs == [[True, *here], [False, *here[::-1]]]


@pytest.mark.parametrize(
    ("rule", "settings"),
    [
        (DESCENT, {}),
        (MOMENTUM, {}),
        (NESTEROV, {}),
        (NESTEROV, {"clipvalue": 2.0, "weight_decay": 0.5, "use_ema": True, "ema_momentum": 0.5}),
    ],
)
def test_a_second_rule(rule: Rule, settings: dict[str, Any], kernel: str) -> None:
    rng = np.random.default_rng(0)
    w = rng.integers(-8, 8, (5, 13)).astype(np.float32)  # small enough for exact arithmetic
    want: Array = w.astype(float)
    trace: Any = 0.0
    average: Array | None = None
    opt = Custom(rule, **settings)
    for _ in range(3):
        g = rng.integers(-4, 4, w.shape).astype(np.float32)
        opt.apply_gradients([(g, w)])
        if settings:
            g = np.clip(g, -2, 2)
            want -= want * 0.5 * 0.25
        trace = 0.5 * trace + g if rule.slots else g
        want -= 0.25 * (g + 0.5 * trace if rule is NESTEROV else trace)
        average = want.copy() if average is None else (average + want) / 2
    np.testing.assert_array_equal(w, want)
    state = opt.named_variables()
    if rule.slots:
        np.testing.assert_array_equal(state["variable_trace"], trace)
    if settings:
        np.testing.assert_array_equal(state["variable_average"], average)


def test_a_rule_that_captures_something_is_refused() -> None:
    """Its name, its source and its settings would not tell it from another."""

    def rule_of(power: int) -> Rule:
        return Rule(lambda functions: lambda w, g, slots, c: (w - g**power, ()), (), ())

    w = np.ones(3, np.float32)
    with pytest.raises(ValueError, match="top level of a module"):
        Custom(rule_of(2)).apply_gradients([(w.copy(), w)])
    assert w.tolist() == [1, 1, 1]


def test_a_rule_without_source_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("typed_in")
    exec("def make(functions):\n return lambda w, g, slots, c: (w, ())", module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with pytest.raises(ValueError, match="'typed_in', which has none"):
        ask_for_pass(rule=Rule(module.make, (), ()))


# --- The cache of machine code --------------------------------------------------------------------


def load() -> int:
    """A kernel smaller than any of ours, from the cache or the compiler."""
    result = array("q", [0])
    kernel = jit.compiled(lambda: lambda job: job + 1, "small", (), frozenset())
    assert kernel(result.buffer_info()[0], 0, 41) == 0
    return result[0]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OMNIADAM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One element a compilation."""
    count: list[None] = []
    compile_ = jit._compile

    def counted(*args: Any) -> bytes:
        count.append(None)
        return compile_(*args)

    monkeypatch.setattr(jit, "_compile", counted)
    return count


def test_cache_is_read_back(folder: Path, compilations: list[None]) -> None:
    assert [load(), load(), len(compilations)] == [42, 42, 1]
    (file,) = folder.iterdir()
    assert os.name != "posix" or (folder.stat().st_mode & 0o777, file.stat().st_mode & 0o077) == (
        0o700,
        0,
    )


def fail(*args: Any, **kwargs: Any) -> Any:
    raise PermissionError("read-only")


@pytest.mark.parametrize(
    ("module", "function"),
    [(Path, "mkdir"), (tempfile, "mkstemp"), (os, "fdopen"), (os, "replace"), (None, "")],
)
def test_cache_that_cannot_be_written(
    module: Any,
    function: str,
    folder: Path,
    compilations: list[None],
    slow_reasons: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also as root, whom permissions do not stop. It is said once, with what helps."""
    with monkeypatch.context() as patch:
        if module is None:
            folder.write_text("a file")
            patch.setenv("OMNIADAM_CACHE_DIR", str(folder / "below"))
        else:
            patch.setattr(module, function, fail)
        with pytest.warns(RuntimeWarning, match="cannot be kept in .*OMNIADAM_CACHE_DIR") as said:
            assert [load(), load(), len(compilations)] == [42, 42, 2]
        assert len(said) == len(slow_reasons) == 1 and str(folder) in slow_reasons[0]
        assert not jit.kept()[1] or function in ("mkstemp", "fdopen", "replace")
    assert not folder.is_dir() or not list(folder.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="has its own folder")
def test_cache_of_a_read_only_home(
    tmp_path: Path, compilations: list[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").write_text("no folder can be made below a file")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("OMNIADAM_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert [load(), load(), len(compilations)] == [42, 42, 1]
    assert len(list((tmp_path / f"omniadam-{os.getuid()}").iterdir())) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:30],
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: b"0" * 64 + content[64:],
        lambda content: content[65:],
    ],
)
def test_cache_that_is_damaged(
    damage: Callable[[bytes], bytes], folder: Path, compilations: list[None]
) -> None:
    load()
    (file,) = folder.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert [load(), load(), len(compilations)] == [42, 42, 2]
    assert list(folder.iterdir()) == [file]


@pytest.mark.skipif(sys.platform == "win32", reason="has no such permissions")
@pytest.mark.parametrize("whose", [0o770, 0o707, 0o722, "another user's"])
def test_cache_that_others_may_write_to(
    whose: Any,
    folder: Path,
    compilations: list[None],
    slow_reasons: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What lies there would be executed."""
    load()
    (file,) = folder.iterdir()
    content = file.read_bytes()
    file.write_bytes(content + b"\n")
    if isinstance(whose, int):
        folder.chmod(whose)
    else:
        file.write_bytes(content)
        monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)
    before = file.read_bytes()
    with pytest.warns(RuntimeWarning, match="cannot be kept"):
        assert [load(), load(), len(compilations)] == [42, 42, 3]
    assert jit.kept() == (folder, False)
    assert [*folder.iterdir()] == [file] and file.read_bytes() == before


def test_cache_written_by_two_processes_at_once(folder: Path, compilations: list[None]) -> None:
    code = "from test_kernels import load\nassert load() == 42"
    writers = [threading.Thread(target=fresh, args=[code]) for _ in range(2)]
    for each in writers:
        each.start()
    for each in writers:
        each.join()
    assert len(list(folder.iterdir())) == 1
    assert load() == 42 and not compilations


def test_cache_read_while_it_is_written(folder: Path) -> None:
    code, seen = bytes(1_000_000), []
    jit._write("key", code)
    writer = threading.Thread(target=lambda: [jit._write("key", code) for _ in range(100)])
    writer.start()
    while writer.is_alive():
        seen.append(jit._read("key") == code)
    assert all(seen)
    assert [each.name for each in folder.iterdir()] == ["key"]


# --- What the compiler made of it ---------------------------------------------------------


@pytest.fixture
def llvm_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], str]:
    """The optimised LLVM text of the kernel that is asked for, from which code is emitted."""
    numba = pytest.importorskip("numba")
    made: list[Any] = []
    cfunc = numba.cfunc

    def kept(*args: Any, **kwargs: Any) -> Any:
        decorate = cfunc(*args, **kwargs)

        def keep(function: Any) -> Any:
            made.append(decorate(function))
            return made[-1]

        return keep

    monkeypatch.setattr(numba, "cfunc", kept)
    monkeypatch.setattr(jit, "_read", lambda key: None)
    monkeypatch.setattr(jit, "_write", lambda key, code: None)

    def text(ask: Callable[[], Any]) -> str:
        ask()
        return str(made.pop().inspect_llvm())

    return text


DOUBLE = r"= f(add|sub|mul|div|neg|cmp)\b.*\bdouble\b"
VECTOR = r"= f(add|sub|mul|div) .*<\d+ x {}>"


@pytest.mark.parametrize(("kind", "rule"), [(STEP, ADAM), (EVERYTHING, AMSGRAD)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_no_double_arithmetic_on_float32(
    kind: Pass, rule: Rule, dtype: str, llvm_of: Callable[..., str]
) -> None:
    text = llvm_of(lambda: ask_for_pass(kind, rule, dtype, dtype))
    assert not re.findall(r"= fpext .* to (?:<\d+ x )?double", text)
    assert not re.findall(DOUBLE, text)
    assert not re.findall(r"<\d+ x double>", text)
    assert re.findall(VECTOR.format("float"), text), "not vectorised"
    assert re.findall(r"<\d+ x float> @llvm\.sqrt", text), "not vectorised"


def test_double_arithmetic_on_float64_is_found_and_vectorised(
    llvm_of: Callable[..., str],
) -> None:
    text = llvm_of(lambda: ask_for_pass(STEP, ADAM, "float64", "float64"))
    assert re.findall(DOUBLE, text) and re.findall(VECTOR.format("double"), text)


def test_norms_are_vectorised_in_double(llvm_of: Callable[..., str]) -> None:
    text = llvm_of(lambda: ask_for_norm())
    assert re.findall(VECTOR.format("double"), text)


@pytest.mark.parametrize(
    "ask",
    [
        lambda: ask_for_pass(EVERYTHING, AMSGRAD),
        lambda: ask_for_norm(),
    ],
)
def test_no_flag_but_to_reorder_a_sum(ask: Callable[[], Any], llvm_of: Callable[..., str]) -> None:
    flags = {
        flag for line in re.findall(r"= f\w+ ([a-z ]+)", llvm_of(ask)) for flag in line.split()
    }
    # Beside flags, what the operation is of, and how numbers are compared.
    assert flags <= {"reassoc", "float", "double", "ogt", "olt", "oeq", "une", "uno"}


# --- The same bits, wherever the rule is compiled -------------------------------------------------


def same_bits(table: dict[str, Case]) -> list[Case]:
    """All but those with a norm, which is added up in another order."""
    norms = {"clipnorm", "global_clipnorm"}
    return [case for case in table.values() if not norms & case.settings.keys()]


# All passes that `Adam` makes, in one type; of the others a few.
SAME_BITS = {dtype: same_bits(WHOLE | {"defaults": CASES["defaults"]}) for dtype in FLOATS}
SAME_BITS["float32"] = same_bits(PART | BEYOND_KERAS)


@pytest.mark.parametrize("dtype", FLOATS)
def test_numba_and_numpy_give_the_same_bits(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(kernel: str, case: Case) -> list[Array]:
        monkeypatch.setenv("OMNIADAM_KERNEL", kernel)
        params = variables(dtype)
        opt = Adam(**case.settings_for(omniadam.schedules))
        opt.exclude_from_weight_decay([params[i] for i in case.excluded])
        opt.build(params)
        for step in range(4):
            grads = with_missing(step, gradients(step, dtype=dtype))
            with warnings.catch_warnings(action="ignore"):
                opt.apply_gradients(zip(grads, params, strict=True))
        return [*params, *opt.variables]

    for case in SAME_BITS[dtype]:
        for compiled, plain in zip(trained("numba", case), trained("numpy", case), strict=True):
            assert compiled.tobytes() == plain.tobytes(), case


# --- NaN and infinity -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"amsgrad": True},
        {"clipnorm": 1.5},
        {"global_clipnorm": 1.5},
        {"clipvalue": 0.5},
        {"gradient_accumulation_steps": 2},
        FULL,
        {"amsgrad": True, "clipvalue": 0.5, "use_ema": True},
    ],
    ids=lambda settings: "+".join(settings) or "plain",
)
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_traps_3_and_4_nan_and_infinity(
    special: float, settings: dict[str, Any], kernel: str
) -> None:
    """In the first call, at places in the vectors and in what is left; then three finite calls."""
    shapes = ((), (3,), (67,), (5, 4))
    params = variables(shapes=shapes)
    opt, reference = Adam(**settings), Reference(params, **settings)
    for step in range(4):
        grads = gradients(step, shapes)
        if step == 0:
            grads[0][...] = grads[1][1] = grads[2][::9] = special
        opt.apply_gradients(zip(grads, params, strict=True))
        reference.step(grads)
    assert_close(params, reference)
    state = opt.named_variables()
    names = ["variable", *(f"variable_{i}" for i in range(1, len(params)))]
    for slot in set(reference.state) - {"variable"}:
        assert_close([state[f"{name}_{slot}"] for name in names], reference, slot)


# --- Threads --------------------------------------------------------------------------------------


@pytest.fixture
def parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small the work, helpers share it."""
    monkeypatch.setattr(cpu, "PARALLEL", 1)
    monkeypatch.setenv("OMNIADAM_NUM_THREADS", "3")


BUSY = "import time\nend = time.time() + 60\nwhile time.time() < end: pass"


@pytest.fixture
def busy() -> Iterator[None]:
    """Every core has something else to do."""
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(os.cpu_count() or 1)]
    yield
    for each in others:
        each.kill()
        each.wait()


NORMS = [FULL, {"clipnorm": 0.5, "gradient_accumulation_steps": 2}]


@pytest.mark.parametrize("settings", NORMS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_threads_change_no_bit(
    dtype: str,
    settings: dict[str, Any],
    busy: None,
    parallel: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = set()
    for threads in (1, 2, 3, 7) * 3:
        monkeypatch.setenv("OMNIADAM_NUM_THREADS", str(threads))
        seen.add(digest(train(settings, dtype)))
    assert len(seen) == 1


def test_blas_threads_change_no_bit() -> None:
    """The fallback's norms, which np.dot would round as it divides the work."""
    code = "from test_kernels import *; print(digest(train({'clipnorm': 0.5}, 'float64')))"
    names = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
    runs = [
        fresh(code, OMNIADAM_KERNEL="numpy", **dict.fromkeys(names, count)) for count in ("1", "2")
    ]
    assert runs[0] == runs[1]


def test_step_while_a_thread_hogs_the_interpreter(parallel: None) -> None:
    want, stop = digest(train(FULL)), threading.Event()

    def hog() -> None:
        while not stop.is_set():
            pass

    thread = threading.Thread(target=hog, daemon=True)
    thread.start()
    try:
        assert [digest(train(FULL)) for _ in range(3)] == [want] * 3
    finally:
        stop.set()
        thread.join()


def test_two_optimizers_in_two_threads(parallel: None) -> None:
    table = [FULL, {"clipnorm": 0.5}, {}, {"amsgrad": True}]
    want = [digest(train(settings)) for settings in table]
    got: list[set[str]] = [set() for _ in table]

    def work(i: int) -> None:
        for _ in range(5):
            got[i].add(digest(train(table[i])))

    threads = [threading.Thread(target=work, args=[i]) for i in range(len(table))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [{each} for each in want]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork_after_helpers_exist(parallel: None) -> None:
    code = """
        import os, threading, time
        from omniadam.kernels import cpu
        from test_kernels import FULL, digest, train
        cpu.PARALLEL = 1
        want = digest(train(FULL))
        assert threading.active_count() == 3
        child = os.fork()
        if not child:
            same = digest(train(FULL)) == want
            os._exit(0 if same and threading.active_count() == 3 else 1)
        for _ in range(600):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
            time.sleep(0.1)
        else:
            os.kill(child, 9)
        assert digest(train(FULL)) == want
        print(ended == child and status == 0)
    """
    assert fresh(code, OMNIADAM_NUM_THREADS="3") == "True\n"


@pytest.mark.parametrize(
    ("size", "threads", "wakes"),
    [(cpu.PARALLEL - 1, "8", 0), (cpu.PARALLEL, "1", 0), (cpu.PARALLEL, "2", 2)],
)
def test_small_work_wakes_no_helper(
    size: int, threads: str, wakes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMNIADAM_NUM_THREADS", threads)
    woken: list[int] = []

    def counted(self: Any, count: int, *job: Any) -> list[Any]:
        woken.append(count)
        return []

    monkeypatch.setattr(cpu._Helpers, "wakers", counted)
    w = np.ones(size, np.float32)
    Adam(clipnorm=1.0).apply_gradients([(w.copy(), w)])
    assert woken == [int(threads) - 1] * wakes


def test_without_another_thread(parallel: None, monkeypatch: pytest.MonkeyPatch) -> None:
    want = digest(train(FULL))

    def refused(self: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(cpu, "_helpers", cpu._Helpers())
    monkeypatch.setattr(threading.Thread, "start", refused)
    assert digest(train(FULL)) == want


def test_an_interrupt_before_the_step_leaves_it_undone(
    parallel: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, opt = np.ones(LONG, np.float32), Adam()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cpu._Helpers, "wakers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        opt.apply_gradients([(w.copy(), w)])
    assert (w == 1).all() and not opt.built


def test_step_waits_for_the_helper_that_is_in_its_last_chunk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = array("q", [0] * cpu.WORDS)
    job[cpu.COUNT] = 5
    done: list[int] = []
    monkeypatch.setattr(cpu._helpers, "wakers", lambda *_: [])

    def kernel(result: int, zero: int, address: int) -> int:
        """A kernel that finds no chunk left, and one more of the helper's done at each call."""
        assert result == address + 8 * cpu._RESULT
        done.append(len(done))
        job[cpu._RESULT] = len(done)
        if len(done) == 3:
            raise KeyboardInterrupt
        return 0

    work = cpu.Work()
    work.add_kernel(kernel, job, 1, ())
    with pytest.raises(KeyboardInterrupt):
        work.do()
    assert len(done) == 5


@pytest.mark.parametrize(
    "kernel_of",
    [
        lambda: ask_for_pass(EVERYTHING, AMSGRAD),
        lambda: ask_for_norm(NORM._replace(accumulated=True, scaled=True)),
    ],
)
def test_late_helper_touches_nothing_but_its_job(kernel_of: Callable[[], jit.Kernel]) -> None:
    """Of a step that is over: its arrays may be gone. What is read here instead is made up."""
    count = 3
    job = array("q", [0] * cpu.WORDS)
    made_up = (ctypes.c_double * 16)(*[7.0] * 16)
    for word in (cpu._ADDRESSES, cpu._CHUNKS, cpu._FACTORS, cpu.COEFFICIENTS, cpu._PARTIALS):
        job[word] = ctypes.addressof(made_up)
    job[cpu.COUNT] = job[cpu.NEXT] = job[cpu.DONE] = count
    address, _ = job.buffer_info()
    kernel_of()(address + 8 * cpu._RESULT, 0, address)
    assert job[cpu._RESULT] == count and list(made_up) == [7.0] * 16


# --- Memory ---------------------------------------------------------------------------------------

ROWS, WIDTH = 1 << 14, 128  # 2M elements, 8 MB of float32


def used(count: int) -> IndexedSlices:
    rng = np.random.default_rng(0)
    values = rng.random((count, WIDTH), np.float32)
    return IndexedSlices(values, rng.integers(0, ROWS, count), (ROWS, WIDTH))


def table(**layout: Any) -> Array:
    return np.ones((ROWS, WIDTH), np.float32, **layout)


MEMORY: dict[str, tuple[dict[str, Any], Callable[[], Array], Callable[[], Any]]] = {
    "plain": ({}, table, table),
    "full": (FULL, table, table),
    "accumulation": ({"gradient_accumulation_steps": 2}, table, table),
    "strided": (FULL, lambda: np.ones((ROWS, 2 * WIDTH), np.float32)[:, ::2], table),
    "transposed": (FULL, lambda: np.ones((WIDTH, ROWS), np.float32).T, table),
    "F-ordered gradient": (FULL, table, lambda: table(order="F")),
    "float64 gradient": (FULL, table, lambda: np.ones((ROWS, WIDTH))),
    "sparse": (FULL, table, lambda: used(200)),
    "sparse, strided": (
        FULL,
        lambda: np.ones((ROWS, 2 * WIDTH), np.float32)[:, ::2],
        lambda: used(200),
    ),
}


@pytest.mark.parametrize("name", MEMORY)
def test_no_temporary_of_a_parameters_size(name: str, kernel: str) -> None:
    """NumPy tells tracemalloc of its arrays; buffers for strided memory have 64k elements."""
    settings, variable, gradient = MEMORY[name]
    w, g, opt = variable(), gradient(), Adam(**settings)
    peaks = []
    for _ in range(4):
        tracemalloc.start()
        opt.apply_gradients([(g, w)])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    strided = kernel == "numpy" or name in ("strided", "transposed", "F-ordered gradient")
    assert max(peaks[2:]) < (3_000_000 if strided or "," in name else 300_000)


# --- Half precision -------------------------------------------------------------------------------


def make_gradient_the_variable(functions: Any) -> Any:
    return lambda w, g, slots, c: (g, ())


def converted(values: Array, source: str, target: str) -> Array:
    """Memory of one type as another: the kernel's, by a rule that stores the gradient."""
    stored = np.empty(values.shape, cpu.STORAGE[target])
    sweep = Sweep(
        STEP,
        Rule(make_gradient_the_variable, (), ()),
        target,
        source,
        [[stored.ctypes.data, 0, 0]],
        [values.size],
    )
    nothing = array("d", [0.0] * 8)
    sweep.run(array("q", [values.ctypes.data]), nothing, nothing)
    return stored


def half_dtype(dtype: str) -> Any:
    return np.float16 if dtype == "float16" else pytest.importorskip("ml_dtypes").bfloat16


PATTERNS = np.arange(1 << 16, dtype=np.uint16)


def assert_same_floats(got: Array, want: Array) -> None:
    """To the bit, signs of zero included, but for what a NaN carries."""
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    bits = f"u{got.itemsize}"
    is_number = ~np.isnan(want)
    np.testing.assert_array_equal(got[is_number].view(bits), want[is_number].view(bits))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_widens_every_pattern(dtype: str) -> None:
    want = PATTERNS.view(half_dtype(dtype)).astype(np.float32)
    assert_same_floats(converted(PATTERNS, dtype, "float32"), want)
    assert_same_floats(layout.widened(PATTERNS, dtype), want)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # overflow, as it should
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_rounds_to_nearest_even(dtype: str) -> None:
    """Every value, every tie between two, the floats beside them, and random bits."""
    half = half_dtype(dtype)
    values = PATTERNS.view(half).astype(np.float32)
    bits = values.view(np.uint32)
    tie = np.uint32(1 << (15 if dtype == "bfloat16" else 12))
    rng = np.random.default_rng(0)
    anything = rng.integers(0, 1 << 32, 1 << 20, dtype=np.uint32)
    tiny = (rng.random(1 << 16) * 2.0**-23).astype(np.float32).view(np.uint32)  # subnormal halves
    near = [bits, bits + tie, bits + tie - np.uint32(1), bits + tie + np.uint32(1)]
    floats = np.concatenate([*near, anything, tiny]).view(np.float32)
    want = floats.astype(half)
    assert_same_floats(converted(floats, "float32", dtype).view(half), want)
    assert_same_floats(layout.narrowed(floats, dtype).view(half), want)


def test_half_precision_is_float32_with_one_rounding_a_step(kernel: str) -> None:
    shapes = ((), (67,), (3, 5))
    settings: dict[str, Any] = {"learning_rate": 0.01, "amsgrad": True, "weight_decay": 0.5}
    halves = variables("float16", shapes=shapes)
    singles = [w.astype(np.float32) for w in halves]
    opt, wide = Adam(**settings), Adam(**settings)
    for step in range(5):
        grads = gradients(step, shapes, dtype="float16")
        opt.apply_gradients(zip(grads, halves, strict=True))
        wide.apply_gradients((g.astype(np.float32), w) for g, w in zip(grads, singles, strict=True))
        for half, single in zip(halves, singles, strict=True):
            np.testing.assert_array_equal(half, single.astype(np.float16))
            single[...] = half
    for slot, wide_slot in zip(opt.variables, wide.variables, strict=True):
        assert slot.dtype == wide_slot.dtype != np.float16
        np.testing.assert_array_equal(slot, wide_slot)


# --- Without Numba --------------------------------------------------------------------------------


def test_without_numba_the_same_rule_runs_on_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """And that is said, once."""
    code = """
        import sys, warnings
        sys.modules["numba"] = sys.modules["llvmlite"] = None
        from test_kernels import FULL, digest, train
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            digests = [digest(train(settings)) for settings in (FULL, {})]
        (one,) = said
        assert one.category is RuntimeWarning
        assert "slow here: numba is not installed" in str(one.message)
        assert "pip install 'numba>=" in str(one.message)
        print(*digests)
    """
    monkeypatch.setenv("OMNIADAM_KERNEL", "numpy")
    here = [digest(train(settings)) for settings in (FULL, {})]
    assert fresh(code, OMNIADAM_KERNEL="").split() == here
    # Who chose NumPy is told nothing.
    code = "import warnings; warnings.simplefilter('error'); import test_kernels; " + (
        "import sys; sys.modules['numba'] = None; test_kernels.train({})"
    )
    fresh(code, OMNIADAM_KERNEL="numpy")


def test_numba_that_is_switched_off_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu.available()
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    assert not cpu.available()


@pytest.mark.parametrize(
    ("name", "value"),
    [("OMNIADAM_KERNEL", each) for each in ("cuda", "NumPy", " ")]
    + [("OMNIADAM_NUM_THREADS", each) for each in ("0", "-1", "two", "1.5", " ")],
)
def test_bad_environment_is_an_error_before_anything_moves(
    name: str, value: str, parallel: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(cpu, "PARALLEL", 100)
    params = [np.ones(10, np.float64), np.ones(1000, np.float32)]
    with pytest.raises(ValueError, match=f"{name} must be .*Received: {value!r}"):
        Adam().apply_gradients([(w.copy(), w) for w in params])
    assert all(np.all(w == 1) for w in params)


# --- The inspector --------------------------------------------------------------------------------


def inspected() -> tuple[Inspector, list[Array], list[Array]]:
    """An inspector, gradients and variables that it recognises, of every layout it takes."""
    own: list[Array] = [
        np.ones((3, 4), np.float32),
        np.ones((3, 4), np.float32, order="F"),
        np.ones(6),
        np.ones((), np.float16),
        np.ones((0, 3), np.float32),
        np.ones((1, 5, 1), np.float32),
    ]
    assert all(map(Inspector.takes, own))
    memory = [(w.ctypes.data, w.ctypes.data + w.nbytes) for w in own]
    return Inspector(own, [], memory), [np.copy(w, order="K") for w in own], own


class Subclass(np.ndarray):
    pass


def unaligned(values: Array) -> Array:
    memory = np.zeros(values.nbytes + 1, np.uint8)[1:].view(values.dtype).reshape(values.shape)
    memory[...] = values
    assert not memory.flags.aligned
    return memory


def moved(w: Array) -> None:
    """To other memory, as `resize(refcheck=False)` may, which NumPy does not advise."""
    before = w.ctypes.data
    shape, size = w.shape, w.size
    w.resize((size << 18,), refcheck=False)
    held.extend(np.ones(shape, w.dtype) for _ in range(64))  # who has the old memory now
    w.resize(shape, refcheck=False)
    assert w.ctypes.data != before


held: list[Array] = []


def test_arrays_that_are_laid_out_otherwise(
    slow_reasons: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ndarrays, "_word", lambda address: address)
    with pytest.warns(RuntimeWarning, match="slow here: numpy .* the layout of an array"):
        assert not ndarrays._is_laid_out.__wrapped__()


def test_inspector_recognises_what_is_as_it_was() -> None:
    inspector, grads, own = inspected()
    for _ in range(2):
        found = inspector.addresses(grads, own)
        assert found is not None and found.tolist() == [g.ctypes.data for g in grads]
    grads[0].flags.writeable = False
    assert inspector.addresses(grads, own) is not None


def test_inspector_looks_at_what_is_no_variable_too() -> None:
    (w, g), state = np.ones((2, 3)), np.ones(3)
    inspector = Inspector([w], [state], [(w.ctypes.data, w.ctypes.data + w.nbytes)])
    assert inspector.addresses([g], [w]) is not None
    state.flags.writeable = False
    assert inspector.addresses([g], [w]) is None
    state.flags.writeable = True
    assert inspector.addresses([g], [w]) is not None
    moved(state)
    assert inspector.addresses([g], [w]) is None


GRADIENT_0: dict[str, Callable[[Array, Array], Any]] = {
    "shape": lambda g, w: np.ones((4, 3), np.float32),
    "rank": lambda g, w: g[None],
    "more dimensions": lambda g, w: g[..., None],
    "fewer dimensions": lambda g, w: g.reshape(-1),
    "dtype": lambda g, w: g.astype(np.float64),
    "integers of the same size": lambda g, w: g.view(np.int32),
    "byte order": lambda g, w: g.astype(">f4"),
    "metadata": lambda g, w: g.astype(np.dtype("f4", metadata={"a": 1})),
    "order": lambda g, w: np.asfortranarray(g),
    "strided": lambda g, w: np.ones((3, 8), np.float32)[:, ::2],
    "reversed": lambda g, w: g[::-1],
    "broadcast": lambda g, w: np.broadcast_to(np.float32(1), (3, 4)),
    "unaligned": lambda g, w: unaligned(g),
    "subclass": lambda g, w: g.view(Subclass),
    "masked": lambda g, w: np.ma.masked_array(g),
    "list": lambda g, w: g.tolist(),
    "number": lambda g, w: 1.0,
    "scalar": lambda g, w: np.float32(1),
    "none": lambda g, w: None,
    "sparse": lambda g, w: IndexedSlices(g, [0, 1, 2], (3, 4)),
    "the variable": lambda g, w: w,
    "a view of the variable": lambda g, w: w.reshape(3, 4),
    "across the variable": lambda g, w: np.lib.stride_tricks.as_strided(
        w.reshape(-1)[3:], (3, 4), (16, 4)
    ),
}


@pytest.mark.parametrize("name", GRADIENT_0)
def test_inspector_refuses_gradients(name: str) -> None:
    inspector, grads, own = inspected()
    grads[0] = GRADIENT_0[name](grads[0], own[0])
    assert inspector.addresses(grads, own) is None


VARIABLES: dict[str, Callable[[list[Array], list[Array]], Any]] = {
    "swapped": lambda g, w: w.insert(0, w.pop(1)),
    "swapped with gradients": lambda g, w: (w.insert(0, w.pop(1)), g.insert(0, g.pop(1))),
    "another object": lambda g, w: w.__setitem__(0, w[0][:]),
    "read-only": lambda g, w: w[0].setflags(write=False),
    "reshaped": lambda g, w: w[0].resize((4, 3), refcheck=False),
    "moved": lambda g, w: moved(w[0]),
    "shorter": lambda g, w: (w.pop(), g.pop()),
    "fewer gradients": lambda g, w: g.pop(),
    "more gradients": lambda g, w: g.append(g[0]),
    "longer": lambda g, w: (w.append(w[0]), g.append(g[0])),
    "empty": lambda g, w: (w.clear(), g.clear()),
}


@pytest.mark.parametrize("name", VARIABLES)
def test_inspector_refuses_variables(name: str) -> None:
    inspector, grads, own = inspected()
    VARIABLES[name](grads, own)
    assert inspector.addresses(grads, own) is None


@pytest.mark.parametrize(
    "variable_of",
    [
        lambda: np.ones((3, 8), np.float32)[:, ::2],
        lambda: np.ones(3, np.float32)[::-1],
        lambda: np.ones((3, 4), np.float32).view(Subclass),
        lambda: np.ones((1,) * 9, np.float32),
        lambda: unaligned(np.ones(3, np.float32)),
        lambda: np.ones(3, np.dtype("f4", metadata={"a": 1})),
    ],
    ids=["strided", "reversed", "subclass", "rank 9", "unaligned", "metadata"],
)
def test_inspector_is_not_for_every_variable_but_the_optimizer_is(
    variable_of: Callable[[], Array], kernel: str
) -> None:
    variable = variable_of()
    assert not Inspector.takes(variable)
    operand = layout.Operand("float32", layout.region_of(variable))
    plain = kernel == "numba" and variable.flags.c_contiguous and variable.flags.aligned
    assert (cpu.available() and layout.is_regular(operand)) == plain
    opt, want = Adam(0.5), np.ones(variable.shape, np.float32)
    want_opt = Adam(0.5)
    for _ in range(2):
        opt.apply_gradients([(np.ones_like(variable), variable)])
        want_opt.apply_gradients([(np.ones_like(want), want)])
    np.testing.assert_array_equal(variable, want)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (moved, None),
        (lambda w: w.resize((4, 3), refcheck=False), "must stay as it was built"),
        (lambda w: w.setflags(write=False), "read-only"),
    ],
    ids=["moved", "reshaped", "read-only"],
)
def test_variable_that_changes_between_steps(
    change: Callable[[Array], None], error: str | None, kernel: str
) -> None:
    params = [np.full((3, 4), i, np.float32) for i in range(2)]
    opt = Adam(0.5)
    grads = [np.ones((3, 4), np.float32) for _ in params]
    for _ in range(2):
        opt.apply_gradients(zip(grads, params, strict=True))
    change(params[1])
    before = [w.copy() for w in params]
    if error is None:
        opt.apply_gradients(zip(grads, params, strict=True))
        assert all(np.all(w < old) for w, old in zip(params, before, strict=True))
    else:
        with pytest.raises(ValueError, match=error):
            opt.apply_gradients(zip(grads, params, strict=True))
        assert [w.tolist() for w in params] == [old.tolist() for old in before]
        assert opt.iterations == 2


def test_regions_that_overlap() -> None:
    """As NumPy says of each pair."""
    rng = np.random.default_rng(0)
    outcomes = []
    for _ in range(400):
        memory = np.zeros((6, 8), np.float32)
        views: list[Array] = []
        for _ in range(rng.integers(2, 5)):
            (a, b), (c, d) = np.sort(rng.integers(0, 7, 2)), np.sort(rng.integers(0, 9, 2))
            view = memory[a : b : rng.integers(1, 4), c : d : rng.integers(1, 4)]
            view = view[:: rng.choice([1, -1]), :: rng.choice([1, -1])]
            wide = view.shape[1] and view.strides[1] == 4
            views.append(view.view(np.uint16) if wide and rng.random() < 0.3 else view)
        regions = list(map(layout.region_of, views))
        found = layout.overlapping(regions)
        pairs = [(i, j) for j in range(len(views)) for i in range(j)]
        expected = [p for p in pairs if np.shares_memory(views[p[0]], views[p[1]])]
        assert found is None if not expected else tuple(sorted(found or ())) in expected
        outcomes.append(found is None)
    assert 50 < sum(outcomes) < 350


def test_many_columns_of_one_matrix() -> None:
    whole = np.zeros((4, 5000))
    columns = [whole[:, i] for i in range(5000)]
    start = time.perf_counter()
    Adam().build(columns)
    assert time.perf_counter() - start < 5.0  # to compare all pairs takes 30 s
