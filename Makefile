# make demo | test | test-slow | test-wheel | lint | dist | docs | docs-check | bench | clean. Each makes
# the virtual environment it needs, once, and again when pyproject.toml or constraints.txt changed.
# ARGS goes to the command: make test ARGS="-k cli".
# make conformance: every Adam that installs, beside the oracle; writes docs/conformance.md.
# make test-oldest | test-newest: the same tests at both ends of the versions that pyproject.toml allows.

PYTHON ?= python3
ARGS ?=
JOBS ?= 2
# Of the newest versions: `torch` alone would bring gigabytes of CUDA where the index has no CPU build.
TORCH ?= $(shell grep '^torch==' constraints.txt)

.PHONY: demo test test-slow test-oldest test-newest test-wheel bench conformance lint dist docs docs-check format clean
.DELETE_ON_ERROR:

demo: .venv-demo/installed
	.venv-demo/bin/omniadam train --output runs/demo --overwrite $(ARGS)

# Every library is installed here, so a test that skips for want of one is a failure. A file goes to
# one worker: its tests share what they compile, and the processes that they start.
pytest = OMNIADAM_REQUIRE_ALL=1 $(1)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test: .venv-test/installed
	$(call pytest,.venv-test) -m "not slow" $(ARGS)

# Other projects' suites, and the numbers of every library without what is only fast.
test-slow: .venv-test/installed
	$(call pytest,.venv-test) -m slow $(ARGS)

test-oldest: .venv-oldest/installed
	$(call pytest,.venv-oldest) $(ARGS)

# What is newest changes without a file here that does: made anew each time.
test-newest:
	rm -rf .venv-newest
	$(MAKE) .venv-newest/installed
	$(call pytest,.venv-newest) $(ARGS)

# The peers are the libraries of the tests: the same environment.
bench: .venv-test/installed
	.venv-test/bin/python benchmarks/run.py $(ARGS)

# Makes an environment for each library, a gigabyte where PyTorch is in it; ARGS="torch optax" are
# those alone.
conformance: .venv-conformance/page/installed
	.venv-conformance/page/bin/python benchmarks/conformance $(ARGS)

lint: .venv-lint/installed dist docs
	.venv-lint/bin/ruff check .
	.venv-lint/bin/ruff format --check .
	.venv-lint/bin/mypy
	.venv-lint/bin/codespell
	$(schema)-workflows .github/workflows/*.yml
	$(schema)-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(schema)-issue-forms .github/ISSUE_TEMPLATE/*_re*.yml
	.venv-lint/bin/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

# What these files may say, as check-jsonschema has it built in.
schema = .venv-lint/bin/check-jsonschema --builtin-schema vendor.github

# The sdist, and the wheel that is built of it. Without isolation: what builds them is pinned, too.
dist: .venv-lint/installed
	rm -rf dist
	.venv-lint/bin/python -m build --no-isolation
	.venv-lint/bin/twine check --strict dist/*

# The wheel in an environment of its own with what it depends on, from the index, and nothing else.
test-wheel: dist
	$(PYTHON) tests/wheel.py dist/*.whl

# The site, in site/. A warning is an error: mkdocs.yml is strict.
docs: .venv-docs/installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --quiet

# Each page of the site in a browser, which is the system's Chromium or, where it has none,
# Playwright's: it is fetched then, with its libraries (as root).
docs-check: docs .venv-docs/browser
	.venv-docs/bin/python tests/browse.py site build/screenshots

format: .venv-lint/installed
	.venv-lint/bin/ruff check --fix .
	.venv-lint/bin/ruff format .

clean:
	rm -rf .venv-* .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist site
	find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

define environment
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "omniadam needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make $(MAKECMDGOALS) PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(@D)
endef
pip = $(@D)/bin/python -m pip install --quiet --disable-pip-version-check

.venv-demo/installed: pyproject.toml constraints.txt
	$(environment)
	$(pip) --constraint constraints.txt --editable '.[demo]'
	@touch $@

.venv-lint/installed: pyproject.toml constraints.txt
	$(environment)
	$(pip) --constraint constraints.txt --editable '.[lint]'
	@touch $@

.venv-docs/installed: pyproject.toml constraints.txt
	$(environment)
	$(pip) --constraint constraints.txt --editable '.[docs]'
	@touch $@

.venv-docs/browser: .venv-docs/installed
	$(pip) --constraint constraints.txt playwright
	command -v chromium || $(@D)/bin/playwright install --with-deps chromium
	@touch $@

# torch first and by its exact version: where pip knows a CPU build (2.13.0+cpu), it then takes that
# one, and what is installed is not fetched again with CUDA. tf_keras: see pyproject.toml.
.venv-test/installed: pyproject.toml constraints.txt
	$(environment)
	$(pip) "$$(grep '^torch==' constraints.txt)"
	$(pip) --constraint constraints.txt --editable '.[test]'
	$(pip) --constraint constraints.txt --no-deps tf_keras
	@touch $@

.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	$(environment)
	$(pip) "$$(grep '^torch==' constraints-oldest.txt)"
	$(pip) --constraint constraints-oldest.txt --editable '.[test]'
	$(pip) --constraint constraints-oldest.txt --no-deps tf_keras
	@touch $@

.venv-newest/installed: pyproject.toml
	$(environment)
	$(pip) "$(TORCH)"
	$(pip) --editable '.[test]'
	$(pip) --no-deps tf_keras
	@touch $@

.venv-conformance/page/installed: constraints.txt
	$(environment)
	$(pip) --constraint constraints.txt matplotlib
	@touch $@
