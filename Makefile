# One virtual environment for everything; PYTHON may be any of 3.10 .. 3.13.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A CPU build is enough; the newest release would bring several GB of CUDA packages.
TORCH ?= torch==2.13.0
FASHION := /usr/share/datasets/fashion-mnist
SUDO := $(shell test "$$(id -u)" = 0 || echo sudo)

.PHONY: demo test test-all test-gpu lint bench data clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check $(TORCH)
	$(BIN)/pip install -q --disable-pip-version-check -e ".[test,tutorials,tune,dev]"
	touch $@

# Fashion-MNIST (MIT licence) as Debian ships it.
$(FASHION):
	$(SUDO) apt-get update -qq
	$(SUDO) apt-get install -y -qq dataset-fashion-mnist

data: $(FASHION)

demo: $(VENV)/installed data   ## install, then compress and compile the shipped networks and show what that does
	$(BIN)/python tutorials/01_five_minutes_on_the_cpu.py

test: $(VENV)/installed data   ## install, then the fast tests (some minutes on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not slow"

test-all: $(VENV)/installed data   ## everything, big networks too (long)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

test-gpu: $(VENV)/installed   ## the tests of kernels and modules for NVIDIA GPUs, on this machine's GPU; needs nvcc
	LPSN_CUDA_TESTS=gpu OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not slow" -rs \
	    tests/schedules/cuda tests/targets/test_cuda_*.py tests/test_cuda_*.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/mypy lpsn_tvm

bench: $(VENV)/installed data   ## latency against peers, accuracy of pruning and quantization; kept in benchmarks/results
	$(BIN)/pip install -q --disable-pip-version-check -e ".[bench]"
	$(BIN)/python benchmarks/cpu.py --calibration
	$(BIN)/python benchmarks/accuracy.py
	$(BIN)/python -m benchmarks.quantize
	$(BIN)/python -m benchmarks.prune
	$(BIN)/python benchmarks/vta_layers.py
	$(BIN)/python benchmarks/vta.py
	$(BIN)/python -m benchmarks.vta_accuracy --seeds 3
	$(BIN)/python benchmarks/tuning.py
	@if $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then $(BIN)/python benchmarks/cuda.py; \
	else echo "torch sees no GPU: benchmarks/cuda.py is left out"; fi

clean:
	rm -rf $(VENV) build dist *.egg-info out
