"""Adam as Keras documents it, on the arrays people already have."""

from typing import TYPE_CHECKING

from . import schedules
from .adam import Adam, AdamW
from .compat.migration import migrate
from .environment import info
from .optimizer import Optimizer
from .saving import from_file, load, save, state_hash
from .sparse import IndexedSlices
from .table import Table

__version__ = "0.1.0"

__all__ = [
    "Adam",
    "AdamW",
    "IndexedSlices",
    "Optimizer",
    "Table",
    "from_file",
    "info",
    "load",
    "migrate",
    "save",
    "schedules",
    "state_hash",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


if not TYPE_CHECKING:

    def __getattr__(name: str) -> None:
        hint = ""
        if name in ("keras", "optax", "torch"):  # which import these libraries
            hint = f": it is there after `import omniadam.{name}`"
        raise AttributeError(f"module 'omniadam' has no attribute '{name}'{hint}", name=name)
