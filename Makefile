# Verbs over CMake; `make help` lists them. The build itself is described in CMakeLists.txt.
#
# A fresh machine needs two commands: `make demo` and `make test`. Both install the Debian packages
# they need first (through sudo when you are not root).

.DEFAULT_GOAL := build
.PHONY: build deps test test-cuda bench-cuda demo demo-offline results asan fuzz faults debug format check clean help

JOBS ?= $(shell nproc)

build: build/release/build.ninja  ## build ./tq (the default)
	@cmake --build --preset release --parallel $(JOBS) --target tq
	@ln -sf build/release/tq tq

# Order-only: `deps` has no file of its own, and must not cause a new configuration.
build/%/build.ninja: CMakeLists.txt CMakePresets.json | deps
	@cmake --preset $*

deps:  ## install the packages needed to build, test and run the demo (Debian, Ubuntu)
	@tools/deps.sh

test: build/release/build.ninja  ## build everything and run all tests
	@cmake --build --preset release --parallel $(JOBS)
	@ctest --preset release --parallel $(JOBS)

CUDA_TESTS := test_cuda_ops test_cuda_linears test_cuda_layers
test-cuda: build/release/build.ninja  ## the tests of the CUDA backend; fails without a GPU
	@cmake --build --preset release --parallel $(JOBS) --target tq $(CUDA_TESTS)
	@for name in $(CUDA_TESTS); do TQ_REQUIRE_GPU=1 build/release/$$name || exit; done

bench-cuda: build/release/build.ninja  ## time the CUDA kernels one by one, rewrite docs/results.md
	@cmake --build --preset release --parallel $(JOBS) --target bench_cuda
	@build/release/bench_cuda --json docs/results-cuda.json
	@tools/cuda_table.py docs/results-cuda.json

asan: build/asan/build.ninja  ## all tests under AddressSanitizer and UndefinedBehaviorSanitizer
	@cmake --build --preset asan --parallel $(JOBS)
	@ctest --preset asan --parallel $(JOBS)

SECONDS ?= 60
fuzz:  ## fuzz every reader of untrusted files for SECONDS each (60), with Clang's libFuzzer
	@tools/deps.sh fuzz
	@$(MAKE) --no-print-directory build/fuzz/build.ninja
	@cmake --build --preset fuzz --parallel $(JOBS) --target \
	  $(patsubst tests/fuzz/%.cpp,%,$(wildcard tests/fuzz/fuzz_*.cpp))
	@tests/fuzz/run.sh build/fuzz $(SECONDS)

FAULTS := --tq build/release/tq --fixtures tests/fixtures
faults: build/release/build.ninja  ## let every n-th call of the system fail, kill 200 runs (hours)
	@cmake --build --preset release --parallel $(JOBS) --target tq faults
	@tests/faults/kill.py $(FAULTS)
	@tests/faults/inject.py $(FAULTS) --library build/release/libfaults.so $(ARGS)

debug: build/debug/build.ninja  ## build build/debug/tq without optimisation
	@cmake --build --preset debug --parallel $(JOBS)

demo: build  ## fetch SmolLM2-135M-Instruct (93 MB), quantize it to 4 bits, ask it something
	@tools/demo.sh

demo-offline: build  ## the same with a 1 MB story model of this repository: no network, seconds
	@tools/demo.sh --offline

results: build  ## measure every method again and rewrite the table of docs/results.md (hours)
	@tools/results.py $(ARGS)

format:  ## reformat all C++ and CUDA files, count the lines of the README's code tour
	@git ls-files -co --exclude-standard '*.h' '*.cpp' '*.cu' '*.cuh' | xargs -r clang-format -i
	@tools/check_tree --count

check:  ## format, dependency direction, file sizes
	@tools/check_tree

clean:  ## remove what was built; demo/ stays (it holds the download)
	@rm -rf build tq

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/\1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16
