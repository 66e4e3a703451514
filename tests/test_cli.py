"""`omniadam`: what it says, what a run leaves on disk, and that no interruption shows."""

import contextlib
import inspect
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import tomllib
import warnings
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import omniadam
from omniadam import slow

pytest.importorskip("autograd")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from autograd import value_and_grad

from omniadam.cli import checkpoint, compare, curves, digits, main
from omniadam.cli.frameworks import FRAMEWORKS
from omniadam.cli.peers import PEERS, NotComparable, PeerRun
from omniadam.cli.run import SCHEDULES, USUAL, Run, Settings
from omniadam.cli.train import DEFAULTS, HYPERPARAMETERS, NEEDED
from omniadam.environment import Info

# Four epochs of twelve steps; --schedule-epochs so that a run of two epochs has the same schedule.
SHORT = ["--batch-size", "128", "--schedule-epochs", "4"]
SOURCE = str(Path(omniadam.__file__).parents[1])


@dataclass
class Result:
    """What the command wrote, and its status."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


class Written(io.StringIO):
    is_terminal = False

    def isatty(self) -> bool:
        return self.is_terminal


def call(*arguments: object) -> Result:
    """The command in this process."""
    status: Any = 0
    with (
        contextlib.redirect_stdout(Written()) as out,
        contextlib.redirect_stderr(Written()) as err,
    ):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code
    if isinstance(status, str):  # as the interpreter does with it
        return Result(1, out.getvalue(), f"{err.getvalue()}{status}\n")
    return Result(status or 0, out.getvalue(), err.getvalue())


def invoke(*arguments: object) -> Result:
    return call("train", *arguments)


def trained(output: Path, *arguments: object) -> dict[str, np.ndarray]:
    result = invoke("--output", output, *arguments)
    assert result.exit_code == 0, result.output
    return stored(output)


def stored(output: Path) -> dict[str, np.ndarray]:
    """What is in the checkpoint of a run, by a reader that is not ours."""
    arrays: dict[str, np.ndarray] = load_file(output / "checkpoint.safetensors")
    return arrays


def settings_in(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(arrays["run/settings"].tobytes())
    return found


def assert_same_bits(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert list(one) == list(other)
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert one[name].tobytes() == other[name].tobytes(), name


def test_the_defaults_learn_the_digits(tmp_path: Path) -> None:
    result = invoke("--output", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "test accuracy" in result.stderr and "loss" in result.stderr
    assert "Test accuracy" in result.stdout and "To try next:" in result.stdout

    state = stored(tmp_path / "run")
    model = checkpoint.load(tmp_path / "run" / "model.npz")
    accuracy = state["run/history"][-1, 3]
    assert accuracy >= 0.97
    assert f"{accuracy:.2%}" in result.stdout
    assert digits.loss_and_accuracy(list(model.values()), digits.load()[1])[1] == accuracy
    assert_same_bits(model, {k: state[f"model/{k}"] for k in model})

    picture = (tmp_path / "run" / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and len(picture) > 10_000
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "checkpoint.safetensors",
        "curves.png",
        "model.npz",
    ]


def test_every_hyperparameter_is_an_option_with_adams_default() -> None:
    signature = inspect.signature(omniadam.Adam).parameters
    assert list(HYPERPARAMETERS) == [name for name in signature if name != "name"]
    for name in HYPERPARAMETERS:
        assert DEFAULTS[name] == signature[name].default


def test_every_option_has_a_help_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    for command in ("train", "info", "inspect", "diff", "convert"):
        page = call(command, "--help")
        assert page.exit_code == 0
        joined = re.sub(r"\n {8,}", "  ", page.stdout)  # what is too long for the first column
        options = [line for line in joined.splitlines() if line.startswith("  -")]
        assert all(re.fullmatch(r"  -.*?  +[A-Zs].{10,}", line) for line in options), options
        if command == "train":
            shown = {
                match[1]: line for line in options if (match := re.match(r"  --([\w-]+)", line))
            }
            assert {name.replace("_", "-") for name in DEFAULTS} < set(shown)
            assert (
                shown["seed"].endswith("Default: 0.")
                and "Default: 0.001." in shown["learning-rate"]
            )
            assert shown["amsgrad"].endswith("Default: no.") and "--no-amsgrad" in shown["amsgrad"]


def test_on_a_terminal_there_is_a_bar_and_elsewhere_a_line_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*SHORT, "--epochs", 2]
    lines = invoke("--output", tmp_path / "log", *arguments).stderr.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    assert all(re.search(r": loss 0\.\d{4}, test accuracy \d\d\.\d\d%$", line) for line in lines)
    monkeypatch.setattr(Written, "is_terminal", True)
    bar = invoke("--output", tmp_path / "bar", *arguments).stderr
    assert "step/s" in bar and f"{100}%" in bar and "epoch 2/2: loss" not in bar


def test_the_examples_are_fixed_and_the_order_depends_on_seed_and_epoch() -> None:
    learn, test = digits.load()
    assert (len(learn), len(test)) == (1437, 360)
    assert np.ptp(test.digits.sum(axis=0)) <= 3  # of 36 each
    assert learn.images.dtype == learn.digits.dtype == np.float32

    def order(seed: int, epoch: int) -> bytes:
        batches = list(digits.batches(learn, 100, seed, epoch))
        assert [len(batch) for batch in batches] == [100] * 14 + [37]
        images = np.concatenate([batch.images for batch in batches])
        assert sorted(map(bytes, images)) == sorted(map(bytes, learn.images))
        return images.tobytes()

    assert order(0, 3) == order(0, 3)
    assert len({order(0, 3), order(0, 4), order(1, 3)}) == 3


def test_loss_and_gradients_are_float32() -> None:
    weights = list(digits.initial_parameters(0).values())
    batch = next(digits.batches(digits.load()[0], 32, 0, 0))
    loss, gradients = value_and_grad(digits.cross_entropy)(weights, batch)
    assert loss.dtype == np.float32
    assert [(g.shape, g.dtype) for g in gradients] == [(w.shape, w.dtype) for w in weights]
    assert float(loss) == pytest.approx(digits.loss_and_accuracy(weights, batch)[0], rel=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_start_at_the_rate_and_come_down(name: str) -> None:
    rate = SCHEDULES[name](0.01, 100)
    if name == "none":
        assert rate == 0.01
        return
    rates = [float(rate(step)) for step in range(100)]
    assert rates[0] == pytest.approx(0.01)
    assert 0 <= rates[-1] <= 0.0012
    SCHEDULES[name](0.01, 1)(0)  # a run of one step has a schedule too


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--use-ema --ema-momentum 0.9 --ema-overwrite-frequency 5 --schedule piecewise",
        "--gradient-accumulation-steps 5 --loss-scale-factor 1024 --clipvalue 0.01",
        "--schedule cosine-restarts --amsgrad --weight-decay 0.01 --global-clipnorm 1 --seed 7",
        "--schedule exponential --use-ema --gradient-accumulation-steps 5 --clipnorm 0.5",
    ],
)
def test_resumed_is_as_never_stopped(options: str, tmp_path: Path) -> None:
    arguments = [*SHORT, *options.split()]
    whole = trained(tmp_path / "whole", *arguments, "--epochs", 4)
    trained(tmp_path / "parts", *arguments, "--epochs", 1)
    parts = trained(tmp_path / "parts", "--epochs", 4, "--resume")
    assert_same_bits(parts, whole)
    for name in ("model.npz", "curves.png"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_every_installed_library_makes_the_same_run(tmp_path: Path) -> None:
    """In a process of its own: Keras on a library that compiles, and imports with their noise."""
    installed = {name for name in FRAMEWORKS if find_spec(name)}
    below = next(n for n in ("jax", "tensorflow", "torch", "numpy") if n in installed)
    options = "--framework all --schedule cosine --epochs 4"
    process = subprocess.run(
        [sys.executable, "-m", "omniadam", "train", "--output", "run", *options.split(), *SHORT],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": SOURCE, "KERAS_BACKEND": below},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    for name in FRAMEWORKS:
        (row,) = (line for line in lines if line.split(" ")[0] == name)
        if name not in installed:
            assert f"{name} is not installed" in row
            continue
        title, loss, accuracy, milliseconds, *differences = re.split(r" {2,}", row)
        assert title.endswith(f" on {below}") == (name == "keras")
        history = stored(tmp_path / "run" / name)["run/history"]
        assert loss == f"{history[-1, 0]:.4f}" and accuracy == f"{history[-1, 3]:.2%}"
        assert history[-1, 3] > 0.9
        assert float(milliseconds) > 0
        assert len(checkpoint.load(tmp_path / "run" / name / "model.npz")) == 6
        assert (tmp_path / "run" / name / "curves.png").exists()
        # After twelve steps. Gradients differ by roundings, 1e-7 of their largest, which is about
        # 1e-2. Where a gradient is no larger than epsilon, 1e-7, that is at most a hundredth of it,
        # and moves the weight by a hundredth of a step, which is the learning rate, 1e-3.
        # Another batch or setting anywhere would show as whole steps.
        assert name == "numpy" or float(differences[0]) <= 1e-5
        if name in PEERS:
            check_own(name, lines[lines.index(row) + 1], below, result=(loss, accuracy))
    # Older versions of TensorFlow say, too, that XLA is there, in the form of its logs.
    expected = r"[\w.]+ +epoch \d/4: loss"
    libraries = omniadam.info()["libraries"]
    if libraries.get("tensorflow-cpu", libraries.get("tensorflow", "")).startswith("2.19."):
        expected += r"|WARNING: All log messages before absl|I\d{4} [\d:.]+ "
    said = process.stderr.splitlines()
    assert [line for line in said if not re.match(expected, line)] == []


def check_own(name: str, row: str, below: str, result: tuple[str, str]) -> None:
    """The row of a library's own Adam, below ours."""
    title, *cells = re.split(r" {2,}", row.strip())
    assert row.startswith("  ") and title.startswith(PEERS[name].label)
    if name == "tensorflow" != below:
        assert cells == [f"Keras runs on {below} here: set KERAS_BACKEND=tensorflow"]
        return
    loss, accuracy, milliseconds, early, _ = cells
    assert float(loss) == pytest.approx(float(result[0]), abs=5e-3) and float(milliseconds) > 0
    assert float(accuracy.rstrip("%")) == pytest.approx(float(result[1].rstrip("%")), abs=1)
    assert 0 < float(early) < 0.05  # it is another Adam


