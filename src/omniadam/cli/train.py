"""`omniadam train`: its options, and what it says."""

import argparse
import shlex
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from omniadam.cli import checkpoint, compare, curves, digits
from omniadam.cli.frameworks import FRAMEWORKS
from omniadam.cli.peers import PEERS, NotComparable, PeerRun
from omniadam.cli.run import SCHEDULES, USUAL, Run, Settings, stored_settings

# Defaults are Adam's own.
HYPERPARAMETERS: dict[str, tuple[type, str]] = {
    "learning_rate": (float, "Step size; with --schedule, the one to start from."),
    "beta_1": (float, "Decay of the average of gradients."),
    "beta_2": (float, "Decay of the average of squared gradients."),
    "epsilon": (float, "Keeps the division finite."),
    "amsgrad": (bool, "Divide by the largest average of squared gradients so far."),
    "weight_decay": (float, "Decoupled weight decay, as in AdamW."),
    "clipnorm": (float, "Clip the norm of each variable's gradient."),
    "clipvalue": (float, "Clip each element of the gradients."),
    "global_clipnorm": (float, "Clip the norm over all gradients together."),
    "use_ema": (bool, "Keep a moving average of the weights, and evaluate with it."),
    "ema_momentum": (float, "Decay of that average."),
    "ema_overwrite_frequency": (int, "Set the weights to their average every so many steps."),
    "loss_scale_factor": (float, "Multiply the loss, divide the gradients."),
    "gradient_accumulation_steps": (int, "Update once for so many batches."),
    "epsilon_hat": (
        bool,
        'Take epsilon for "epsilon hat" of the paper, as Keras does; PyTorch and optax do not.',
    ),
}
ALL = "all"
# Of every option that the numbers of a run depend on, unless it is given or a run is resumed.
DEFAULTS: dict[str, Any] = {
    "framework": "numpy",
    "epochs": 25,
    "batch_size": 32,
    **USUAL,
    "schedule": "none",
    "schedule_epochs": None,
    "seed": 0,
}
# What the extra "demo" brings, by the names that are imported.
NEEDED = {
    "autograd": "autograd",
    "matplotlib": "matplotlib",
    "sklearn": "scikit-learn",
    "threadpoolctl": "threadpoolctl",
    "tqdm": "tqdm",
}


class Refused(Exception):
    """What the user is told in a line, before the command ends."""

    status = 1


class UsageError(Refused):
    """An option that cannot be, or not beside another."""

    status = 2


class NotInstalled(Refused):
    """The library of a run is not there."""


def integer(least: int) -> Callable[[str], int]:
    """What reads an integer that is no smaller."""

    def read(text: str) -> int:
        with suppress(ValueError):
            if int(text) >= least:
                return int(text)
        raise argparse.ArgumentTypeError(f"must be an integer of at least {least}: {text!r}")

    return read


