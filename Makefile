# One command for each thing; each makes the environment in .venv first if it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# what `make gpu` runs: a machine's own python with torch, triton, pytest and its plugins xdist and
# benchmark, and nothing installed by us; compiling a kernel's variants is most of a test step's time,
# about 250 variants in the first and 150 in the second, so several processes share the GPU
GPU_PYTHON ?= python3
GPU_WORKERS ?= 4
GPU_ENV := PYTHONPATH=.:$(PYTHONPATH)
# its packages are not ours: what they warn of is no error
GPU_PYTEST = $(GPU_ENV) $(GPU_PYTHON) -m pytest -W default
GPU_TESTS_1 := $(addprefix tests/test_,siamese_lstm.py ops.py)
GPU_TESTS_2 := $(addprefix tests/test_,siamese_gru.py siamese_wide.py similarity.py packing.py weight_gradients.py tiling.py module.py layers.py recompute.py large_offsets.py topk.py \
	graph.py backend_choice.py bad_input.py reference.py benchmarks.py)

BENCH := benchmarks --benchmark-only --save-results --benchmark-columns=median,iqr,rounds

.PHONY: help demo test check aot gpu gpu-test gpu-sanitize gpu-bench bench report sick scores clean
.PHONY: gpu-test-1 gpu-test-2 gpu-bench-a gpu-bench-b gpu-bench-b2 gpu-bench-c gpu-bench-d gpu-bench-more

help:
	@echo "make demo           make sentence pairs, train a small model on them, print its scores"
	@echo "make test           the test suite"
	@echo "make check          the gate: format, lint, types, tests, report in step"
	@echo "make aot            compile every kernel for every target, print the table, compile what is launched (needs no GPU)"
	@echo "make gpu            on a GPU machine: gpu-test, gpu-sanitize, gpu-bench, each in steps of minutes"
	@echo "make bench          measure this machine into benchmarks/results/"
	@echo "make report         render the README's table and the plots from benchmarks/results/"
	@echo "make sick DATA=DIR  train every recipe on the SICK files; DIR holds sick/, sts/, vectors/, seed/"
	@echo "make scores DATA=DIR  time text to scores beside sentence-transformers; DIR holds sick/ and vectors/"
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
	PYTHONPATH=build/triton-$(TRITON) $(BIN)/python tests/launches.py
else
	$(BIN)/python tests/aot.py
	$(BIN)/python tests/launches.py
endif

gpu: gpu-test gpu-sanitize gpu-bench

gpu-test: gpu-test-1 gpu-test-2

gpu-test-1:
	$(GPU_PYTEST) -n $(GPU_WORKERS) $(GPU_TESTS_1)
gpu-test-2:
	$(GPU_PYTEST) -n $(GPU_WORKERS) $(GPU_TESTS_2)

# one small case an op: the tool slows a kernel down a hundredfold
gpu-sanitize:
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(GPU_ENV) compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 1 \
		$(GPU_PYTHON) -m pytest -W default -p no:cacheprovider -m gpu -k sanitize $(GPU_TESTS_1) $(GPU_TESTS_2)

gpu-bench: gpu-bench-a gpu-bench-b gpu-bench-b2 gpu-bench-c gpu-bench-d gpu-bench-more

gpu-bench-a gpu-bench-b gpu-bench-b2 gpu-bench-c gpu-bench-d gpu-bench-more:
	$(GPU_PYTEST) $(BENCH) --cases "$(CASES)"
gpu-bench-a: CASES = A
gpu-bench-b: CASES = B
gpu-bench-b2: CASES = B'
gpu-bench-c: CASES = C
gpu-bench-d: CASES = D
gpu-bench-more: CASES = both ways,GRU

bench: $(VENV)/.made-test
	$(BIN)/python -m pytest $(BENCH)

report: $(VENV)/.made-test
	$(BIN)/python -m benchmarks.report

sick: $(VENV)/.made-test
	@test -n "$(DATA)" || { echo "make sick: DATA must name the folder that holds sick/, sts/, vectors/ and seed/, as in: make sick DATA=data" >&2; exit 2; }
	for preset in fast good paper article; do \
		$(BIN)/python -m benchmarks.sick --preset $$preset --data "$(DATA)" || exit; \
	done
	rm -rf build/sick-best
	$(BIN)/python -m benchmarks.sick --preset best --seeds 5 --data "$(DATA)" --out build/sick-best
	$(BIN)/python -m benchmarks.sick_regression --data "$(DATA)" --runs build/sick-best
	$(BIN)/python -m benchmarks.sick_times --data "$(DATA)"
	$(BIN)/python -m benchmarks.sick_report

scores: $(VENV)/.made-test
	@test -n "$(DATA)" || { echo "make scores: DATA must name the folder that holds sick/ and vectors/, as in: make scores DATA=data" >&2; exit 2; }
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/sentence-transformers -r benchmarks/text_to_scores.txt
	PYTHONPATH=build/sentence-transformers OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.text_to_scores --data "$(DATA)"

clean:
	rm -rf $(VENV) build dist *.egg-info fastsiam/_compiled_steps* .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# the stamp is written last, so an interrupted set-up is taken up again;
# torch comes first and alone, because the rest asks for whatever torch is there
$(VENV)/.made-%: pyproject.toml setup.py constraints.txt $(wildcard kernels/cpu/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "fastsiam needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1); pass another: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -c constraints.txt -e '.[$*]'
	@touch $@
