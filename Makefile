# Holdfast: everything a contributor types.  Needs make and Python 3.11 or newer, nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
DEMO_ARGS ?=
PYTEST_ARGS ?=
# Processes that share the suite out; each has a server of its own.
TEST_PROCESSES ?= 2
BENCH_ARGS ?=
SEED ?= 1
STEPS ?= 100000
KILLS ?= 1000

# pyright asks the package index for a newer release of itself unless told not to.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.PHONY: help demo test check lint types imports bench growth coverage torture-keys torture-commits format wheel-check clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.stamp-all  ## three small agents publish, hand on references, archive and query
	@$(BIN)/holdfast demo $(DEMO_ARGS)

test: $(VENV)/.stamp-dev  ## the whole test suite, against a real nats-server that it starts itself
	@echo "make test: unit, property, integration and fault tests"
	@$(BIN)/pytest -n $(TEST_PROCESSES) --dist worksteal $(PYTEST_ARGS)

check: lint types imports  ## ruff, mypy strict, pyright strict, import contracts

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.stamp-dev
	$(BIN)/mypy
	$(BIN)/pyright

imports: $(VENV)/.stamp-dev
	$(BIN)/lint-imports --no-logo

bench: $(VENV)/.stamp-dev  ## benchmarks beside their raw limits; JSON in benchmarks/results/
	@$(BIN)/python -m benchmarks $(BENCH_ARGS)

torture-keys: $(VENV)/.stamp-dev  ## named contexts beside their model; SEED=1 STEPS=100000
	@$(BIN)/python -m tests.campaigns.keys --seed $(SEED) --steps $(STEPS)

torture-commits: $(VENV)/.stamp-dev  ## commits of twenty keys by clients that are killed; SEED=1 KILLS=1000
	@$(BIN)/python -m tests.campaigns.commits --seed $(SEED) --kills $(KILLS)

growth: $(VENV)/.stamp-dev  ## what a conversation costs that is stored after every turn (needs recorded traces)
	@$(BIN)/python -m benchmarks.growth $(BENCH_ARGS)

coverage: $(VENV)/.stamp-dev  ## the test suite with branch coverage
	@$(BIN)/coverage erase
	@$(BIN)/coverage run -m pytest $(PYTEST_ARGS)
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report

format: $(VENV)/.stamp-dev  ## format the code and mend what ruff can mend safely
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel-check: $(VENV)/.stamp-dev  ## build sdist and wheel, install them in empty environments, import
	@$(BIN)/python .ci/wheel_check.py

clean:  ## remove caches and build output (the environment in .venv stays)
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage .coverage.*
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# The environment.  Two stamps, because a demo need not wait for test tools; the larger set contains the smaller.

$(VENV)/.stamp-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "Holdfast needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo 'not found')." >&2; \
	    echo "Name another one: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || { \
	    echo "No virtual environment could be made; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@touch $@

$(VENV)/.stamp-all: pyproject.toml | $(VENV)/.stamp-python
	@if test $(VENV)/.stamp-dev -nt pyproject.toml; then :; else \
	    echo "installing Holdfast with all its parts into $(VENV) (once)"; $(PIP) install -e '.[all]'; fi
	@touch $@

$(VENV)/.stamp-dev: pyproject.toml | $(VENV)/.stamp-python
	@echo "installing Holdfast and the tools of development into $(VENV) (once)"
	@$(PIP) install -e '.[dev]'
	@touch $@
