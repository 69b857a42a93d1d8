# make demo      projection beside tuned Adam and the paper's methods, on digits; PNGs in runs/demo
# make test      the test suite and the doctests
# make coverage  the tests, and which lines and branches of the core they reach
# make lint      ruff, pyright and the contracts of imports
# make examples  every script in examples/
# make docs      the documentation, into site/, with the tutorials executed
# PYTHON=/path/to/python3.12 make demo  chooses the interpreter of a new .venv

BIN := .venv/bin

.PHONY: demo test coverage lint examples docs clean

demo: .venv/.installed-lab
	$(BIN)/pjax demo

test: .venv/.installed-dev
	$(BIN)/python -m pytest -n 2 --benchmark-disable

coverage: .venv/.installed-dev
	$(BIN)/python -m pytest -n 2 --benchmark-disable --cov --cov-report=term

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

examples: .venv/.installed-dev
	@set -e; for script in examples/*.py; do echo "== $$script"; $(BIN)/python "$$script"; done
	PYTHON=$(BIN)/python bash examples/two_processes.sh

docs: .venv/.installed-dev
	$(BIN)/mkdocs build --strict

# One stamp for each extra: a second run installs nothing until pyproject.toml changes.
.venv/.installed-%: pyproject.toml
	@sh .ci/install $*
	@touch $@

clean:
	rm -rf .venv runs build dist site
