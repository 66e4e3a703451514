"""What torch's own tests give to Adam and AdamW, as the wheel has it."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torch")

from test_torch_optim import ROOT, python


@pytest.mark.slow
@pytest.mark.needs("expecttest")
def test_every_input_of_torchs_own_tests() -> None:
    """In a process of its own: what is imported for it changes torch for all that follows."""
    (ran,) = python(str(ROOT / "tests" / "torch_suite.py"), timeout=600).splitlines()[-1:]
    assert json.loads(ran) == {"inputs": 180, "refused": 52, "schedulers": 8, "errors": 144}
