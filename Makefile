# Two commands on a fresh machine with Python 3.11 or newer: `make demo` and `make test`.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
BENCHMARKS := $(filter-out $(addprefix benchmarks/,common.py table.py ray_serve.py),$(wildcard benchmarks/*.py))

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench

help:
	@echo "make demo    train a small network on generated streets, cut it, attack it, report; needs no data"
	@echo "make test    every check: lint, types, import rules, tests"
	@echo "make lint    the checks that run nothing: ruff, mypy, import rules"
	@echo "make bench   the benchmarks, one after the other, but for ray_serve.py, which needs ray; hours"

demo: .venv/installed
	$(BIN)/louver demo

# One thread a worker: two processes with two threads each would get in each other's way on two cores.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS)

lint: .venv/installed
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy --no-error-summary
	$(BIN)/lint-imports --no-logo

bench: .venv/installed
	@for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

# Made once, and brought up to date when what is to be installed changes.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("Louver needs Python 3.11 or newer; this is %d.%d. Name another: make PYTHON=python3.12 ..." % v[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[cloud,lab,dev]'
	@touch $@
