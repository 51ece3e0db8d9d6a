# Two commands from a fresh clone: `make demo` and `make test`. In an active virtual environment they use it, else .venv.
ifdef VIRTUAL_ENV
PYTHON := $(VIRTUAL_ENV)/bin/python
else
PYTHON := .venv/bin/python
endif
STAMP := build/.installed-$(subst /,_,$(PYTHON))

.PHONY: demo test lint setup
setup: $(STAMP)

# torch is installed, pinned, only where there is none: a CUDA build that is there stays.
$(STAMP): pyproject.toml
	test -x $(PYTHON) || python3 -m venv .venv
	$(PYTHON) -c "import torch" 2>/dev/null || $(PYTHON) -m pip install --quiet torch==2.13.0
	$(PYTHON) -m pip install --quiet -e ".[dev]"
	mkdir -p build && touch $@

demo: setup
	$(PYTHON) examples/byte_lm/demo.py

test: setup
	$(PYTHON) -m pytest -n 2

# Types are checked on an installed copy, because passes/ is sagecompile.passes only once installed.
lint: setup
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	rm -rf build/typed build/lib
	$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation --upgrade --target build/typed .
	MYPYPATH=build/typed $(PYTHON) -m mypy -p sagecompile
