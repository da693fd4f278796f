# One environment in .venv, made and kept up to date by `make setup`; every other target uses it.

# A python3.11 that is only a shim without an interpreter behind it does not count.
PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
BIN := .venv/bin

# Tests and the demo run on a CPU and without a network. OMP_NUM_THREADS is left to vLLM: set to the
# number of cores, its processes wait for each other's threads, and a token takes 20 times as long.
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_OFFLINE ?= 1
export VLLM_NO_USAGE_STATS ?= 1
export DO_NOT_TRACK ?= 1
# Without compiled modules every process compiles all tests anew, and their servers this package.
unexport PYTHONDONTWRITEBYTECODE

# tests/conftest.py says which tests share a process.
WORKERS ?= 2
PYTEST := $(BIN)/pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup demo test pytest test-fast loadtest lint format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup:  ## create or update .venv (a second or two when nothing changed)
	@$(PYTHON) scripts/setup_env.py

demo: setup  ## serve a tiny model and show what the reduction does
	@$(BIN)/python -m ep_serve.demo

test: lint pytest  ## lint, types, import contracts, then all tests

pytest: setup  ## all tests, in two processes
	@$(PYTEST)

test-fast: setup  ## only the tests that take seconds
	@$(PYTEST) -m "not engine and not slow"

loadtest: setup  ## stock vLLM, no reduction and two keep ratios side by side, with a report
	@$(BIN)/python -m loadtest run --eager

lint: setup  ## ruff, mypy and the import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: setup  ## let ruff rewrite the sources
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:  ## delete .venv, caches and builds
	rm -rf .venv .demo build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
