# `make` alone lists the targets. Needs make and Python 3.11 or 3.12; PYTHON=... chooses one.
# Everything is installed into .venv; targets write to data/, runs/ and out/.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The newest supported Python that runs and can make a virtual environment.
PYTHON ?= $(shell for p in python3.12 python3.11 python3 python; do \
	$$p -c 'import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' \
	>/dev/null 2>&1 && { echo $$p; break; }; done)

comma := ,
VENV := .venv
PY := $(VENV)/bin/python
# An environment whose Python was removed does not start: delete it, so that it is made again.
$(shell test ! -L $(PY) -o -e $(PY) || rm -rf $(VENV))
DEMO_OUT := out/demo
EMOJI := data/emoji
EMOJI_SIZE ?= 128
EMOJI_1024 := data/emoji_1024
# The records that the tiny configs read; rendering these alone at 1024 px takes minutes.
TINY_SUBSET := concrete,group=animals-nature|food-drink|objects|smileys-emotion
TINY := runs/tiny
JUDGE := runs/judge
TINY_FLAGS ?=# for every stage, such as --config.num_steps=100
# Two simulated devices of one thread each: the decoder trains at twice the speed of one core.
TINY_XLA_FLAGS ?= --xla_force_host_platform_device_count=2 --xla_cpu_multi_thread_eigen=false
# The stages in the order of their training, from the project's own table.
TINY_STAGES ?= $(shell $(PYTHON) -c 'from dalle2_jax import stages; print(*stages.configs())')
TEST_JOBS ?= 2
PYTEST := $(PY) -m pytest --ignore=tests/parity -n $(TEST_JOBS) --dist loadfile
PARITY := torch==2.13.0 diffusers==0.42.1 transformers==5.23.0

# $(call install,requirements,description): installs at the versions pinned in .ci/.
define install
	@echo "installing $(2) into $(VENV) (minutes the first time) ..."
	@v=$$($(PY) -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	c=.ci/constraints-$$v.txt; test -f $$c || { echo "no $$c: installing the newest versions"; c=/dev/null; }; \
	$(PY) -m pip install -qq --disable-pip-version-check -c $$c $(1)
	@touch $@
endef

.PHONY: help demo test test-slow test-tpu test-parity data train-tiny evals evals-1024 evals-more lint format typecheck clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.base ## install the base package and generate images from four prompts
	$(PY) sample.py --weights tiny --n 4 --seed 0 --out $(DEMO_OUT) \
		--prompt "a flat emoji of a red apple" \
		--prompt "a glossy 3d emoji of a cat face" \
		--prompt "a noto emoji of a grinning face" \
		--prompt "a black and white emoji of a butterfly"
	@echo "Open $(DEMO_OUT)/grid.png"

test: $(VENV)/.train ## the default tests: no network, no accelerator, no torch
	$(PYTEST)

test-slow: $(VENV)/.gcs ## the tests that take longer, and the bucket client
	$(PYTEST) -m "slow and not tpu_aot and not parity"

test-tpu: $(VENV)/.tpu ## small programs compiled for TPUs that are not attached
	$(PYTEST) -m "tpu_aot and not parity"

test-parity: $(VENV)/.parity ## against torch, diffusers and transformers
	$(PY) -m pytest -m parity tests/parity

data: $(EMOJI) ## the emoji data set, rendered from npm packages (needs npm)

train-tiny: $(EMOJI) $(if $(filter upsampler_1024,$(TINY_STAGES)),$(EMOJI_1024)) ## train every stage in order into one model folder; run again to resume
	@for stage in $(TINY_STAGES); do \
		echo "== $$stage"; \
		XLA_FLAGS="$(TINY_XLA_FLAGS)" $(PY) train.py --config=configs/$$stage.py:tiny --workdir=$(TINY)/$$stage \
			--config.clip_from=$(TINY)/model --config.export_to=$(TINY)/model $(TINY_FLAGS); \
	done
	@echo "Generate with it: $(PY) sample.py --weights $(TINY)/model --prompt '...'"

evals: $(JUDGE)/model/config.json ## judge the packaged weights (the first time, trains the judge)
	$(VENV)/bin/dalle2 evals report --weights tiny --judge $(JUDGE)/model --data $(EMOJI) --out out/evals \
		--num 200 --batch_size 20 --reconstruct

evals-1024: $(JUDGE)/model/config.json $(EMOJI_1024) ## what the upsamplers add up to 1024 px, and what they cost
	$(VENV)/bin/dalle2 evals upsampling --weights tiny --judge $(JUDGE)/model --data $(EMOJI_1024)

evals-more: $(JUDGE)/model/config.json ## solvers, priors, inversion and edits, judged (an hour)
	for name in inversion manipulations inpainting priors solvers; do \
		$(VENV)/bin/dalle2 evals $$name --weights tiny --judge $(JUDGE)/model --data $(EMOJI); \
	done

lint: $(VENV)/.dev ## ruff's rules and format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.dev ## rewrite the code in ruff's format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

typecheck: $(VENV)/.dev $(VENV)/.train ## pyright
	$(VENV)/bin/pyright

clean: ## remove the environment and the output of tests and demos; data/ and runs/ stay
	rm -rf $(VENV) out .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

$(EMOJI): | $(VENV)/.train
	$(VENV)/bin/dalle2 data emoji --out $@ --size $(EMOJI_SIZE)

$(EMOJI_1024): | $(VENV)/.train
	$(VENV)/bin/dalle2 data emoji --out $@ --size 1024 --subset '$(TINY_SUBSET)'

$(JUDGE)/model/config.json: | $(EMOJI)
	XLA_FLAGS="$(TINY_XLA_FLAGS)" $(PY) train.py --config=configs/clip.py:judge --workdir=$(JUDGE)

$(PY):
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 with venv found;" \
		"install one (Debian: apt install python3-venv) or give PYTHON=/path/to/python" >&2; exit 2; }
	$(PYTHON) -m venv --clear $(VENV)

$(VENV)/.base: pyproject.toml | $(PY)
	$(call install,-e .,the base package)

$(VENV)/.train: pyproject.toml | $(PY)
	$(call install,-e '.[train$(comma)test]',the extras train and test)

$(VENV)/.dev: pyproject.toml | $(PY)
	$(call install,-e '.[dev]',the tools)

$(VENV)/.tpu: $(VENV)/.train
	$(call install,-e '.[tpu]',the TPU compiler)

$(VENV)/.gcs: $(VENV)/.train
	$(call install,-e '.[gcs]',the bucket client)

$(VENV)/.parity: $(VENV)/.train
	$(call install,$(PARITY),the references)