def add_to(commands: Any) -> None:
    """Add the command to a parser's."""
    parser = commands.add_parser(
        "train",
        help="Train a small network on handwritten digits (needs omniadam[demo]).",
        description=(
            "Train a small network on scikit-learn's handwritten digits with omniadam.Adam. "
            "Variables and gradients are NumPy's (by autograd) or another library's. Takes some "
            "seconds. A run that was stopped, by whatever, goes on with --resume and ends in the "
            "same numbers as one that was not."
        ),
        usage="%(prog)s [options]",
        allow_abbrev=False,
        # What is not given is told from what is given and is the default: see `resumed_settings`.
        argument_default=argparse.SUPPRESS,
    )

    def add(name: str, text: str, default: str = "", **settings: Any) -> None:
        if not default:
            value = DEFAULTS[name]
            default = "none" if value is None else str(value)
            if isinstance(value, bool):
                default = "yes" if value else "no"
        parser.add_argument(
            "--" + name.replace("_", "-"), help=f"{text} Default: {default}.", **settings
        )

    add(
        "framework",
        "Library of the variables and gradients: %(choices)s. With all, the same run is made in "
        "each, by omniadam's Adam and by the library's own, and compared.",
        choices=[*FRAMEWORKS, ALL],
        metavar="NAME",
    )
    add("epochs", "How often to go through the examples.", type=integer(1), metavar="N")
    add("batch_size", "Examples in a step.", type=integer(1), metavar="N")
    for name, (kind, text) in HYPERPARAMETERS.items():
        if kind is bool:
            add(name, text, action=argparse.BooleanOptionalAction)
        else:
            add(name, text, type=kind, metavar="X" if kind is float else "N")
    add(
        "schedule",
        "How the learning rate comes down: %(choices)s.",
        choices=list(SCHEDULES),
        metavar="NAME",
    )
    add(
        "schedule_epochs",
        "Length of the schedule.",
        "the run's --epochs",
        type=integer(1),
        metavar="N",
    )
    text = "Decides the initial weights and the order of the batches."
    add("seed", text, type=integer(0), metavar="N")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/digits"),
        metavar="FOLDER",
        help="Folder for the checkpoint, the model and the picture. Default: %(default)s.",
    )
    for name, text in {
        "resume": "Go on with the run in --output.",
        "overwrite": "Replace the run in --output.",
    }.items():
        parser.add_argument(f"--{name}", action="store_true", default=False, help=text)

    def run(output: Path, resume: bool, overwrite: bool, **given: Any) -> None:
        try:
            train(parser.prog, output, resume, overwrite, given)
        except UsageError as error:
            parser.error(str(error))
        except Refused as error:
            sys.exit(f"Error: {error}")

    parser.set_defaults(run=run)


def train(
    command: str, output: Path, resume: bool, overwrite: bool, given: Mapping[str, Any]
) -> None:
    """Do what the options say.

    Args:
        command: how this one was called, to suggest others.
        output: the folder of the run.
        resume: whether to go on with the run that is there.
        overwrite: whether to replace it.
        given: the other options, those that were given.
    """
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        raise NotInstalled(
            f"omniadam train needs {', '.join(missing)}: pip install 'omniadam[demo]'"
        )
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output} is a file.")
    if resume and overwrite:
        raise UsageError("--resume and --overwrite contradict each other.")
    if given.get("framework") == ALL:
        if resume:
            raise UsageError(
                "--framework all starts from the beginning. --resume goes on with one of its runs: "
                f"--output {shlex.quote(str(output / 'numpy'))} --resume"
            )
        train_all(command, output, overwrite, given)
    else:
        check_free(output, resume or overwrite)
        run = train_one(command, output, resume, overwrite, given)
        report(command, run, output)


def train_all(command: str, output: Path, overwrite: bool, given: Mapping[str, Any]) -> None:
    """The same run in every library that is there, each in its own folder, and a table.

    And with each library's own Adam, which leaves nothing on disk.
    """
    for name in FRAMEWORKS:
        check_free(output / name, overwrite)
    results = []
    width = max(map(len, (*FRAMEWORKS, *(peer.label for peer in PEERS.values()))))
    for name in FRAMEWORKS:
        result = compare.Result(name)
        results.append(result)
        own = {**given, "framework": name}
        label = f"{name:{width}}  "
        try:
            run = train_one(command, output / name, False, overwrite, own, label, result.note)
        except NotInstalled as missing:
            result.problem = str(missing)
            continue
        if name in PEERS:
            results.append(train_peer(run, width))
    epochs = {**DEFAULTS, **given}["epochs"]
    print(f"\n{compare.table(results, epochs)}\nThe runs are in {output}/.")


def train_peer(ours: Run, width: int) -> compare.Result:
    """The run that ours was, by the library's own Adam."""
    from threadpoolctl import threadpool_limits

    kind = PEERS[ours.settings.framework]
    result = compare.Result(kind.label, is_own=True)
    try:
        with threadpool_limits(limits=1):  # as in `train_one`
            run = PeerRun(kind, ours.settings, ours.learn, ours.test)
            train_to_the_end(run, None, f"{kind.label:{width}}  ", result.note)
    except ModuleNotFoundError as error:
        result.problem = not_installed(ours.settings.framework, error)
    except (FloatingPointError, NotComparable) as error:
        result.problem = str(error)
    return result


