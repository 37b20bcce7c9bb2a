# Set-up, checks and tests. Everything runs in a virtual environment that is made when it is first needed:
#   make demo              the demonstration, on a fresh machine too
#   make test              lint, types, the documentation and the default tests
#   make test-all          the slow tests as well
#   make docs              the documentation as a site, in site/
# VENV chooses where the environment is, PYTHON what it is made with, PYTEST_ARGS adds to pytest's arguments.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PACKAGING := pyproject.toml setup.cfg constraints.txt
# One thread for each test process: more would fight over the cores. Bytecode is kept, whatever the environment says:
# dozens of processes read it.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

.PHONY: help demo setup lint format docs test test-all clean

help:
	@sed -n 's/^#   //p' Makefile

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The stamps are older than a changed dependency list, so that the next make installs it.
$(VENV)/.installed: $(PACKAGING) | $(BIN)/python
	$(INSTALL) --editable ".[vision,plots]"
	touch $@

$(VENV)/.installed-dev: $(PACKAGING) | $(BIN)/python
	$(INSTALL) --editable ".[dev]"
	touch $@ $(VENV)/.installed

setup: $(VENV)/.installed-dev

demo: $(VENV)/.installed
	$(BIN)/hf-vitprune demo --force

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

test: lint docs
	$(PYTEST)

test-all: lint docs
	$(PYTEST) -m "slow or not slow"

clean:
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
