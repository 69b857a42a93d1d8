# make demo      projection beside tuned Adam and the paper's methods, on digits; PNGs in runs/demo
# make test      the test suite and the doctests
# make lint      ruff and pyright
# make examples  every script in examples/
# make docs      the documentation, into site/, with the tutorials executed
# PYTHON=/path/to/python3.12 make demo  chooses the interpreter of a new .venv

BIN := .venv/bin

.PHONY: demo test lint examples docs clean

demo: .venv/.installed-lab
	$(BIN)/pjax demo

test: .venv/.installed-dev
	$(BIN)/python -m pytest -n 2 --benchmark-disable

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

examples: .venv/.installed-dev
	@set -e; for script in examples/*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

docs: .venv/.installed-dev
	$(BIN)/mkdocs build --strict

# One stamp for each extra: a second run installs nothing until pyproject.toml changes.
.venv/.installed-%: pyproject.toml
	@sh .ci/install $*
	@touch $@

clean:
	rm -rf .venv runs build dist site
