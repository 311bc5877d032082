# Every target makes .venv when it is missing or older than requirements.lock, then prints the plain command it runs.
# The variables below are set on the command line: make train CONFIG=prism SCHEDULE=short ARGS="--config.seed=3"

CONFIG = prism
MODEL =
SCALE =
SCHEDULE =
WORKDIR = work/$(basename $(notdir $(CONFIG)))
ARGS =
ACCEL = cpu
PYTHON =
BASE = main
PROGRAM = popi/fused_update
SWEEP = configs/sweeps/default.py
GENERATOR =

# on Linux large arrays then lie in huge pages, which spares page faults; glibc older than 2.35 ignores it
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

ifeq ($(filter $(ACCEL),cpu cuda13 tpu),)
$(error ACCEL = "$(ACCEL)": must be one of cpu, cuda13, tpu)
endif

VENV := .venv
STAMP := $(VENV)/.installed-$(ACCEL)
RUN := $(VENV)/bin/python -m

# the compiler for TPUs, where there are no TPUs: in a folder of its own, as JAX would take its presence for that of one
LIBTPU := $(if $(filter Linux-x86_64,$(shell uname -sm | tr ' ' -)),.libtpu/.installed)

empty :=
space := $(empty) $(empty)
comma := ,
options := $(if $(MODEL),model=$(MODEL)) $(if $(SCALE),scale=$(SCALE)) $(if $(SCHEDULE),schedule=$(SCHEDULE))
options := $(subst $(space),$(comma),$(strip $(options)))
FLAGS = --config=$(CONFIG)$(if $(options),:$(options)) --config.workdir='$(WORKDIR)' $(ARGS)

.PHONY: help setup data train eval sweep transfer baselines summarize generate export fit fit-table print-config lint test test-slow golden bench bench-compare \
  bench-padding bench-growth bench-restart bench-data bench-evaluation bench-gpu bench-peers-setup bench-peers profile clean

help: ## what there is
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1|\2/p' Makefile | column -t -s '|' 2>/dev/null || grep '##' Makefile
	@printf '\nvariables, e.g. make train CONFIG=prism SCHEDULE=short ARGS="--config.seed=3"\n'
	@printf '  %-9s %s\n' \
	  CONFIG 'a file of configs/ or your own ($(CONFIG))' \
	  MODEL 'a row of configs/models.py (tiny)' \
	  SCALE 'a row of configs/scales.py (auto: the one for this machine)' \
	  SCHEDULE 'a row of configs/schedules.py (default)' \
	  WORKDIR 'where the run lives ($(WORKDIR))' \
	  ARGS 'further flags of the command, or of pytest' \
	  ACCEL 'what is installed for: cpu, cuda13 or tpu ($(ACCEL))' \
	  BASE 'the revision that bench-compare compares with ($(BASE))' \
	  SWEEP 'the file of a sweep ($(SWEEP))' \
	  GENERATOR 'base models that transfer reads summaries with' \
	  PROGRAM 'what profile traces ($(PROGRAM))' \
	  PYTHON 'a Python of at least 3.11 (the first of python3.12, python3.11, python3)'
	@printf '\nflags and fields of a command: %s popi_jax.train --help\n' '$(RUN)'

setup: $(STAMP) ## install the locked requirements into .venv

data: $(STAMP) ## fetch, check and prepare the data of CONFIG, and show it
	$(RUN) popi_jax.prepare $(FLAGS)

train: $(STAMP) ## train both models; goes on where a stopped run ended
	$(RUN) popi_jax.train $(FLAGS)

eval: $(STAMP) ## score the checkpoint in WORKDIR on the test users
	$(RUN) popi_jax.evaluate $(FLAGS)

sweep: $(STAMP) ## score many models under many conditions, one file each; goes on where a stopped one ended
	$(RUN) popi_jax.sweep --sweep='$(SWEEP)' $(FLAGS)

transfer: $(STAMP) ## what share of the gain of summaries survives on another generator (GENERATOR=FOLDER or org/name)
	$(RUN) popi_jax.sweep --sweep='configs/sweeps/transfer.py:$(GENERATOR)' $(FLAGS)

