# `make` alone lists what there is. Everything that needs the environment sets it up first; once there, that is free.
VENV ?= $(or $(DPHRL_VENV),.venv)
BIN := $(VENV)/bin
export DPHRL_VENV := $(VENV)

# Tests download nothing; a missing file should say so instead of waiting for a hub.
PYTEST = HF_HUB_OFFLINE=1 $(BIN)/python -m pytest
FAST = $(wildcard tests/unit tests/golden tests/contracts)
# Those that start no engine share the cores, one thread each: torch's threads of one process wait for each other, and
# take tens of times as long where another process has their core. Engines would fight, so their tests run one by one.
SHARING = not gpu and not benchmark and not long and (inline or not integration)
ONE_BY_ONE = not gpu and not benchmark and not long and not inline
SIDE_BY_SIDE = -n auto --maxprocesses 8 --dist loadfile
# 5: ARGS selected none of these tests.
OR_NONE = || [ $$? = 5 ]

.DEFAULT_GOAL := help
.PHONY: help setup lock sbom demo test test-fast test-long mutants lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## make .venv with everything in it (minutes once, then nothing); DPHRL_BACKEND=cpu|cuda to choose
	@docker/setup.sh

lock: ## renew the versions in docker/constraints-*.txt, for review: the newest that pyproject.toml allows
	@docker/setup.sh --lock
	@$(BIN)/python docker/sizes.py

sbom: setup ## write sbom.cdx.json: what the environment holds, with licences (CycloneDX)
	$(BIN)/python docker/sbom.py -o sbom.cdx.json

demo: setup ## train the small maths model on this machine; ARGS="learner.num_steps=10" to override settings
	$(BIN)/dphrl train demo-math --overwrite $(ARGS)

test: setup ## every test that needs no GPU; ARGS="-k name" to select
	OMP_NUM_THREADS=1 $(PYTEST) $(FAST) tests/test_architecture.py tests/integration -m "$(SHARING)" $(SIDE_BY_SIDE) $(ARGS) $(OR_NONE)
	$(PYTEST) tests/integration tests/gpu -m "$(ONE_BY_ONE)" $(ARGS) $(OR_NONE)

test-long: setup ## what takes minutes each: exact resume on Ray, proofs on wide engines
	$(PYTEST) tests/integration -m long $(ARGS)

test-fast: setup ## the tests that start no process and no engine: unit, golden, contracts
	OMP_NUM_THREADS=1 $(PYTEST) $(FAST) $(SIDE_BY_SIDE) $(ARGS)

mutants: setup ## make deliberate errors in the core and see that tests notice; ARGS="--only losses" to select, --list
	$(BIN)/python -m tests.mutants $(ARGS)

lint: setup ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## let ruff rewrite what it can
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

clean: ## remove caches and build output; keeps .venv and runs/
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find dphrl actors cluster tests -name __pycache__ -type d -prune -exec rm -rf {} +
