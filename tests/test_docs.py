"""What the documentation says is run: proofs in docs/, examples in README and examples/."""

from __future__ import annotations

import runpy

import pytest

from inner import by_backend
from shown import ROOT, SHOWN, backend_of, blocks

BACKENDS = ("numpy", "jax", "torch", "tensorflow")
# The examples of docs/keras.md share values among devices.
check = by_backend("shown.py", XLA_FLAGS="--xla_force_host_platform_device_count=8")


@pytest.mark.needs("keras", "jax", "tensorflow", "torch")
@pytest.mark.parametrize(
    ("backend", "name"), [(backend_of(SHOWN[each]), f"test_shown[{each}]") for each in SHOWN]
)
def test_with_keras(backend: str, name: str, request: pytest.FixtureRequest) -> None:
    """One process a backend, since each import of Keras takes seconds."""
    check(request)


def test_every_proof_names_a_backend() -> None:
    named = [
        backend
        for backend in BACKENDS
        for code in blocks("docs/deviations.md")
        if f"KERAS_BACKEND={backend}\n" in code
    ]
    assert len(named) == len(blocks("docs/deviations.md")) >= 10 and {*named} == {*BACKENDS}
    of_keras = blocks("docs/keras.md")
    named = [b for b in BACKENDS if any(f"KERAS_BACKEND={b}\n" in code for code in of_keras)]
    assert named == ["jax", "torch"] and len(of_keras) >= 5


@pytest.mark.needs("autograd", "jax", "torch")
def test_readme() -> None:
    found = blocks("README.md")
    assert found
    for code in found:
        exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})


@pytest.mark.needs("torch", "jax", "optax", "tensorflow", "autograd")
@pytest.mark.parametrize(
    "script", sorted(p.name for p in ROOT.glob("examples/*.py") if "keras" not in p.name)
)
def test_example(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
    assert capsys.readouterr().out
