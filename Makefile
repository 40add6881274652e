# Everything runs in a virtual environment that is made on first use. `make help` lists the targets.
TORCH ?= torch==2.13.0
VENV ?= .venv
PYTHON ?= python3
# Packages for `make test`; a demo needs only [video].
EXTRAS ?= video,training,test,bench

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
BIN := $(abspath $(VENV))/bin
# Tests import the installed package: the scripts in $(BIN) do not put the source tree on the path.
PYTEST := GI_KERNELS_TEST_INSTALLED=1 $(BIN)/pytest -p no:cacheprovider
VALUES := tests/contract/test_values.py
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PATH := $(BIN):$(PATH)

.PHONY: help demo install test lint types ctest unit interpret interpret-long fuzz variants emulate \
        sanitize sanitize-short mutants install-ladder cuda-build cuda-record bench quality train-tiny gpu-suite \
        readme doctor clean
.NOTPARALLEL:

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

demo: EXTRAS = video
demo: install  ## repair the bundled clip into demo-output/, time the two-stream generator
	cd $(BIN) && ./python -m gi_model.demo -o $(CURDIR)/demo-output

test: install lint types ctest unit interpret variants emulate sanitize-short  ## everything that must pass, in under 30 minutes
	@echo "make test: passed"

install: $(BIN)/python  ## this package into the virtual environment, torch first if it is not there
	$(BIN)/pip show --quiet torch 2>/dev/null || $(BIN)/pip install '$(TORCH)'
	rm -rf build/lib*
	$(BIN)/pip install --quiet '.[$(EXTRAS)]'
	cd $(BIN) && ./gi-kernels doctor

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

lint:  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types:  ## mypy
	$(BIN)/mypy

ctest:  ## the C++ unit tests of what kernels share, without torch
	cmake -S . -B build/ctest -G Ninja -DGI_PYTHON= > build/ctest.log || { cat build/ctest.log; exit 1; }
	cmake --build build/ctest --target gi_tests
	ctest --test-dir build/ctest --output-on-failure

INTERPRETED := TRITON_INTERPRET=1 $(PYTEST) -q --hypothesis-seed=0 -k triton
interpret:  ## values and gradients of the Triton kernels on the CPU, in Triton's interpreter
	$(INTERPRETED) $(VALUES)::test_value_and_gradient tests/test_attention.py tests/gpu

interpret-long:  ## the contract suite in Triton's interpreter, on chosen samples
	$(INTERPRETED) tests/contract tests/test_attention.py tests/gpu

gpu-suite:  ## everything that only a GPU can tell; PARTS='--part contract --part speed' and others: see --help
	$(PYTHON) -m benchmarks.gpu_suite $(PARTS)

unit:  ## all tests on the installed package; the same random calls each time
	$(PYTEST) --hypothesis-seed=0 tests

fuzz:  ## many random calls of every operator, others each time
	$(PYTEST) --hypothesis-profile=long tests/contract/test_fuzz.py

variants:  ## values and gradients again on the variants for older machines
	for v in portable avx2 avx512; do GI_KERNELS_CPU_CAPABILITY=$$v $(PYTEST) -q $(VALUES) tests/test_fourier.py; done

# Address and undefined-behaviour sanitizers, in a copy of the package beside the installed one.
SANITIZED := $(CURDIR)/build/sanitized
SANITIZER_LIBRARIES = $(foreach l,libasan.so libubsan.so libstdc++.so.6,$(shell $${CXX:-c++} -print-file-name=$(l)))
UNDER_SANITIZERS = env LD_PRELOAD="$(SANITIZER_LIBRARIES)" PYTHONPATH=$(SANITIZED) GI_KERNELS_TEST_SANITIZED=1 \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
	$(BIN)/pytest -p no:cacheprovider -q
# Compilers would be run under the sanitizers too; heaps are poisoned already.
NOT_SANITIZED := --ignore tests/contract/test_compilers.py --deselect \
	tests/contract/test_runtime.py::test_nothing_depends_on_fresh_memory
