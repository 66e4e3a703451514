"""Machine code from Numba, kept on disk between processes.

Numba compiles a function to LLVM's intermediate form; from there on its own dispatcher and cache
are left aside, because that cache does not key on what a closure captured (two specialisations of
one kernel could be mistaken for each other), wants a writable folder, and costs the import of Numba
in every process. Here the key is a digest of everything that the machine code depends on: all
sources, the versions of the compilers, the processor and the specialisation. A warm process loads
the object code through llvmlite in a few milliseconds and does not import Numba.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import slow

# A kernel takes the address of its job, and returns 0.
Kernel = Callable[[int, int, int], int]

_SYMBOL = "omniadam_kernel"
_keep: list[Any] = []  # engines own the memory of the code, so they live as long as the process


def compiled(
    build: Callable[[], Callable[[int], Any]],
    specialisation: str,
    sources: tuple[str, ...],
    fastmath: frozenset[str],
    *,
    holds_lock: bool = False,
) -> Kernel:
    """The kernel that `build()` returns as a Python function of one int64, as machine code.

    Args:
        build: called only if the cache has no such kernel; may import Numba.
        specialisation: everything that `build` captured, as text.
        sources: the source text that the code was written in, beside this file.
        fastmath: LLVM's fast-math flags.
        holds_lock: whether it has the interpreter's lock while it runs, as what reads Python's own
            structures must; else it gives that up by itself.

    Returns:
        A function `(result_address, 0, job_address) -> 0`.
    """
    digest = hashlib.sha256()
    for part in (*_environment(), specialisation, *sorted(fastmath), *sources):
        digest.update(f"{len(part)}:{part}".encode())
    key = digest.hexdigest()
    code = _read(key)
    if code is None:
        code = _compile(build(), fastmath)
        _write(key, code)
    return _load(code, ctypes.PYFUNCTYPE if holds_lock else ctypes.CFUNCTYPE)


@cache
def _environment() -> tuple[str, ...]:
    import llvmlite.binding as llvm

    return (
        source_of(__name__),
        version("numba"),
        version("llvmlite"),
        sys.version,
        platform.machine(),
        llvm.get_host_cpu_name(),
        llvm.get_host_cpu_features().flatten(),
        # Numba's own settings, of which some decide how code is optimised.
        *(f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("NUMBA_")),
    )


@cache
def source_of(module: str) -> str:
    """The source text of a module, which is part of a kernel's key."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        raise ValueError(
            f"A rule must be written in a file, whose text tells its machine code from others'. "
            f"Received one of module {module!r}, which has none; set OMNIADAM_KERNEL=numpy for it."
        )
    return Path(file).read_text(encoding="utf-8")


@cache
def _target() -> Any:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple()


def _machine() -> Any:
    import llvmlite.binding as llvm

    return _target().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        reloc="pic",
        codemodel="jitdefault",
    )


def _compile(function: Callable[[int], Any], fastmath: frozenset[str]) -> bytes:
    import llvmlite.binding as llvm
    import numba

    compiled = numba.cfunc(
        numba.int64(numba.int64), nopython=True, error_model="numpy", fastmath=set(fastmath)
    )(function)
    _target()
    module = llvm.parse_assembly(compiled.inspect_llvm())
    # cfunc's own entry reports exceptions to the interpreter, which a kernel has none of; without
    # it and Numba's runtime the object refers to nothing that only Numba could supply.
    body = compiled.native_name.removeprefix("cfunc.")
    for each in module.functions:
        if each.name == body:
            each.name = _SYMBOL
        elif not each.is_declaration:
            each.linkage = "internal"
    machine = _machine()
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(0))
    passes = llvm.create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()
    passes.run(module, builder)
    return bytes(machine.emit_object(module))


def _load(code: bytes, prototype: Any) -> Kernel:
    import llvmlite.binding as llvm

    _target()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _keep.append(engine)
    address = engine.get_function_address(_SYMBOL)
    if not address:
        raise RuntimeError("The compiled kernel has no entry point; set OMNIADAM_KERNEL=numpy.")
    kind = prototype(ctypes.c_int32, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
    function: Kernel = kind(address)
    return function


def assembled(body: Callable[[Any, Any], Any]) -> int:
    """The address of a C function of one word, written by hand in LLVM's intermediate form.

    Args:
        body: is given llvmlite's builder and the word.
    """
    from llvmlite import ir

    module, word = ir.Module(), ir.IntType(64)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [word]), _SYMBOL)
    builder = ir.IRBuilder(function.append_basic_block())
    body(builder, function.args[0])
    builder.ret_void()
    return linked(module, _SYMBOL)


def linked(module: Any, name: str) -> int:
    """The address of a function of a module of llvmlite's; its code is never freed."""
    import llvmlite.binding as llvm

    _target()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(str(module)), _machine())
    engine.finalize_object()
    _keep.append(engine)
    return int(engine.get_function_address(name))


def address_of(function: Any) -> int:
    """Where the machine code of a function of ctypes begins."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _folders() -> Iterator[Path]:
    """Where machine code may be kept, best first: it must be ours alone, since it is executed."""
    if chosen := os.environ.get("OMNIADAM_CACHE_DIR"):
        yield Path(chosen)
        return
    if sys.platform == "win32":
        yield Path(os.environ.get("LOCALAPPDATA", tempfile.gettempdir()), "omniadam", "cache")
        return
    yield Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "omniadam")
    # A home that cannot be written to, as in many containers.
    yield Path(tempfile.gettempdir(), f"omniadam-{os.getuid()}")


def _is_ours(folder: Path) -> bool:
    if sys.platform == "win32":
        return folder.is_dir()
    state = folder.stat()
    return folder.is_dir() and state.st_uid == os.getuid() and not state.st_mode & 0o022


def _read(key: str) -> bytes | None:
    for folder in _folders():
        try:
            if _is_ours(folder):
                content = (folder / key).read_bytes()
                # The first line is a digest, so that a torn or altered file is compiled again.
                digest, _, code = content.partition(b"\n")
                if digest == hashlib.sha256(code).hexdigest().encode():
                    return code
        except OSError:
            continue
    return None


def _write(key: str, code: bytes) -> None:
    for folder in _folders():
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not _is_ours(folder):
                continue
            handle, name = tempfile.mkstemp(dir=folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(hashlib.sha256(code).hexdigest().encode() + b"\n" + code)
                os.replace(name, folder / key)
            except OSError:
                os.unlink(name)
                raise
        except OSError:
            continue  # full or read-only: compiling again each time is slower, not wrong
        return
    slow.warn(
        f"compiled kernels cannot be kept in {' or '.join(map(str, _folders()))}, so that each "
        "process compiles them again, for seconds. OMNIADAM_CACHE_DIR names another folder, to "
        "which only you may write."
    )


def kept() -> tuple[Path, bool]:
    """The folder in which machine code is kept, and whether files can be made there.

    That is tried, so that the folder is made if there is none.
    """
    for folder in _folders():
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if _is_ours(folder):
                with tempfile.TemporaryFile(dir=folder):
                    return folder, True
        except OSError:
            continue
    return next(_folders()), False
