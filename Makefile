# SPDX-License-Identifier: Apache-2.0
# Everything runs in a virtual environment that is made on first use; nothing else is touched.

VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# Version of vLLM, and its build: cpu, cuda, or nothing for cuda where a GPU is visible.
VLLM ?= 0.32.0
ENGINE ?=
# Model and prompts of serve, bench and verify; the model is fetched once if none is given.
MODEL ?=
PROMPTS ?= examples/prompts.jsonl
ARGS ?=

# Tests side by side, a core and about 2 GiB each; test files are not split.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 4 ? n : 4)))

BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(VLLM)
FETCHED_MODEL = $(or $(MODEL),$$($(BIN)/vllm-ext model fetch))
PYTEST := $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help install peers demo serve test test-previous lint types unit engine slow docs bench verify clean

help:  ## this list
	@awk -F ':.*## *' '/^[a-z-]+:.*##/ { printf "%-15s %s\n", $$1, $$2 }' Makefile

install: $(READY)  ## make the environment: engine, this package, development tools

$(READY): ci/install.py ci/vllm-alias/setup.py ci/vllm-alias/pyproject.toml pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed: make PYTHON=/path/to/python" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "==> environment $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@$(BIN)/python ci/install.py --version $(VLLM) $(addprefix --engine ,$(ENGINE))
	@touch $@

peers: $(READY)  ## what vLLM's own method `suffix` needs, to compare with it (compiles 3 minutes)
	@$(BIN)/python ci/peers.py

demo: $(READY)  ## serve a small model with dyspec, chat with it, compare speeds, stop
	@$(BIN)/python examples/demo.py $(ARGS)

serve: $(READY)  ## leave a server with dyspec running until Ctrl-C
	@$(BIN)/python examples/demo.py --serve $(addprefix --model ,$(MODEL)) $(ARGS)

test: lint types unit engine  ## the whole CI suite

test-previous:  ## the suite on the previous minor version of vLLM, in an environment of its own
	$(MAKE) test VENV=.venv-0.31.0 VLLM=0.31.0

lint: $(READY)  ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## static types
	$(BIN)/mypy

unit: $(READY)  ## tests without an engine
	$(PYTEST) -q -n $(JOBS) --dist loadfile -m "not engine and not gpu and not slow"

engine: $(READY)  ## tests on a real engine
	$(PYTEST) -q -n $(JOBS) --dist loadfile -m "engine and not gpu and not slow"

slow: $(READY)  ## long statistical tests
	$(PYTEST) -q -m "slow and not gpu"

docs: $(READY)  ## regenerate docs/methods.md
	$(BIN)/vllm-ext methods --markdown > docs/methods.md

bench: $(READY)  ## speed against plain vLLM and its ngram: MODEL, PROMPTS, ARGS
	@mkdir -p build
	$(BIN)/vllm-ext bench --model "$(FETCHED_MODEL)" --prompts $(PROMPTS) --json build/bench.json $(ARGS)

verify: $(READY)  ## token identity with plain vLLM: MODEL, PROMPTS, ARGS
	@mkdir -p build
	$(BIN)/vllm-ext verify --model "$(FETCHED_MODEL)" --prompts $(PROMPTS) --json build/verify.json $(ARGS)

clean:  ## remove the environment and caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
