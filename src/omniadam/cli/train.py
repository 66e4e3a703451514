"""`omniadam train`: its options, and what it says."""

import inspect
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from click.core import ParameterSource
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from omniadam import Adam
from omniadam.cli import checkpoint, compare, curves, digits
from omniadam.cli.frameworks import FRAMEWORKS
from omniadam.cli.run import SCHEDULES, Run, Settings, stored_settings

# Defaults are Adam's own, read from its signature.
HYPERPARAMETERS: dict[str, tuple[type, str]] = {
    "learning_rate": (float, "Step size; with --schedule, the one to start from."),
    "beta_1": (float, "Decay of the average of gradients."),
    "beta_2": (float, "Decay of the average of squared gradients."),
    "epsilon": (float, 'Keeps the division finite: "epsilon hat" of the paper.'),
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
}


def hyperparameters(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for each hyperparameter of Adam."""
    signature = inspect.signature(Adam).parameters
    for name, (kind, text) in reversed(HYPERPARAMETERS.items()):
        flag = "--" + name.replace("_", "-")
        default = signature[name].default
        command = click.option(
            f"{flag}/--no{flag[1:]}" if kind is bool else flag,
            name,
            type=kind,
            default=default,
            show_default="none" if default is None else True,
            help=text,
        )(command)
    return command


ALL = "all"


class NotInstalled(click.ClickException):
    """The library of a run is not there."""


@click.command(context_settings={"max_content_width": 100})
@click.option(
    "--framework",
    type=click.Choice([*FRAMEWORKS, ALL]),
    default="numpy",
    show_default=True,
    help="Library of the variables and gradients; all makes the run in each and compares.",
)
@click.option("--epochs", type=click.IntRange(min=1), default=25, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@hyperparameters
@click.option("--schedule", type=click.Choice(SCHEDULES), default="none", show_default=True)
@click.option(
    "--schedule-epochs",
    type=click.IntRange(min=1),
    help="Length of the schedule.  [default: the run's --epochs]",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Decides the initial weights and the order of the batches.",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs/digits"),
    show_default=True,
    help="Folder for the checkpoint, the model and the picture.",
)
@click.option("--resume", is_flag=True, help="Go on with the run in --output.")
@click.option("--overwrite", is_flag=True, help="Replace the run in --output.")
@click.pass_context
def train(
    context: click.Context,
    /,
    output: Path,
    resume: bool,
    overwrite: bool,
    **options: Any,
) -> None:
    """Train a small network on scikit-learn's handwritten digits with omniadam.Adam.

    Variables and gradients are NumPy's (by autograd) or another library's. Takes some seconds. A
    run that was stopped, by whatever, goes on with --resume and ends in the same numbers as one
    that was not.
    """
    if resume and overwrite:
        raise click.UsageError("--resume and --overwrite contradict each other.")
    if options["framework"] == ALL:
        if resume:
            raise click.UsageError(
                "--framework all starts from the beginning. --resume goes on with one of its runs: "
                f"--output {shlex.quote(str(output / 'numpy'))} --resume"
            )
        train_all(context, output, overwrite, options)
    else:
        check_free(output, resume or overwrite)
        run = train_one(context, output, resume, overwrite, options)
        report(context, run, output)


def train_all(
    context: click.Context, output: Path, overwrite: bool, options: dict[str, Any]
) -> None:
    """The same run in every library that is there, each in its own folder, and a table."""
    for name in FRAMEWORKS:
        check_free(output / name, overwrite)
    results = []
    for name in FRAMEWORKS:
        result = compare.Result(name)
        results.append(result)
        own = {**options, "framework": name}
        try:
            train_one(context, output / name, False, overwrite, own, f"{name:10}  ", result.note)
        except NotInstalled as missing:
            result.problem = missing.message
    click.echo(f"\n{compare.table(results, options['epochs'])}\nThe runs are in {output}/.")


FILES = ("checkpoint.npz", "model.npz", "curves.png")


def check_free(output: Path, is_wanted: bool) -> None:
    """Stop if a folder holds a run and nothing was said about it."""
    if not is_wanted and any((output / name).exists() for name in FILES):
        raise click.UsageError(
            f"{output} holds a run. --resume goes on with it, --overwrite replaces it, "
            "another --output leaves it alone."
        )


def train_one(
    context: click.Context,
    output: Path,
    resume: bool,
    overwrite: bool,
    options: dict[str, Any],
    label: str = "",
    note: Callable[[Run], object] = lambda run: None,
) -> Run:
    """A run from its beginning, or where it stopped, to its end, with everything it leaves behind.

    `note` is called after each epoch, and `label` is put before the progress bar.
    """
    state, model, picture = (output / name for name in FILES)
    run = open_run(context, options.copy(), state if resume else None)
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
            title = f"Handwritten digits{where}: {headline(run)}"
            curves.draw(picture, np.array(run.history), title)
        except OSError as error:
            raise click.ClickException(f"Cannot write to {output}: {error}") from error
        except FloatingPointError as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            click.echo(f"Stopped after epoch {run.epoch}. To go on:", err=True)
            click.echo(f"  {again(context, output)} --resume", err=True)
            sys.exit(130)
    return run


def open_run(context: click.Context, options: dict[str, Any], file: Path | None) -> Run:
    """A new run, or the one in `file`, if a file is given and there is one."""
    stored = None
    if file is not None:
        try:
            stored = checkpoint.load(file)
            settings = resumed_settings(context, options, stored_settings(stored))
        except FileNotFoundError:
            click.echo(f"No checkpoint in {file.parent}: starting from the beginning.")
        except (OSError, ValueError) as error:
            raise click.ClickException(f"Cannot resume from {file}: {error}") from error
    if stored is None:
        adam = {name: options.pop(name) for name in HYPERPARAMETERS}
        options["schedule_epochs"] = options["schedule_epochs"] or options["epochs"]
        settings = Settings(adam=adam, **options)
    learn, test = digits.load()
    try:
        run = Run(settings, learn, test)
    except ModuleNotFoundError as error:
        raise NotInstalled(not_installed(settings.framework, error)) from error
    except (TypeError, ValueError) as error:
        raise click.UsageError(" ".join(str(error).split())) from error
    if stored is not None:
        run.load(stored)
        click.echo(f"Resuming after epoch {run.epoch} of {settings.epochs}.")
    return run


def not_installed(framework: str, error: ModuleNotFoundError) -> str:
    """What is missing, and what to do."""
    library = str(error.name).partition(".")[0]
    package = f"'omniadam[{library}]'" if library in FRAMEWORKS else library
    other = ", or set KERAS_BACKEND" if framework == "keras" != library else ""
    return f"{library} is not installed: pip install {package}{other}"


def resumed_settings(context: click.Context, options: dict[str, Any], stored: Settings) -> Settings:
    """The stored settings, with --epochs raised or --framework changed where it was given.

    No other may differ.
    """
    before = stored.flat()
    given = {
        name: value
        for name, value in options.items()
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT
    }
    framework = given.pop("framework", stored.framework)  # state is the same in each
    epochs = given.get("epochs", stored.epochs)
    if epochs > stored.epochs:
        del given["epochs"]
    for name, value in given.items():
        if value != before[name]:
            raise click.UsageError(
                f"--{name.replace('_', '-')} is {value}, but the run to resume was started with "
                f"{before[name]}. Leave the option out, or start another run with --output."
                + (" --epochs can only be raised." if name == "epochs" else "")
            )
    return replace(stored, epochs=epochs, framework=framework)


def train_to_the_end(
    run: Run, file: Path, label: str = "", note: Callable[[Run], object] = lambda run: None
) -> None:
    """Train the epochs that are left, with a progress bar and a checkpoint after each."""
    steps, epochs = run.steps_per_epoch, run.settings.epochs
    with tqdm(total=epochs * steps, initial=run.epoch * steps, unit="step") as bar:
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
            run.save(file)
            note(run)
            accuracy = f", test accuracy {run.history[-1][3]:.2%}"
        loss = run.history[-1][0]
        bar.set_postfix_str(f"loss {loss:.4f}{accuracy}")


def headline(run: Run) -> str:
    """The result in a line."""
    accuracy, examples = run.history[-1][3], len(run.test)
    right = round(accuracy * examples)
    return f"test accuracy {accuracy:.2%} after {run.epoch} epochs ({right} of {examples})"


def again(context: click.Context, output: Path) -> str:
    """The command that starts on this folder."""
    return f"{context.command_path} --output {shlex.quote(str(output))}"


def report(context: click.Context, run: Run, output: Path) -> None:
    """Say what came out, where it is, and what could be next."""
    new = context.command_path
    files = [output / name for name in FILES]
    click.echo(f"\n{headline(run).capitalize()}\n")
    for file, content in zip(
        files,
        (
            "weights, optimizer and settings: what --resume starts from",
            "the weights to use" + (", their averages" if run.settings.adam["use_ema"] else ""),
            "loss and accuracy over the epochs",
        ),
        strict=True,
    ):
        click.echo(f"  {file!s:<{max(len(str(file)) for file in files)}}  {content}")
    click.echo(
        f"""
To try next:
  {again(context, output)} --resume --epochs {run.epoch * 2}
  {new} --output runs/cosine --schedule cosine --learning-rate 0.003
  {new} --output runs/steady --use-ema --weight-decay 0.01 --global-clipnorm 1
  {new} --output runs/all --framework all
  {new} --help"""
    )