@pytest.mark.needs("torch")
@pytest.mark.parametrize("option", ["", "--weight-decay 5", "--clipnorm 1"])
def test_own_adam_has_the_settings_of_the_run_or_says_so(option: str) -> None:
    settings = Settings(
        epochs=1,
        batch_size=128,
        seed=0,
        schedule="exponential",
        schedule_epochs=1,
        framework="torch",
        adam={**USUAL, "weight_decay": 5.0} if "decay" in option else USUAL,
    )
    if "clip" in option:
        with pytest.raises(NotComparable, match="has no --clipnorm"):
            PeerRun(
                PEERS["torch"], replace(settings, adam={**USUAL, "clipnorm": 1.0}), *digits.load()
            )
        return
    runs = [Run(settings, *digits.load()), PeerRun(PEERS["torch"], settings, *digits.load())]
    for run in runs:
        run.train_epoch(lambda loss: None)
    ours, own = (run.weights() for run in runs)
    # Epsilon is elsewhere; a forgotten decay or schedule would move the mean weight by 1e-3.
    assert 0 < compare.largest_difference(ours, own) < 2e-3
    middle = [float(np.abs(a - b).mean()) for a, b in zip(ours, own, strict=True)]
    assert max(middle) < 1e-4


def test_a_library_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "jax", "tensorflow", "keras"):
        monkeypatch.setitem(sys.modules, name, None)
    result = invoke("--output", tmp_path / "run", "--framework", "torch")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == (
        "Error: torch is not installed: pip install 'omniadam[torch]'"
    )
    assert not list(tmp_path.iterdir())

    result = invoke("--output", tmp_path, "--framework", "all", *SHORT, "--epochs", 1)
    assert result.exit_code == 0
    assert result.stdout.count("not installed") == 4
    assert [folder.name for folder in tmp_path.iterdir()] == ["numpy"]


