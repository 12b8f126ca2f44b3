# Every target installs what it needs into .venv first; Python >= 3.11 and make are all that must be there.

PYTHON ?= $(shell python3.11 -c 'import ensurepip, venv' >/dev/null 2>&1 && echo python3.11 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
# Written when a set of extras is complete, so that an install cut short is taken up again.
STAMP := $(VENV)/.installed-

# The extras of each set, and the sets that it includes.
EXTRAS_recipes := recipes
EXTRAS_qm9 := recipes,qm9
EXTRAS_dev := recipes,qm9,dev
EXTRAS_docs := docs
EXTRAS_all := recipes,qm9,docs,dev
INCLUDED_qm9 := recipes
INCLUDED_dev := recipes qm9
INCLUDED_all := recipes qm9 docs dev

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Two installs into one environment must not run at once.
.NOTPARALLEL:

.PHONY: help install demo toy qm9 scenes test test-fast test-lowest lint docs clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)all ## Make .venv with the package, editable, and all that the other targets need

$(STAMP)%: pyproject.toml
	@rm -f $@ $(INCLUDED_$*:%=$(STAMP)%)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lightning_cost needs Python >= 3.11, but $(PYTHON) is " + sys.version.split()[0] + ": run make PYTHON=/path/to/python3.11")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --no-input -e ".[$(EXTRAS_$*)]"
	@touch $@ $(INCLUDED_$*:%=$(STAMP)%)

demo: $(STAMP)recipes ## Train on overlaid digits with and without COST: a table, CSV files and figures in demo_output/
	$(BIN)/python -m recipes.digits.demo

toy: $(STAMP)recipes ## Draw trajectories on the two-parameter problem, with and without COST
	$(BIN)/python -m recipes.toy

qm9: $(STAMP)qm9 ## Train on 10,000 molecules with and without COST: a table and figures in qm9_output/
	$(BIN)/python -m recipes.qm9.demo

scenes: $(STAMP)recipes ## Draw 1,000 rooms and train on them with and without COST: tables and pictures in scenes_output/
	$(BIN)/python -m recipes.scenes.demo

test: $(STAMP)dev ## Run the tests and the examples in the docstrings; the 15 slowest are listed
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --durations=15

test-fast: $(STAMP)dev ## Run the tests that are not marked slow
	$(BIN)/python -m pytest -n auto --maxprocesses 4 -m "not slow"

test-lowest: $(LOWEST)/.installed ## Run the tests that are not marked slow with the lowest versions, in .venv-lowest
	$(LOWEST)/bin/python -m pytest -n auto --maxprocesses 4 -m "not slow" --ignore=tests/recipes --ignore=tests/test_docs.py

$(LOWEST)/.installed: pyproject.toml requirements/lowest.txt
	@rm -f $@
	@$(LOWEST)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install --disable-pip-version-check --no-input -e ".[recipes,dev]" -c requirements/lowest.txt
	@touch $@

lint: $(STAMP)dev ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)docs ## Build the documentation into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## Remove caches and what the other targets wrote, but keep the environments
	rm -rf build dist site demo_output study_output toy_output qm9_output scenes_output lightning_logs .hypothesis .mypy_cache .pytest_cache .ruff_cache .coverage
	find . -path './.venv*' -prune -o -type d -name __pycache__ -exec rm -rf {} +
