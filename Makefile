# make demo: install into $(VENV), then erase a concept with the embedded model. make test: install, then the tests.
# Needs python3.11 or later, make and g++ (without g++ the ops run in PyTorch). Nothing outside $(VENV) is changed.
VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PYTEST_ARGS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
STAMP := $(VENV)/.lbdt-installed

.PHONY: setup demo test lint bench clean
.DEFAULT_GOAL := demo

setup: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt lbdt/_build.py $(wildcard csrc/*/*)
	@test -n "$(PYTHON)" || { echo "lbdt: no Python 3.11 or later with venv found; set PYTHON=" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) -c constraints.txt --upgrade setuptools
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt --no-build-isolation -e ".[test]"
	touch $@

demo: setup
	$(BIN)/lbdt erase "An image of Cats in Sketch style." --concept Cats

test: setup
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: setup
	$(BIN)/python -m benchmarks.detect_vs_literal

clean:
	rm -rf $(VENV) build *.egg-info lbdt/*.so
