# PYTHON: any Python from 3.11 on; it is only used to create .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA ?= digits
DATA_DIR ?=
SIZE ?= 32

.PHONY: venv check test quickstart clean

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: venv
	$(BIN)/python -m pytest

quickstart: venv
	$(BIN)/python scripts/quickstart.py --data $(DATA) --size $(SIZE) \
		$(if $(DATA_DIR),--data-dir '$(DATA_DIR)')

clean:
	rm -rf build dist quickstart-output *.egg-info
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
