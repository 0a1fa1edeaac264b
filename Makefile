# `make demo` and `make test` need nothing but python3 and pip; everything else builds on the same .venv.
PYTHON ?= python3
JOBS ?= 2
VENV := .venv
LOWEST ?= .venv-lowest
BIN := $(VENV)/bin
PROMPT := deep elf with a red cloak, wizard hat and great sword
# one thread a worker: two workers with two threads each would fight over two cores
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -q

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-cluster test-lowest lint docs gpu bench clean

help:  ## show the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

# stamps: a second run does not call pip again unless pyproject.toml changed
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $@ $(VENV)/.installed

demo: $(VENV)/.installed  ## sixteen heroes from one sentence, written to demo.png
	$(BIN)/vargen generate "$(PROMPT)" -n 16 --seed 7 --overwrite -o demo.png
	@echo "written to $(CURDIR)/demo.png"

test: lint  ## lint, types, and every test that a CPU can run (under 20 minutes on two cores)
	$(PYTEST)

test-fast: $(VENV)/.installed-dev  ## the tests without the slow ones (under two minutes)
	$(PYTEST) -m "not slow and not cluster"

test-cluster: $(VENV)/.installed-dev  ## what is too long for every run: all recorded codes, mutants
	$(PYTEST) -m cluster

test-lowest:  ## the fast tests on the lowest version of every dependency, in an environment of its own (9 GB)
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python tests/lowest.py > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --quiet -c $(LOWEST)/constraints.txt setuptools -e ".[dev,demo]"
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n $(JOBS) -q -m "not slow and not cluster"

lint: $(VENV)/.installed-dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/.installed-dev  ## the documentation, into build/site
	$(BIN)/python -m mkdocs build --strict

gpu: $(VENV)/.installed-dev  ## kernel tests and timings on a CUDA device
	$(BIN)/python benchmarks/gpu.py

bench: $(VENV)/.installed-dev  ## CPU timings, written to benchmarks/results/
	$(BIN)/python benchmarks/next_token.py

clean:  ## remove the environment and the caches, not the models
	rm -rf $(VENV) .venv-lowest build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
