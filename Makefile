# `make test` and `make demo` are all that a fresh machine needs: they make their own virtual environment.
PYTHON ?= python3
VENV ?= .venv
LOWEST_VENV ?= .venv-lowest
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOWEST_STAMP := $(LOWEST_VENV)/.installed
# One process for each core; the tests of a module stay together, because they share what takes long to make.
PYTEST := -m pytest -n logical --dist loadscope
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help install test slow lint demo bench docs wheel test-lowest

help:
	@echo "make test         run the tests (a few minutes)"
	@echo "make demo         train a small GPT-2 with and without nowcasts (ARGS='--arch llama' and more)"
	@echo "make bench        compare nowcasting with its rivals, in tiny (ARGS='--preset tuned' for more)"
	@echo "make slow         run the slow tests"
	@echo "make lint         check the style with ruff"
	@echo "make docs         make docs/api.md anew"
	@echo "make wheel        build sdist and wheel, install it elsewhere, and run the demo from there"
	@echo "make test-lowest  run the tests with the lowest versions that setup.cfg promises"

install: $(STAMP)

test: $(STAMP)
	$(BIN)/python $(PYTEST) $(ARGS)

slow: $(STAMP)
	$(BIN)/python $(PYTEST) -m slow $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

demo: $(STAMP)
	$(BIN)/hf-nino demo $(ARGS)

bench: $(STAMP)
	$(BIN)/hf-nino bench $(ARGS)

docs: $(STAMP)
	$(BIN)/python docs/make_api.py

wheel:
	$(check_python)
	$(PYTHON) .ci/wheel.py $(ARGS)

# Old packages warn about new ones: here only our own warnings are errors.
test-lowest: $(LOWEST_STAMP)
	$(LOWEST_VENV)/bin/python $(PYTEST) -o filterwarnings="error:::hf_nino" $(ARGS)

$(STAMP): setup.cfg pyproject.toml constraints/ci.txt
	$(call install,$(VENV),constraints/ci.txt)

$(LOWEST_STAMP): setup.cfg pyproject.toml constraints/lowest.txt
	$(call install,$(LOWEST_VENV),constraints/lowest.txt)

define check_python
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "hf_nino needs Python 3.10 or newer, but $(PYTHON) is `$(PYTHON) --version 2>&1`."; \
		echo "Name a newer one: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
endef

define install
	$(check_python)
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check -c $(2) -e ".[dev]"
	touch $@
endef
