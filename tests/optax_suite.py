"""A plugin of pytest for the tests of optax: ours have the names of theirs, and are what is tested.

Most of those tests are made for every solver, and say which one only in their parameters.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import optax
from optax._src import alias, transform

from omniadam.optax import adam, adamw, scale_by_adam

SOLVERS = {
    "adam": adam,
    "adamw": adamw,
    "nadam": partial(adam, nesterov=True),
    "nadamw": partial(adamw, nesterov=True),
}
SCALED = {"scale_by_adam": scale_by_adam}

for module, ours in ((alias, SOLVERS), (transform, SCALED), (optax, SOLVERS | SCALED)):
    for name, made in ours.items():
        assert hasattr(module, name), f"{module.__name__} has no {name}"
        setattr(module, name, made)


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Leave out what is made for another solver."""
    chosen = []
    for item in items:
        parameters = getattr(item.cls, "_test_params_reprs", {}).get(item.name, "")
        solvers = re.findall(r"opt_name='?(\w+)|'opt_name': '(\w+)'", parameters)
        if not solvers or {one or other for one, other in solvers} & SOLVERS.keys():
            chosen.append(item)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen
