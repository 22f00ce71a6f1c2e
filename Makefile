# Everything runs in .venv, which `make setup` makes and which the other targets make when it is missing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test soak lint clean
setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Freewheel needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,plots,ray,examples]'
	@touch $@

demo: setup
	$(BIN)/freewheel bench digits --stages 2 --rounds 3

# Two files at a time, the slowest first: their programs import and wait more than they compute.
test: setup
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# More generated networks and plans than a run of all tests has time for.
soak: setup
	FREEWHEEL_EXAMPLES=1000 $(BIN)/python -m pytest $(wildcard tests/test_generated_models.py tests/test_generated_plans.py)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache runs
