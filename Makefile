# Every command makes its own environment: .venv, with the tested versions of constraints.txt, once and again when those change.
#   make demo    fine-tune a small model, show what it learned, save and reload the adapter (no network needed but for installing)
#   make test    the tests          make check   ruff, mypy, layering
#   make bench   the benchmarks     make docs    the documentation, into site/
# Settings: PYTHON=python3.12 (creates .venv), ARGS='...' (for the demo, pytest or the benchmarks), JOBS=2 (processes for tests).

PYTHON ?= python3
ARGS ?=
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test check bench docs
.SECONDARY:
MAKEFLAGS += --no-print-directory

help:
	@sed -n '2,5s/^# //p' Makefile

demo: $(VENV)/.ready-examples
	@$(BIN)/python examples/finetune.py $(ARGS)

test: $(VENV)/.ready-test
	@$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

check: $(VENV)/.ready-test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy --strict peftlite
	@$(BIN)/python -m pytest -q tests/test_layering.py

bench: $(VENV)/.ready-bench
	@$(BIN)/python -m benchmarks $(ARGS)

docs: $(VENV)/.ready-docs
	@$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going docs site
	@echo "site/index.html"

# One stamp for each extra. The build backends (setuptools is hqq's) are installed into .venv as well, so that an
# environment that has everything is brought up to date without a network.
$(VENV)/.ready-%: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing peftlite[$*] with the tested versions into $(VENV) (the first time takes some minutes)"
	@$(PIP) hatchling setuptools
	@$(PIP) --no-build-isolation --editable '.[$*]'
	@touch $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("peftlite needs Python 3.10 or newer, this is " \
	  + sys.version.split()[0] + "; name another one: make PYTHON=python3.12 ...")'
	@$(PYTHON) -m venv $(VENV)
