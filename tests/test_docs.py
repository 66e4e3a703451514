"""What the documentation says is run: proofs in docs/, examples in README and examples/."""

from __future__ import annotations

import re
import runpy

import pytest

from inner import by_backend
from shown import ELSEWHERE, PAGES, ROOT, SHOWN, backend_of, blocks

BACKENDS = ("numpy", "jax", "torch", "tensorflow")
# Some examples share values among devices.
check = by_backend("shown.py", XLA_FLAGS="--xla_force_host_platform_device_count=8")


@pytest.mark.needs("keras", "jax", "tensorflow", "torch")
@pytest.mark.parametrize(
    ("backend", "name"), [(backend_of(SHOWN[each][0]), f"test_shown[{each}]") for each in SHOWN]
)
def test_with_keras(backend: str, name: str, request: pytest.FixtureRequest) -> None:
    """One process a backend, since each import of Keras takes seconds."""
    check(request)


@pytest.mark.parametrize("page", [*PAGES, "README.md"])
def test_every_example_is_found(page: str) -> None:
    """As a block of code at the margin, which is what is looked for, in a language by its name."""
    text = (ROOT / page).read_text(encoding="utf-8")
    fences = re.findall(r"^(.*(?:```|~~~).*)$", text, re.M)
    assert {*fences} <= {"```", "```python", "```text", "```console"}, fences
    assert len(re.findall("^```python$", text, re.M)) == len(blocks(page))
    # What is indented is shown, too, and is not run: commands, and what is no Python.
    assert not re.search(r"^ {4,}(import|from \S+ import|>>>) ", text, re.M)


def test_pages_are_run() -> None:
    assert {*PAGES} > ELSEWHERE and all(blocks(page) for page in ELSEWHERE)
    run = {each.rsplit(":", 1)[0] for each in SHOWN}
    assert run >= {page for page in PAGES if blocks(page)} - ELSEWHERE
    quoted = [each for each, (_, said) in SHOWN.items() if said]
    assert len([each for each in quoted if each.startswith("docs/faq.md")]) >= 5


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(file: str) -> None:
    """Those of docs/ are checked when the site is built."""
    text = (ROOT / file).read_text(encoding="utf-8")
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    names = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, name = link.partition("#")
        assert (ROOT / path).exists() if path else name in names, link


def test_what_is_said_to_be_tested_is_what_is_pinned() -> None:
    """The versions in the table of README.md."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S+) \| ([\d.]+) \| (.*) \| ([\d.]+) \| tested \|$", text, re.M)
    assert len(rows) >= 9
    for file, column in (("constraints-oldest.txt", 1), ("constraints.txt", 3)):
        pins = (ROOT / file).read_text(encoding="utf-8").splitlines()
        for row in rows:
            name = {"PyTorch": "torch"}.get(row[0], row[0].lower())
            if column == 3 or row[2] == "tested":
                assert {f"{name}=={row[column]}", f"{name}-cpu=={row[column]}"} & {*pins}, row


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
    imported = re.findall(r"^(?:import|from) (\w+)", found[0], re.M)
    assert {*imported} == {"numpy", "omniadam"}  # what a bare installation has
    for code in found:
        exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})


@pytest.mark.needs("torch", "jax", "optax", "tensorflow", "autograd")
@pytest.mark.parametrize(
    "script", sorted(p.name for p in ROOT.glob("examples/*.py") if "keras" not in p.name)
)
def test_example(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
    assert capsys.readouterr().out
