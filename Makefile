# Everything is made by the two commands of the README: `make figures` and `make test`.
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# auto: MNIST if it is here or can be downloaded, else the embedded digits, which it says. mnist never falls back.
DATASET ?= auto
# A parameter file of one's own instead of notebooks/params/$(DATASET).yaml; figures go to figures/<its name>/.
PARAMS ?=
# Notebooks side by side when make was not told with -j: one for each core, as far as memory goes.
JOBS ?= $(shell $(RUN) --jobs)
export PYTHONDONTWRITEBYTECODE = 1

# An interpreter with everything installed, such as python in the conda environment of environment.yml; else make sets up
# build/.venv, again whenever what it is made from changes: told by content, since git sets the times of files.
INTERPRETER ?=
READY := build/.venv/ready-$(shell (cat pyproject.toml constraints.txt; pwd) | cksum | tr -d ' ')
PY := $(or $(INTERPRETER),build/.venv/bin/python)
RUN := $(PY) -m vaenb.execute

.PHONY: help setup figures paper test lab bench faults fuzz lint clean refresh made

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile
	@echo '  DATASET=auto|mnist|fashion|digits chooses the data, PARAMS=my.yaml your own parameters, JOBS=4 or -j4 how many notebooks run at once.'

setup: $(if $(INTERPRETER),,$(READY))  ## the virtual environment in build/.venv, from pinned versions

$(READY):
	@rm -rf build/.venv && mkdir -p build
	@for candidate in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
	  if $$candidate -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then found=$$candidate; break; fi; \
	done; \
	if [ -z "$$found" ]; then echo 'error: no Python 3.11, 3.12 or 3.13 found; name one with make PYTHON=/path/to/python' >&2; exit 1; fi; \
	echo "setting up build/.venv with $$($$found --version) (once; several gigabytes with PyTorch)"; \
	$$found -m venv build/.venv
	@$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@$(PY) -c 'import torch, torchvision'
	@touch $@

# exec: a signal to make reaches what it has started, where a shell between them would end alone.
figures: setup  ## train what is missing, execute the notebooks, make the figures
	@params="$(PARAMS)"; [ -n "$$params" ] || params=$$($(RUN) --dataset $(DATASET) --resolve) || exit 1; \
	exec $(MAKE) --no-print-directory $(if $(findstring --jobserver,$(MAKEFLAGS))$(filter -j1,$(MAKEFLAGS)),,-j$(or $(JOBS),2)) made PARAMS="$$params"

# A short one first, for whoever waits for a picture; then the long ones, so that side by side they end together. Notebooks that
# want the same runs share them through the run store in any order; only the comparison of the maps waits for theirs, so as not to
# compute them in one process.
MAPS := 02_latent_maps-28 02_latent_maps-14 02_latent_maps-7
BOOKS := 02_latent_maps-7 07_trained_jointly 02_latent_maps-28 07_priors 05_locality 08_any_size 01_symptom 02_latent_maps-14 06_controls 04_cause 03_bug_hunt 02_map_sizes
WITH = $(if $(PARAMS),--params "$(PARAMS)",--dataset $(DATASET))
# Where there are more cores than notebooks to execute, helpers execute the longest ones beside the first and share their work.
LONGEST := 07_trained_jointly 05_locality 08_any_size 07_priors 06_controls 03_bug_hunt 01_symptom 04_cause
HELPERS := helper-1 helper-2 helper-3 helper-4 helper-5 helper-6
.PHONY: $(BOOKS) $(HELPERS)
made: $(BOOKS) $(HELPERS)
	@$(RUN) $(WITH) --times
$(BOOKS) $(HELPERS): setup
$(HELPERS): $(filter $(MAPS),$(BOOKS))  # what 02_map_sizes waits for, so that its turn comes before theirs
02_map_sizes: $(MAPS)

$(MAPS):
	@exec $(RUN) $(WITH) 02_latent_maps latent_size=$(subst 02_latent_maps-,,$@)

$(filter-out $(MAPS),$(BOOKS)):
	@exec $(RUN) $(WITH) $@

$(HELPERS): helper-%:
	@exec $(RUN) $(WITH) --helper $* $(LONGEST)

test: setup  ## unit, property and notebook tests; no network needed
	@$(PY) -m pytest --nbval -n 2 -q

paper: setup  ## the write-up from the committed figures, with all notebooks, as one page: build/paper.html
	@$(RUN) --in-place 00_paper && $(PY) -m vaenb.page

lab: setup  ## JupyterLab on the notebooks, at the write-up and its table of contents
	@$(PY) -m jupyterlab --notebook-dir=notebooks --LabApp.default_url=/lab/tree/00_paper.ipynb

bench: setup  ## speed, and our priors beside those of pythae, on MNIST (an optional extra; an hour on an idle machine)
	@$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	@$(PY) tests/bench/speed.py && $(PY) tests/bench/samplers.py

faults: setup  ## kill -9, full disks, moved clocks and stores, two users at once (half an hour)
	@$(PY) tests/bench/faults.py

fuzz: setup  ## all readers against 15,000 damaged files each (minutes)
	@VAENB_FUZZ=15000 $(PY) -m pytest -q -n 2 --dist load tests/test_hostile.py

lint: setup  ## style and dead code
	@$(PY) -m ruff check . && $(PY) -m ruff format --check .

refresh: setup  ## execute the committed notebooks in place, on digits, as pytest --nbval compares them
	@for book in notebooks/*.ipynb; do $(RUN) --in-place $$(basename $$book .ipynb) || exit 1; done

clean:  ## delete build/: environment, runs, downloaded data, failed notebooks
	@rm -rf build
