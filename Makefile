# make demo: from nothing to a verified completion.   make test: all tests.   make help: the rest.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
PREFILLS ?= 3
HOSTS ?= 24
N ?= 200

# Python may keep what it has compiled: tests start our command hundreds of times.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo demo-vllm demo-fleet demo-ha demo-down test test-all test-unit coverage lint bench bench-hosts bench-prompt bench-health soak lock ready ready-dev clean

help:           ## Show this.
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' $(MAKEFILE_LIST) | expand -t 20

demo: ready     ## Deploy QwQ-32B's 3P1D on the lab through Prefect, and leave it up.
	@$(BIN)/python -m demo up

demo-vllm: ready ## The same with vLLM itself on this machine's CPUs, 3P1D; PREFILLS=1 for 1P1D.
	@$(BIN)/python -m demo vllm --prefills $(PREFILLS)

demo-fleet: ready ## An 18P1D-like service on 24 simulated hosts, decode over 6 of them; HOSTS=8 for 6P1D.
	@$(BIN)/python -m demo fleet --hosts $(HOSTS)

demo-ha: check-machine ready-dev ## Prefect as in production; half of it dies during an upgrade.
	@$(BIN)/python -m demo ha

demo-down:      ## Remove every trace of the demo.
	@if [ -x $(BIN)/python ]; then $(BIN)/python -m demo down; else echo "nothing to remove"; fi

test: test-unit ## Unit, lab and end-to-end tests, these in two labs beside each other.
	@$(BIN)/pytest -n 2 --dist worksteal tests/lab tests/e2e

test-all: ready-dev ## All tests, with a kill at every moment of an upgrade; takes an hour or two.
	@PD_TEST_ALL=1 $(BIN)/pytest

test-unit: ready-dev ## Only the tests that need no host; on all cores.
	@$(BIN)/pytest -n auto tests/unit

coverage: ready-dev ## Which lines of flows, tasks and steps the unit tests miss; fails below 90 %.
	@$(BIN)/coverage run -m pytest -q tests/unit
	@$(BIN)/coverage report

lint: ready-dev ## Format, lint and type checks.
	@$(BIN)/ruff format --check
	@$(BIN)/ruff check
	@$(BIN)/mypy

bench: ready    ## Measure the control plane's own time, by part.
	@$(BIN)/python -m bench

bench-hosts: ready ## What runs on 2, 8, 24 and 48 simulated hosts cost; takes 15 minutes and 8 GB.
	@$(BIN)/python -m bench.hosts

bench-prompt: ready ## What a user waits for from the prompt, and how much of it is Prefect's.
	@$(BIN)/python -m bench.prompt

bench-health: ready ## How soon a killed server and a rebooted host are seen by a check, and serve again.
	@$(BIN)/python -m bench.health

soak: ready     ## N=200 upgrades in a row with traffic and faults; fails if any does, or if anything grows.
	@$(BIN)/python -m bench.soak --count $(N)

lock:           ## Update the lock files.
	$(BIN)/pip-compile -q --generate-hashes --allow-unsafe --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --strip-extras --extra build -o requirements.lock pyproject.toml
	$(BIN)/pip-compile -q --generate-hashes --allow-unsafe --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --strip-extras --extra build --extra production --extra dev -c requirements.lock -o requirements-dev.lock pyproject.toml

ready: check-machine $(VENV)/ready

ready-dev: check-machine-for-tests $(VENV)/ready-dev

.PHONY: check-machine check-machine-for-tests
check-machine:
	@$(PYTHON) -m demo.preconditions

check-machine-for-tests:
	@$(PYTHON) -m demo.preconditions --no-server

$(VENV)/ready: requirements.lock pyproject.toml
	@echo "installing the locked packages into $(VENV) (a minute or two the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -qq --disable-pip-version-check --require-hashes --no-deps -r requirements.lock
	@$(BIN)/pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/ready-dev: $(VENV)/ready requirements-dev.lock
	@$(BIN)/pip install -qq --disable-pip-version-check --require-hashes --no-deps -r requirements-dev.lock
	@touch $@
