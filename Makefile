# One thread for each process: the tests run in two, and timings are compared between equals.
export OMP_NUM_THREADS := 1
export MKL_NUM_THREADS := 1
export OPENBLAS_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false

PYTHON := .venv/bin/python
JOBS ?= 2
EXTRAS := cpu,hf,report,openvino,triton,tensorrt,dev
READY := .venv/.tokcc-ready
# A machine with a GPU has a torch of its own.
GPU_PYTHON ?= python3

.PHONY: help setup demo test test-all lint format typecheck imports bench gpu-check constraints clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(READY) ## make .venv with everything that development needs

$(READY): pyproject.toml setup.py constraints.txt
	test -x $(PYTHON) || python3 -m venv .venv
	$(PYTHON) -m pip install --quiet "setuptools>=77" wheel
	$(PYTHON) -m pip install --quiet --no-build-isolation -c constraints.txt -e ".[$(EXTRAS)]"
	touch $@

demo: $(READY) ## compile a real image encoder and show what it saves and costs
	$(PYTHON) examples/demo.py

test: $(READY) ## the fast tests (ARGS="-k name" passes on)
	$(PYTHON) -m pytest -n $(JOBS) --dist loadfile $(ARGS)

test-all: $(READY) ## all tests but those that need a GPU; fetches real weights
	$(PYTHON) -m pytest -n $(JOBS) --dist loadfile -m "not gpu" $(ARGS)

lint: $(READY) typecheck imports ## ruff, mypy --strict, import-linter
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

format: $(READY) ## rewrite the sources in the house style
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

typecheck: $(READY) ## mypy --strict over the package
	tools/typecheck.sh

imports: $(READY) ## the layers point one way
	tools/imports.sh

bench: $(READY) ## accuracy of compiled engines on real data (long; results go to benchmarks/results)
	$(PYTHON) benchmarks/accuracy.py $(ARGS)

gpu-check: ## every Triton kernel on the GPU that is there: results and speed (GPU_PYTHON=its interpreter)
	$(GPU_PYTHON) -m benchmarks.gpu_check $(ARGS)

constraints: $(READY) ## write constraints.txt from what is installed
	$(PYTHON) tools/constraints.py

clean: ## remove what can be made again, but .venv and .weights
	rm -rf build dist *.egg-info .typecheck .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache demo
