# make          lists the targets
# make TARGET KEY=VALUE …; anything else for the command goes into ARGS="key=value …"

PYTHON ?= python3
VENV ?= .venv
GPUS ?= 1
NODES ?= 1
ENCODER ?= base
MODEL ?= runs/finetune/latest
OUT ?= predictions.csv
TASK ?= matbench_jdft2d
SWEEP ?= finetune
COUNT ?= 4
LOCAL ?=
ARGS ?=
SLURM ?=
RUNS ?= runs
TIME ?= 24:00:00
CPUS ?= 8
SBATCH ?=

ifeq ($(VENV),none)
# A machine that brings its own torch: use PYTHON as it is, from the source tree.
RUN := PYTHONPATH=src$(if $(PYTHONPATH),:$(PYTHONPATH)) $(PYTHON) -m
READY :=
else
RUN := $(VENV)/bin/python -m
READY := $(VENV)/.ready
endif

PARALLEL := $(if $(filter-out 1,$(GPUS) $(NODES)),trainer.devices=$(GPUS) trainer.num_nodes=$(NODES) strategy=ddp)

comma := ,
# Whether a switch is on: not empty, 0 or no.
on = $(filter-out 0 no No NO off Off OFF false False FALSE,$(1))
# A value within single quotes of the shell, and as the replacement of a sed command in such quotes.
single = $(subst ','\'',$(1))
quoted = $(call single,$(subst |,\|,$(subst &,\&,$(subst \,\\,$(1)))))
fill = -e 's|@$(1)@|$(call quoted,$(2))|g'
empty :=
# Options for sbatch as lines of the script, one for each word that begins with a dash.
sbatch_lines = $(subst $(empty) -,\n\#SBATCH -,$(if $(strip $(SBATCH)), $(call quoted,$(strip $(SBATCH)))))
# The folder of all runs from the root, since a job can be submitted anywhere.
runs_folder = $(if $(filter /%,$(RUNS)),,$(CURDIR)/)$(RUNS)
# The script of a job, for a command and its arguments. It runs in this folder, wherever it is submitted.
slurm_script = sed $(call fill,NODES,$(NODES)) $(call fill,GPUS,$(GPUS)) $(call fill,CPUS,$(CPUS)) $(call fill,TIME,$(TIME)) \
	$(call fill,RUNS,$(RUNS)) $(call fill,RUN,$(RUN)) $(call fill,COMMAND,$(1)) $(call fill,ARGS,$(2)) \
	$(call fill,LOGS,$(runs_folder)/slurm) $(call fill,ROOT,$(call single,$(CURDIR))) -e 's|@SBATCH@|$(sbatch_lines)|' conf/slurm.sh
# Check early for input on which SLURM or the shell would fail later.
said = { echo "$(1)" >&2; exit 2; }
checked = for pair in 'GPUS=$(call single,$(GPUS))' 'NODES=$(call single,$(NODES))' 'CPUS=$(call single,$(CPUS))'; do \
	case $${pair\#*=} in ''|0*|*[!0-9]*) $(call said,$$pair: give a whole number from 1 on);; esac; done; \
	case '$(call single,$(RUNS))' in ''|-*|*[!A-Za-z0-9_./+=,:@-]*) \
	$(call said,RUNS is empty or has a character that the script of a job can't hold in the name of a folder: use letters$(comma) digits and _./+=$(comma):@-);; esac; \
	$(call slurm_script,$(1),$(2)) | bash -n 2>/dev/null || $(call said,ARGS: quotes or parentheses aren't closed; put every key=value that has one of its own into quotes)
submit = $(checked); command -v sbatch >/dev/null || { echo "sbatch isn't here: run this on a login node of a SLURM cluster, or leave SLURM out" >&2; exit 1; }; \
	mkdir -p $(RUNS)/slurm && script=$(RUNS)/slurm/$$(date +%Y-%m-%d_%H-%M-%S)-$$$$.sh && $(call slurm_script,$(1),$(2)) >$$script && \
	echo "sbatch $(SBATCH) $$script; its log will be in $(RUNS)/slurm/" && sbatch $(SBATCH) $$script
PRETRAIN := $(PARALLEL) $(ARGS)
FINETUNE := pretrained=$(ENCODER) $(PARALLEL) $(ARGS)

.DEFAULT_GOAL := help
.PHONY: help install lock slurm-script pretrain finetune predict matbench sweep bench docs test test-distributed test-slow lint types clean

help: ## list the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo '  make pretrain GPUS=8                      one process per GPU; CPU processes without GPUs'
	@echo '  make pretrain GPUS=8 NODES=4 SLURM=1 SBATCH="--partition=gpu --account=me"'
	@echo '  make pretrain ARGS="encoder=pddformer stages.vae.epochs=50"'
	@echo '  make finetune ENCODER=none                from scratch'
	@echo '  make predict FILES="my_cifs/*.cif"        with the model just finetuned, or MODEL=runs/finetune/NAME'
	@echo '  make sweep SWEEP=finetune COUNT=20 LOCAL=1'
	@echo '  make … PYTHON=python3.12 VENV=none        use an existing environment with torch'

install: $(READY) ## create .venv with the exact versions in constraints.txt, checked by sha256

# Torch comes first, pinned by version only: every index has its own builds for CPUs and each CUDA.
$(VENV)/.ready: pyproject.toml constraints.txt requirements.lock
	@echo 'Installing into $(VENV). About 0.7 GB are downloaded, or 3.5 GB where torch comes with CUDA (from PyPI, on Linux);'
	@echo 'that takes from 3 minutes to half an hour.'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(VENV)/bin/python -m pip install --disable-pip-version-check --no-deps --require-hashes -r requirements.lock
	$(VENV)/bin/python -m pip install --disable-pip-version-check --no-build-isolation -c constraints.txt -e ".[matbench,wandb,sweep,hub,formats,tensorboard,onnx,docs,dev]"
	@touch $@

lock: constraints.txt ## write requirements.lock, the sha256 of all files for the versions in constraints.txt (needs uv)
	grep -v -e '^#' -e '^torch==' constraints.txt | uv pip compile --no-deps --generate-hashes --no-header --no-annotate \
		--python-version 3.11 --output-file requirements.lock -

pretrain: $(READY) ## pretrain an encoder on the embedded crystals (GPUS=, NODES=, ARGS=; SLURM=1 submits a job)
	$(if $(call on,$(SLURM)),@$(call submit,pretrain,$(PRETRAIN)),$(RUN) crysldnet pretrain $(PRETRAIN))

finetune: $(READY) ## train a property model (ENCODER=name, path or none, GPUS=, ARGS=; SLURM=1 submits a job)
	$(if $(call on,$(SLURM)),@$(call submit,finetune,$(FINETUNE)),$(RUN) crysldnet finetune $(FINETUNE))

slurm-script: ## print the script that make pretrain SLURM=1 submits, and create its log folder (SBATCH=, …)
	@$(call checked,pretrain,$(PRETRAIN)); mkdir -p $(RUNS)/slurm && $(call slurm_script,pretrain,$(PRETRAIN))

predict: $(READY) ## predict for CIF or POSCAR files (FILES="…", MODEL=, OUT=)
	$(RUN) crysldnet predict model=$(MODEL) "files=$(FILES)" out=$(OUT) $(ARGS)

matbench: $(READY) ## run Matbench tasks and write a submission folder (TASK=, ENCODER=, ARGS=)
	$(RUN) crysldnet matbench tasks=$(TASK) pretrained=$(ENCODER) $(ARGS)

sweep: $(READY) ## run a sweep on W&B, or locally without an account (SWEEP=, COUNT=, LOCAL=1, ARGS=; SLURM=1 inside a job)
	$(if $(call on,$(SLURM)),srun env )$(RUN) crysldnet sweep sweep=$(SWEEP) count=$(COUNT) backend=$(if $(call on,$(LOCAL)),local,wandb) $(ARGS)

bench: $(READY) ## measure speed: graphs, loading, encoders, waiting for data, the Trainer, pretraining, scaling (minutes, on an idle machine)
	for part in data encoders epoch trainer pretrain scaling sets imports.run; do $(RUN) benchmarks.$$part || exit 1; done

docs: $(READY) ## build the documentation site, dist/site/index.html
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --strict

test: $(READY) ## run the tests
	$(RUN) pytest -n auto --dist loadfile $(ARGS)

test-distributed: $(READY) ## run the tests that start several processes or wait for timeouts, one at a time
	$(RUN) pytest -m 'distributed and not slow' $(ARGS)

test-slow: $(READY) ## run the tests that take many minutes: runs killed dozens of times, studies, long examples
	$(RUN) pytest -m slow $(ARGS)

lint: $(READY) ## check style and format
	$(RUN) ruff check .
	$(RUN) ruff format --check .

types: $(READY) ## check types
	$(RUN) mypy

clean: ## remove the environment and caches, not the runs
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache dist
