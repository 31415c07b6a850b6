# `make demo` and `make test` are all that a new user needs: they set up .venv by themselves.
#
# Variables:  PYTHON=python3.12   the interpreter to build .venv with (3.11 or 3.12)
#             EXTRAS=cli,test     what to install, see pyproject.toml
#             WANTED=             without DeepSpeed; it may be missing where it does not install
#             TORCH_FLAGS=...     for pip when it installs torch; on a machine without a GPU
#                                 "--index-url https://download.pytorch.org/whl/cpu" avoids the
#                                 gigabytes of CUDA that the default build brings along
#             ARGS=...            passed on to the demo, to pytest or to benchmarks/train_step.py
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench clean

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.hiedit-installed
EXTRAS ?= cli,mlflow,models,peft,ray,triton,world,test
# What `make test` uses where it can be had: DeepSpeed comes as source, whose setup fails beside a
# CUDA build of torch without a CUDA toolkit. Its tests are skipped then, with the reason.
WANTED ?= deepspeed>=0.19.8,<0.20
REAL := smollm2-135m
PYTHON ?= python3.12 python3.11 python3
TORCH_FLAGS ?=

help: ## this list
	@sed -nE 's/^([a-z]+):.*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

setup: $(STAMP) ## .venv with HiEdit, its extension and all that demo and test need

demo: $(STAMP) ## edit SmolLM2-135M 50 times, show the table (ARGS=--world: a small embedded model)
	@$(BIN)/hiedit demo $(ARGS)

test: $(STAMP) ## the test suite
	@workers=
	if $(BIN)/python -c 'import xdist' 2>/dev/null; then workers="-n 2"; fi
	$(BIN)/python -m pytest $$workers $(ARGS)

lint: $(STAMP) ## ruff: rules and formatting
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(STAMP) ## seconds per training edit, edit, commit and forward pass beside other ways
	@$(BIN)/python benchmarks/train_step.py $(ARGS)
	$(BIN)/python benchmarks/edit_step.py --edits 10
	$(BIN)/python benchmarks/forward_shift.py --repeats 5
	$(BIN)/python benchmarks/ledger_commit.py
	$(BIN)/python benchmarks/scaling.py --edits 10 --rounds 3

clean: ## removes .venv and everything built; runs/ stays
	@rm -rf $(VENV) build dist *.egg-info hiedit/_C*.so .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# A name on PATH may be a shim that only prints an error, and a distribution may leave out what
# venv needs, so candidates are run rather than looked up. A GPU machine whose interpreter brings a
# CUDA build of torch is used as it is (it may have no network): .venv then only adds to it.
$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	@began=$$SECONDS
	say() { echo "[setup $$((SECONDS - began))s] $$*"; }
	usable() { "$$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' &>/dev/null; }
	has_cuda() { "$$1" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' &>/dev/null; }
	gpu=$$(nvidia-smi -L 2>/dev/null | head -n 1 || true)
	python=
	for p in $(PYTHON); do
	  if [ -n "$$gpu" ] && usable "$$p" && has_cuda "$$p"; then python=$$p; break; fi
	done
	brought=$$python
	for p in $(PYTHON); do
	  if [ -z "$$python" ] && usable "$$p"; then python=$$p; fi
	done
	if [ -z "$$python" ]; then
	  echo "HiEdit needs Python 3.11 or 3.12 with its venv module, and none of these is one:"
	  echo "    $(PYTHON)"
	  echo "Install it (Debian, Ubuntu: apt-get install python3 python3-venv python3-dev) or name"
	  echo "one: make setup PYTHON=/path/to/python3.12"
	  exit 1
	fi
	if [ ! -x $(BIN)/python ]; then
	  say "$$("$$python" --version) ($$python) -> $(VENV)"
	  "$$python" -m venv $${brought:+--system-site-packages} $(VENV)
	fi
	# A virtual environment made from another one does not see the packages of that one.
	if [ -n "$$brought" ] && ! has_cuda $(BIN)/python; then
	  "$$brought" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' \
	    > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/system.pth"
	fi
	export PATH="$(CURDIR)/$(BIN):$$PATH" PIP_DISABLE_PIP_VERSION_CHECK=1
	# Most of what gets installed is never imported: it is compiled when it is, not now.
	install() { $(BIN)/python -m pip install -qq --no-compile "$$@"; }
	if [ -n "$$brought" ]; then
	  say "HiEdit[$(EXTRAS)] on the torch that $$brought brings"
	  install --retries 1 --timeout 10 --no-build-isolation -e ".[$(EXTRAS)]" || {
	    say "not everything could be installed; going on with what is here"
	    install --no-build-isolation --no-deps -e .
	  }
	  [ -z "$(WANTED)" ] || install --retries 1 --timeout 10 --no-build-isolation "$(WANTED)" ||
	    say "$(WANTED) could not be installed: its tests will be skipped"
	else
	  # First of all, or another requirement would fetch the newest build, and the CUDA one.
	  say "torch"
	  install -c constraints.txt $(TORCH_FLAGS) torch
	  say "HiEdit[$(EXTRAS)] and what it needs"
	  install -c constraints.txt setuptools wheel ninja
	  install -c constraints.txt --no-build-isolation -e ".[$(EXTRAS)]"
	  [ -z "$(WANTED)" ] || install -c constraints.txt --no-build-isolation "$(WANTED)" ||
	    say "$(WANTED) could not be installed: its tests will be skipped"
	fi
	say "the real model (a download of 93 MB)"
	$(BIN)/hiedit models get $(REAL) ||
	  say "going on without it: $(BIN)/hiedit models get $(REAL) brings it"
	$(BIN)/python -m hiedit.doctor --problems
	touch $@
	say "ready"
