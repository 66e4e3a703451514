"""Adam as Keras documents it, on the arrays people already have."""

from . import schedules
from .adam import Adam, AdamW
from .compat.migration import migrate
from .optimizer import Optimizer
from .sparse import IndexedSlices

__version__ = "0.1.0"

__all__ = ["Adam", "AdamW", "IndexedSlices", "Optimizer", "migrate", "schedules"]