baselines: $(STAMP) ## train and fit what the run in WORKDIR is compared with; one table
	$(RUN) popi_jax.compare $(FLAGS)

summarize: $(STAMP) ## write the preference summaries of users
	$(RUN) popi_jax.summarize $(FLAGS)

generate: $(STAMP) ## answer prompts given a summary
	$(RUN) popi_jax.generate $(FLAGS)

export: $(STAMP) ## write the trained models as Hugging Face folders
	$(RUN) popi_jax.export $(FLAGS)

fit: $(STAMP) $(LIBTPU) ## compile the update of CONFIG for a TPU slice that need not be there (SCALE=v5p:4x4x4), or for this machine
	$(RUN) popi_jax.fit $(FLAGS)

fit-table: $(STAMP) $(LIBTPU) ## compile for many TPU slices, and write the table of docs/tpu.md
	$(RUN) benchmarks.tpu_table $(ARGS)

print-config: $(STAMP) ## print the resolved configuration
	$(RUN) popi_jax.train $(FLAGS) --print_config

lint: $(STAMP) ## ruff and mypy
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) mypy popi_jax configs benchmarks

test: $(STAMP) $(LIBTPU) ## the quick tests
	$(RUN) pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: $(STAMP) ## the tests that take minutes or the network
	$(RUN) pytest -q -m "slow or network" $(ARGS)

golden: $(STAMP) ## rewrite tests/golden after an intended change of a default
	for name in prism elix review roleplay alignx psoups ufp4 prefeval personamem jsonl smoke; do \
	  $(RUN) popi_jax.train --config=$$name:scale=laptop --print_config > tests/golden/$$name.json; done
	$(RUN) tests.data.record_templates

bench: $(STAMP) ## time every program of benchmarks/ on this machine
	$(RUN) benchmarks.bench $(ARGS)

bench-compare: $(STAMP) ## time this tree against the revision BASE; fails when slower
	$(RUN) benchmarks.compare --base='$(BASE)' $(ARGS)

bench-padding: $(STAMP) ## how much is padding in the batches of CONFIG, and what leaving it out saves
	$(RUN) benchmarks.padding --config=$(CONFIG) $(ARGS)

bench-growth: $(STAMP) ## cost against the number of users, pairs and samples
	$(RUN) benchmarks.growth $(ARGS)

bench-restart: $(STAMP) ## seconds to the first step, cold and with the cache of compiled programs
	$(RUN) benchmarks.restart $(ARGS)

profile: $(STAMP) ## trace PROGRAM, and show where its time goes
	$(RUN) benchmarks.profile --program='$(PROGRAM)' $(ARGS)

.libtpu/.installed: requirements-fit.txt | $(STAMP)
	rm -rf $(@D)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(@D) -r $<
	@touch $@

bench-data: $(STAMP) ## how fast a large made set is prepared, encoded and read in batches
	$(RUN) benchmarks.data $(ARGS)

bench-evaluation: $(STAMP) ## time the scoring of pairs beside lm-evaluation-harness
	$(RUN) benchmarks.evaluation $(ARGS)

bench-gpu: $(STAMP) ## fused attention, updates and scoring on this GPU (ACCEL=cuda13)
	$(RUN) benchmarks.accelerator $(ARGS)

bench-peers-setup: .venv-peers/trl/.installed .venv-peers/tunix/.installed ## install TRL and Tunix, each on its own

.venv-peers/%/.installed: benchmarks/peers/requirements-%.txt | $(STAMP)
	rm -rf $(@D)
	$(VENV)/bin/python -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

bench-peers: $(STAMP) ## time popi_jax against TRL and Tunix
	$(RUN) benchmarks.peers.run $(ARGS)

clean: ## remove .venv, .venv-peers, .libtpu and caches; work/ and data/ stay
	rm -rf $(VENV) .venv-peers .libtpu .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find benchmarks configs popi_jax tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): requirements.lock
	@launch/make_venv.sh $(ACCEL) $(PYTHON)
