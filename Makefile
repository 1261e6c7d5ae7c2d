# Each target sets up what it needs: a virtual environment in .venv, with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: help venv triton ecosystem demo test test-ecosystem check clean

help:
	@echo "make demo    train on two ranks, kill -9, resume on three; loss curve in runs/demo/loss.png"
	@echo "make test    run the tests (PYTEST='-k clip' to choose)"
	@echo "make test-ecosystem  also install the frameworks that ADOPT is tested in, and run those tests"
	@echo "make check   lint, format and types"
	@echo "make venv    only set up $(VENV)"
	@echo "make triton  also install Triton, for the tests of the CUDA kernel"
	@echo "make clean   remove $(VENV) and runs"

venv: $(STAMP)

# torch first and by its version: "torch" alone would let pip pick another release and its CUDA packages.
# Without build isolation, setuptools is the pinned one too, and nothing is fetched twice.
# The fused kernel is compiled by the install, where there is a C compiler.
$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard sharded_adopt/kernels/native/*.[ch])
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1); try make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt torch==2.13.0 setuptools
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[plots,test,reference,dev]'
	@touch $(STAMP)

# A gigabyte, so not for everybody: with it, the tests run the CUDA kernel in Triton's interpreter too. A torch with CUDA
# has brought the one release that it works with, so no version is in constraints.txt: it would forbid that torch.
triton: $(VENV)/installed-triton

$(VENV)/installed-triton: $(STAMP)
	$(BIN)/python -c 'import triton' || $(BIN)/python -m pip install --disable-pip-version-check 'triton<=3.9.0'
	@touch $@

# Another gigabyte: the frameworks that ADOPT is tested in. torch is installed already and the constraints hold it there.
ecosystem: $(VENV)/installed-ecosystem

$(VENV)/installed-ecosystem: $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[hosts]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST)

test-ecosystem: $(VENV)/installed-ecosystem
	$(BIN)/python -m pytest tests/ecosystem $(PYTEST)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs
