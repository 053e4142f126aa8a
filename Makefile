# make serve   build, pack densenet161 and serve it; returns once it answers
# make test    lint, types and all tests
# make correctness   serve the models of tests/models in every way and write docs/correctness.md
#
# TORCH=...    the torch to build against, as pip takes it (2.11 to 2.13), for instance
#              make build TORCH="torch==2.12.0 --index-url https://download.pytorch.org/whl/cpu"
# WEIGHTS=...  densenet161's official .pth file; without it the weights are random
# LABELS=...   its index_to_name.json

TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STORE := model-store
EXAMPLE_FLAGS := $(if $(WEIGHTS),--weights $(WEIGHTS)) $(if $(LABELS),--labels $(LABELS))

.PHONY: build serve stop test lint bench correctness clean
.DELETE_ON_ERROR:

build: $(VENV)/.built

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and alone: what follows must find it and never fetch another one.
$(VENV)/.torch: $(BIN)/python
	$(BIN)/pip install --quiet "setuptools>=77" wheel ninja numpy
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet $(TORCH)
	@touch $@

$(VENV)/.built: $(VENV)/.torch pyproject.toml setup.py $(wildcard csrc/*)
	@echo "building the native engine (a minute or two)"
	@$(BIN)/pip install --quiet --no-build-isolation --editable ".[test,bench]" > $(VENV)/build.log 2>&1 \
	  || { tail -40 $(VENV)/build.log; exit 1; }
	@$(BIN)/python -c 'import sysconfig; print("$(CURDIR)/pyserve/compat", \
	  file=open(sysconfig.get_path("purelib") + "/pyserve-compat.pth", "w"))'
	@touch $@

$(STORE)/densenet161.mar: | build
	$(BIN)/pyserve example densenet161 --export-path $(STORE) $(EXAMPLE_FLAGS)

serve: build $(STORE)/densenet161.mar
	$(BIN)/pyserve start --model-store $(STORE) --models densenet161.mar

stop:
	$(BIN)/pyserve stop

lint: build
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -q

bench: build
	$(BIN)/python bench/compare.py

correctness: build
	PYTHONPATH=tests:$$PYTHONPATH $(BIN)/python -m models.correctness

clean:
	rm -rf build bench/out pyserve/_core*.so pyserve/_build_info.py $(VENV)/.built .pytest_cache .mypy_cache .ruff_cache
