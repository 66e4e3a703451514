"""Files of state: whole or not there, whatever happens while they are written; none that is damaged
is read.
"""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import omniadam
from omniadam import Adam
from omniadam.saving import atomic, file
from omniadam.saving.snapshot import KERAS, Snapshot, Tensor

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="forks, limits and permissions of POSIX"),
    # Of JAX, where it is imported: a fork here does not use it.
    pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Exception ignored in. <function _at_fork"),
]


@pytest.fixture(autouse=True)
def _without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNIADAM_KERNEL", "numpy")


def optimizer(size: int = 100, momentum: float = 1.0) -> Adam:
    opt = Adam(amsgrad=True)
    opt.build({"a/b": np.ones(size, np.float32), "c": np.ones((3, 2))})
    for slot in opt.variables[2:]:
        slot[...] = momentum
    return opt


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "adam.safetensors"


def state_in(path: Path) -> str:
    return file.read(path).state_hash


# --- while they are written ---


def test_killed_at_any_instant(path: Path) -> None:
    """200 forks of one warm process, most of them killed in a save, or just before or after it."""
    code = """
import os, random, signal, sys, time
import numpy as np
import omniadam
from omniadam.saving import file
path, hashes = sys.argv[1], {}
opt = omniadam.Adam()
opt.build({"w": np.zeros(100_000)})
omniadam.save(opt, path)
whole = time.perf_counter()
omniadam.save(opt, path)
whole = time.perf_counter() - whole
known = {file.read(path).state_hash: 0}
rng = random.Random(0)
seen = []
for i in range(1, 201):
    opt.variables[2][...] = i
    opt.assign(opt.variables[0], i)
    known[omniadam.state_hash(opt)] = i
    child = os.fork()
    if child == 0:
        try:
            omniadam.save(opt, path)
        finally:
            os._exit(0)
    if i % 4:  # however slow the machine is just now, others may end
        time.sleep(rng.uniform(0, 1.5) * whole * (i % 4 - 1))
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    seen.append(known[file.read(path).state_hash])  # KeyError if it is neither old nor new
    assert seen[-1] in (i, *seen[-2:-1], 0), seen[-3:]
    left = set(os.listdir(os.path.dirname(path))) - {os.path.basename(path)}
    assert left <= {"." + os.path.basename(path) + ".partial"}, left
killed = sum(a != i for i, a in enumerate(seen, 1))
omniadam.save(opt, path)
assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)]
print(killed)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, os.fspath(path)],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 5 < int(done.stdout) < 200  # some were killed in time, and some ended


def in_child(act: Callable[[], object]) -> str:
    """What a function raises in a fork, where it may give up rights and get limits."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            act()
            said = "nothing"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(into, said.encode())
        os._exit(0)
    os.close(into)
    with os.fdopen(out) as read:
        said = read.read()
    os.waitpid(child, 0)
    return said


