# Two commands: `make report` and `make test`. The others are listed by `make`.
SHELL := /usr/bin/env bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
STUDY ?= phantom
DATA ?=
N ?= 2
PROFILE ?= local
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.medaug-ready

.PHONY: help report test lab study plan render bench lint clean publish foundations env pins

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  variables: STUDY=$(STUDY) DATA=/folder N=$(N) (cores) PROFILE=$(PROFILE) (slurm, kubernetes) PYTHON=$(PYTHON)"

report: ## run the embedded study on simulated images, build the site, print where it is (10 to 13 minutes)
	@$(MAKE) -s env
	@$(BIN)/medaug run phantom --cores $(N)
	@$(BIN)/medaug site --where phantom

test: ## pass the tests
	@$(MAKE) -s env
	@$(BIN)/python -m pytest -n $(N) --dist loadscope

lab: ## step through the notebooks in JupyterLab
	@$(MAKE) -s env
	@$(BIN)/jupyter lab --notebook-dir notebooks

study: ## run a study: make study STUDY=guangzhou-local DATA=/folder (N=cores, PROFILE=slurm)
	@$(MAKE) -s env
	@$(BIN)/medaug run $(STUDY) --data "$(DATA)" --profile $(PROFILE) $(if $(filter local,$(PROFILE)),--cores $(N))
	@$(BIN)/medaug site --where $(STUDY)

plan: ## show what a run of STUDY would do and why: time, disk, GPU hours; runs nothing
	@$(MAKE) -s env
	@$(BIN)/medaug plan $(STUDY) --data "$(DATA)"

render: ## build the site from what has been run, without running anything
	@$(MAKE) -s env
	@$(BIN)/medaug site

bench: ## measure our code beside the plain way, in alternation; rows go to bench/results/
	@$(MAKE) -s env
	@$(BIN)/python bench/run.py

lint: ## check the style of the code, and that no notebook carries outputs
	@$(MAKE) -s env
	@$(BIN)/ruff check .
	@$(BIN)/medaug strip --check

publish: ## copy the results of STUDY to data/results/ (numbers; pictures only of simulated images)
	@$(MAKE) -s env
	@$(BIN)/medaug publish $(STUDY)

foundations: ## train the small weights in data/foundations/ again (hours on a CPU, minutes on a GPU; resumes)
	@$(MAKE) -s env
	@mkdir -p runs/foundations
	@HF_HUB_OFFLINE=1 MEDAUG_HEADLESS=1 $(BIN)/papermill --kernel python3 --cwd . \
	  notebooks/00-foundations.ipynb runs/foundations/00-foundations.ipynb

clean: ## remove what runs and tools wrote (runs/, the site, caches); keeps data, results and .venv
	@rm -rf runs _site .quarto .snakemake .pytest_cache .ruff_cache build src/*.egg-info
	@find src tests bench -name __pycache__ -prune -exec rm -rf {} +

env: $(READY) ## set up .venv with the pinned packages (done by the others when needed)

# `flock` (where there is one) makes a second `make` wait for the first one's installation.
$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "medaug needs Python >= 3.11, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | head -1): use make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@mkdir -p $(VENV)
	@if command -v flock >/dev/null; then exec 9>$(VENV)/.lock; flock 9; fi; \
	if [ $@ -nt requirements.txt ] && [ $@ -nt pyproject.toml ]; then exit 0; fi; \
	echo "Setting up $(VENV): about 250 packages, some gigabytes, once"; \
	[ -x $(BIN)/pip ] || $(PYTHON) -m venv $(VENV) || { \
	  echo "cannot make $(VENV): Python's venv module is missing (on Debian: the package python3-venv)" >&2; exit 1; }; \
	$(BIN)/python -m pip install -r requirements.txt && \
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e . && touch $@

pins: ## raise the pins in requirements.txt to what pyproject.toml allows today (needs uv)
	@uv=$$(command -v uv || echo $(BIN)/uv); \
	{ echo "# Every package pinned, for Python 3.11 and later on any platform. Made from pyproject.toml by \`make pins\`."; \
	$$uv pip compile --quiet --universal --python-version 3.11 --extra dev --upgrade --no-header --no-annotate \
	--no-emit-index-url --no-emit-find-links pyproject.toml; } > requirements.txt.new
	@mv requirements.txt.new requirements.txt
