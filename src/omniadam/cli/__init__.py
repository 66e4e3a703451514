"""The `omniadam` command. Its libraries come with the extra "demo", not with the optimizer."""

import shutil
import sys
from pathlib import Path


def main() -> None:
    """Run the command line: the entry point of the `omniadam` script."""
    try:
        import click

        from omniadam.cli.train import train

        group = click.Group("omniadam", commands=[train], help="Adam as Keras documents it.")
        group(prog_name=program())
    except ModuleNotFoundError as missing:
        sys.exit(
            f"The omniadam command needs {missing.name}, which is not installed: "
            "pip install 'omniadam[demo]'"
        )


def program() -> str:
    """How this program was called, so that the commands it suggests can be pasted."""
    called = sys.argv[0]
    if Path(called).name == "__main__.py":
        return f"{Path(sys.executable).name} -m omniadam"
    return "omniadam" if shutil.which("omniadam") == called else called