def test_a_full_disk(path: Path) -> None:
    omniadam.save(optimizer(momentum=2.0), path)
    before = path.read_bytes()

    def act() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        omniadam.save(optimizer(10_000), path)

    said = in_child(act)
    assert said.startswith(f"OSError: [Errno {errno.EFBIG}]")
    assert f"{path} was not written, and is as it was before" in said
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_a_full_file_system(tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", os.fspath(place)]
    if mount is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs here")
    try:
        path = place / "adam.safetensors"
        omniadam.save(optimizer(momentum=2.0), path)
        before = path.read_bytes()
        with pytest.raises(OSError, match="was not written, and is as it was before") as info:
            omniadam.save(optimizer(100_000), path)
        assert info.value.errno == errno.ENOSPC
        assert path.read_bytes() == before and os.listdir(place) == [path.name]
    finally:
        subprocess.run(["umount", os.fspath(place)], check=True)


def test_no_permission() -> None:
    """To write to the folder, or to read the file, for one who is not root."""
    with tempfile.TemporaryDirectory() as folder:
        _check_permissions(Path(folder))


def _check_permissions(folder: Path) -> None:
    os.chmod(folder, 0o755)
    path = folder / "adam.safetensors"
    omniadam.save(optimizer(), path)
    path.chmod(0o600)
    before = path.read_bytes()

    def as_nobody(act: Callable[[], object]) -> Callable[[], object]:
        def done() -> None:
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            else:
                os.chmod(folder, 0o555)
                os.chmod(path, 0)
            act()

        return done

    said = in_child(as_nobody(lambda: omniadam.save(optimizer(), path)))
    assert said.startswith("PermissionError: ") and "was not written, and is as it was" in said
    assert in_child(as_nobody(lambda: omniadam.from_file(path))).startswith("PermissionError: ")
    os.chmod(folder, 0o755)
    os.chmod(path, 0o600)
    assert path.read_bytes() == before and os.listdir(folder) == [path.name]


def test_a_folder_in_the_place_of_the_file(path: Path) -> None:
    path.mkdir()
    with pytest.raises(IsADirectoryError, match=r"Is a folder.*was not written"):
        omniadam.save(optimizer(), path)
    with pytest.raises(ValueError, match="is a folder"):
        omniadam.from_file(path)
    assert os.listdir(path.parent) == [path.name] and not os.listdir(path)
    with pytest.raises(FileNotFoundError, match="was not written"):
        omniadam.save(optimizer(), path.parent / "nowhere" / "adam.safetensors")
    with pytest.raises(FileNotFoundError):
        omniadam.load(path.parent / "none.safetensors", optimizer())


def test_links_and_modes_stay(path: Path) -> None:
    real = path.parent / "real.safetensors"
    omniadam.save(optimizer(), real)
    real.chmod(0o640)
    path.symlink_to(real.name)
    omniadam.save(opt := optimizer(momentum=3.0), path)
    assert path.is_symlink() and stat.S_IMODE(real.stat().st_mode) == 0o640
    assert state_in(real) == omniadam.state_hash(opt)


def test_two_at_once_wait_for_one_another(path: Path) -> None:
    """The second begins while the first is in the middle of its file."""
    order: list[str] = []

    def first(opened: Any) -> None:
        child = os.fork()
        if child == 0:
            atomic.replace(path, lambda other: other.write(b"second"))
            os._exit(0)
        children.append(child)
        opened.write(b"fir")
        time.sleep(0.1)
        opened.write(b"st")
        order.append(path.read_text() if path.exists() else "none")

    children: list[int] = []
    atomic.replace(path, first)
    os.waitpid(children[0], 0)
    assert order == ["none"] and path.read_text() == "second"
    assert os.listdir(path.parent) == [path.name]


def test_an_interrupt_leaves_nothing(path: Path) -> None:
    def stop() -> Any:
        raise KeyboardInterrupt

    tensors = {"iteration": Tensor((), "int64", stop)}
    with pytest.raises(KeyboardInterrupt):
        file.write(path, Snapshot("omniadam.Adam", KERAS, {}, (), tensors))
    assert not os.listdir(path.parent)


# --- damaged and hostile ones ---


def is_refused(path: Path) -> bool:
    try:
        file.read(path)
    except ValueError as error:
        assert str(path) in str(error)
        return True
    return False


def test_no_altered_byte_is_accepted(path: Path) -> None:
    """Of 11,000 variants with some bits or bytes altered, nor of any that ends earlier."""
    omniadam.save(optimizer(), path)
    whole = path.read_bytes()
    rng = random.Random(0)
    wrong = path.with_name("wrong")
    bits = [*range(0, 8 * 64), *(rng.randrange(8 * len(whole)) for _ in range(10_000))]
    wrong.write_bytes(whole)
    with open(wrong, "r+b", buffering=0) as held:  # a new file each time would take longer
        for bit in bits:
            altered = bytes([whole[bit // 8] ^ 1 << bit % 8])
            os.pwrite(held.fileno(), altered, bit // 8)
            assert is_refused(wrong), bit
            os.pwrite(held.fileno(), whole[bit // 8 : bit // 8 + 1], bit // 8)
        assert not is_refused(wrong)
        for _ in range(500):
            at = rng.randrange(len(whole) - 8)
            os.pwrite(held.fileno(), rng.randbytes(8), at)
            assert is_refused(wrong)
        os.pwrite(held.fileno(), whole, 0)
        for size in reversed(range(len(whole))):
            os.ftruncate(held.fileno(), size)
            assert is_refused(wrong), size
    for more in (b"\0", whole):
        wrong.write_bytes(whole + more)
        assert is_refused(wrong)


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    return json.loads(whole[8 : 8 + size]), whole[8 + size :]


def put(path: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def hostile(path: Path) -> Iterator[str]:
    """Files, one after another, whose header is not what safetensors allows."""
    omniadam.save(optimizer(), path)
    header, data = parts(path)
    for name, text in {
        "empty": b"",
        "no object": b"[]",
        "deep": b'{"a":' * 5000 + b"1" + b"}" * 5000,
        "not UTF-8": b'{"\xff": 1}',
        "a pickle": b"\x80\x04K\x01.",
    }.items():
        put(path, text, data)
        yield name
    for name, length in {
        "huge": 1 << 62,
        "longer than the file": 1 << 20,
        "all": 2**64 - 1,
    }.items():
        path.write_bytes(length.to_bytes(8, "little") + b"{}" + data)
        yield name
    tensor = next(name for name in header if name not in ("__metadata__", "iteration"))
    begin, end = header[tensor]["data_offsets"]
    for name, changed in {
        "overlapping": {"data_offsets": [begin - 8, end - 8]},
        "a hole": {"data_offsets": [begin + 8, end + 8]},
        "backwards": {"data_offsets": [end, begin]},
        "beyond the end": {"data_offsets": [begin, 1 << 40]},
        "negative": {"data_offsets": [-8, end]},
        "another shape": {"shape": [7, 7]},
        "an endless shape": {"shape": [1 << 62, 1 << 62]},
        "another type": {"dtype": "F16"},
        "no type": {"dtype": "OBJECT"},
        "nothing": {"dtype": None},
    }.items():
        put(path, header | {tensor: header[tensor] | changed}, data)
        yield name
    text = json.dumps(header).encode()
    again = json.dumps({tensor: header[tensor]}).encode()
    put(path, text[:-1] + b"," + again[1:], data)
    yield "repeated"
    put(
        path, header | {"more": {"dtype": "U8", "shape": [0], "data_offsets": [begin, begin]}}, data
    )
    yield "one more"
    put(path, {k: v for k, v in header.items() if k != "__metadata__"}, data)
    yield "no metadata"
    put(path, header | {"__metadata__": {"omniadam_format": "1"}}, data)
    yield "little metadata"


def test_hostile_headers(path: Path) -> None:
    for name in hostile(path):
        assert is_refused(path), name


def forged(path: Path, **changes: Any) -> None:
    """A file whose digests are right, of content that is not."""
    whole = file.read(path).snapshot
    changed = {**vars(whole), **changes}
    # Read before the file is replaced.
    changed["tensors"] = {
        name: Tensor.of(tensor.read()) for name, tensor in changed["tensors"].items()
    }
    file.write(path, Snapshot(**changed))


def test_right_digests_of_wrong_content(path: Path) -> None:
    opt = optimizer()
    before = [weight.tobytes() for weight in opt.get_weights()]
    omniadam.save(opt, path)
    right = file.read(path).snapshot
    tensors = {name: Tensor.of(tensor.read()) for name, tensor in right.tensors.items()}
    first, second = right.variables
    cases: dict[str, dict[str, Any]] = {
        "whole numbers from 0": {
            "tensors": tensors | {"iteration": Tensor.of(np.array(-1, np.int64))}
        },
        "'iteration'": {"tensors": tensors | {"iteration": Tensor.of(np.array(np.nan))}},
        "does not fit": {"tensors": tensors | {"../../etc/passwd": Tensor.of(np.ones(3))}},
        "learning_rate": {"settings": {**right.settings, "learning_rate": -1.0}},
        "`amsgrad`": {"settings": {**right.settings, "amsgrad": "yes"}},
        "momentum of 'c'": {
            "variables": (
                first,
                second._replace(slots={**second.slots, "momentum": "c.velocity_hat"}),
            ),
            "tensors": {k: v for k, v in tensors.items() if k != "c.momentum"}
            | {"c.velocity_hat": Tensor.of(np.ones(3))},
        },
        "twice": {"variables": (first, second._replace(name=first.name))},
    }
    for message, changes in cases.items():
        file.write(path, Snapshot(**{**vars(right), "tensors": tensors, **changes}))
        with pytest.raises(ValueError, match=message):
            omniadam.load(path, opt)
        assert [weight.tobytes() for weight in opt.get_weights()] == before, message
        with pytest.raises(ValueError):
            omniadam.from_file(path).build({"a/b": np.ones(100, np.float32), "c": np.ones((3, 2))})


@pytest.mark.parametrize("rate", ["NaN", "Infinity", "1e999"])
def test_numbers_that_json_has_not(rate: str, path: Path) -> None:
    """The settings are text in the metadata: with right digests around it."""
    from hashlib import sha256

    opt = optimizer()
    omniadam.save(opt, path)
    header, data = parts(path)
    settings = json.loads(header["__metadata__"]["settings"])
    text = json.dumps(settings).replace(
        f'"learning_rate": {settings["learning_rate"]}', f'"learning_rate": {rate}'
    )
    assert rate in text
    header["__metadata__"]["settings"] = text
    encoded = json.dumps(header).encode()
    put(path, header, data[:-32] + sha256(len(encoded).to_bytes(8, "little") + encoded).digest())
    with pytest.raises(ValueError, match=r"learning_rate|damaged"):
        omniadam.load(path, opt)
    assert opt.learning_rate == 0.001


def test_a_later_format_is_named(path: Path) -> None:
    omniadam.save(optimizer(), path)
    header, data = parts(path)
    header["__metadata__"] |= {"omniadam_format": "2", "omniadam_version": "9.1.0"}
    put(path, header, data)
    with pytest.raises(ValueError, match=r"has format '2'.*Use omniadam 9\.1\.0, which wrote it"):
        file.read(path)


def test_files_of_others(path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"a": np.ones(3)}, path)
    with pytest.raises(ValueError, match="not of omniadam"):
        file.read(path)
    for content in (b"", b"PK\x03\x04", b"\x89HDF\r\n\x1a\n", b"\x80\x04."):
        path.write_bytes(content)
        assert is_refused(path)


def test_memory_and_time_of_a_hostile_file_are_bounded(path: Path) -> None:
    """A header that says what its file has not: no more memory is asked for than the file has."""

    def act() -> None:
        limit = 1 << 31
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + limit, used + limit))
        count = sum(is_refused(path) for _ in hostile(path))
        raise ValueError(f"{count} refused")

    if not Path("/proc/self/statm").exists():
        pytest.skip("how much memory is used is read from /proc")
    assert in_child(act).endswith("refused")


# --- what was written before ---

FIXTURES = sorted((Path(__file__).parent / "files").glob("*.safetensors"))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:keras")
@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda each: each.stem)
def test_files_of_earlier_versions_are_loaded(fixture: Path) -> None:
    """Each stands beside what was in it, as JSON: nothing is written anew here."""
    told = json.loads(fixture.with_suffix(".json").read_text())
    found = file.read(fixture)
    assert found.state_hash == told["state_hash"]
    given = {v["name"]: np.ones(v["shape"], v["dtype"]) for v in told["variables"]}
    if told["class"] == "optax":
        assert omniadam.state_hash(_optax_state(fixture, given)) == told["state_hash"]
        return
    if told["class"].startswith("omniadam.torch."):
        opt: Any = _of_torch(given)
        omniadam.load(fixture, opt)
        assert omniadam.state_hash(opt) == told["state_hash"]
        return
    opt = omniadam.from_file(fixture, by=told["by"])
    assert omniadam.state_hash(opt) == told["state_hash"]  # of what waits for the variables
    assert opt.get_config() == told["config"] and int(opt.iterations) == told["iterations"]
    if told["class"] in ("omniadam.Adam", "omniadam.AdamW"):
        opt.build(given if told["by"] == "name" else list(given.values()))
        assert omniadam.state_hash(opt) == told["state_hash"]
        assert opt.get_config() == told["config"] and opt.iterations == told["iterations"]


def _optax_state(fixture: Path, given: dict[str, Any]) -> Any:
    import jax.numpy as jnp

    from omniadam.optax import adamw

    names = ("dense/kernel", "dense/bias", "scale")
    shapes = ((3, 2), (2,), ())
    params = {name: jnp.zeros(shape) for name, shape in zip(names, shapes, strict=True)}
    return omniadam.load(fixture, like=adamw(0.01).init(params))


def _of_torch(given: dict[str, Any]) -> Any:
    import torch

    from omniadam.torch import AdamW

    params = [(name, torch.tensor(value)) for name, value in given.items()]
    return AdamW(params, lr=0.5, amsgrad=True, use_ema=True)


def test_there_are_files_of_earlier_versions() -> None:
    assert FIXTURES
