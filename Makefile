# What a person types in a clone. `make fit` is the main job on the model that ships with parco; every target sets up what it needs.
PYTHON ?= python3
VENV ?= .venv
BUILD ?= build/dev
TESTS ?= tests
FIT ?=
BENCH ?=
# What takes an hour or more, a fit of a 1.1 B model and whole trainings, is run by its own name.
LONG := fit_% recipes_train_to_% what_each_part_% factors_keep_% pruning_orders_% corrections_pay_% adapters_match_% \
  lora_trains_to_% low_rank_training_% int4_lora_% searched_scales_%
CLAIMS ?= $(filter-out $(addprefix benchmarks/,$(LONG)),$(wildcard benchmarks/*.py))

BIN := $(VENV)/bin
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt
# The tools of the environment first: its cmake and ninja, not the system's.
export PATH := $(abspath $(BIN)):$(PATH)
# Every command that a test starts imports some 3,000 modules: compiled once, they take half of the time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: fit build test bench lint sanitize prove docs wheel

fit: build
	$(BIN)/parco fit $(FIT)

# The extension, compiled incrementally and put beside the Python sources. One build at a time; a running process keeps its old copy.
build: $(VENV)/ready
	@mkdir -p $(BUILD)
	@flock $(BUILD)/lock sh scripts/build.sh $(BUILD) $(BIN)/python

test: build $(VENV)/ready-test
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal $(TESTS)

# The table of the embedded model's shapes, then every claim.
bench: build $(VENV)/ready-test
	$(BIN)/parco bench --out build/bench $(BENCH)
	for claim in $(CLAIMS); do echo "== $$claim"; $(BIN)/python $$claim || exit 1; done

lint: build $(VENV)/ready-test $(VENV)/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'tests/csrc/*.cpp' 'tests/csrc/*.h')

# The C++ tests with AddressSanitizer and UndefinedBehaviorSanitizer, without Python.
sanitize: $(VENV)/ready
	@cmake -S . -B build/sanitize -G Ninja -DPARCO_PYTHON=OFF -DPARCO_TESTS=ON -DPARCO_SANITIZE=address,undefined >/dev/null
	@cmake --build build/sanitize
	ctest --test-dir build/sanitize --output-on-failure --parallel $$(nproc)

# What CI samples, at length: SHAPES random products on every instruction set, and kernels from several threads at once
# under ThreadSanitizer.
SHAPES ?= 5000
prove: $(VENV)/ready
	@cmake -S . -B build/prove -G Ninja -DPARCO_PYTHON=OFF -DPARCO_TESTS=ON >/dev/null
	@cmake --build build/prove
	build/prove/linear_coded $(SHAPES)
	@cmake -S . -B build/threads -G Ninja -DPARCO_PYTHON=OFF -DPARCO_TESTS=ON -DPARCO_SANITIZE=thread >/dev/null
	@cmake --build build/threads --target threads
	build/threads/threads

docs: build $(VENV)/ready-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# What `pip install .` installs, tried from a folder of its own (-S: without the editable install): extension, model, page.
# What `make build` compiled is not compiled again.
wheel: build
	rm -rf dist build/installed
	flock $(BUILD)/lock $(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps \
	  --config-settings=build-dir=$(BUILD) --wheel-dir dist .
	$(PIP) --no-deps --target build/installed dist/parco-*.whl
	cd build/installed && PYTHONPATH=.:$$(../../$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
	  ../../$(BIN)/python -S -c 'import parco.cli, sys; assert parco.__file__.startswith(sys.argv[1]), parco; sys.exit(parco.cli.main(["machine"]))' "$$PWD" >/dev/null
	test -s build/installed/parco/hub/embedded/model.safetensors -a -s build/installed/parco/report/page.html.j2

# The environment. The CPU build of torch is asked for by name; where the package index has none, the default one is taken.
$(VENV)/ready: constraints.txt pyproject.toml
	@PYTHON=$(PYTHON) sh scripts/check_machine.sh
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null \
	  || $(PIP) "torch==2.13.0+cpu" 2>/dev/null \
	  || $(PIP) torch
	$(PIP) scikit-build-core nanobind cmake ninja
	$(PIP) --no-build-isolation --editable .
	@touch $@

$(VENV)/ready-%: $(VENV)/ready
	$(PIP) --no-build-isolation --editable ".[$*]"
	@touch $@
