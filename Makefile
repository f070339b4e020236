# make demo · make test · make test-slow · make bench       each sets up .venv first, then runs
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

REQUIREMENTS := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo requirements.txt || echo requirements-cpu.txt)
PY := .venv/bin/python
READY := .venv/ready-$(REQUIREMENTS)
export PYTHONUNBUFFERED := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup demo test test-slow bench clean
help:
	@sed -n '1p' Makefile

setup: $(READY)

# python3.12 or python3.11, whichever is there and really starts; uv resolves and downloads in parallel.
$(READY): $(REQUIREMENTS)
	@python=; for name in python3.12 python3.11 python3 python; do \
	  if $$name -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then python=$$name; break; fi; \
	done; \
	if [ -z "$$python" ]; then echo "error: Python 3.11 or 3.12 is needed, and neither is on the PATH" >&2; exit 1; fi; \
	[ -x $(PY) ] || { echo "creating .venv with $$python"; $$python -m venv .venv; }
	@echo "installing $(REQUIREMENTS) (about 5 GB the first time)"
	@$(PY) -m pip install --quiet --disable-pip-version-check uv
	@$(PY) -m uv pip install --quiet --python $(PY) -r $(REQUIREMENTS)
	@touch $@

demo: setup
	@$(PY) -m data.tokenizer --check
	@rm -rf runs/demo-start runs/demo
	$(PY) train_sft.py demo
	$(PY) train_grpo.py demo

test: setup
	$(PY) -m pytest -q -m "not slow and not gpu" tests

test-slow: setup
	$(PY) -m pytest -q -m "slow and not gpu" tests

bench: setup
	for file in kernels/*.py; do $(PY) -m kernels.$$(basename $$file .py); done

clean:
	rm -rf .venv
