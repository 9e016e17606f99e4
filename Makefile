# On a fresh machine with Python 3.11 or newer: `make reports`, then `make test`; `make nbval test-slow` is the rest.

unexport MPLBACKEND  # notebooks use the kernel's own
unexport PYTHONDONTWRITEBYTECODE  # the install compiles no package: the first import of each module does

PYTHON ?= python3
BIN := .venv/bin/python
INSTALLED := .venv/.installed
# the jobs print the progress; Snakemake's own output is shown when something fails
SNAKEMAKE := $(BIN) -m snakemake --cores all --keep-going --quiet host progress reason rules
# tests/offline: tests, including the notebooks' kernels, have no network access
PYTEST := COMPANION_PROGRESS=off PYTHONPATH='$(CURDIR)/tests/offline' $(BIN) -m pytest
# one process per core, each with THREADS threads; a notebook's kernel and a test file run in one process, except the
# files that tests/conftest.py distributes
THREADS ?= 1
SIDE_BY_SIDE := --numprocesses logical --maxprocesses 4
# the notebooks and benchmarks of PAPERS, or all of them
SPACE := $() $()
NOTEBOOKS = $(if $(PAPERS),$(PAPERS:%=notebooks/%.ipynb),$(wildcard notebooks/*.ipynb))
BENCHMARKS = $(if $(PAPERS),$(PAPERS:%=benchmarks/%.py),$(filter-out $(addprefix benchmarks/,bench.py gpu.py memory.py),$(wildcard benchmarks/*.py)))
NBVAL := --nbval --nbval-current-env --nbval-sanitize-with tests/nbval.cfg
LONGEST_FIRST := --dist loadgroup --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help reports study paper lint test coverage nbval test-slow lab gpu bench notebooks lock clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

# today's pip resolves the dependencies in half of the time of the one that Python 3.11 brings
$(INSTALLED): pyproject.toml requirements.lock
	test -x $(BIN) || $(PYTHON) -m venv .venv
	$(BIN) -m pip install --quiet --upgrade pip
	$(BIN) -m pip install --quiet --no-compile --constraint requirements.lock --editable '.[all]'
	touch $@

reports: $(INSTALLED)  ## run the notebooks whose code changed at the pocket profile (PAPERS="bat tip" for some), and build reports/site/index.html
	@mkdir -p build
	@$(SNAKEMAKE) --config papers='$(PAPERS)' 2> build/snakemake.log || { cat build/snakemake.log >&2; exit 1; }
	@echo 'reports/site/index.html is up to date'

study: $(INSTALLED)  ## rerun the studies (hours; PAPERS="sa2vp bat" for some), then the reports that show them
	@mkdir -p build
	@$(SNAKEMAKE) --config papers='$(PAPERS)' -- studies
	@$(MAKE) --no-print-directory reports PAPERS=

paper: $(INSTALLED)  ## one paper from its study to its page (PAPERS=sa2vp): study, notebook, its tests and dry runs, nbval, benchmark, site
	@test -n '$(PAPERS)' || { echo 'which paper? make paper PAPERS=sa2vp'; exit 1; }
	@$(MAKE) --no-print-directory study notebooks
	OMP_NUM_THREADS=$(THREADS) $(PYTEST) $(SIDE_BY_SIDE) $(LONGEST_FIRST) -m 'not slow' -k '$(subst $(SPACE), or ,$(strip $(PAPERS)))' tests
	OMP_NUM_THREADS=$(THREADS) $(PYTEST) $(NBVAL) $(NOTEBOOKS)
	@$(MAKE) --no-print-directory bench reports

lint: $(INSTALLED)  ## facts, contributed rows, ruff, formatting, types, import rules, and the committed notebooks as they are
	$(BIN) -m tools.facts
	$(BIN) -m tools.contributed
	$(BIN) -m ruff check .
	$(BIN) -m ruff format --check .
	$(BIN) -m mypy
	$(BIN) -m pytest -q tests/test_imports.py
	$(BIN) -m companion.runs.notebooks --check notebooks/*.ipynb

test: $(INSTALLED)  ## unit tests, parity with the authors' code, a small site in a browser
	OMP_NUM_THREADS=$(THREADS) $(PYTEST) $(COVERAGE) $(SIDE_BY_SIDE) $(LONGEST_FIRST) -m 'not slow' tests

# of the lines that the tests run themselves; of other processes nothing is counted
coverage: COVERAGE := --cov --cov-report term --cov-report html:build/coverage
coverage: test  ## the same tests, which take almost twice as long, and the share of lines that they run

# separate from `test`: with --cov, nbval starts coverage in every kernel, which times out
nbval: $(INSTALLED)  ## run the committed notebooks and compare their outputs
	OMP_NUM_THREADS=$(THREADS) $(PYTEST) $(NBVAL) $(SIDE_BY_SIDE) --dist loadfile notebooks

# full-size models: one process per file, since those of several files do not fit in memory
test-slow: $(INSTALLED)  ## the rest: full-size parity (up to 13 GB), then the simulated GPU, the site, JupyterLab and other long checks
	@failed=0; for file in $$(grep -rl 'mark.large' tests --include='test_*.py'); do \
	  $(PYTEST) -m large $$file || failed=1; done; \
	  OMP_NUM_THREADS=$(THREADS) $(PYTEST) $(SIDE_BY_SIDE) $(LONGEST_FIRST) -m 'slow and not large' \
	    $$(grep -rl 'mark.slow' tests --include='test_*.py') || failed=1; \
	  exit $$failed

lab: $(INSTALLED)  ## open the notebooks in JupyterLab
	$(BIN) -m jupyterlab --LabApp.default_url=/lab/tree/notebooks

gpu: $(INSTALLED)  ## on a GPU: tests, parity and full-size training steps; writes reports/gpu/
	$(BIN) benchmarks/gpu.py

bench: $(INSTALLED)  ## time each method and the plain backbone passes that it cannot avoid (PAPERS="sa2vp bat" for some)
	for script in $(BENCHMARKS); do $(BIN) "$$script" || exit 1; done

notebooks: $(INSTALLED)  ## run the notebooks in place: writes their committed outputs, tables, claims and run records (PAPERS="sa2vp bat" for some)
	$(BIN) -m companion.runs.notebooks $(NOTEBOOKS)

lock: $(INSTALLED)  ## write requirements.lock from the installed packages
	$(BIN) .ci/lock.py > requirements.lock.new
	mv requirements.lock.new requirements.lock
	touch $(INSTALLED)

clean:  ## remove generated files; the committed tables, claims and records are not touched
	rm -rf .venv .snakemake .pytest_cache .ruff_cache .mypy_cache build dist reports/site reports/pocket/*/*.ipynb reports/pocket/*/figures
