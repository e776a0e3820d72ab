# One command for each thing; each makes the environment in .venv first if it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# what `make gpu` runs: a machine's own python with torch, triton and pytest, and nothing installed by us
GPU_PYTHON ?= python3
# these need the text libraries or an environment of their own
NOT_ON_GPU := $(wildcard tests/test_text_*.py) $(addprefix tests/test_,article.py calibration.py cli.py demo.py model.py packaging.py readme.py recipes.py sample.py sick.py training.py)
GPU_TESTS = $(filter-out $(NOT_ON_GPU),$(wildcard tests/test_*.py))

BENCH := benchmarks --benchmark-only --save-results --benchmark-columns=median,iqr,rounds

.PHONY: help demo test check aot gpu gpu-test gpu-sanitize gpu-bench bench report sick clean
.PHONY: gpu-bench-a gpu-bench-b gpu-bench-cd

help:
	@echo "make demo           train, evaluate and query a small model on pairs that ship with the package"
	@echo "make test           the test suite"
	@echo "make check          the gate: format, lint, types, tests, report in step"
	@echo "make aot            compile every kernel for every target and print the table (needs no GPU)"
	@echo "make gpu            on a GPU machine: gpu-test, gpu-sanitize, gpu-bench"
	@echo "make bench          measure this machine into benchmarks/results/"
	@echo "make report         render the README's table and the plots from benchmarks/results/"
	@echo "make sick DATA=DIR  train every recipe on the SICK files; DIR holds sick/, sts/, vectors/, seed/"
	@echo "make clean          remove what was built, the environment included"

demo: $(VENV)/.made-test
	$(BIN)/fastsiam demo

test: $(VENV)/.made-test
	$(BIN)/python -m pytest -n auto tests

check: $(VENV)/.made-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto tests
	$(BIN)/python -m benchmarks.report --check

# TRITON=3.6.0 compiles with that version instead of the environment's
aot: $(VENV)/.made-test
ifdef TRITON
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/triton-$(TRITON) triton==$(TRITON)
	PYTHONPATH=build/triton-$(TRITON) $(BIN)/python tests/aot.py --json build/aot-$(TRITON).json
else
	$(BIN)/python tests/aot.py
endif

gpu: gpu-test gpu-sanitize gpu-bench

gpu-test:
	PYTHONPATH=. $(GPU_PYTHON) -m pytest $(GPU_TESTS)

# one small case an op: the tool slows a kernel down a hundredfold
gpu-sanitize:
	PYTHONPATH=. PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
		$(GPU_PYTHON) -m pytest -p no:cacheprovider -m gpu -k sanitize $(GPU_TESTS)

gpu-bench: gpu-bench-a gpu-bench-b gpu-bench-cd

gpu-bench-a gpu-bench-b gpu-bench-cd:
	PYTHONPATH=. $(GPU_PYTHON) -m pytest $(BENCH) --cases "$(CASES)"
gpu-bench-a: CASES = A
gpu-bench-b: CASES = B,B'
gpu-bench-cd: CASES = C,D

bench: $(VENV)/.made-test
	$(BIN)/python -m pytest $(BENCH)

report: $(VENV)/.made-test
	$(BIN)/python -m benchmarks.report

sick: $(VENV)/.made-test
	@test -n "$(DATA)" || { echo "make sick: DATA must name the folder that holds sick/, sts/, vectors/ and seed/, as in: make sick DATA=data" >&2; exit 2; }
	for preset in fast good best paper article; do \
		$(BIN)/python -m benchmarks.sick --preset $$preset --data "$(DATA)" || exit; \
	done
	$(BIN)/python -m benchmarks.sick_times --data "$(DATA)"
	$(BIN)/python -m benchmarks.sick_report

clean:
	rm -rf $(VENV) build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# the stamp is written last, so an interrupted set-up is taken up again;
# torch comes first and alone, because the rest asks for whatever torch is there
$(VENV)/.made-%: pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "fastsiam needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1); pass another: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -c constraints.txt -e '.[$*]'
	@touch $@
