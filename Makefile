# The commands people type. `make demo` and `make test` do everything on a fresh machine.
SHELL := /bin/bash
PYTHON ?= python3
TORCH ?= 2.13.0
JOBS ?= $(shell nproc)
VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin
RUN := PYTHONPATH=$(CURDIR)/python PATH=$(BIN):$$PATH
SOURCES := $(shell find src include cmake -type f) CMakeLists.txt
TEST_SOURCES := $(wildcard tests/cpp/*.txt tests/cpp/*/*.cpp)
PYTEST := $(RUN) OMP_NUM_THREADS=2 $(BIN)/python -m pytest -q --timeout=1200

.PHONY: help setup build demo demo-pt test test-all fuzz lint bench bench-gpu clean
help:
	@echo "make demo      set up, build, fine-tune SmolLM2-135M-Instruct on CPU processes and compare (MODEL=<folder or hub id>: yours)"
	@echo "make demo-pt   pre-train a small Qwen3 from scratch"
	@echo "make test      build what is missing and run the tests; make test-all: the slow ones too"
	@echo "make fuzz      throw damaged bytes at the checkpoint parsers for a minute (installs clang; part of test-all)"
	@echo "make lint | bench | bench-gpu | setup | build | clean"

# Distribution packages, the virtual environment, PyPI packages.
setup: $(VENV)/.ready
$(VENV)/.ready: requirements.txt scripts/setup.sh
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" VENV="$(VENV)" scripts/setup.sh
	@touch $@

# The library, the Python module and the C++ tests; the two .so files go where the Python package looks for them.
build: build/.built
build/.built: $(VENV)/.ready $(SOURCES) $(TEST_SOURCES)
	PATH=$(BIN):$$PATH cmake -S . -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DMCB_BUILD_TESTS=ON -DPython_EXECUTABLE=$(BIN)/python -Wno-dev > build.log 2>&1 || { cat build.log; exit 1; }
	@rm -f build.log
	PATH=$(BIN):$$PATH cmake --build build -j $(JOBS)
	mkdir -p python/mcore_bridge/lib
	cp build/_core*.so python/mcore_bridge/
	cp build/libmcore_bridge.so.*.*.* python/mcore_bridge/lib/
	@touch $@

demo: build
	$(RUN) $(BIN)/python examples/demo/demo.py $(if $(MODEL),--model "$(MODEL)")

demo-pt: build
	$(RUN) $(BIN)/python examples/demo/demo_pt.py

test: build
	OMP_NUM_THREADS=2 build/tests/cpp/mcore_bridge_tests --gtest_brief=1
	$(PYTEST) -m "not slow" tests

test-all: build
	OMP_NUM_THREADS=2 build/tests/cpp/mcore_bridge_tests --gtest_brief=1
	$(PYTEST) tests
	$(MAKE) fuzz

# Throws bytes at the parsers of checkpoint headers for a fixed time, from the hand-made files on; new finds go to build/fuzz.
FUZZ_SECONDS ?= 60
fuzz: build
	VENV="$(VENV)" scripts/setup.sh clang
	PATH=$(BIN):$$PATH cmake -S . -B build -DMCB_BUILD_FUZZ=ON > /dev/null
	PATH=$(BIN):$$PATH cmake --build build --target fuzz
	mkdir -p build/fuzz/found
	build/fuzz/fuzz_checkpoint_headers -max_total_time=$(FUZZ_SECONDS) -max_len=100000 -timeout=20 -rss_limit_mb=1024 -print_final_stats=1 \
	  -artifact_prefix=build/fuzz/ build/fuzz/found fuzz/corpus

lint: $(VENV)/.ready
	$(BIN)/ruff check python tests examples benchmarks scripts fuzz
	$(BIN)/ruff format --check python tests examples benchmarks scripts fuzz
	$(BIN)/clang-format --dry-run --Werror $$(find src include tests/cpp examples/cpp fuzz -name '*.cpp' -o -name '*.h')
	$(BIN)/python scripts/check_includes.py
	scripts/check_cuda.sh

bench-gpu: build
	$(RUN) $(BIN)/python benchmarks/gpu.py

bench: build
	$(RUN) $(BIN)/python benchmarks/train_step.py

clean:
	rm -rf build python/mcore_bridge/lib python/mcore_bridge/_core*.so
