"""Run every Adam that installs beside the oracle, and write docs/conformance.md.

    python benchmarks/conformance [--page] [NAME ...]

NAME is a row or an environment (torch, optax, ...); all if none. Each environment is made once, in
.venv-conformance/NAME, with the newest versions that install. What is measured is kept in
docs/conformance.json, so that one row can be measured again; `--page` only writes the page anew.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE)]

from adapters import ROWS, Row  # noqa: E402
from page import write  # noqa: E402

FOUND = ROOT / "docs" / "conformance.json"
# By its exact version: `torch` alone would bring gigabytes of CUDA.
TORCH = next(
    line
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line.startswith("torch==")
)
# What pip is asked for, one call after the other. tf_keras asks for `tensorflow` by that name.
ENVIRONMENTS: dict[str, list[str]] = {
    "omniadam": [TORCH, "numpy numba jax keras optax tensorflow-cpu"],
    "torch": [TORCH, "numpy"],
    "optax": ["optax"],
    "keras": [TORCH, "keras jax tensorflow-cpu"],
    "tf_keras": ["tensorflow-cpu", "--no-deps tf_keras"],
    "jax": ["jax"],
    "scikit-learn": ["scikit-learn"],
    "autograd": ["autograd"],
    "thinc": ["thinc"],
    "mlx": ["mlx[cpu] numpy"],
    "paddle": ["paddlepaddle numpy"],
    "tinygrad": ["tinygrad numpy"],
    "optimi": [TORCH, "torch-optimi numpy packaging"],
    "pytorch_optimizer": [TORCH, "pytorch_optimizer numpy"],
    "torchao": [TORCH, "torchao numpy"],
    "bitsandbytes": [TORCH, "bitsandbytes"],
}
SECONDS = 1800  # that a row may take


def python_of(name: str) -> Path:
    """The interpreter of an environment, which is made if it is not there as it should be."""
    folder = ROOT / ".venv-conformance" / name
    python, stamp = folder / "bin" / "python", folder / "installed"
    wanted = "\n".join(ENVIRONMENTS[name])
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    for packages in ENVIRONMENTS[name]:
        pip = [str(python), "-m", "pip", "install", "--quiet", "--only-binary", ":all:"]
        done = subprocess.run([*pip, *packages.split()], capture_output=True, text=True)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            raise RuntimeError("does not install: " + (said or ["pip failed"])[-1])
    stamp.write_text(wanted, encoding="utf-8")
    return python


def measured(name: str, row: Row) -> dict[str, Any]:
    """What the probes found, or why there is nothing."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTHONPATH": str(ROOT / "src") if row.environment == "omniadam" else "",
    }
    try:
        command = [str(python_of(row.environment)), str(HERE / "probes.py"), name]
        done = subprocess.run(
            command,
            env=environment | row.variables,
            stdout=subprocess.PIPE,
            text=True,
            timeout=SECONDS,
        )
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        if "epsilon: failed" in found:  # it makes no step at all
            found = {"versions": found["versions"], "not run": found["epsilon: failed"]}
    except subprocess.TimeoutExpired:
        found = {"not run": f"took more than {SECONDS // 60} minutes"}
    except (IndexError, ValueError):
        found = {"not run": "its process ended before its probes"}
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        found = {"not run": str(error)}
    return found | {"on": datetime.now(UTC).date().isoformat()}


def machine() -> str:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        name = next((x.partition(": ")[2] for x in lines if x.startswith("model name")), name)
    return f"{name}; {platform.system()}; Python {platform.python_version()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--page", action="store_true", help="only write the page anew")
    given = parser.parse_args()
    known = {*ROWS, *ENVIRONMENTS}
    if unknown := set(given.names) - known:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
    for name, row in () if given.page else ROWS.items():
        if given.names and not {name, row.environment} & set(given.names):
            continue
        print(f"--- {name}", flush=True)
        new = measured(name, row)
        # Read again each time: a row beside may be measured by another process.
        rows = {**held(), name: new}
        found = {"machine": machine(), "rows": {each: rows[each] for each in ROWS if each in rows}}
        FOUND.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    write(json.loads(FOUND.read_text(encoding="utf-8")), ROOT / "docs")


def held() -> dict[str, Any]:
    """What was measured before, by row."""
    rows: dict[str, Any] = {}
    if FOUND.exists():
        rows = json.loads(FOUND.read_text(encoding="utf-8"))["rows"]
    return rows


if __name__ == "__main__":
    main()
