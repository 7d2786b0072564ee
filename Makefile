# The two commands of the README: `make demo` and `make test`. Both set up .venv first.
#
#   make demo    see what is in the demo model, load it, answer a prompt
#   make test    everything that CI runs
#   make check   the same, without setting up
#   make bench   the benchmarks that fit this machine; results go to benchmarks/results

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROMPT ?= Why is the sky blue? Answer in two sentences.

.PHONY: demo test check lint types flow unit bench clean

demo: $(VENV)/installed
	$(BIN)/loadstone inspect
	$(BIN)/loadstone load
	$(BIN)/loadstone run "$(PROMPT)"

test: $(VENV)/dev
	$(MAKE) check

check: lint types flow unit

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types:
	$(BIN)/mypy

flow:
	$(BIN)/lint-imports --no-logo

unit:
	$(BIN)/pytest -n 2

bench: $(VENV)/dev
	$(BIN)/pip install --quiet --constraint constraints.txt accelerate
	for script in benchmarks/bench_*.py; do $(BIN)/python $$script || exit 1; done

# torch goes first, at the pinned version: asked for by a range, pip may take the newest build with CUDA's libraries.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

$(VENV)/dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