build_sanitized = rm -rf build/lib* $(SANITIZED) && GI_KERNELS_SANITIZE=1 GI_KERNELS_CPP=1 \
	$(1) $(BIN)/pip install --quiet --no-deps --target $(SANITIZED) .

sanitize:  ## the contract suite under the sanitizers, every variant, and on the bodies of the CUDA kernels
	$(call build_sanitized,)
	$(UNDER_SANITIZERS) tests/contract $(NOT_SANITIZED)
	for v in portable avx2 avx512; do GI_KERNELS_CPU_CAPABILITY=$$v $(UNDER_SANITIZERS) $(VALUES) tests/contract/test_layouts.py; done
	$(call build_sanitized,GI_KERNELS_PORTABLE=1 GI_KERNELS_EMULATE_CUDA=1)
	OMP_NUM_THREADS=1 GI_KERNELS_TEST_EMULATED=1 $(UNDER_SANITIZERS) $(VALUES) tests/contract/test_layouts.py \
	  tests/contract/test_positions.py -k "($(EMULATED_OPERATORS)) and cpp"

sanitize-short:  ## values and gradients under the sanitizers, portable variant
	$(call build_sanitized,GI_KERNELS_PORTABLE=1)
	$(UNDER_SANITIZERS) $(VALUES)

# The bodies of the CUDA kernels in loops, in a copy of the package beside the installed one.
EMULATED := $(CURDIR)/build/emulated
EMULATED_OPERATORS := flow_warp or deformable or window or correlation or convex or complete or consistency
build_emulated = rm -rf build/lib* $(EMULATED) && GI_KERNELS_EMULATE_CUDA=1 GI_KERNELS_PORTABLE=1 GI_KERNELS_CPP=1 \
	$(1) $(BIN)/pip install --quiet --no-deps --target $(EMULATED) .

emulate:  ## the contract suite on the CUDA kernels, run on the CPU thread by thread
	$(call build_emulated,)
	OMP_NUM_THREADS=1 PYTHONPATH=$(EMULATED) GI_KERNELS_TEST_EMULATED=1 $(BIN)/pytest -p no:cacheprovider -q \
	  --hypothesis-seed=0 tests/contract --ignore tests/contract/test_compilers.py -k "($(EMULATED_OPERATORS)) and cpp"

cuda-build:  ## compile and link the CUDA kernels against a torch with CUDA, no GPU needed; registers and spills
	$(BIN)/python csrc/tests/cuda_build.py

cuda-record:  ## the same, and write down what they use
	$(BIN)/python csrc/tests/cuda_build.py --record

mutants: install  ## seeded faults in the kernels: each must be caught
	$(BIN)/python tests/mutants/run.py

install-ladder: install  ## installing with and without compiler, kernels, torch: about ten minutes
	$(PYTEST) tests/test_install.py --slow

bench:  ## benchmarks, their table and plot
	$(BIN)/pytest benchmarks --benchmark-only
	$(BIN)/pytest benchmarks/bench_end_to_end.py --benchmark-only
	$(BIN)/python -m benchmarks.bench_propagation
	$(BIN)/python -m benchmarks.bench_training
	$(BIN)/python -m benchmarks.report

CLIPS ?= build/clips
quality: install  ## how good propagation is on clips with known truth: table, pictures, floors
	-$(BIN)/python -m benchmarks.clips $(CLIPS)
	-$(BIN)/gi-model fetch-lpips
	$(BIN)/python -m benchmarks.quality --clips $(CLIPS)

TINY ?= build/tiny
train-tiny: EXTRAS = video,training,evaluation,bench
train-tiny: install  ## train a small generator on free photos; compare it on held-out ones: table, curve, pictures
	$(BIN)/gi-model fetch-lpips
	$(BIN)/python -m benchmarks.tiny $(TINY)

readme:  ## the generated tables of README.md
	$(BIN)/python -m gi_kernels.testing.tables README.md

doctor:  ## what is installed, and how to mend it
	cd $(BIN) && ./gi-kernels doctor

clean:  ## remove what was built; keeps the virtual environment
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -rf gi_kernels/lib gi_kernels/_C.*.so gi_kernels/build_failure.txt
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
