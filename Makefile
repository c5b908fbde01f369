# `make demo` and `make test` are all a newcomer needs, with Python 3.11+ and
# apt install g++ make python3-dev python3-venv libnuma1.
# Both create .venv on first use and work offline afterwards.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The CUDA build of vLLM where an NVIDIA GPU answers, the CPU build elsewhere.
ACCELERATOR ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
# Test processes at once; an engine takes about 2 GiB.
JOBS ?= 2
CONSTRAINTS := constraints-$(ACCELERATOR).txt
# vLLM's CPU build asks for these, but their wheels are built for CUDA and break transformers.
UNUSABLE_cpu := torchvision torchaudio torchcodec

# Release of vLLM whose Python files `make contract` checks.
VERSION ?= 0.33.0

# Where PyTorch and Triton are, for gpu-check; vLLM is measured too where it is there.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
GPU_RESULT ?= build/gpu-check.json

# Triton that gpu-compile takes: the one that PyTorch for CUDA pins.
TRITON ?= $(shell sed -n 's/^triton==//p' constraints-cuda.txt)

.PHONY: demo test unit soak check contract compatibility gpu-check gpu-compile docs install clean help

help:
	@echo "make demo     fetch a chat model, compress it, and let both answer side by side"
	@echo "make test     lint, type check, and every test"
	@echo "make unit     lint, type check, and the unit tests, two minutes"
	@echo "make soak     mixed load on the demo's Eigen server, 20 minutes at most"
	@echo "make check    lint and type check only"
	@echo "make contract VERSION=0.33.0  check a vLLM release for what the plugin relies on"
	@echo "make compatibility  run the engine tests and write docs/compatibility.md"
	@echo "make gpu-check  check and time the kernels on this machine's GPU, 15 minutes at most"
	@echo "make gpu-compile  the tests of compiled GPU kernels with the Triton of CUDA installs; no GPU needed"
	@echo "make docs     build the documentation into build/site"
	@echo "make install  only create .venv with everything to calibrate and serve"
	@echo "make clean    remove .venv and the demo's output"

install: $(VENV)/.$(ACCELERATOR)

demo: $(VENV)/.$(ACCELERATOR)
	@"$(BIN)/python" -m demo.run

# Options go in SOAK, e.g. `make soak SOAK="--requests 500 --minutes 3"`.
soak: $(VENV)/.$(ACCELERATOR) .demo/eigen/config.json
	@"$(BIN)/vllm-eigen" bench soak --model .demo/eigen --output .demo/soak.json $(SOAK)

.demo/eigen/config.json: | $(VENV)/.$(ACCELERATOR)
	@"$(BIN)/python" -m demo.run --calibrate-only

check: $(VENV)/.dev
	"$(BIN)/python" -m ruff check .
	"$(BIN)/python" -m ruff format --check .
	"$(BIN)/python" -m mypy
	"$(BIN)/python" -m mypy docker/entrypoint.py docker/health.py
	"$(BIN)/lint-imports"

test: check
	"$(BIN)/python" -m pytest --numprocesses $(JOBS)

unit: check
	"$(BIN)/python" -m pytest --numprocesses $(JOBS) -m "unit and not slow"

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.$(ACCELERATOR): $(BIN)/python pyproject.toml $(CONSTRAINTS)
	@echo "Installing vLLM for $(ACCELERATOR) and the project; this takes one to three minutes."
	"$(BIN)/python" -m pip install --quiet --progress-bar on --disable-pip-version-check \
	    -c $(CONSTRAINTS) -e ".[$(ACCELERATOR),calibrate]"
ifneq ($(UNUSABLE_$(ACCELERATOR)),)
	"$(BIN)/python" -m pip uninstall --quiet --yes $(UNUSABLE_$(ACCELERATOR))
endif
	@touch $@

$(VENV)/.dev: $(VENV)/.$(ACCELERATOR)
	"$(BIN)/python" -m pip install --quiet --disable-pip-version-check \
	    -c $(CONSTRAINTS) -e ".[calibrate,dev,docs]"
	@touch $@

contract: $(VENV)/.dev
	"$(BIN)/python" -m tests.plugin.contract.check $(VERSION)

compatibility: $(VENV)/.dev
	"$(BIN)/python" -m pytest tests/plugin --numprocesses $(JOBS) --compatibility docs/compatibility.md

# The project's own dependencies are small; PyTorch and Triton are taken as they are.
gpu-check:
	"$(GPU_PYTHON)" -m pip install --quiet --disable-pip-version-check -e .
	@mkdir -p "$(dir $(GPU_RESULT))"
	"$(GPU_PYTHON)" -m vllm_eigen.cli bench gpu --output-json "$(GPU_RESULT)"

gpu-compile: $(VENV)/.dev build/triton-$(TRITON)/triton
	EIGEN_TEST_TRITON=build/triton-$(TRITON) "$(BIN)/python" -m pytest --numprocesses $(JOBS) \
	    --dist loadfile tests/kernels/gpu/test_compile.py tests/kernels/gpu/test_compile_coded.py

build/triton-%/triton: | $(BIN)/python
	"$(BIN)/python" -m pip install --quiet --disable-pip-version-check --no-deps \
	    --target "build/triton-$*" triton==$*

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 "$(BIN)/python" -m mkdocs build --strict

clean:
	rm -rf $(VENV) .demo
