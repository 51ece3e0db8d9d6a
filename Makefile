# Two commands from a fresh clone: `make demo` and `make test`. In an active virtual environment they use it, else .venv.
# What they install has the exact versions of $(CONSTRAINTS), which `make constraints` moves; with a Python that has none
# of these: make test CONSTRAINTS=/dev/null
ifdef VIRTUAL_ENV
PYTHON := $(VIRTUAL_ENV)/bin/python
else
PYTHON := .venv/bin/python
endif
CONSTRAINTS := .ci/constraints-cpu.txt
# torch, and the triton that fits it, are in no file of versions: a CUDA build that is there stays as it is.
TORCH := torch==2.13.0 triton==3.9.0
STAMP := build/.installed-$(subst /,_,$(PYTHON)$(CONSTRAINTS))
PIP = $(PYTHON) -m pip install --quiet --constraint $(CONSTRAINTS)

.PHONY: demo test test-newest lint setup constraints
setup: $(STAMP)

# Built with the setuptools of $(CONSTRAINTS), which a build environment of pip's own would not heed.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	test -x $(PYTHON) || python3 -m venv $(dir $(PYTHON))..
	$(PYTHON) -c "import torch" 2>/dev/null || $(PIP) $(TORCH)
	$(PIP) "setuptools>=77"
	$(PIP) --no-build-isolation -e ".[dev]"
	mkdir -p build && touch $@

demo: setup
	$(PYTHON) examples/byte_lm/demo.py

test: setup
	$(PYTHON) -m pytest -n 2

# The newest of everything but torch, in an environment of its own: what will break when the versions are moved.
test-newest:
	rm -rf build/newest build/.installed-build_newest*
	$(MAKE) test VIRTUAL_ENV=build/newest CONSTRAINTS=/dev/null TORCH="torch==2.13.0 triton"

# Write the newest versions of today into the files that `make` and .ci/vllm install from.
constraints:
	.ci/constraints

# Types are checked on an installed copy, because passes/ is sagecompile.passes only once installed.
lint: setup
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	rm -rf build/typed build/lib
	$(PIP) --no-deps --no-build-isolation --upgrade --target build/typed .
	MYPYPATH=build/typed $(PYTHON) -m mypy -p sagecompile
