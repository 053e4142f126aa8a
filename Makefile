# `make` prints the targets.
#
# TORCH=...    the torch to build against, as pip takes it (2.11 to 2.13), for instance
#              make build TORCH="torch==2.12.0 --index-url https://download.pytorch.org/whl/cpu"
# WEIGHTS=...  densenet161's official .pth file; without it the weights are random
# LABELS=...   its index_to_name.json
# JOBS=...     processes that run the tests side by side
# FUZZ_SECONDS=...   of `make fuzz`, for each target;  FUZZ="zip frames": which, and further arguments
# MUTANTS=...        bugs of `make mutants`, by name
# SANITIZE=...       parts of `make sanitize`, such as "python -- tests/test_core.py"

TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STORE := model-store
JOBS ?= $(shell expr $$(nproc) + 1)
EXAMPLE_FLAGS := $(if $(WEIGHTS),--weights $(WEIGHTS)) $(if $(LABELS),--labels $(LABELS))
CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/http/*.h csrc/http/*.cpp tests/native/*.h tests/native/*.cpp tests/fuzz/*.cpp tests/sanitize/*.cpp \
  tests/simdev/*.h tests/simdev/*.cpp)
FUZZ_SECONDS ?= 60
# On a terminal pip shows how far it is; elsewhere only what goes wrong is told.
QUIET := $(if $(MAKE_TERMOUT),,--quiet)

# Of what pip tells: the packages that it fetches, and ninja's steps, such as `[3/9] lane.cpp`.
BUILD_STEPS := sed -u -n -E -e 's|^ *(\[[0-9]+/[0-9]+\]).* -c [^ ]*/([^ /]+) .*|\1 \2|p' -e t -e 's|^ *(\[[0-9]+/[0-9]+\]).*|\1|p' \
  -e 's/^ *((Downloading|Building|Installing) [^ ].*)/\1/p'

.DEFAULT_GOAL := help
.PHONY: help build serve stop format lint fast test chaos sanitize mutants fuzz compat newman wheel docs bench correctness clean
.DELETE_ON_ERROR:

help: ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: $(VENV)/.tools ## make .venv with torch, the native engine and every tool

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and alone: what follows must find it and never fetch another one.
$(VENV)/.torch: $(BIN)/python
	$(BIN)/pip install $(QUIET) "setuptools>=77" wheel ninja numpy
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install $(QUIET) $(TORCH)
	@touch $@

