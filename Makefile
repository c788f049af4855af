# Every target makes .venv and installs what is missing first. Needs Python 3.10 or newer, make and a C compiler.
PYTHON ?= python3
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
BIN := .venv/bin
INSTALLED := .venv/installed
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: install demo test check bench docs clean

install: $(INSTALLED)

demo: $(INSTALLED)
	@$(BIN)/python samples/demo.py

test: $(INSTALLED)
	$(BIN)/pytest -n 2 --dist loadfile

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/check_types.py

bench: $(INSTALLED)
	@for script in tests/bench/bench_*.py; do echo "$$script"; $(BIN)/python "$$script" || exit 1; done

docs: $(INSTALLED)
	$(BIN)/python docs/generate_cli.py

clean:
	rm -rf .venv build demo dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find edgekit exporters kernels devices samples tests docs -name __pycache__ -prune -exec rm -rf {} +
	find kernels -name '*.so' -delete

# torch first, without CUDA where such a build is on offer; llama-cpp-python is compiled, once.
$(INSTALLED): pyproject.toml constraints.txt $(wildcard setup.py kernels/*.c kernels/*.h)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("edgekit needs Python 3.10 or newer, $(PYTHON) is " + sys.version.split()[0] + "; run: make PYTHON=python3.11")'
	@test -x $(BIN)/python || { echo "make: creating .venv"; $(PYTHON) -m venv .venv; }
	@echo "make: installing $(TORCH) into .venv"
	@$(PIP) setuptools "$(TORCH)+cpu" 2>/dev/null || $(PIP) setuptools "$(TORCH)"
	@$(BIN)/python -c 'import llama_cpp' 2>/dev/null || echo "make: installing llama-cpp-python (compiled from source: some 7 minutes on 2 cores)"
	@$(PIP) llama-cpp-python
	@echo "make: installing edgekit and the rest"
	@$(PIP) --no-build-isolation --editable '.[convert,onnx,dev]'
	@touch $@
