# Commands for working in this repository. `make test` and `make demo` need nothing but Python 3.10 or
# later and GNU make: each creates the environment in $(VENV) when it is missing or half made.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
GPU_OUTPUT ?= build/bench/gpu
FRAMEWORK_PAGES := docs/guide/frameworks/monai.md docs/guide/frameworks/mmseg.md docs/guide/frameworks/nnunet.md
ARM64_CXX ?= aarch64-linux-gnu-g++
ARM64_EMULATOR ?= qemu-aarch64
# `make test` builds the CUDA kernels for the GPU at hand where there is nvcc: each further architecture takes as long
# again, and without a GPU tests read off what nvcc makes of them, and run their bodies in an emulation.
GPU_ARCH = $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1 | tr -d .)
NVCC = $(shell $(PYTHON) csrc/cuda/nvcc.py 2>/dev/null)
CUDA_ARCHS ?= $(or $(SEMEDA_FAST_CUDA_ARCHS),$(if $(NVCC),$(GPU_ARCH)),$(if $(filter cuda,$(SEMEDA_FAST_BUILD)),,none))
BUILD = $(or $(SEMEDA_FAST_BUILD),$(if $(filter none,$(CUDA_ARCHS)),auto,cuda))

BIN := $(VENV)/bin
INTEGRATIONS := build/integrations
SOURCES := pyproject.toml setup.py constraints.txt \
           $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h) \
           $(wildcard csrc/cuda/*.cu csrc/cuda/*.cuh csrc/cuda/*.cpp csrc/cuda/*.h csrc/cuda/*.py)

# Pins hold in pip's isolated build environment too; old and new pip read them from different variables.
PINNED := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1
INSTALL := $(PINNED) $(BIN)/python -m pip install --quiet --no-input

.DEFAULT_GOAL := help
.PHONY: help test test-integrations docs docs-look docs-pictures sanitize sanitize-arm64 fuzz-native demo bench bench-steps bench-full gpu lint format clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  Variables: PYTHON=$(PYTHON) VENV=$(VENV) JOBS=$(JOBS) (test processes) PYTEST_ARGS=... CUDA_ARCHS=$(CUDA_ARCHS)"
	@echo "  make demo IMAGES=folder MASKS=folder [NUM_CLASSES=n] [IGNORE_INDEX=n] runs on your own data"

# One thread per test process: with more, the processes would take each other's cores.
test: $(VENV)/.stamp-dev  ## Create the environment if missing and run every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --benchmark-disable $(PYTEST_ARGS)

# The frameworks that the development environment has (transformers, Lightning, Accelerate) are tested by `make test`.
test-integrations: $(INTEGRATIONS)/.stamp  ## Run the tests with MONAI, mmengine and nnU-Net, in an environment that has them
	OMP_NUM_THREADS=1 $(INTEGRATIONS)/bin/python -m pytest -rs --benchmark-disable $(PYTEST_ARGS) \
	  tests/test_integration_monai.py tests/test_integration_mmseg.py tests/test_integration_nnunet.py
	OMP_NUM_THREADS=1 $(INTEGRATIONS)/bin/python tests/readme_blocks.py $(FRAMEWORK_PAGES)

# Without a network; a warning is an error, a link that leads nowhere in the site among them.
docs: $(VENV)/.stamp-docs  ## Build the documentation site: build/docs/index.html
	rm -rf build/docs
	$(BIN)/python -m sphinx --builder html --nitpicky --fail-on-warning --keep-going --quiet docs build/docs
	@echo "The site is in build/docs/index.html"

docs-look: docs  ## Look at every page in Chromium, wide and narrow, light and dark; screenshots in build/screenshots
	SEMEDA_FAST_SITE=build/docs $(BIN)/python -m pytest -rs tests/test_site.py tests/test_site_links.py

docs-pictures: $(VENV)/.stamp-dev  ## Draw the pictures of the site anew
	$(BIN)/python docs/draw.py

# CXX=clang++ builds with another compiler.
sanitize: $(VENV)/.stamp-python  ## Run the CPU kernels on odd shapes under the address and undefined-behaviour sanitizers
	$(if $(filter default,$(origin CXX)),,CXX="$(CXX)") $(BIN)/python csrc/tests/sanitize.py

# Where no such processor is at hand: a cross compiler builds them and QEMU runs them, in about ten minutes.
sanitize-arm64: $(VENV)/.stamp-python  ## The same shapes on the kernels for arm64, in QEMU (needs g++ for aarch64)
	CXX="$(ARM64_CXX)" $(BIN)/python csrc/tests/sanitize.py --build build/sanitize-arm64 --emulator "$(ARM64_EMULATOR)"

fuzz-native: $(VENV)/.stamp-dev  ## Call every native function with right and wrong memory under the address sanitizer
	$(if $(filter default,$(origin CXX)),,CXX="$(CXX)") $(BIN)/python csrc/tests/fuzz_native.py $(FUZZ_ARGS)

demo: $(VENV)/.stamp-demo  ## Train with and without SEMEDA on synthetic scenes, print a table, draw a picture
	$(BIN)/python examples/demo.py \
	  $(if $(IMAGES),--images "$(IMAGES)") $(if $(MASKS),--masks "$(MASKS)") \
	  $(if $(NUM_CLASSES),--num-classes $(NUM_CLASSES)) $(if $(IGNORE_INDEX),--ignore-index $(IGNORE_INDEX)) $(DEMO_ARGS)

bench: $(VENV)/.stamp-dev  ## Measure the quick set (under 5 minutes on 2 cores); report and plots in build/bench/quick
	$(BIN)/python -m benchmarks run --quick $(BENCH_ARGS)

bench-steps: $(VENV)/.stamp-dev  ## Measure whole training steps of four networks (nearly an hour); build/bench/steps
	$(BIN)/python -m benchmarks run --steps $(BENCH_ARGS)

bench-full: $(VENV)/.stamp-dev  ## Measure everything (hours); report and plots in build/bench/full
	$(BIN)/python -m benchmarks run --full $(BENCH_ARGS)

# With $(PYTHON) as it is, not $(VENV): a GPU machine brings its own torch, and nothing is installed or downloaded.
gpu:  ## Test and measure on a GPU with $(PYTHON), under 9 minutes; GPU_ARGS="--only tests", GPU_OUTPUT=folder
	$(PYTHON) -m benchmarks.gpu --output "$(GPU_OUTPUT)" $(GPU_ARGS)

lint: $(VENV)/.stamp-dev  ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu*' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/.stamp-dev  ## Rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu*' | xargs $(BIN)/clang-format -i

clean:  ## Remove what was built, and caches; the environment and results stay
	rm -rf build dist *.egg-info semeda_fast/_C*.so semeda_fast/_C*.pyd
	rm -f $(VENV)/.stamp-dev $(VENV)/.stamp-demo  # the next target compiles again, and does not go without
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find semeda_fast kernels csrc tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment. A stamp is written last, so an interrupted install is taken up again.
$(VENV)/.stamp-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "semeda_fast needs Python 3.10 or later; name one with: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip --version > /dev/null || \
	  { echo "pip in $(VENV) is broken: making $(VENV) anew"; $(PYTHON) -m venv --clear $(VENV); }
	@touch $@

# The development environment holds all that the demo needs, so it serves both.
$(VENV)/.stamp-dev: $(VENV)/.stamp-python $(SOURCES)
	@echo "Installing semeda_fast with its development tools into $(VENV) ..."
	SEMEDA_FAST_BUILD="$(BUILD)" SEMEDA_FAST_CUDA_ARCHS="$(CUDA_ARCHS)" $(INSTALL) -e '.[dev]'
	@touch $(VENV)/.stamp-demo $@

# On top of the demo's environment, which the development environment holds, too. By its name the package is installed
# already and only what the extra asks for is added: nothing is compiled twice.
$(VENV)/.stamp-docs: $(VENV)/.stamp-demo
	@echo "Installing what the documentation needs into $(VENV) ..."
	$(INSTALL) 'semeda-fast[docs]'
	@touch $@

# An environment that sees the development environment below it, so that torch and this package are there once.
$(INTEGRATIONS)/.stamp: $(VENV)/.stamp-dev tests/integrations.txt
	@echo "Installing the frameworks into $(INTEGRATIONS) ..."
	$(BIN)/python -m venv --clear $(INTEGRATIONS)
	below=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	  above=$$($(INTEGRATIONS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	  echo "import site; site.addsitedir('$$below')" > "$$above/below.pth"
	$(PINNED) $(INTEGRATIONS)/bin/python -m pip install --quiet --no-input --no-deps --requirement tests/integrations.txt
	@touch $@

# The demo runs on the CPU, so it does not wait for the CUDA kernels.
$(VENV)/.stamp-demo: $(VENV)/.stamp-python $(SOURCES)
	@echo "Installing semeda_fast with what the demo needs into $(VENV) ..."
	SEMEDA_FAST_BUILD=$(or $(filter-out cuda,$(SEMEDA_FAST_BUILD)),auto) SEMEDA_FAST_CUDA_ARCHS=none \
	  $(INSTALL) -e '.[cli,train,metrics,plot]'
	@touch $@
