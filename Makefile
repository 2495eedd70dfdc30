# Every target works alone on a fresh machine with Python 3.11 and make: it creates .venv first.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/.installed
# Kernels are interpreted in one thread each, so tests run side by side. On a GPU: make test WORKERS=0
WORKERS ?= 2
# A file stays with one worker: what its tests share is made once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile

# Another Triton than constraints.txt's, beside the same torch: what the kernels are tested on with it.
TRITON ?= 3.9.0
OTHER_TRITON = .venv/triton-$(TRITON)
KERNEL_TESTS ?= tests/kernels tests/bindings/test_preference.py

.PHONY: help demo docs test test-slow test-all test-exhaustive test-triton gpu lint format clean

help:
	@echo "make demo      train and align a small model on the CPU, and print before and after"
	@echo "make test      every test but the slow ones: some six minutes on two cores"
	@echo "make test-all  those and the slow ones"
	@echo "make test-exhaustive  kernels compiled for chips that borrow tiles"
	@echo "make test-triton TRITON=3.9.0   the kernels' tests, slow ones too, with another Triton"
	@echo "make gpu       check and time the kernels on this machine's GPU, with its own python3"
	@echo "make docs      the documentation as a site, in build/site"
	@echo "make lint      ruff check and ruff format --check"
	@echo "make format    ruff's fixes, written"

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "build/site/index.html opens from the disk; its search needs a server: python3 -m http.server -d build/site"

test: $(INSTALLED)
	$(PYTEST) -m "not slow"

test-slow: $(INSTALLED)
	$(PYTEST) -m "slow and not exhaustive"

test-exhaustive: $(INSTALLED)
	$(PYTEST) -m exhaustive

test-all: test test-slow

test-triton: $(INSTALLED)
	test -d $(OTHER_TRITON) || $(BIN)/python -m pip install --quiet --no-deps --target $(OTHER_TRITON) triton==$(TRITON)
	PYTHONPATH=$(CURDIR)/$(OTHER_TRITON) $(PYTEST) $(KERNEL_TESTS)

gpu:  # no .venv: on a GPU machine torch and triton are already there
	python3 bench/checkout.py gpu

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

# The stamp is written last, so an installation cut short is taken up again.
$(INSTALLED): pyproject.toml constraints.txt
	@"$(PYTHON)" -c "import sys; sys.exit(sys.version_info < (3, 11))" \
	    || { echo "prefuse needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "installing into .venv; the first time this downloads torch and takes a few minutes"
	@"$(PYTHON)" -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[train,trl,bench,dev,docs]" -c constraints.txt
	@touch $@
