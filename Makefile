# make quickstart | test | check | bench-algorithms | clean.  PYTHON chooses the interpreter (3.11 to 3.13); all else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
export RAY_USAGE_STATS_ENABLED = 0
export TOKENIZERS_PARALLELISM = false

.PHONY: quickstart test unit check clean bench-algorithms bench-schedules bench-mismatch

quickstart: .venv/.installed
	$(BIN)/asystem train recipe=quickstart

# The tests' tensors are tiny: a second thread only waits for the first.
test unit: export OMP_NUM_THREADS = 1

test: .venv/.dev
	$(BIN)/python -m pytest -n 2 tests/unit
	$(BIN)/python -m pytest tests --ignore=tests/unit

unit: .venv/.dev
	$(BIN)/python -m pytest -n 2 tests/unit

check: .venv/.dev
	$(BIN)/ruff check asystem tests recipes benchmarks
	$(BIN)/ruff format --check asystem tests recipes benchmarks
	$(BIN)/mypy

# Studies on two CPU cores: they rewrite benchmarks/results and the tables of docs/.
bench-algorithms: bench-schedules bench-mismatch

bench-schedules: .venv/.dev
	rm -rf runs/schedules
	$(BIN)/python benchmarks/schedules.py --part floor
	$(BIN)/python benchmarks/schedules.py --part speed
	$(BIN)/python benchmarks/schedules.py --part learning --jobs 2

bench-mismatch: .venv/.dev
	$(BIN)/python benchmarks/mismatch.py --out runs/mismatch --jobs 2 --write

clean:
	rm -rf .venv build dist *.egg-info .ruff_cache .mypy_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and by its exact pin: whatever depends on it would otherwise take its newest CUDA build.
.venv/.installed: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] <= (3, 13) else \
	    "asystem needs Python 3.11 to 3.13, and $(PYTHON) is %d.%d: make PYTHON=python3.11" % sys.version_info[:2])'
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[wandb]'
	touch $@

.venv/.dev: .venv/.installed tests/oracle/requirements.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[wandb,parquet,dev]'
	$(BIN)/python -m pip install --quiet --no-deps -r tests/oracle/requirements.txt
	touch $@
