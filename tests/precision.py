"""Double precision in JAX for as long as a block runs, in every version of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax


@contextmanager
def double_precision(is_on: bool = True) -> Iterator[None]:
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", is_on)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)
