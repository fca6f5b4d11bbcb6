# Holdfast: everything a contributor types.  Needs make and Python 3.11 or newer, nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
DEMO_ARGS ?=
PYTEST_ARGS ?=
# Processes that share the suite out; each has a server of its own.  Three, since on two cores one often waits for the disk.
TEST_PROCESSES ?= 3
BENCH_ARGS ?=
SEED ?= 1
STEPS ?= 100000
KILLS ?= 1000
# Further arguments of a campaign, as CAMPAIGN_ARGS="--kind torn --keep /tmp/kept".
CAMPAIGN_ARGS ?=

# pyright asks the package index for a newer release of itself unless told not to.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.PHONY: help demo test check bench bench-full bench-guard torture torture-kills torture-power torture-power-fast torture-disk torture-cluster torture-cluster-chaos torture-chaos torture-syscalls torture-kill-points torture-archivers torture-damage torture-backups torture-fuzz torture-keys torture-commits growth coverage format wheel-check clean lint types imports

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-21s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

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

bench: $(VENV)/.stamp-dev  ## benchmarks beside raw limits and peers (under 10 min); JSON in benchmarks/results/
	@$(BIN)/python -m benchmarks $(BENCH_ARGS)

bench-full: $(VENV)/.stamp-dev  ## growth curves up to ten million rows (under 60 min, 10 GB of disk)
	@$(BIN)/python -m benchmarks full $(BENCH_ARGS)

bench-guard: $(VENV)/.stamp-dev  ## has a hot path collapsed? (seconds)
	@$(BIN)/python -m benchmarks guard

torture: $(VENV)/.stamp-dev  ## a system of its own under load and every fault for 60 s; SEED=1
	@$(BIN)/holdfast torture --seed $(SEED) --seconds 60 $(CAMPAIGN_ARGS)

torture-kills: $(VENV)/.stamp-dev  ## kill -9 of the server under load, 1,200 times (8 min); SEED=1
	@$(BIN)/python -m tests.campaigns.kills --cycles 1200 --seed $(SEED) $(CAMPAIGN_ARGS)

torture-power: $(VENV)/.stamp-dev  ## 300 power cuts of one server (40 min, root); SEED=1
	@$(BIN)/python -m tests.campaigns.power --cuts 300 --seed $(SEED) $(CAMPAIGN_ARGS)

torture-power-fast: $(VENV)/.stamp-dev  ## 30 power cuts in mode fast, which must lose something (2 min, root); SEED=1
	@$(BIN)/python -m tests.campaigns.power --cuts 30 --seed $(SEED) --durability fast $(CAMPAIGN_ARGS)

torture-disk: $(VENV)/.stamp-dev  ## 100 full or failing disks (15 min, root, strace); SEED=1
	@$(BIN)/python -m tests.campaigns.disk --runs 100 --seed $(SEED) $(CAMPAIGN_ARGS)

torture-cluster: $(VENV)/.stamp-dev  ## three nodes: leader kills, partitions, power, wiped nodes (60 min, root); SEED=1
	@$(BIN)/python -m tests.campaigns.cluster --rounds 30 --wipes 12 --seed $(SEED) \
	    --kind leader-kill,partition,all-cut,wipe,combined $(CAMPAIGN_ARGS)

torture-cluster-chaos: $(VENV)/.stamp-dev  ## three nodes under mixed faults for an hour (root); SEED=1
	@$(BIN)/python -m tests.campaigns.cluster --kind chaos --minutes 60 --load 0.3 --seed $(SEED) $(CAMPAIGN_ARGS)

torture-chaos: $(VENV)/.stamp-dev  ## one server under mixed faults for an hour; SEED=1
	@$(BIN)/python -m tests.campaigns.chaos --minutes 60 --load 0.3 --lake-rows 2000000 --seed $(SEED) $(CAMPAIGN_ARGS)

torture-syscalls: $(VENV)/.stamp-dev  ## killed before every system call of five cycles (30 min); SEED=1
	@$(BIN)/python -m tests.campaigns.syscalls --seed $(SEED) $(CAMPAIGN_ARGS)

torture-kill-points: $(VENV)/.stamp-dev  ## workers killed at 5,000 random moments (27 min); SEED=1
	@$(BIN)/python -m tests.campaigns.kill_points --kills 5000 --seed $(SEED) $(CAMPAIGN_ARGS)

torture-archivers: $(VENV)/.stamp-dev  ## several archivers and compactors, one asleep at each step (35 min); SEED=1
	@$(BIN)/python -m tests.campaigns.archivers --rounds 100 --seed $(SEED) $(CAMPAIGN_ARGS)

torture-damage: $(VENV)/.stamp-dev  ## 2,000 flipped bits in files of every kind (70 min); SEED=1
	@$(BIN)/python -m tests.campaigns.damage --flips 2000 --seed $(SEED) $(CAMPAIGN_ARGS)

torture-backups: $(VENV)/.stamp-dev  ## backups that are killed, everything destroyed, restored (30 min); SEED=1
	@$(BIN)/python -m tests.campaigns.backups --rounds 100 --seed $(SEED) $(CAMPAIGN_ARGS)

torture-fuzz: $(VENV)/.stamp-dev  ## a million hostile inputs, twenty thousand of them served (7 min); SEED=1
	@$(BIN)/python -m tests.campaigns.fuzz --inputs 1000000 --served 20000 --seed $(SEED) $(CAMPAIGN_ARGS)

torture-keys: $(VENV)/.stamp-dev  ## named contexts beside their model; SEED=1 STEPS=100000
	@$(BIN)/python -m tests.campaigns.keys --seed $(SEED) --steps $(STEPS) $(CAMPAIGN_ARGS)

torture-commits: $(VENV)/.stamp-dev  ## commits of twenty keys by clients that are killed; SEED=1 KILLS=1000
	@$(BIN)/python -m tests.campaigns.commits --seed $(SEED) --kills $(KILLS) $(CAMPAIGN_ARGS)

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
