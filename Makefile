# Each target works as the first command on a fresh clone: it makes .venv when that is missing or out of date.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Flags for installing torch alone, for instance an index of CPU builds: make venv TORCH_PIP_FLAGS='--index-url ...'
TORCH_PIP_FLAGS ?=
# Runs of each campaign of `make chaos`, of 38 faults each.
RUNS ?= 8

.DEFAULT_GOAL := test
.PHONY: venv demo test lint bench chaos clean

venv: $(STAMP)

# Torch comes first and in a call of its own (its version is pinned in constraints.txt): a plain index may serve a CUDA build of
# several GB, so where torch comes from must be choosable without touching the rest. What this call has installed satisfies the
# second one, which then leaves it alone.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(TORCH_PIP_FLAGS) -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test,dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/lightning-gemini demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -q

bench: $(STAMP)
	$(BIN)/python -m benchmarks.run

chaos: $(STAMP)
	GEMINI_CHAOS=$(RUNS) $(BIN)/python -m pytest -q -m campaign

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
