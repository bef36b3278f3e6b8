# The only commands anyone needs. Each installs what it needs first; CI calls the same ones.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4

.PHONY: demo test test-slow lint type bench docs clean

demo: $(INSTALLED)  ## the main job on a real model: profile, sparsify, evaluate, bench, report
	$(BIN)/prunus demo

test: $(INSTALLED)  ## the default tests: CPU, offline, under ten minutes; each process has one thread
	$(PYTEST) --dist loadfile

test-slow: $(INSTALLED)  ## the tests that take minutes
	$(PYTEST) -m slow

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

type: $(INSTALLED)
	$(BIN)/mypy

bench: $(INSTALLED)  ## against the best peer, an hour on two cores: make bench CALIBRATION=train.txt TEST=test.txt
	$(BIN)/python benchmarks/forward.py --calibration "$(CALIBRATION)"
	$(BIN)/python benchmarks/peers.py --calibration "$(CALIBRATION)" --test "$(TEST)"

docs: $(INSTALLED)  ## the pages that are made from the tables in the code, and the plot in one of them
	$(BIN)/python docs/tables.py
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python docs/plots.py

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs
