# fisherkit: `make help` lists the targets.
#
# Everything runs in .venv, made on first use and installed with the tested versions of constraints.txt. Stamps inside
# .venv remember what was installed, so later runs start at once; change pyproject.toml, constraints.txt or
# requirements-bench.txt and the next run installs again.

PYTHON ?= python3
PYTEST_WORKERS ?= 2
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=
PAPER_ARGS ?=
CONTINUAL_ARGS ?=
MERGING_ARGS ?=
INFLUENCE_ARGS ?=

# The versions in constraints.txt need this much; the package itself supports what pyproject.toml says.
MIN_PYTHON := 3.11.5

VENV := .venv
BIN := $(VENV)/bin
DEV_STAMP := $(VENV)/.installed-dev
DEMO_STAMP := $(VENV)/.installed-demo
PAPER_STAMP := $(VENV)/.installed-paper
PIP_INSTALL := $(BIN)/python -m pip install -c constraints.txt

# One thread a worker: workers that each start a thread per core slow each other down.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
RUN_TESTS := $(ONE_THREAD) $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist worksteal

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help install test test-examples test-thorough lint docs demo bench paper continual merging influence format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(DEV_STAMP) ## set up .venv with everything that development needs
	@echo "$(VENV) is ready"

# The order matters: pytest comes last, so that its summary is the last line printed. Types and site are checked side by side.
test: $(DEV_STAMP) ## check everything: lint, types, layers, docs, tests
	$(MAKE) --no-print-directory --jobs 2 lint docs
	$(RUN_TESTS) -m 'not examples and not thorough' $(PYTEST_ARGS)

test-examples: $(DEV_STAMP) ## test the scripts of examples/ (of which `make test` runs one test each)
	$(RUN_TESTS) -m examples $(PYTEST_ARGS) tests/examples

test-thorough: $(DEV_STAMP) ## more seeds of the random tests (before a release)
	$(RUN_TESTS) -m thorough $(PYTEST_ARGS) tests

lint: $(DEV_STAMP) ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

docs: $(DEV_STAMP) ## build the site into site/; a broken link or reference is an error
	@# Not --quiet: it hides warnings from --strict too.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

demo: $(DEMO_STAMP) ## train a small network, compare every kind of Fisher, write demo/
	$(BIN)/python -m examples.demo --out demo $(DEMO_ARGS)

bench: $(DEV_STAMP) ## time everything against the peers, write benchmarks/ (long)
	$(BIN)/python -m examples.benchmarks --out benchmarks $(BENCH_ARGS)

paper: $(PAPER_STAMP) ## reproduce the iEF paper's findings, write paper/ (hours; goes on where it stopped)
	$(BIN)/python -m examples.paper --out paper $(PAPER_ARGS)

continual: $(PAPER_STAMP) ## elastic weight consolidation with every Fisher, write continual/ (goes on where it stopped)
	$(BIN)/python -m examples.continual --out continual $(CONTINUAL_ARGS)

merging: $(PAPER_STAMP) ## models merged by every Fisher and structure, write merging/ (goes on where it stopped)
	$(BIN)/python -m examples.merging --out merging $(MERGING_ARGS)

influence: $(PAPER_STAMP) ## influence scores against retraining, write influence/ (goes on where it stopped)
	$(BIN)/python -m examples.influence --out influence $(INFLUENCE_ARGS)

format: $(DEV_STAMP) ## rewrite the code the way `make lint` wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## delete what can be made again, except .venv
	rm -rf build benchmarks continual demo dist influence merging paper site .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# Fails with advice where the interpreter $(1) is too old.
define require_python
	@$(1) -c 'import sys; sys.exit(sys.version_info[:3] < tuple(map(int, "$(MIN_PYTHON)".split("."))))' || { \
		echo "error: $(1) is $$($(1) --version 2>&1), but constraints.txt needs Python $(MIN_PYTHON) or newer." >&2; \
		echo "Try: $(2)" >&2; exit 1; }
endef

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
		echo "error: no '$(PYTHON)' on PATH. Try: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	$(call require_python,$(PYTHON),make PYTHON=python3.11 $(MAKECMDGOALS))
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "error: $(PYTHON) cannot make virtual environments: its venv or ensurepip module is missing." >&2; \
		echo "Try: your system's package for it (on Debian and Ubuntu: python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)

# What `dev` installs includes what `demo` and `paper` need, hence all stamps; and `paper` what `demo` needs.
$(DEV_STAMP): pyproject.toml constraints.txt requirements-bench.txt | $(BIN)/python
	$(call require_python,$(BIN)/python,rm -r $(VENV) and run make again with PYTHON=python3.11)
	$(PIP_INSTALL) -e '.[dev,demo,docs]'
	$(PIP_INSTALL) --no-deps -r requirements-bench.txt
	@touch $(DEMO_STAMP) $(PAPER_STAMP) $@

$(DEMO_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(call require_python,$(BIN)/python,rm -r $(VENV) and run make again with PYTHON=python3.11)
	$(PIP_INSTALL) -e '.[demo]'
	@touch $@

$(PAPER_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(call require_python,$(BIN)/python,rm -r $(VENV) and run make again with PYTHON=python3.11)
	$(PIP_INSTALL) -e '.[paper]'
	@touch $(DEMO_STAMP) $@
