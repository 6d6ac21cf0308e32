# make demo    the whole product on real text: about 5 minutes on two cores
# make test    ruff, types, the import rule, then the tests
# make fuzz    30,000 damaged files through the checkpoint readers
PYTHON ?= python3
BIN := .venv/bin
TORCH := torch==2.13.0

.PHONY: help demo test fuzz check format clean
help:
	@grep -E '^# make' Makefile | cut -c3-

demo: .venv/installed
	$(BIN)/python -m demo

test: check
	$(BIN)/pytest -q -n auto

fuzz: .venv/installed
	GPTJ_FUZZ_INPUTS=3000 $(BIN)/pytest -q -n auto tests/checkpoint/test_fuzz.py

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv demo/out

# PyTorch first, so that what depends on it takes the build chosen here: CUDA's where there is a GPU, else the
# CPU's, which is far smaller. Where no package source lists the CPU build by version, uv knows PyTorch's own index.
.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	@if nvidia-smi -L >/dev/null 2>&1; then $(BIN)/pip install -q $(TORCH); \
	else $(BIN)/pip install -q $(TORCH)+cpu 2>/dev/null || \
		{ $(BIN)/pip install -q uv && $(BIN)/uv pip install -q --python $(BIN)/python --torch-backend cpu $(TORCH); } || \
		$(BIN)/pip install -q $(TORCH); fi
	$(BIN)/pip install -q -e '.[dev]'
	@touch $@
