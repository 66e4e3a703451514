"""Measure omniadam beside its peers and write the tables into README.md.

    python benchmarks/run.py [--quick] [SECTION ...]

Each row is a process of its own, in which the two steps alternate; a figure is the ratio of their
medians, with the lowest and the highest of five fifths of the run. `--quick` leaves out the two
large sets and does not write. Sections are measured apart, each with its machine: see SECTIONS.
What was measured is kept in results.json, from which docs/speed.png is drawn.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import picture

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results.json"
THREADS = 2
KERAS = {"Keras on TensorFlow": "tensorflow", "Keras on JAX": "jax", "Keras on PyTorch": "torch"}
NUMPY_PEERS = ["torch fused", "torch foreach", "optax", *KERAS, "plain NumPy"]
LIBRARY_PEERS = [
    "PyTorch: torch fused",
    "omniadam.torch: torch fused",
    "PyTorch: Keras on PyTorch",
    "JAX Refs: optax",
    "JAX stateless: optax",
    "JAX Refs: Keras on JAX",
    "TensorFlow: Keras on TensorFlow",
    "omniadam.optax: optax",
    *(f"omniadam.keras: {peer}" for peer in KERAS),
]
IN_FUNCTION_PEERS = ["TensorFlow, in a tf.function: Keras on TensorFlow"]
OLDER_PEERS = ["compat.optimizer_v2, in a tf.function: tf_keras legacy"]
TORCH_PEERS = ["PyTorch: torch fused", "omniadam.torch: torch fused"]
LOOP_PEERS = [
    f"{ours}: torch {theirs}"
    for ours in ("PyTorch", "omniadam.torch")
    for theirs in ("fused", "foreach")
]
LOOPS = ["MLP loop", "transformer loop", "CNN loop"]
FIRST_STEPS = ["first step of 10,000 tensors", "first step of 20,000 tensors"]
# Bytes a float32 element: g read; w, m, v read and written; with the norm g once more, with the
# average one more read and write.
BYTES = {"plain": 28, "full": 40}


def child(code: list[str], **environment: str) -> str:
    env = os.environ | {
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{HERE}",
        "OMNIADAM_NUM_THREADS": str(THREADS),
        "OMP_NUM_THREADS": str(THREADS),
        "TF_NUM_INTRAOP_THREADS": str(THREADS),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "XLA_FLAGS": f"--xla_cpu_multi_thread_eigen=true intra_op_parallelism_threads={THREADS}",
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run(
        [sys.executable, *code], env=env | environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{code}: {done.stderr[-2000:]}")
    return done.stdout


# What was measured in this run, row by row.
measured: list[dict[str, Any]] = []


def pair(peer: str, name: str, mode: str) -> dict[str, Any]:
    backend = KERAS.get(peer.split(": ")[-1], "numpy")
    out = child([str(HERE / "pair.py"), peer, name, mode], KERAS_BACKEND=backend)
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    measured.append({"peer": peer, "set": name, "mode": mode, **result})
    low, high = result["spread"]
    print(
        f"{peer:32} {name:12} {mode:6} ours {result['ours'] * 1e3:9.3f} ms   "
        f"theirs {result['theirs'] * 1e3:9.3f} ms   {result['theirs'] / result['ours']:6.2f} x "
        f"({low:.2f} to {high:.2f})",
        flush=True,
    )
    return result


def cell(result: dict[str, Any]) -> str:
    """Who is faster, in bold if that is omniadam, and how sure that is."""
    ratio = result["theirs"] / result["ours"]
    low, high = result["spread"]
    spread = f"({low:.2f} to {high:.2f})"
    if round(low, 2) <= 1.0 <= round(high, 2) or 0.97 < ratio < 1.03:
        return f"level {spread}"
    return f"**{ratio:.2f}× faster** {spread}" if ratio > 1 else f"{1 / ratio:.2f}× slower {spread}"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}" if seconds < 1e-3 else f"{seconds * 1e3:.1f}"


def table(peers: list[str], sets: list[str], modes: Sequence[str] = tuple(BYTES)) -> list[str]:
    columns = [(name, mode) for name in sets for mode in modes]
    lines = [
        "| | " + " | ".join(f"{name}, {mode}" for name, mode in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    own: dict[tuple[str, str], list[float]] = {column: [] for column in columns}
    for peer in peers:
        cells = []
        for column in columns:
            try:
                result = pair(peer, *column)
            except RuntimeError as error:
                print(error)
                cells.append("failed")
                continue
            own[column].append(result["ours"])
            cells.append(cell(result))
        lines.append(f"| {peer} | " + " | ".join(cells) + " |")
    if peers is not NUMPY_PEERS:  # each row has its own library
        return lines
    medians = [milliseconds(statistics.median(own[column])) for column in columns]
    lines.insert(2, "| **omniadam, ms a step** | " + " | ".join(medians) + " |")
    return lines


def tails() -> list[str]:
    """How late the late steps are, in a loop in which torch keeps all cores busy."""
    lines = [
        "| 95th percentile of a step / its median | omniadam | torch fused |",
        "|---|---:|---:|",
    ]
    for peer in TORCH_PEERS:
        for name in LOOPS:
            ours, theirs = pair(peer, name, "plain")["tails"]
            lines.append(f"| {peer.partition(':')[0]}, {name} | {ours:.2f} | {theirs:.2f} |")
    return lines


BUSY = "import numpy as np; a = np.ones((300, 300))\nwhile True: a @ a"


@contextmanager
def busy_neighbours(count: int = 4) -> Iterator[None]:
    """Processes that want the same cores."""
    env = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    others = [subprocess.Popen([sys.executable, "-c", BUSY], env=env) for _ in range(count)]
    try:
        yield
    finally:
        for each in others:
            each.kill()
            each.wait()


def beside_neighbours() -> list[str]:
    with busy_neighbours():
        return table(TORCH_PEERS, LOOPS[:1])


def bandwidth(sets: list[str]) -> list[str]:
    lines = [
        "| | GB/s, plain | of the streaming bound | GB/s, full |",
        "|---|---:|---:|---:|",
    ]
    for name in sets:
        stream = pair("streaming", name, "plain")
        full = pair("streaming", name, "full")
        rates = [
            r["n"] * BYTES[m] / r["ours"] / 1e9 for r, m in ((stream, "plain"), (full, "full"))
        ]
        share = stream["theirs"] / stream["ours"]
        lines.append(f"| {name} | {rates[0]:.0f} | {share:.0%} | {rates[1]:.0f} |")
    return lines


SMALL = """
import json, statistics, time
start = time.perf_counter(); import numpy as np; numpy = time.perf_counter() - start
start = time.perf_counter(); from omniadam import Adam; ours = time.perf_counter() - start
def arrays(n): return [np.ones(1, np.float32) for _ in range(n)]
w, g = arrays(1), arrays(1)
start = time.perf_counter(); Adam().apply_gradients(zip(g, w)); first = time.perf_counter() - start
def step(n):
    opt, w, g, taken = Adam(), arrays(n), arrays(n), []
    for _ in range(3000):
        start = time.perf_counter(); opt.apply_gradients(zip(g, w))
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)
one, many = step(1), step(101)
print(json.dumps([ours, first, one, (many - one) / 100]))
"""


def small() -> list[str]:
    with tempfile.TemporaryDirectory() as cache:
        runs = [json.loads(child(["-c", SMALL], OMNIADAM_CACHE_DIR=cache)) for _ in range(7)]
    cold, warm = runs[0], [statistics.median(column) for column in zip(*runs[1:], strict=True)]
    return [
        "| | measured |",
        "|---|---:|",
        f"| step over one variable of one element | {warm[2] * 1e6:.1f} µs |",
        f"| each further variable | {warm[3] * 1e6:.2f} µs |",
        f"| `import omniadam`, on top of NumPy's own | {warm[0]:.2f} s |",
        f"| first step of a process, kernels in the cache | {warm[1]:.2f} s |",
        f"| first step with an empty cache | {cold[1]:.1f} s |",
    ]


ACCURACY = """
import json, sys
sys.path[:0] = ["tests"]
import keras, numpy as np
from cases import CASES, error_in_ulps, gradients, variables
import omniadam
largest = [0.0, 0.0]
steps = [gradients(i) for i in range(50)]
for case in CASES.values():
    ours = variables(); reference = case.reference(ours)
    theirs = [keras.Variable(x) for x in ours]
    opts = (omniadam.Adam(**case.settings_for(omniadam.schedules)),
            keras.optimizers.Adam(**case.settings_for(keras.optimizers.schedules)))
    for opt, values in zip(opts, (ours, theirs)):
        opt.exclude_from_weight_decay(var_list=[values[i] for i in case.excluded])
    for g in steps:
        reference.step(g)
        for opt, values in zip(opts, (ours, theirs)):
            opt.apply_gradients(zip(g, values))
    for k, values in enumerate((ours, [v.numpy() for v in theirs])):
        for i, value in enumerate(values):
            worst = float(np.max(error_in_ulps(value, reference, i), initial=0.0))
            largest[k] = max(largest[k], worst)
