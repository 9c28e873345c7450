# `make test` and `make demo` set up .venv by themselves; `make help` lists the targets.
.DEFAULT_GOAL := help
.PHONY: help setup lint format test test-fast demo clean

VENV ?= .venv
STAMP := $(VENV)/.installed
# Three workers for two cores: ranks and Slurm's daemons wait for each other half of the time. Modules that start ranks
# stay in one of them (tests/groups.py). WORKERS=0 runs the tests in one process.
# Compiled modules are kept, also where PYTHONDONTWRITEBYTECODE is set: every process would compile the project again.
WORKERS ?= 3
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder
CANDIDATES := $(PYTHON) python3.12 python3.13 python3 $(wildcard $(HOME)/.pyenv/versions/3.1[2-9]*/bin/python)

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP)  ## create the environment in .venv (about 6 GB)

# A pyenv shim named python3.12 may exist and not run, so every candidate is tried.
$(STAMP): setup.py constraints.txt
	@for candidate in $(CANDIDATES); do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then found="$$candidate"; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "error: no Python 3.12 or later among: $(strip $(CANDIDATES)); install one or run make PYTHON=/path/to/python" >&2; exit 2; \
	fi; \
	echo "setting up $(VENV) with $$found" && "$$found" -m venv $(VENV) && \
	$(VENV)/bin/python -m pip install -q --upgrade pip "setuptools>=77" wheel && \
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[dev]' && touch $(STAMP)

lint: $(STAMP)  ## check style, types and shell scripts
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/shellcheck -x .ci/run slurm/*.sh slurm/cluster.env
	$(VENV)/bin/mypy

format: $(STAMP)  ## lay out the code (ruff format)
	$(VENV)/bin/ruff format

test: $(STAMP)  ## run every test that needs no GPU
	$(PYTEST)

test-fast: $(STAMP)  ## the tests of `make test` that are not marked slow, for every commit
	$(PYTEST) -m "not long and not slow"

demo: $(STAMP)  ## select with TAGS, pretrain a tiny KSA + HARPE model (STEPS=300, resumes; FRESH=1 starts over)
	$(VENV)/bin/python examples/demo/run.py $(if $(FRESH),--fresh) $(if $(STEPS),--steps $(STEPS))

clean:  ## remove the environment and the demo's files
	rm -rf $(VENV) runs build *.egg-info
