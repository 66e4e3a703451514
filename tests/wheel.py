"""The wheel as a user gets it: `make test-wheel` installs it, with nothing but what it asks for.

    python tests/wheel.py dist/omniadam-*.whl

It makes an environment of its own in a temporary folder, and reads nothing of this checkout.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

# Raised by what needs a library that is not there; it says how to get it.
NAMES_THE_EXTRA = """
try:
    import omniadam.{name}
except ImportError as error:
    assert "omniadam[{name}]" in str(error), error
else:
    raise AssertionError("omniadam.{name} was imported without {name}")
"""
METADATA = "from importlib.metadata import metadata; print(metadata('omniadam').get_payload())"
KERNELS = "import omniadam; found = omniadam.info(); assert 'Numba' in found['kernels'], found"


def main(wheel: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        venv.create(at / "venv", with_pip=True)
        bin = at / "venv" / ("Scripts" if os.name == "nt" else "bin")
        python = str(bin / "python")
        # Nothing of the caller's: an option or a path of its environment may hide what is missing.
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "OMNIADAM_"))}
        environment = keep | {"OMNIADAM_CACHE_DIR": str(at / "cache"), "PYTHONWARNINGS": "error"}

        def run(*command: str, **settings: str) -> str:
            done = subprocess.run(
                command, cwd=at, env=environment | settings, capture_output=True, text=True
            )
            if done.returncode:
                sys.exit(f"{' '.join(command)[:400]}\n{done.stdout}{done.stderr}")
            return done.stdout

        install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        run(python, *install, str(wheel.resolve()), PYTHONWARNINGS="")
        version = run(str(bin / "omniadam"), "--version").split()
        assert version == ["omniadam", wheel.name.split("-")[1]], version
        assert "compiled by Numba" in run(str(bin / "omniadam"), "info")
        assert run(python, "-m", "omniadam", "--version").split() == version
        run(python, "-c", KERNELS)
        for name in ("torch", "keras", "optax"):
            run(python, "-c", NAMES_THE_EXTRA.format(name=name))
        readme = run(python, "-c", METADATA, PYTHONIOENCODING="utf-8")
        relative = [each for each in re.findall(r"\]\(([^)]*)\)", prose(readme)) if ":" not in each]
        assert not [each for each in relative if not each.startswith("#")], relative
        example = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
        assert example is not None, "the README has no example"
        (at / "example.py").write_text(example[1], encoding="utf-8")
        run(python, "example.py")
        print(f"{wheel.name}: the command, the first example and the errors are as they should be")


def prose(text: str) -> str:
    """What is not code."""
    return re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
