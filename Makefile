# PYTHON: any Python from 3.11 on; it is only used to create .venv.
# SITE=1: .venv sees the packages of that Python, torch say, and installs only what is missing.
PYTHON ?= python3
SITE ?=
VENV := .venv
BIN := $(VENV)/bin
DATA ?= digits
DATA_DIR ?=
SIZE ?= 32

PACKAGES = import sys; \
	print(*(path for path in sys.path if path.endswith("-packages")), sep="\n")
PYTEST = $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

.PHONY: venv check cards site test test-all quickstart clean

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(SITE),$(PYTHON) -c '$(PACKAGES)' > "$$($(BIN)/python -c \
		'import sysconfig; print(sysconfig.get_path("purelib"))')/site-of-python.pth")
	@echo "Installing what is missing: with torch's CUDA libraries about 5 GB, some minutes."
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[test]'
	touch $@

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/write_cards.py --check

# model_cards/, from registry/
cards: venv
	$(BIN)/python scripts/write_cards.py

# site/, from registry/, docs/ and the code: static pages, to open or to copy to a web server
site: venv
	$(BIN)/python scripts/build_site.py

test: venv
	$(PYTEST) -m "not slow"

test-all: venv
	$(PYTEST)

quickstart: venv
	$(BIN)/python scripts/quickstart.py --data $(DATA) --size $(SIZE) \
		$(if $(DATA_DIR),--data-dir '$(DATA_DIR)')

clean:
	rm -rf build dist site quickstart-output *.egg-info
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
