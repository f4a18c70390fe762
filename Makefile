# `make demo` and `make test` do everything themselves, from a fresh clone on: environment, installation, run.
# Everything is installed into .venv, nothing elsewhere. With another interpreter: make test PYTHON=python3.13

PYTHON ?= python3
OLD := "semiseg needs Python 3.11 or newer: name one by PYTHON=python3.11"
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
INPUTS := pyproject.toml constraints.txt
MYPY := $(BIN)/mypy
RUFF := $(BIN)/ruff

# $(call timed,title,command): runs the command and prints how long it took.
timed = @echo "== $(1)"; start=$$(date +%s); $(2) && echo "== $(1): $$(($$(date +%s) - start)) s"

.PHONY: demo test lint docs

demo: .venv/.run
	$(call timed,demo,$(BIN)/semiseg demo)

test: lint
	$(call timed,tests,OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --durations=10)

lint: .venv/.dev
	$(call timed,ruff check,$(RUFF) check .)
	$(call timed,ruff format,$(RUFF) format --check .)
	$(call timed,mypy,$(MYPY))

docs: .venv/.dev
	$(call timed,docs,$(BIN)/python -m sphinx -W --keep-going -q docs docs/_build/html)
	@echo "docs/_build/html/index.html"

# pip is the last thing that venv writes: a half-made environment is made again.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit($(OLD) if sys.version_info < (3, 11) else 0)'
	$(call timed,environment .venv,$(PYTHON) -m venv .venv)

.venv/.run: $(INPUTS) | $(BIN)/pip
	$(call timed,install (several minutes the first time),$(PIP) -e .)
	@touch $@

# What the demo needs is part of what the tests need.
.venv/.dev: $(INPUTS) | $(BIN)/pip
	$(call timed,install (several minutes the first time),$(PIP) -e '.[dev]')
	@touch $@ .venv/.run
