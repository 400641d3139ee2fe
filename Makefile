# Each target does all its own set-up on a fresh machine and is quick the second time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RANKS ?= 2
WORKERS ?= 2
N ?= 1000
SEED ?= 0
IN_DOCS := replicate_bypass compile_bypass hooks_bypass sharded_bypass precision_bypass batchnorm_modes \
  sync_batchnorm dropout_modes mode_mismatch jit_hooks checkpointing same_as_one_process

IN_LESSONS := hooks_bypass forward_bypass arming replicas_parting batchnorm_dropout compiled_calls sharded_calls \
  accelerate_unwrap mode_mismatch mixing_matrix same_as_one_process

# The experiments whose reports the documentation's home links to.
LIVE := forward_bypass truth_table mixing_matrix
SOURCES := $(shell find src conf launch -name '*.py' -o -name '*.yaml' -o -name '*.j2')

.DEFAULT_GOAL := help
.PHONY: help lab test browser corpus soak check bench tables lessons mixing semantics claims versions screenshot docs wheel clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /  make \1\t/' | expand -t 18

$(VENV)/.lab: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[lab]'
	@touch $@

$(VENV)/.dev: $(VENV)/.lab
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

lab: $(VENV)/.lab  ## run the main experiment on $(RANKS) ranks: what does model.forward(x) lose?
	$(BIN)/torchrun --standalone --nproc-per-node $(RANKS) launch/train.py experiment=forward_bypass

test: $(VENV)/.dev  ## run every test (gloo, CPU), $(WORKERS) files at a time; count them by kind, name the slowest ten
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --durations 10

browser:  ## install Chromium and its driver, for the tests of the report (Debian, as root)
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -qq -y chromium chromium-driver > /dev/null

corpus: $(VENV)/.dev  ## score the watch on the scripts of tests/corpus: found, missed, false
	$(BIN)/python -m tests.corpus.score

soak: $(VENV)/.dev  ## $(N) random faults on forked ranks; case i has the seed $(SEED) + i
	$(BIN)/python -m tests.soak --seed $(SEED) --cases $(N)

check: $(VENV)/.dev  ## format, lint and type check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

bench: $(VENV)/.dev  ## measure the cost of the harness, as ratios
	$(BIN)/python -m bench

tables: $(VENV)/.lab  ## rewrite the tables of README and docs from fresh runs
	mkdir -p runs
	for name in forward_bypass arming $(IN_DOCS); do \
	  $(BIN)/python launch/train.py experiment=$$name device=cpu hydra.run.dir=runs/tables/$$name > runs/$$name.txt || exit 1; done
	$(BIN)/python -m ddpcall.lab.truth_table README.md runs/tables/forward_bypass
	$(BIN)/python -m ddpcall.lab.truth_table docs/index.md runs/tables/forward_bypass
	$(BIN)/python -m ddpcall.lab.truth_table docs/experiments.md runs/tables/arming \
	  $(IN_DOCS:%=runs/tables/%)

lessons: $(VENV)/.lab  ## write the pages of docs/labs from fresh runs
	for name in $(IN_LESSONS); do \
	  $(BIN)/python launch/train.py experiment=$$name device=cpu hydra.run.dir=runs/lessons/$$name || exit 1; done
	$(BIN)/python -m ddpcall.teach.pages labs docs/labs $(IN_LESSONS:%=runs/lessons/%)

mixing: $(VENV)/.lab  ## draw the matrices of docs/mixing_matrix.md from a fresh run
	$(BIN)/python launch/train.py experiment=mixing_matrix device=cpu hydra.run.dir=runs/tables/mixing_matrix
	$(BIN)/python -m ddpcall.lab.mixing_page docs/mixing_matrix.md runs/tables/mixing_matrix

semantics: $(VENV)/.lab  ## write docs/semantics.md from a run of the whole truth table
	$(BIN)/python launch/train.py experiment=truth_table device=cpu hydra.run.dir=runs/tables/truth_table
	$(BIN)/python -m ddpcall.lab.truth_table --page docs/semantics.md runs/tables/truth_table

claims: $(VENV)/.lab  ## run every claim and rewrite docs/claims.md from it
	$(BIN)/python -m ddpcall.teach.pages claims docs/claims.md

versions: $(VENV)/.dev  ## try the oldest, constrained and newest torch, and rewrite docs/versions.md
	$(BIN)/python -m tests.versions

# Real runs for the site's live pages; made anew when the code has changed.
runs/live/%/report.html: $(VENV)/.dev $(SOURCES)
	mkdir -p runs
	$(BIN)/python launch/train.py experiment=$* device=cpu hydra.run.dir=runs/live/$* > runs/live-$*.txt

runs/live/watch.html: README.md $(VENV)/.dev $(SOURCES)
	mkdir -p $(@D)
	sed -n '/^<!-- script -->/,/^<!-- end script -->/{/^[<`]/d;p}' README.md > $(@D)/train.py
	cd $(@D) && $(CURDIR)/$(BIN)/ddpcall watch -n 2 --json watch.json train.py; test $$? -eq 1  # it has a finding
	$(BIN)/ddpcall report $(@D)/watch.json --out $@

docs: $(VENV)/.dev $(LIVE:%=runs/live/%/report.html) runs/live/watch.html  ## build the documentation site into site/, strictly, with pages from real runs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	mkdir -p site/live
	for name in $(LIVE); do cp runs/live/$$name/report.html site/live/$$name.html || exit 1; done
	cp runs/live/watch.html site/live/watch.html

screenshot: $(VENV)/.dev  ## rewrite docs/images/report.png from a fresh run; needs `make browser`
	$(BIN)/python launch/train.py experiment=forward_bypass device=cpu hydra.run.dir=runs/screenshot
	$(BIN)/python -m tests.report.screenshot runs/screenshot/report.html docs/images/report.png

wheel: $(VENV)/.dev  ## build the wheel into dist/
	$(BIN)/python -m build --wheel

clean:  ## remove the environment and what runs left behind
	rm -rf $(VENV) build dist runs site src/*.egg-info