def test_all_neither_resumes_nor_replaces_unasked(tmp_path: Path) -> None:
    state = trained(tmp_path / "keras", *SHORT, "--epochs", 1)
    for option, words in {"--resume": "beginning", "--no-amsgrad": "keras holds a run"}.items():
        result = invoke("--output", tmp_path, "--framework", "all", option)
        assert result.exit_code == 2
        assert words in " ".join(result.stderr.split())
    assert [folder.name for folder in tmp_path.iterdir()] == ["keras"]
    assert_same_bits(stored(tmp_path / "keras"), state)


@pytest.mark.needs("torch")
@pytest.mark.parametrize(
    "options",
    ["", "--use-ema --gradient-accumulation-steps 5 --loss-scale-factor 1024 --schedule cosine"],
)
def test_resumed_on_torch_is_as_never_stopped(options: str, tmp_path: Path) -> None:
    arguments = ["--framework", "torch", *SHORT, *options.split()]
    whole = trained(tmp_path / "whole", *arguments, "--epochs", 4)
    trained(tmp_path / "parts", *arguments, "--epochs", 1)
    parts = trained(tmp_path / "parts", "--epochs", 4, "--resume")
    assert settings_in(parts)["framework"] == "torch"
    assert_same_bits(parts, whole)


@pytest.mark.needs("torch")
def test_a_run_goes_on_in_another_library(tmp_path: Path) -> None:
    options = ["--use-ema", "--clipnorm", 1, "--schedule", "cosine", *SHORT]
    numpy = trained(tmp_path / "numpy", *options, "--epochs", 2)
    trained(tmp_path / "both", *options, "--epochs", 1)
    state = trained(tmp_path / "both", "--epochs", 2, "--resume", "--framework", "torch")
    assert settings_in(state)["framework"] == "torch"
    assert list(state) == list(numpy)
    for name in state:
        if state[name].dtype == np.float32:  # 1e-5: see above
            assert np.abs(state[name] - numpy[name]).max() <= 1e-5, name


