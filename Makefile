# Needs GNU make, bash and Python; everything else goes into .venv. Another Python: make PYTHON=python3.12 test
SHELL := bash
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq -c constraints.txt
unexport OMP_NUM_THREADS
CONTEXTS ?= 5
EPOCHS ?= 4
ROUNDS ?= 1
RESULTS := benchmarks/results

.PHONY: demo test lint bench clean

demo: $(READY)
	@$(BIN)/selfparam demo

test: lint
	$(BIN)/python -m pytest -q

lint: $(READY)
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

# make bench CONTEXTS=100 EPOCHS=12 ROUNDS=3 for more; the GPU part is: .venv/bin/python -m benchmarks.gpu
bench: $(READY)
	@$(PIP) -e '.[bench]'
	$(BIN)/python -m benchmarks.injection --contexts $(CONTEXTS) --epochs $(EPOCHS) --rounds $(ROUNDS) --out $(RESULTS)/injection.json
	$(BIN)/python -m benchmarks.reach --out $(RESULTS)/reach.json
	$(BIN)/python -m benchmarks.growth --out $(RESULTS)/growth.json
	$(BIN)/python -m benchmarks.render

# torch first and alone: where a CPU build of the pinned release lies on disk, pip takes that one.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	  || { echo "$(PYTHON) is not Python >= 3.11: name one that is, as in 'make PYTHON=python3.12'." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "$(PYTHON) cannot make a virtual environment (no ensurepip): install its venv package, python3-venv on Debian and Ubuntu." >&2; exit 1; }
	@echo "Setting up .venv: some minutes, once."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(PIP) torch==2.13.0
	@$(PIP) -e '.[dev]'
	@touch $@

# Back to a fresh clone: the next command sets .venv up again.
clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
