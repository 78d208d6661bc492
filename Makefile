# make demo and make test work on a machine with Python 3.11 and make; both set up .venv on their first run. A C++
# compiler is welcome: without one torch decodes, and the tests of the kernels are skipped.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help demo test test-slow test-gpu test-arm test-cluster test-clients check bench page clean

help:
	@echo "make demo       answer a question about a picture in examples/ with the bundled model"
	@echo "make test       lint, types, import contract and tests"
	@echo "make check      the same without the tests"
	@echo "make test-slow  tests that take minutes"
	@echo "make test-gpu   tests that need CUDA"
	@echo "make test-cluster  two replicas through Ray Serve, really started; brings Ray, 80 MB"
	@echo "make test-clients  the server and the predictor asked by openai 1.x, replicate 2.x and Cog's own server"
	@echo "make test-arm   the ARM kernels in an emulator; wants g++-aarch64-linux-gnu and qemu-user (Debian's names)"
	@echo "make page       builds the page of seekvl serve from page/ into the package; needs Node 20"
	@echo "make bench      the CPU kernels beside torch; speed and memory beside transformers, same weights, one run"

$(VENV)/.base: pyproject.toml constraints.txt setup.py $(wildcard seekvl/engine/kernels/src/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/.base
	$(BIN)/seekvl ask examples/chart.png "Which bar is tallest?"
	$(BIN)/seekvl ask examples/sign.png "What does the sign say?"
	$(BIN)/seekvl ask examples/sign.png "Where is the sign?" --draw examples/sign-answer.png

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	$(BIN)/pytest

test-slow: $(VENV)/.dev
	$(BIN)/pytest -m slow

test-gpu: $(VENV)/.dev
	$(BIN)/pytest -m gpu -rs

test-arm: $(VENV)/.dev
	$(BIN)/pytest -m arm tests/engine/kernels/test_arm.py

$(VENV)/.cluster: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cluster]'
	touch $@

test-cluster: $(VENV)/.cluster
	$(BIN)/pytest -m slow tests/serve/test_cluster.py

# other generations of packages that .venv has in one: each in a folder that stands before it
CLIENTS := $(abspath $(VENV))/clients
PUT := $(BIN)/python -m pip install --quiet --no-deps --target

$(VENV)/.clients: $(VENV)/.dev
	rm -rf $(CLIENTS)
	$(PUT) $(CLIENTS)/openai-1 openai==1.109.1 distro==1.9.0
	$(PUT) $(CLIENTS)/replicate-2 replicate==2.0.0b4 distro==1.9.0
	$(PUT) $(CLIENTS)/cog cog==0.23.1 coglet==0.23.1
	touch $@

test-clients: $(VENV)/.clients
	PYTHONPATH=$(CLIENTS)/openai-1 $(BIN)/python -c "import openai; assert openai.__version__ < '2', openai"
	PYTHONPATH=$(CLIENTS)/openai-1 $(BIN)/pytest $(addprefix tests/serve/test_,app.py chat.py files.py guard.py responses.py)
	PYTHONPATH=$(CLIENTS)/replicate-2 $(BIN)/pytest tests/serve/test_replicate_2.py
	PYTHONPATH=$(CLIENTS)/cog $(BIN)/pytest tests/deploy/test_cog_server.py

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/peer_transformers.py

page:
	cd page && npm ci --no-audit --no-fund && npm run build

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache seekvl/engine/kernels/native.so
