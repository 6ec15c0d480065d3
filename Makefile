# make train   install into .venv (first time only), then train the shipped policy with GRPO: a few minutes on 2 cores
# make test    install into .venv (first time only), then run every test but the longer ones on several processes:
# make test-distributed    ZeRO-1/2/3, FSDP2, LoRA and runs that are killed, one after another
# make test-versions   the drop-in's tests on the oldest and newest TRL and transformers (four environments, 6 GB)
# make test-release    build wheel and sdist, install them into empty environments, and use what is installed there
# make lint    ruff and mypy;   make format   let ruff rewrite;   make clean   forget the installation and the runs
#
# Needs Python 3.11 with pip, and g++. Another interpreter: make PYTHON=python3.12 train
# More arguments for the run: make train ARGS="--max_steps 20 --atlas.speculate false"

PYTHON ?= python3
ARGS ?=
VENV := .venv
STAMP := $(VENV)/.installed
EXTRAS := tasks,plots,peft,deepspeed,test,dev

.DEFAULT_GOAL := help
.PHONY: help setup train test test-distributed test-versions test-release lint format clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

setup: $(STAMP)
	@:

train: setup
	@$(VENV)/bin/atlas-rl train --config configs/quickstart.yaml $(ARGS)

test: setup lint
	@$(VENV)/bin/python -m pytest -n logical --maxprocesses 8 --dist loadfile $(ARGS)

test-distributed: setup
	@$(VENV)/bin/python -m pytest -m distributed $(ARGS)

test-versions: setup
	@$(VENV)/bin/python tests/version_matrix.py $(ARGS)

test-release: setup
	@$(VENV)/bin/python tests/smoke_install.py $(ARGS)

lint: setup
	@$(VENV)/bin/ruff check --quiet .
	@$(VENV)/bin/mypy --no-error-summary

format: setup
	@$(VENV)/bin/ruff format --quiet . && $(VENV)/bin/ruff check --quiet --fix .

clean:
	rm -rf $(VENV) .venvs runs build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(VENV)/bin/python:
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

# Redone only when what is installed would change; pip takes seconds when nothing does.
$(STAMP): pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing Atlas-RL and its dependencies into $(VENV) (the first time takes a few minutes)"
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@