FILES = ("checkpoint.npz", "model.npz", "curves.png")


def check_free(output: Path, is_wanted: bool) -> None:
    """Stop if a folder holds a run and nothing was said about it."""
    if not is_wanted and any((output / name).exists() for name in FILES):
        raise UsageError(
            f"{output} holds a run. --resume goes on with it, --overwrite replaces it, "
            "another --output leaves it alone."
        )


def train_one(
    command: str,
    output: Path,
    resume: bool,
    overwrite: bool,
    given: Mapping[str, Any],
    label: str = "",
    note: Callable[[Run], object] = lambda run: None,
) -> Run:
    """A run from its beginning, or where it stopped, to its end, with everything it leaves behind.

    `note` is called after each epoch, and `label` is put before what is said of the epoch.
    """
    from threadpoolctl import threadpool_limits

    state, model, picture = (output / name for name in FILES)
    run = open_run(given, state if resume else None)
    name = run.settings.framework
    # A sum that is split between threads depends on how many there are: with one, a run that is
    # resumed on another number of cores keeps its bits. Matrices this small lose nothing.
    with threadpool_limits(limits=1):
        try:
            output.mkdir(parents=True, exist_ok=True)
            if overwrite:
                model.unlink(missing_ok=True)
                picture.unlink(missing_ok=True)
            # Before the first step, so that a run can be resumed from any moment on; and when
            # resuming, because --epochs may have been raised.
            run.save(state)
            train_to_the_end(run, state, label, note)
            run.save_model(model)
            where = "" if name == "numpy" else f" on {run.framework.title}"
            title = f"Handwritten digits{where}"
            curves.draw(picture, np.array(run.history), title, headline(run))
        except OSError as error:
            raise Refused(f"Cannot write to {output}: {error}") from error
        except FloatingPointError as error:
            raise Refused(str(error)) from error
        except KeyboardInterrupt:
            stopped(command, output, run)
    return run


def stopped(command: str, output: Path, run: Run) -> NoReturn:
    """End the command that was interrupted, and say how to go on."""
    print(f"Stopped after epoch {run.epoch}.", file=sys.stderr)
    if (output / FILES[0]).exists():
        print(f"To go on:\n  {again(command, output)} --resume", file=sys.stderr)
    sys.exit(130)


def open_run(given: Mapping[str, Any], file: Path | None) -> Run:
    """A new run, or the one in `file`, if a file is given."""
    stored = None
    if file is not None:
        try:
            stored = checkpoint.load(file)
            settings = resumed_settings(given, stored_settings(stored))
        except FileNotFoundError as error:
            raise UsageError(
                f"There is no checkpoint in {file.parent} to resume from. Without --resume a new "
                "run starts there; --output names another folder."
            ) from error
        except (OSError, ValueError) as error:
            raise Refused(f"Cannot resume from {file}: {error}") from error
    else:
        options = {**DEFAULTS, **given}
        adam = {name: options.pop(name) for name in HYPERPARAMETERS}
        options["schedule_epochs"] = options["schedule_epochs"] or options["epochs"]
        settings = Settings(adam=adam, **options)
    learn, test = digits.load()
    try:
        run = Run(settings, learn, test)
    except ModuleNotFoundError as error:
        raise NotInstalled(not_installed(settings.framework, error)) from error
    except (TypeError, ValueError) as error:
        raise UsageError(" ".join(str(error).split())) from error
    if stored is not None:
        run.load(stored)
        print(f"Resuming after epoch {run.epoch} of {settings.epochs}.")
    return run