def test_with_ema_the_model_is_the_average_and_the_checkpoint_is_not(tmp_path: Path) -> None:
    state = trained(tmp_path, *SHORT, "--epochs", 2, "--use-ema")
    model = checkpoint.load(tmp_path / "model.npz")
    weights = {name: state[f"model/{name}"] for name in model}
    assert all((weights[name] != model[name]).any() for name in model)
    averages = [value for name, value in state.items() if name.endswith(".average")]
    for value in model.values():
        assert any(value.tobytes() == average.tobytes() for average in averages)
    tested = digits.loss_and_accuracy(list(model.values()), digits.load()[1])
    assert tested == tuple(state["run/history"][-1, 2:])


# The command in its own process, killed where it would give the checkpoint its name the nth time,
# n being the first argument: all is written then, and still under the temporary name.
COMMAND = """
import os, signal, sys
left, replace = int(sys.argv.pop(1)), os.replace
def counted(source, target):
    global left
    left -= str(target).endswith("checkpoint.safetensors")
    replace(source, target) if left else os.kill(os.getpid(), signal.SIGKILL)
os.replace = counted
sys.argv[0] = "omniadam"
from omniadam.cli import main
main()
"""


def start(output: Path, *arguments: object, killed_at: int = 1000) -> "subprocess.Popen[bytes]":
    path = os.pathsep.join(filter(None, [SOURCE, os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(killed_at), "train", "--output", str(output)]
        + [str(argument) for argument in arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": path},
    )


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
def test_killed_at_the_worst_moments(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", *SHORT, "--epochs", 4)
    broken = tmp_path / "broken"
    assert start(broken, *SHORT, "--epochs", 4, killed_at=1).wait(60) == -signal.SIGKILL
    assert not (broken / "checkpoint.safetensors").exists()

    process = start(broken, *SHORT, "--epochs", 4, killed_at=4)
    assert process.wait(60) == -signal.SIGKILL
    state = stored(broken)
    assert len(state["run/history"]) == 2  # written before the first step and after two epochs
    assert [path.name for path in broken.glob(".*")] == [".checkpoint.safetensors.partial"]

    assert_same_bits(trained(broken, "--resume"), whole)
    assert_same_bits(trained(broken, "--resume"), whole)  # nothing is left to do: nothing changes


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
def test_killed_at_random_moments(tmp_path: Path) -> None:
    options = ["--epochs", 30, "--batch-size", 64, "--use-ema", "--schedule", "cosine"]
    whole = trained(tmp_path / "whole", *options)
    broken = tmp_path / "broken"
    file = broken / "checkpoint.safetensors"
    moment = random.Random(0)
    done = []
    for _ in range(3):
        before = file.stat().st_mtime_ns if file.exists() else None
        process = start(broken, *options, *(["--resume"] if before else []))
        while process.poll() is None and (not file.exists() or file.stat().st_mtime_ns == before):
            time.sleep(0.002)
        time.sleep(moment.uniform(0, 0.4))
        process.kill()
        process.wait()
        done.append(len(stored(broken)["run/history"]))
    assert sorted(done) == done and done[0] < 30, done
    assert_same_bits(trained(broken, "--resume"), whole)


def test_resume_without_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    result = invoke("--output", tmp_path / "run", *SHORT, "--epochs", 1, "--resume")
    assert result.exit_code == 2
    assert f"no checkpoint in {tmp_path / 'run'} to resume from" in result.stderr
    assert not list(tmp_path.iterdir())


def test_resume_takes_its_settings_from_the_run(tmp_path: Path) -> None:
    state = trained(tmp_path, *SHORT, "--epochs", 2, "--beta-1", 0.8)
    for options, words in {
        ("--batch-size", 64): "--batch-size is 64, but the run to resume was started with 128",
        ("--beta-1", 0.9): "--beta-1 is 0.9, but the run to resume was started with 0.8",
        ("--use-ema",): "--use-ema is True, but the run to resume was started with False",
        ("--epochs", 1): "--epochs can only be raised",
        ("--overwrite",): "contradict",
    }.items():
        result = invoke("--output", tmp_path, "--resume", *options)
        assert result.exit_code == 2
        assert words in result.stderr
    assert_same_bits(stored(tmp_path), state)
    trained(tmp_path, "--resume", "--epochs", 3, "--beta-1", 0.8, "--no-use-ema")


def test_a_run_is_not_replaced_unasked(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("a folder may hold other things")
    state = trained(tmp_path, *SHORT, "--epochs", 1)
    result = invoke("--output", tmp_path, *SHORT, "--epochs", 1, "--seed", 1)
    assert result.exit_code == 2
    assert all(option in result.stderr for option in ("--resume", "--overwrite", "--output"))
    assert_same_bits(stored(tmp_path), state)

    other = trained(tmp_path, *SHORT, "--epochs", 1, "--seed", 1, "--overwrite")
    assert settings_in(other)["seed"] == 1
    assert (tmp_path / "mine.txt").exists()


@pytest.mark.parametrize("name", ["checkpoint.npz", "checkpoint.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 half an archive"])
def test_a_damaged_checkpoint_is_an_error_in_a_line(
    content: bytes, name: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    check_cannot_resume(tmp_path / name)


def test_no_altered_byte_is_accepted(tmp_path: Path) -> None:
    """Of the weights and of the run's settings, which are beside the optimizer's state."""
    trained(tmp_path, *SHORT, "--epochs", 1)
    file = tmp_path / "checkpoint.safetensors"
    content, weights = file.read_bytes(), stored(tmp_path)
    for name in ("model/dense_3/bias", "run/settings", "run/history", "iteration"):
        place = content.index(weights[name].tobytes())
        changed = bytearray(content)
        changed[place] ^= 1
        file.write_bytes(changed)
        check_cannot_resume(file)
    omniadam.save(omniadam.Adam(), file)  # a file of ours, and of no run
    assert "not a file that omniadam train wrote" in check_cannot_resume(file)


def check_cannot_resume(file: Path) -> str:
    before = file.read_bytes()
    result = invoke("--output", file.parent, "--resume")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: Cannot resume from")
    assert len(result.stderr.splitlines()) == 1
    assert file.read_bytes() == before
    return result.stderr


FIXTURE = Path(__file__).parent / "fixtures" / "train" / "checkpoint.npz"


def test_a_checkpoint_that_was_written_before(tmp_path: Path) -> None:
    """By omniadam when checkpoints were .npz, after one epoch; its values are a pattern."""
    (tmp_path / "checkpoint.npz").write_bytes(FIXTURE.read_bytes())
    assert invoke("--output", tmp_path, *SHORT).exit_code == 2  # there is a run
    result = invoke("--output", tmp_path, "--resume")  # nothing is left to do
    assert result.exit_code == 0 and "Resuming after epoch 1 of 1." in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint.safetensors",
        "curves.png",
        "model.npz",
    ]
    old, new = checkpoint.load(FIXTURE), stored(tmp_path)
    settings = json.loads(str(old["settings"]))
    settings["adam"]["epsilon_hat"] = True  # which it was then, without a name
    assert settings_in(new) == settings and settings["adam"]["use_ema"]
    assert new["run/history"].tobytes() == old["history"].tobytes()
    names = [name.removeprefix("model/") for name in old if name.startswith("model/")]
    # Keras's order: the count, averages, accumulators, momentum and velocity by turns, the hats.
    order = [*(f"{name}.average" for name in names)]
    order += [f"{name}.gradient_accumulator" for name in names]
    order += [f"{name}.{slot}" for name in names for slot in ("momentum", "velocity")]
    order += [f"{name}.velocity_hat" for name in names]
    pairs = {f"model/{name}": f"model/{name}" for name in names}
    pairs |= {name: f"optimizer/{i}" for i, name in enumerate(["iteration", *order])}
    assert new.keys() == {*pairs, "run/settings", "run/history", "omniadam.digests"}
    for name, before in pairs.items():
        assert new[name].dtype == old[before].dtype, name
        assert new[name].tobytes() == old[before].tobytes(), name
    # And it goes on, the same from either file.
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "checkpoint.npz").write_bytes(FIXTURE.read_bytes())
    ends = [trained(path, "--resume", "--epochs", 2) for path in (tmp_path, tmp_path / "again")]
    assert_same_bits(*ends)
    assert len(ends[0]["run/history"]) == 2


def test_the_state_of_a_run_is_a_file_like_any(tmp_path: Path) -> None:
    trained(tmp_path, *SHORT, "--epochs", 1)
    result = call("inspect", tmp_path / "checkpoint.safetensors")
    assert result.exit_code == 0 and "dense_1/kernel" in result.stdout
    opt = omniadam.from_file(tmp_path / "checkpoint.safetensors")
    assert opt.iterations == 12


def test_a_checkpoint_of_another_version_is_an_error_in_a_line(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "checkpoint.npz", {"format": np.array(99)})
    result = invoke("--output", tmp_path, "--resume")
    assert result.exit_code == 1
    assert "another version of omniadam" in result.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--beta-1 1.5", "beta_1"),
        ("--learning-rate nan", "learning_rate"),
        ("--learning-rate -1 --schedule cosine", "learning_rate"),
        ("--epsilon -1e-7", "epsilon"),
        ("--clipnorm 1 --clipvalue 1", "clip"),
        ("--weight-decay -0.1", "weight_decay"),
        ("--gradient-accumulation-steps 0", "gradient_accumulation_steps"),
        ("--batch-size 0", "--batch-size"),
        ("--epochs many", "--epochs"),
        ("--schedule linear", "--schedule"),
        ("--seed -1", "--seed"),
    ],
)
def test_bad_values_are_usage_errors(options: str, words: str, tmp_path: Path) -> None:
    result = invoke("--output", tmp_path / "run", *options.split())
    assert result.exit_code == 2
    assert words in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.output
    assert not (tmp_path / "run").exists()


def test_a_run_that_diverges_says_so_and_keeps_its_last_good_state(tmp_path: Path) -> None:
    result = invoke("--output", tmp_path, *SHORT, "--learning-rate", 1e30)
    assert result.exit_code == 1
    assert "diverged" in result.stderr and "--learning-rate" in result.stderr
    state = stored(tmp_path)
    assert all(np.isfinite(value).all() for value in state.values() if value.dtype.kind == "f")


def test_a_folder_that_cannot_be_written_is_an_error_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result = invoke("--output", tmp_path / "file" / "run", *SHORT, "--epochs", 1)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("Error: Cannot write to")
    result = invoke("--output", tmp_path / "file")
    assert result.exit_code == 2 and "is a file" in result.stderr


def test_interrupted_by_the_keyboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("omniadam.cli.train.train_to_the_end", interrupt)
        result = invoke("--output", tmp_path, *SHORT, "--epochs", 1)
    assert result.exit_code == 130
    assert f"--output {tmp_path} --resume" in result.stderr
    trained(tmp_path, "--resume")


def in_a_process(script: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": SOURCE},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_without_the_extra_all_but_a_run_works(tmp_path: Path) -> None:
    """And `train --help`, too; a run says what to install."""
    script = f"""
import os, sys
for name in {[*NEEDED, "click"]}:
    sys.modules[name] = None
from omniadam.cli import main
for arguments in ["--version"], ["--help"], ["info"], ["train", "--help"], ["train"]:
    try:
        main(arguments)
    except SystemExit as end:
        print(arguments, "ended with", end.code)
print(os.listdir())
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": SOURCE},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    ends = [line for line in done.stdout.splitlines() if "ended with" in line]
    packages = ", ".join(NEEDED.values())
    assert ends == [
        "['--version'] ended with 0",
        "['--help'] ended with 0",
        "['train', '--help'] ended with 0",
        f"['train'] ended with Error: omniadam train needs {packages}: "
        "pip install 'omniadam[demo]'",
    ]
    assert done.stdout.startswith(f"omniadam {omniadam.__version__}\n")
    assert "kernels:" in done.stdout and "--learning-rate" in done.stdout
    assert done.stdout.endswith("[]\n")


def test_the_extra_is_what_a_run_needs() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))
    extra = project["project"]["optional-dependencies"]["demo"]
    names = {re.split(r"[>\[]", each.removeprefix("omniadam["))[0].rstrip("]") for each in extra}
    assert names == set(NEEDED.values())


def test_without_a_command_it_shows_its_help() -> None:
    alone, asked = call(), call("--help")
    assert alone.exit_code == 0 and alone.stdout == asked.stdout
    assert all(name in alone.stdout for name in ("info", "train", "--version"))


@pytest.mark.parametrize(
    "arguments", [["infos"], ["--verbose"], ["info", "--js"], ["train", "--ep", "1"]]
)
def test_what_is_no_command_or_option_is_an_error_in_two_lines(arguments: list[str]) -> None:
    result = call(*arguments)
    assert result.exit_code == 2 and not result.stdout
    hint, error = result.stderr.splitlines()
    assert "--help" in hint and "error:" in error


def test_the_best_epoch_is_that_of_the_most_accuracy_and_then_of_the_least_loss() -> None:
    history = np.array([[1, 0, 0.1, 0.8], [1, 0, 0.9, 0.9], [1, 0, 0.5, 0.9], [0, 1, 0.5, 0.9]])
    assert curves.best_epoch(history) == 2


# --- omniadam info --------------------------------------------------------------------------------


def test_info_is_what_a_report_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNIADAM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("OMNIADAM_NUM_THREADS", "3")
    found = omniadam.info()
    assert set(found) == set(Info.__annotations__)
    assert found["libraries"]["numpy"] == np.__version__ and "numba" in found["libraries"]
    assert found["kernels"] == "compiled by Numba" and found["threads"] == 3
    assert found["cache"] == {
        "folder": str(tmp_path / "cache"),
        "writable": True,
        "files": 0,
        "bytes": 0,
    }
    (tmp_path / "cache" / "kernel").write_bytes(b"12345")
    assert omniadam.info()["cache"]["bytes"] == 5
    assert found["variables"]["OMNIADAM_NUM_THREADS"] == "3"

    text = call("info")
    assert text.exit_code == 0 and not text.stderr
    for words in (np.__version__, omniadam.__version__, "3 in a large step", str(tmp_path)):
        assert words in text.stdout
    again = json.loads(call("info", "--json").stdout)
    assert again == json.loads(json.dumps(omniadam.info()))

    monkeypatch.setenv("OMNIADAM_CACHE_DIR", str(tmp_path / "cache" / "kernel" / "below"))
    monkeypatch.setenv("OMNIADAM_KERNEL", "numpy")
    found = omniadam.info()
    assert found["kernels"] == "NumPy only: OMNIADAM_KERNEL is numpy"
    assert not found["cache"]["writable"] and "cannot be written" in call("info").stdout
    monkeypatch.setenv("OMNIADAM_KERNEL", "fortran")
    assert call("info").stderr.startswith("Error: OMNIADAM_KERNEL must be")


def test_info_imports_no_library_and_asks_those_that_are() -> None:
    script = """
import sys, types
import omniadam
assert omniadam.info()["devices"] == {}
print(sorted({"torch", "jax", "tensorflow", "keras", "numba"} & set(sys.modules)))
sys.modules["torch"] = None
sys.modules["jax"] = types.SimpleNamespace(
    devices=lambda: [types.SimpleNamespace(platform="gpu", id=1, device_kind="A")]
)
print(omniadam.info()["devices"])
"""
    done = in_a_process(script)
    assert done.returncode == 0, done.stderr
    none, devices = done.stdout.splitlines()
    assert none == "[]"
    assert "no answer: AttributeError" in devices and "'jax': ['gpu:1 (A)']" in devices


def test_what_is_slow_is_said_once_and_told_again_by_info(slow_reasons: list[str]) -> None:
    with pytest.warns(RuntimeWarning, match="slow here: no wheels. Results are the same") as said:
        slow.warn("no wheels.")
        slow.warn("no wheels.")
    assert len(said) == 1
    assert omniadam.info()["slow"] == ["no wheels."]
    assert re.search("slow: +no wheels.", call("info").stdout)
    # As the warning itself says, it is silenced.
    with warnings.catch_warnings():
        exec(
            str(said[0].message).partition("To silence this: ")[2].rstrip("."),
            {"warnings": warnings},
        )
        slow.warn("no road.")
