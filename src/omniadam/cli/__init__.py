"""The `omniadam` command. It needs nothing but omniadam, except for `train`: the extra "demo"."""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from omniadam import __version__, environment
from omniadam.cli import states, train


class Parser(argparse.ArgumentParser):
    """As argparse has it, but an error shows where help is instead of all options."""

    def error(self, message: str) -> NoReturn:
        """Say it, and end with status 2."""
        self.exit(2, f"Try '{self.prog} --help'.\n{self.prog}: error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line: the entry point of the `omniadam` script.

    Args:
        arguments: without the program's name; those of this process if it is None.
    """
    parser = Parser(program(), description="Adam as Keras documents it.", allow_abbrev=False)
    parser.add_argument(
        "--version",
        action="version",
        version=f"omniadam {__version__}",
        help="Print the version of omniadam.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)
    add_info(commands)
    states.add_to(commands)
    train.add_to(commands)
    options = vars(parser.parse_args(arguments))
    run = options.pop("run", None)
    if run is None:
        parser.print_help()
        return
    try:
        run(**options)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # of what is read no further, as by `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def add_info(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add `omniadam info`."""
    text = "Print versions, devices, kernels, threads and cache: what a report of a bug should say."
    parser = commands.add_parser("info", help=text, description=text, allow_abbrev=False)
    parser.add_argument(
        "--json", action="store_true", help="Print JSON, with omniadam.info's keys."
    )
    parser.set_defaults(run=print_info)


def print_info(*, json: bool) -> None:
    """What `omniadam.info` finds, as text or as JSON."""
    try:
        found = environment.info()
    except ValueError as error:  # a variable of the environment, which every step would refuse
        sys.exit(f"Error: {error}")
    print(as_json(found) if json else environment.as_text(found))


def as_json(found: environment.Info) -> str:
    """In lines."""
    return json.dumps(found, indent=2)


def program() -> str:
    """How this program was called, so that the commands it suggests can be pasted."""
    called = sys.argv[0]
    if Path(called).name == "__main__.py":
        return f"{Path(sys.executable).name} -m omniadam"
    return "omniadam" if shutil.which("omniadam") == called else called


__all__ = ["main"]
