# Works from a fresh clone with GNU make and Python 3.11 or newer: each target first builds the environment it needs (.venv, or
# .venv-bench for the peers), and only when pyproject.toml or constraints.txt has changed since.
# To try others: make test PYTHON=python3.12 TORCH=torch==2.11.0 CONSTRAINTS=   (CONSTRAINTS= takes the newest of everything else)

PYTHON ?= python3
TORCH ?= torch==2.13.0
CONSTRAINTS ?= constraints.txt
WORKERS ?= 2
ARGS ?=

BIN := .venv/bin
BENCH := .venv-bench/bin
PIN := $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
PIP := -m pip install --quiet --disable-pip-version-check $(PIN)
TAG := $(subst =,-,$(TORCH))$(if $(CONSTRAINTS),,-newest)
SOURCES := pyproject.toml $(CONSTRAINTS)
PEERS := kronfluence==1.0.1 dattri==0.3.0 captum==0.9.0 treeig==0.2.2 shap==0.51.0

# One thread in each test process: the processes are the parallelism, and results do not depend on the number of cores.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint docs evidence bench clean

help: ## print these lines
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: .venv/.core-$(TAG) ## trace a small digit classifier to its training examples and write a report
	$(BIN)/headwater demo $(ARGS)

test: lint ## lint, then every test but the slow ones
	$(PYTEST) -m "not slow" $(ARGS)

lint: .venv/.dev-$(TAG) ## style and types of all Python files
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy

docs: .venv/.dev-$(TAG) ## run every example of README and docs, check the commands they show
	$(PYTEST) tests/docs $(ARGS)

evidence: .venv/.dev-$(TAG) ## the slow tests and the measured fidelity against real retraining (long)
	$(PYTEST) -m slow
	$(BIN)/python benchmarks/evidence.py $(ARGS)
	$(BIN)/python benchmarks/ensembles.py $(ARGS)

bench: .venv-bench/.ready-$(TAG) ## time Headwater beside kronfluence, dattri, captum, treeig and shap on this machine
	$(BENCH)/python benchmarks/run.py $(ARGS)
	$(BENCH)/python benchmarks/explain_peers.py

clean: ## remove the environments and caches (recorded runs stay)
	rm -rf .venv .venv-bench build dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis

# ---- environments: a stamp file says with which torch, and is older than what it depends on when it has to be built again

define environment # folder
@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Headwater needs Python 3.11 or newer and this is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12 ...")'
@test -x $(1)/bin/python || { echo "making $(1) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(1); }
@echo "installing $(TORCH) into $(1) (a download of about 0.2 GB as a CPU build, 3 GB with CUDA)"
@$(1)/bin/python $(PIP) $(TORCH)
@echo "installing headwater and what it imports (about 50 MB)"
@$(1)/bin/python $(PIP) hatchling editables
@$(1)/bin/python $(PIP) --no-build-isolation -e .
endef

.venv/.core-$(TAG): $(SOURCES)
	$(call environment,.venv)
	@rm -f .venv/.core-* .venv/.dev-*
	@touch $@

.venv/.dev-$(TAG): .venv/.core-$(TAG)
	@echo "installing the tools of the tests (pytest, ruff, mypy) and the libraries whose models are explained (about 350 MB)"
	@$(BIN)/python $(PIP) --no-build-isolation -e '.[dev]'
	@touch $@

.venv-bench/.ready-$(TAG): $(SOURCES)
	$(call environment,.venv-bench)
	@echo "installing the peers: $(PEERS), and the tree libraries (about 250 MB)"
	@$(BENCH)/python $(PIP) --no-build-isolation -e '.[bench]'
	@$(BENCH)/python $(PIP) --no-deps $(PEERS)
	@rm -f .venv-bench/.ready-*
	@touch $@