print(json.dumps([len(CASES), *largest]))
"""


def accuracy() -> list[str]:
    out = child(["-c", ACCURACY], KERAS_BACKEND="numpy")
    cases, ours, theirs = json.loads(out.splitlines()[-1])
    measured.append({"settings": cases, "omniadam": ours, "Keras": theirs})
    return [
        f"Largest error against a float64 oracle over {cases} settings and 50 steps, in float32 "
        f"ulps of the update: omniadam {ours:.2g}, Keras (NumPy backend) {theirs:.2g}."
    ]


def machine() -> str:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        name = models[0].partition(": ")[2] if models else name
    versions = ", ".join(
        f"{p} {version(p)}" for p in ("numpy", "numba", "torch", "jax", "optax", "keras")
    )
    return f"{name}, {THREADS} threads each; Python {platform.python_version()}, {versions}."


def numpy_arrays(sets: list[str]) -> list[list[str]]:
    legend = (
        "1.50× faster: the peer takes 1.50 times as long for the same step, by the medians of one "
        "run; in brackets the lowest and highest ratio of five fifths of it. On NumPy arrays:"
    )
    return [[legend], table(NUMPY_PEERS, sets)]


def libraries(sets: list[str]) -> list[list[str]]:
    return [
        ["On the variables of each library, against the peers of that library:"],
        table(LIBRARY_PEERS, sets[:2]),
    ]


def tensorflow(sets: list[str]) -> list[list[str]]:
    return [
        ["TensorFlow, inside a `tf.function`, as in a training loop of one's own:"],
        table(IN_FUNCTION_PEERS, sets[:2]),
        table(OLDER_PEERS, sets[:2], ["plain"]),
    ]


def loops(sets: list[str]) -> list[list[str]]:
    legend = (
        "The step inside a training loop of PyTorch, after a forward and a backward pass (the MLP "
        "with batches of 64; 2 layers of a transformer of width 128, 8 sequences of 64; a CNN of 3 "
        "layers, 32 images):"
    )
    return [
        [legend],
        table(LOOP_PEERS, LOOPS),
        tails(),
        ["The same beside four processes that want the same cores:"],
        beside_neighbours(),
    ]


def tensors(sets: list[str]) -> list[list[str]]:
    legend = (
        "Tensors of PyTorch: large ones, many small ones, odd sizes that begin anywhere, and what "
        "it takes to make an optimizer and its first step:"
    )
    large = [name for name in sets if name != "MLP"]
    return [
        [legend],
        table(TORCH_PEERS, [*large, "10,000 tensors", "odd sizes"]),
        table(TORCH_PEERS, FIRST_STEPS, ["plain"]),
    ]


def epochs(sets: list[str]) -> list[list[str]]:
    return [
        ["Whole epochs of `model.fit`, the MLP with 32 batches of 64:"],
        table([f"omniadam.keras: {peer}" for peer in KERAS], ["MLP fit"]),
    ]


def memory(sets: list[str]) -> list[list[str]]:
    return [["Memory traffic, where memory is the limit:"], bandwidth(sets[1:] or sets)]


SPARSE = [
    (1_000_000, 64, "zipf", "cold", 0.0),
    (1_000_000, 64, "uniform", "cold", 0.0),
    (1_000_000, 64, "uniform", "aged", 0.0),
    (1_000_000, 64, "zipf", "cold", 0.01),
    (10_000_000, 16, "zipf", "cold", 0.0),
    (10_000_000, 16, "uniform", "cold", 0.0),
    (10_000_000, 16, "uniform", "aged", 0.0),
]


def sparse(sets: list[str]) -> list[list[str]]:
    lines = [
        "| table, ids | ms a step | our pass over all rows | Keras on TensorFlow | SparseAdam |",
        "|---|---:|---:|---:|---:|",
    ]
    for count, width, how, state, decay in SPARSE:
        arguments = [str(count), str(width), how, state, *([str(decay)] if decay else [])]
        out = child([str(HERE / "sparse.py"), *arguments], KERAS_BACKEND="tensorflow")
        found = json.loads(out.splitlines()[-1])
        own, _, _ = found["table"]
        cells = []
        for name in ("dense", "Keras on TensorFlow", "SparseAdam"):
            if name not in found:
                cells.append("")
                continue
            theirs, low, high = found[name]
            result = {"ours": own, "theirs": theirs, "spread": [low / own, high / own]}
            measured.append({"peer": name, "set": " ".join(arguments), "mode": "sparse", **result})
            cells.append(cell(result))
        what = f"{count:,} x {width}, {how}, {state}" + (", weight decay" if decay else "")
        lines.append(f"| {what} | {milliseconds(own)} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    found = json.loads(child([str(HERE / "sparse.py"), "pauses"]).splitlines()[-1])
    measured.append({"pauses": found})
    picture.draw_pauses(found, ROOT / "docs" / "pauses.png")
    legend = (
        "A table of embeddings, by a lookup of 4,096 ids and a step with their gradients. "
        "SparseAdam computes something else: rows without a gradient stay as they are."
    )
    return [[legend], lines]


def saving(sets: list[str]) -> list[list[str]]:
    found = json.loads(child([str(HERE / "saving.py")]).splitlines()[-1])
    measured.append(found)
    lines = ["| | seconds | |", "|---|---:|---:|"]
    for ours, theirs, what in (
        ("save", "save_file", "`omniadam.save`: `save_file` of safetensors, and fsync"),
        ("load", "load_file", "`omniadam.load`: `load_file`, and a copy into tensors"),
    ):
        own = found[ours][0]
        their, low, high = found[theirs]
        result = {"ours": own, "theirs": their, "spread": [low / own, high / own]}
        lines.append(f"| {what} | {own:.2f} | {cell(result)} |")
    seconds = found["hash"][0]
    rate = found["gigabytes"] / seconds
    lines.append(f"| `omniadam.state_hash` | {seconds:.2f} | {rate:.1f} GB/s |")
    legend = f"State of {found['gigabytes']:.2f} GB on NumPy arrays, verified as it is loaded:"
    return [[legend], lines]


SECTIONS: dict[str, Callable[[list[str]], list[list[str]]]] = {
    "numpy": numpy_arrays,
    "libraries": libraries,
    "tensorflow": tensorflow,
    "loops": loops,
    "tensors": tensors,
    "fit": epochs,
    "sparse": sparse,
    "saving": saving,
    "memory": memory,
    "small": lambda sets: [small()],
    "accuracy": lambda sets: [accuracy()],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; all if none")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    sets = ["MLP"] if given.quick else ["MLP", "ResNet-50", "GPT-2 small"]
    readme = ROOT / "README.md"
    for name in given.sections or SECTIONS:
        parts = [[machine()], *SECTIONS[name](sets)]
        text = "\n\n".join("\n".join(part) for part in parts)
        print(text, flush=True)
        if not given.quick:
            begin, end = (f"<!-- make bench: {word} {name} -->" for word in ("begin", "end"))
            before, _, rest = readme.read_text(encoding="utf-8").partition(begin)
            _, _, after = rest.partition(end)
            readme.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
            results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            results[name] = {"machine": machine(), "rows": measured.copy()}
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            if "numpy" in results:
                picture.draw(results, ROOT / "docs" / "speed.png")
        measured.clear()


if __name__ == "__main__":
    main()
