"""What a report of a bug should say: versions, devices, kernels, threads, cache."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, TypedDict

from . import fast, slow
from .kernels import cpu, jit

# What is asked for, by the names of packages; TensorFlow's are all `import tensorflow`.
_PACKAGES = (
    "numpy",
    "numba",
    "llvmlite",
    "autograd",
    "torch",
    "triton",
    "jax",
    "jaxlib",
    "tensorflow",
    "tensorflow-cpu",
    "keras",
    "tf_keras",
    "optax",
)


class Cache(TypedDict):
    """Where compiled kernels are kept."""

    folder: str
    writable: bool  # files could be made there just now
    files: int
    bytes: int


class Info(TypedDict):
    """What `omniadam.info` returns."""

    omniadam: str  # versions
    python: str
    platform: str
    cpu: str  # the processor's name
    cores: int  # that this process may use
    threads: int  # that a large step uses
    gpus: list[str]  # that nvidia-smi names
    libraries: dict[str, str]  # package -> version, of those that are installed
    devices: dict[str, list[str]]  # library -> its devices, of those that are imported
    kernels: str  # "compiled by Numba", or "NumPy only" and why
    gpu_kernels: dict[str, str]  # device of PyTorch -> the same; those that this process stepped on
    fast: bool  # False where OMNIADAM_FAST=0 leaves fast paths out
    slow: list[str]  # what was warned of in this process: slow paths that nobody chose
    cache: Cache
    variables: dict[str, str]  # of the environment, those that omniadam heeds


def info() -> Info:
    """What this installation is, and how it makes steps: what to put into a report of a bug.

    `omniadam info` on the command line prints the same as text. No library is imported. Of those
    that are imported already, devices are asked for, which starts JAX and TensorFlow if they have
    not begun. nvidia-smi is run if it is there. The cache's folder is made if there is none, to see
    whether it can be written.

    Returns:
        A dict of strings, numbers, lists and dicts, which `json.dumps` takes. Its keys are those of
        `omniadam.environment.Info`.

    Raises:
        ValueError: a variable of the environment that omniadam heeds has a value that it must not
            have.

    Example:
        >>> import numpy, omniadam
        >>> found = omniadam.info()
        >>> found["libraries"]["numpy"] == numpy.__version__
        True
        >>> found["threads"] >= 1
        True
    """
    import platform

    from . import __version__

    why_not = cpu.why_not()
    return {
        "omniadam": __version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "cpu": _processor(),
        "cores": cpu.cores(),
        "threads": cpu.threads(),
        "gpus": _gpus(),
        "libraries": _libraries(),
        "devices": {name: _devices(name, ask) for name, ask in _ASK.items() if name in sys.modules},
        "kernels": f"NumPy only: {why_not}" if why_not else "compiled by Numba",
        "gpu_kernels": _gpu_kernels(),
        "fast": fast.is_enabled(),
        "slow": list(slow.reasons),
        "cache": _cache(),
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("OMNIADAM_", "NUMBA_"))
            or name in ("OMP_NUM_THREADS", "KERAS_BACKEND", "XDG_CACHE_HOME")
        },
    }


def as_text(found: Info) -> str:
    """The same for people, a line for each."""
    cache = found["cache"]
    size = f"{cache['files']} files, {cache['bytes'] / 1e6:.1f} MB"
    can = "can be written" if cache["writable"] else "cannot be written: kernels are compiled anew"
    lines = {
        "omniadam": found["omniadam"],
        "Python": found["python"],
        "platform": found["platform"],
        "CPU": f"{found['cpu']}, {found['cores']} cores for this process",
        "threads": f"{found['threads']} in a large step",
        "GPUs": "; ".join(found["gpus"]) or "none that nvidia-smi names",
        "kernels": found["kernels"],
        **{f"on {k}": said for k, said in found["gpu_kernels"].items()},
        "fast paths": "on" if found["fast"] else "off: OMNIADAM_FAST is 0",
        "cache": f"{cache['folder']} ({size}; {can})",
        "variables": ", ".join(f"{k}={v}" for k, v in found["variables"].items()) or "none set",
        "libraries": ", ".join(f"{k} {v}" for k, v in found["libraries"].items()),
        **{f"{name} sees": ", ".join(seen) for name, seen in found["devices"].items()},
    }
    told = [f"{name + ':':12} {value}" for name, value in lines.items()]
    return "\n".join([*told, *(f"{'slow:':12} {reason}" for reason in found["slow"])])


def _libraries() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    import platform

    if sys.platform == "linux":
        try:
            with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    name, _, value = line.partition(":")
                    if name.strip() == "model name":
                        return value.strip()
        except OSError:
            pass
    elif sys.platform == "darwin" and (said := _said("sysctl", "-n", "machdep.cpu.brand_string")):
        return said
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    fields = "--query-gpu=name,memory.total,driver_version"
    return _said("nvidia-smi", fields, "--format=csv,noheader").splitlines()


def _gpu_kernels() -> dict[str, str]:
    gpu = sys.modules.get(f"{__package__}.backends.gpu")
    return {} if gpu is None else gpu.kernels_by_device()


def _said(program: str, *arguments: str) -> str:
    """What a program writes; nothing if there is none, or it fails."""
    import shutil
    import subprocess

    found = shutil.which(program)
    if found is None:
        return ""
    try:
        done = subprocess.run(
            [found, *arguments], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _cache() -> Cache:
    folder, is_writable = jit.kept()
    try:
        sizes = [file.stat().st_size for file in folder.iterdir()]
    except OSError:
        sizes = []
    return {
        "folder": str(folder),
        "writable": is_writable,
        "files": len(sizes),
        "bytes": sum(sizes),
    }


def _of_torch(torch: Any) -> list[str]:
    found = ["cpu"]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        found += [f"{kind}:{i}" for i in range(torch.accelerator.device_count())]
    return found


def _of_jax(jax: Any) -> list[str]:
    return [f"{each.platform}:{each.id} ({each.device_kind})" for each in jax.devices()]


def _of_tensorflow(tensorflow: Any) -> list[str]:
    devices = tensorflow.config.list_physical_devices()
    return [each.name.removeprefix("/physical_device:") for each in devices]


# What a library says of its devices, by public names.
_ASK: dict[str, Callable[[Any], list[str]]] = {
    "torch": _of_torch,
    "jax": _of_jax,
    "tensorflow": _of_tensorflow,
}


def _devices(library: str, ask: Callable[[Any], list[str]]) -> list[str]:
    try:
        return [str(each) for each in ask(sys.modules[library])]
    except Exception as error:  # a report is needed most where a library is broken
        return [f"no answer: {type(error).__name__}: {error}"]


__all__ = ["Cache", "Info", "as_text", "info"]
