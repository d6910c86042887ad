# The only door. `make demo` and `make test` install what they need into .venv on first use.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
OUT    ?= demo-out
# 2 workers: the suite is sized for 2 cores; more threads inside a worker would only fight each other. A worker that dies
# fails its test and is not replaced: its files would begin anew, and once the run waited for ever after that
PYTEST := OMP_NUM_THREADS=1 VIVACE_CACHE=$(CURDIR)/.cache/vivace $(BIN)/python -m pytest

.PHONY: setup system demo test lint test-gpu fmt check bench clean

setup: $(VENV)/.installed

$(VENV)/.installed: requirements/dev.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements/dev.txt
	# openpi's client pins numpy < 2 without needing it
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps openpi-client==0.1.2
	# a CPU build of torch brings no Triton; its interpreter runs the kernels' logic in the tests
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install -q --disable-pip-version-check --no-deps triton==3.6.0
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -e .
	touch $@

system:  ## Debian/Ubuntu packages: torch.compile on a CPU, and OpenGL without a screen for the simulator's cameras
	apt-get update && apt-get install -y g++ python3-venv libegl1 libgl1 libgl1-mesa-dri

demo: setup  ## the main job with the bundled policy: record, calibrate, check, bench, serve, closed loop, report
	VIVACE_CACHE=$(CURDIR)/.cache/vivace $(BIN)/python examples/demo.py --out $(OUT)

test: lint  ## everything that runs without a GPU
	$(PYTEST) -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 -m "not gpu"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-gpu:  ## kernels and conformance on this machine's NVIDIA GPU, with the torch that is installed
	PYTHONPATH=src $(PYTHON) -m pytest -m gpu

fmt: setup
	$(BIN)/ruff check --fix-only -q .
	$(BIN)/ruff format .

check: setup  ## PATH_=checkpoint folder: is the engine still the same policy?
	$(BIN)/vivace check $(PATH_)

bench: setup  ## PATH_=checkpoint folder: engines side by side
	$(BIN)/vivace bench $(PATH_)

clean:
	rm -rf $(VENV) .cache $(OUT)
