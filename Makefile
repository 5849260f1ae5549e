# make demo: set up everything and see it work.  make test: the tests.  Both can be run again at no cost.

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
NATIVE := CMakeLists.txt pyproject.toml constraints.txt $(shell find plugins tools -type f -not -path 'plugins/tests/*')
JOBS := $(shell nproc)

.PHONY: demo test aarch64 benchmark rtx clean

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

test: $(VENV)/.installed-tests build/tests/.built
	ctest --test-dir build/tests --output-on-failure
	$(BIN)/python -m pytest -n 2

# The CPU kernels as a Jetson's processor runs them: cross-compiled, under qemu (Debian: g++-aarch64-linux-gnu, qemu-user).
aarch64:
	cmake -S . -B build/aarch64 -DCMAKE_TOOLCHAIN_FILE=plugins/tests/aarch64.cmake -DLITEDETR_TESTS=ON
	cmake --build build/aarch64 -j $(JOBS)
	ctest --test-dir build/aarch64 --output-on-failure

benchmark: $(VENV)/.installed-benchmark
	$(BIN)/python benchmarks/kernels.py --output benchmarks/results/kernels

# A whole Lite-DINO R50 in every precision, built ahead of time for RTX GPUs: ten minutes, and a few GB of memory.
rtx: $(VENV)/.installed-tests
	$(BIN)/python tools/build_rtx.py

$(VENV)/.created:
	python3 -m venv $(VENV)
	touch $@

$(VENV)/.installed: $(VENV)/.created $(NATIVE)
	@echo "Installing into $(VENV) and compiling the native libraries: a few minutes the first time."
	$(PIP) --editable '.[evaluate,export]'
	touch $@

$(VENV)/.installed-tests: $(VENV)/.installed
	$(PIP) --editable '.[test]'
	@# What it depends on is TensorRT itself, gigabytes that a type check does not need.
	$(PIP) --no-deps 'tensorrt-stubs>=10.13,<11'
	touch $@

$(VENV)/.installed-benchmark: $(VENV)/.installed
	$(PIP) --editable '.[benchmark]'
	touch $@

build/tests/.built: $(NATIVE) $(wildcard plugins/tests/*)
	cmake -S . -B build/tests -DLITEDETR_TESTS=ON -DLITEDETR_SANITIZE=ON
	cmake --build build/tests -j $(JOBS)
	touch $@

clean:
	rm -rf build $(VENV) demo
