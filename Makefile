# make demo    a talking puppet: out/demo.mp4, and out/demo.png to look at
# make test    the tests
# make lint    style and types
# make clean   removes what these made
#
# Needs python3 (3.11 or later) and installs everything into .venv.
# Another interpreter: make demo PYTHON=python3.12        With extras, on a GPU machine say: make demo EXTRAS=cuda

PYTHON ?= python3
EXTRAS ?=
VENV := .venv
BIN := $(VENV)/bin

# On Linux the C library gives large temporaries back and asks for them again at every step of a program; in huge pages
# that costs next to nothing. Elsewhere it is not read. See "Training" in docs/benchmarks.md.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

comma := ,
suffix := $(if $(EXTRAS),-$(subst $(comma),-,$(EXTRAS)))
INSTALLED := $(VENV)/.installed$(suffix)
INSTALLED_DEV := $(VENV)/.installed-dev$(suffix)
INSTALL := $(BIN)/python -m pip install --quiet --no-input --disable-pip-version-check --editable

.PHONY: demo test lint clean

demo: $(INSTALLED)
	$(BIN)/python sample.py --config configs/demo.py

test: $(INSTALLED_DEV)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: $(INSTALLED_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) out build *.egg-info .mypy_cache .ruff_cache .pytest_cache

# Installed once, and again when pyproject.toml changes.
$(INSTALLED): pyproject.toml | $(BIN)/python
	@echo "installing into $(VENV): some minutes the first time"
	@$(INSTALL) '.$(if $(EXTRAS),[$(EXTRAS)])'
	@touch $@

$(INSTALLED_DEV): pyproject.toml | $(BIN)/python
	@echo "installing into $(VENV): some minutes the first time"
	@$(INSTALL) '.[dev$(if $(EXTRAS),$(comma)$(EXTRAS))]'
	@touch $@ $(INSTALLED)

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found: install Python 3.11 or later" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: Python 3.11 or later is needed, and $(PYTHON) is older: make demo PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "error: $(PYTHON) cannot make a virtual environment: install its venv module (python3-venv)" >&2; exit 1; }
