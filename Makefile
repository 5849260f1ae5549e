# make demo: set up everything and see it work.  make check: format, lint and types.  make test, make test-slow: the tests.
# All of them can be run again at no cost.

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
NATIVE := CMakeLists.txt pyproject.toml constraints.txt $(shell find plugins tools -type f -not -path 'plugins/tests/*')
JOBS := $(shell nproc)
# Two processes on two cores: more threads in each would wait for one another and burn a third of the time.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: demo check test test-slow aarch64 wheel release benchmark rtx clean

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror
	$(BIN)/mypy

# What a change needs at once: some minutes on two cores.
test: $(VENV)/.installed-dev build/tests/.built
	ctest --test-dir build/tests -j $(JOBS) --output-on-failure --label-exclude slow
	$(PYTEST) -m 'not slow'

# The rest: exports and golden outputs of whole R50 detectors, sanitizers and emulation for every instruction set.
test-slow: $(VENV)/.installed-dev build/tests/.built-slow
	ctest --test-dir build/tests -j $(JOBS) --output-on-failure --label-regex slow
	$(PYTEST) -m slow

# The CPU kernels as a Jetson's processor runs them: cross-compiled, under qemu (Debian: g++-aarch64-linux-gnu, qemu-user).
aarch64:
	cmake -S . -B build/aarch64 -DCMAKE_TOOLCHAIN_FILE=plugins/aarch64.cmake -DLITEDETR_TESTS=ON
	cmake --build build/aarch64 -j $(JOBS) --target kda_cpu_test
	ctest --test-dir build/aarch64 --output-on-failure --tests-regex kda_cpu

# Into dist/, for systems of glibc 2.28 and newer.
wheel: $(VENV)/.installed-dev
	$(BIN)/python tools/build_wheel.py dist

# The wheels and the source distribution, after all tests, each tried in an environment of its own; uploads nothing.
release: $(VENV)/.installed-dev
	$(BIN)/python tools/release.py

benchmark: $(VENV)/.installed-benchmark
	$(BIN)/python benchmarks/kernels.py --output benchmarks/results/kernels

# A whole Lite-DINO R50 in every precision, built ahead of time for RTX GPUs: ten minutes, and a few GB of memory.
rtx: $(VENV)/.installed-dev
	$(BIN)/python tools/build_rtx.py

$(VENV)/.created:
	python3 -m venv $(VENV)
	touch $@

$(VENV)/.installed: $(VENV)/.created $(NATIVE)
	@echo "Installing into $(VENV) and compiling the native libraries: a few minutes the first time."
	$(PIP) --editable '.[evaluate,export]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	@# Again, with OpenVINO there to compile its extension against: a build does not see what is installed.
	OpenVINO_DIR=$$($(BIN)/python -c "import openvino; print(openvino.__path__[0])")/cmake $(PIP) --no-deps --editable .
	@# What it depends on is TensorRT itself, gigabytes that a type check does not need.
	$(PIP) --no-deps 'tensorrt-stubs>=10.13,<11'
	@# Triton's server, and the NumPy that its Python back end takes: apart, and the tests of it are skipped without.
	-$(PIP) --no-deps --upgrade --target $(VENV)/triton 'nvidia-pytriton>=0.7,<0.8' 'numpy>=1.26,<2'
	touch $@

$(VENV)/.installed-benchmark: $(VENV)/.installed
	$(PIP) --editable '.[benchmark]'
	touch $@

build/tests/.built: $(NATIVE) $(wildcard plugins/tests/*)
	@# Of the CUDA kernels PTX is enough here, which any GPU compiles: machine codes are what is installed.
	cmake -S . -B build/tests -DLITEDETR_TESTS=ON -DLITEDETR_SANITIZE=ON -DCMAKE_CUDA_ARCHITECTURES=75-virtual
	cmake --build build/tests -j $(JOBS)
	touch $@

build/tests/.built-slow: build/tests/.built
	cmake -S . -B build/tests -DLITEDETR_SLOW_TESTS=ON
	cmake --build build/tests -j $(JOBS)
	touch $@

clean:
	rm -rf build dist $(VENV) demo