def not_installed(framework: str, error: ModuleNotFoundError) -> str:
    """What is missing, and what to do."""
    library = str(error.name).partition(".")[0]
    has_extra = library in FRAMEWORKS or library == "optax"
    package = f"'omniadam[{library}]'" if has_extra else library
    other = ", or set KERAS_BACKEND" if framework == "keras" != library else ""
    return f"{library} is not installed: pip install {package}{other}"


def resumed_settings(given: Mapping[str, Any], stored: Settings) -> Settings:
    """The stored settings, with --epochs raised or --framework changed where it was given.

    No other may differ.
    """
    before, others = stored.flat(), dict(given)
    framework = others.pop("framework", stored.framework)  # state is the same in each
    epochs = others.get("epochs", stored.epochs)
    if epochs > stored.epochs:
        del others["epochs"]
    for name, value in others.items():
        if value != before[name]:
            raise UsageError(
                f"--{name.replace('_', '-')} is {value}, but the run to resume was started with "
                f"{before[name]}. Leave the option out, or start another run with --output."
                + (" --epochs can only be raised." if name == "epochs" else "")
            )
    return replace(stored, epochs=epochs, framework=framework)


def train_to_the_end(
    run: Run, file: Path | None, label: str = "", note: Callable[[Run], object] = lambda run: None
) -> None:
    """Train the epochs that are left, with a checkpoint after each if a file is given.

    On a terminal a progress bar is shown; elsewhere, in a log, a line is written for each epoch.
    """
    from tqdm import tqdm

    steps, epochs = run.steps_per_epoch, run.settings.epochs
    is_shown = sys.stderr.isatty()
    settings: dict[str, Any] = {"total": epochs * steps, "initial": run.epoch * steps}
    with tqdm(**settings, unit="step", disable=not is_shown) as bar:
        accuracy = f", test accuracy {run.history[-1][3]:.2%}" if run.history else ""
        losses: list[float] = []

        def progress(loss: float) -> None:
            losses.append(loss)
            bar.set_postfix_str(f"loss {sum(losses) / len(losses):.4f}{accuracy}", refresh=False)
            bar.update()

        while run.epoch < epochs:
            bar.set_description(f"{label}epoch {run.epoch + 1}/{epochs}", refresh=False)
            losses.clear()
            run.train_epoch(progress)
            if file is not None:
                run.save(file)
            note(run)
            loss, accuracy = run.history[-1][0], f", test accuracy {run.history[-1][3]:.2%}"
            if not is_shown:
                line = f"{label}epoch {run.epoch}/{epochs}: loss {loss:.4f}{accuracy}"
                print(line, file=sys.stderr, flush=True)
        bar.set_postfix_str(f"loss {run.history[-1][0]:.4f}{accuracy}")


def headline(run: Run) -> str:
    """The result in a line."""
    accuracy, examples = run.history[-1][3], len(run.test)
    right = round(accuracy * examples)
    epochs = f"{run.epoch} epoch{'s' * (run.epoch > 1)}"
    return f"test accuracy {accuracy:.2%} after {epochs} ({right} of {examples})"


def again(command: str, output: Path) -> str:
    """The command that starts on this folder."""
    return f"{command} --output {shlex.quote(str(output))}"


def report(command: str, run: Run, output: Path) -> None:
    """Say what came out, where it is, and what could be next."""
    files = [output / name for name in FILES]
    print(f"\n{headline(run).capitalize()}\n")
    for file, content in zip(
        files,
        (
            "weights, optimizer and settings: what --resume starts from",
            "the weights to use" + (", their averages" if run.settings.adam["use_ema"] else ""),
            "loss and accuracy over the epochs",
        ),
        strict=True,
    ):
        print(f"  {file!s:<{max(len(str(file)) for file in files)}}  {content}")
    print(
        f"""
To try next:
  {again(command, output)} --resume --epochs {run.epoch * 2}
  {command} --output runs/cosine --schedule cosine --learning-rate 0.003
  {command} --output runs/steady --use-ema --weight-decay 0.01 --global-clipnorm 1
  {command} --output runs/all --framework all
  {command} --help"""
    )
