# `make demo` and `make test` work from nothing on a fresh machine with Python >= 3.11; neither needs a C compiler.
PYTHON ?= python3
VENV   ?= .venv
# The CPU and the CUDA build are both torch 2.13.0: pip takes what its index offers for this machine.
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin

.PHONY: install models demo test test-gpu lint clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py $(wildcard src/multitensor/kernels/cpu/*.c src/multitensor/kernels/cpu/*.h)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 install")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	if $(BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; then $(BIN)/python -m pip install --quiet -e '.[cuda]'; fi
	touch $@

models: install
	$(BIN)/multitensor pull smollm2-135m
	$(BIN)/multitensor pull gemma3-270m

# The GPUs found, or two CPU ranks where there is none.
demo: install
	@model=$$($(BIN)/multitensor pull smollm2-135m | tail -n 1) && \
	gpus=$$($(BIN)/python -c 'from multitensor.sharding.topology import find_gpus; print(len(find_gpus()))') && \
	if [ "$$gpus" -gt 0 ]; then devices=""; else devices="--devices cpu:2"; fi && \
	set -x && $(BIN)/multitensor run "$$model" $$devices --chat -p "Why is the sky blue?" -n 96 --temp 0

test: install
	$(BIN)/multitensor pull smollm2-135m || echo "the tests that need SmolLM2 will be skipped"
	$(BIN)/multitensor pull gemma3-270m || echo "the tests that need Gemma 3 will be skipped"
	$(BIN)/python -m pytest

# The tests that need GPUs, dealt over those that are here.
test-gpu: install
	$(BIN)/python tools/gpu_tests.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src -name '*.so' -delete