$(VENV)/.built: $(VENV)/.torch pyproject.toml setup.py $(wildcard csrc/* csrc/http/*)
	@echo "building the native engine (a minute or two)"
ifdef MAKE_TERMOUT
	@{ $(BIN)/pip install --verbose --no-build-isolation --editable . 2>&1; echo "exit $$?"; } \
	  | tee $(VENV)/build.log | $(BUILD_STEPS)
	@tail -1 $(VENV)/build.log | grep -q "^exit 0$$" || { tail -40 $(VENV)/build.log; exit 1; }
else
	@$(BIN)/pip install --quiet --no-build-isolation --editable . > $(VENV)/build.log 2>&1 \
	  || { tail -40 $(VENV)/build.log; exit 1; }
endif
	@$(BIN)/python -c 'import sysconfig; print("$(CURDIR)/pyserve/compat", \
	  file=open(sysconfig.get_path("purelib") + "/pyserve-compat.pth", "w"))'
	@touch $@

# What tests, lint and documentation need, and serving does not. Of pyserve-torch pip finds the one that is installed.
$(VENV)/.tools: $(VENV)/.torch pyproject.toml | $(VENV)/.built
	$(BIN)/pip install $(QUIET) "pyserve-torch[dev,docs,test,bench]"
	@touch $@

$(STORE)/densenet161.mar: | $(VENV)/.built
	$(BIN)/pyserve example densenet161 --export-path $(STORE) $(EXAMPLE_FLAGS)

serve: $(VENV)/.built $(STORE)/densenet161.mar ## build, pack densenet161 and serve it; returns once it answers
	$(BIN)/pyserve start --model-store $(STORE) --models densenet161.mar

stop: ## stop what `make serve` started
	$(BIN)/pyserve stop

format: build ## format Python (ruff) and C++ (clang-format) in place
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

lint: build ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy

# Also at work: what needs a server process or a compiler is left to `make test`.
fast: build ## the tests that start no server and compile nothing
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not server and not compiles and not slow and not accelerator"

# A third process on two processors: it works while the others wait for a server or a time limit. What tests compile is
# compiled beside lint, if it has changed: the native tests, and the simulated accelerator.
test: build ## lint, then all tests, the C++ ones under ThreadSanitizer and AddressSanitizer
	@{ $(BIN)/python -m tests.simdev.build; $(BIN)/python -m tests.native.build; } > /dev/null 2>&1 &
	@$(MAKE) --no-print-directory lint
	$(BIN)/python -m tests.whole --jobs $(JOBS)

# About 20 minutes; the next ones of other seeds. The same again: the second line of the report has the command.
CHAOS ?= --requests 700000 --faults 1000 --warm-up 30000
chaos: build ## a server under faults and load, every answer compared; the report is in build/chaos
	$(BIN)/python -m tests.chaos.run --summary build/chaos/summary.txt $(CHAOS)

# The extension takes minutes to build for it, and the tests several times as long as without: for a night.
sanitize: build ## the Python tests with the engine under AddressSanitizer and UBSan, and the C++ ones for longer
	$(BIN)/python -m tests.sanitize.run $(SANITIZE)

# Each bug is a compilation and some tests: minutes, for a night.
mutants: build ## plant bugs in how the engine uses accelerators: for each a test must fail; writes docs/mutants.md
	$(BIN)/python -m tests.simdev.mutants $(MUTANTS)

# Where atheris cannot be installed, inputs are mutated without being guided; without clang's libFuzzer, one target less.
fuzz: build ## feed archives, HTTP, tensors, JSON, forms and frames with inputs guided by coverage
	@$(BIN)/python -c "import atheris" 2> /dev/null || $(BIN)/pip install --quiet "atheris>=2.3,<4" || true
	$(BIN)/python -m tests.fuzz.run --seconds $(FUZZ_SECONDS) $(FUZZ)

# Needs Java 11 or later, and installs TorchServe below build/.
compat: build ## ask TorchServe what pyserve's tests ask, record its answers, and compare
	$(BIN)/python -m tests.compat.record
	$(BIN)/python -m tests.differential.run record
	$(BIN)/python -m tests.differential.run compare

newman: build ## run the Postman collections of tests/newman against pyserve; needs node
	@command -v newman > /dev/null || npm install --silent --prefix build/newman newman
	$(BIN)/python -m tests.newman.run \
	  --newman "$$(command -v newman || echo build/newman/node_modules/.bin/newman)"

# Without what an earlier build left in build/: setuptools packs files there that are no longer in the source.
wheel: build ## build dist/*.whl, and try it in a fresh environment that has torch
	rm -rf dist build/lib build/lib.* build/bdist.*
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	PYSERVE_WHEEL=$$(echo dist/*.whl) $(BIN)/python -m pytest -q -m nightly tests/packaging

# The reference pages come from the tables in the code. Warnings are errors, but with --quiet mkdocs does not see them.
docs: build ## write the reference pages, and build the site in site/
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: build ## measure pyserve beside other servers
	$(BIN)/python bench/compare.py

correctness: build ## serve the models of tests/zoo in every way, and write docs/correctness.md
	$(BIN)/python -m tests.zoo.correctness

clean: ## remove what was built, but not .venv
	rm -rf build dist site bench/out pyserve/_core*.so pyserve/_http*.so pyserve/_front*.so pyserve/_build_info.py $(VENV)/.built $(VENV)/.tools .pytest_cache .mypy_cache .ruff_cache
