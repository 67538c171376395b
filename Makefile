# make demo: installs the library, trains on embedded data.  make test: what CI checks first.
# A comment above each of the other targets explains it.
NEW     = import sys; sys.exit(sys.version_info < (3, 11))
PYTHONS = python3 python3.11 python3.12 python3.13
PYTHON ?= $(shell for p in $(PYTHONS); do $$p -c '$(NEW)' 2>/dev/null && echo $$p && break; done)
VENV   ?= .venv
BIN     = $(VENV)/bin
LIBRARY = $(VENV)/.demo
READY   = $(VENV)/.ready
NEWEST  = .venv-newest
LOWEST  = .venv-lowest
QUIET   = PYTHONWARNINGS=ignore::FutureWarning
# Notebooks and tests run two at a time with one thread each: on few cores faster than one with two threads
ONE     = OMP_NUM_THREADS=1
TWO     = -n 2 --dist worksteal --durations=15

.PHONY: demo test lint sync notebooks-test pytest test-all test-moved docs test-site dist test-newest test-lowest \
        notebooks readme bench clean

# torch and torchvision must come from one place, or torchvision does not import. Without --no-compile, pip
# would compile every module of PyTorch, of which few are used.
UV      = $(shell command -v uv)
PIP     = $(BIN)/pip install -q --disable-pip-version-check --no-compile
INSTALL = $(if $(UV),$(UV) pip install -q --python $(BIN)/python,$(PIP))

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo 'Python 3.11 or newer is needed; set PYTHON=/path/to/python'; exit 2; }
	@echo 'making the virtual environment $(VENV)'
	@$(PYTHON) -m venv $(VENV)

# The library alone
$(LIBRARY): settings.ini setup.py | $(BIN)/python
	@echo 'installing the library and PyTorch into $(VENV): two to four minutes, 6 GB of disk'
	@$(INSTALL) -e .
	@touch $@

# The development environment: notebooks, tests, website, in the versions of constraints.txt
$(READY): settings.ini setup.py constraints.txt | $(BIN)/python
	@echo 'installing the development environment into $(VENV): a few minutes, 7 GB of disk'
	@$(INSTALL) -c constraints.txt -e '.[dev]'
	@touch $@

# SAM, SADT and their controls on scanned digits: a table and a figure, in about a minute.
# The development environment holds the library, so where it is installed, nothing else is.
demo: $(if $(wildcard $(READY)),$(READY),$(LIBRARY))
	@$(BIN)/sadt_demo

test: $(READY) lint sync notebooks-test pytest

# One statement a line, at most 110 columns, no unused or undefined name: ruff.toml says what, and why not more
lint: $(READY)
	$(BIN)/ruff check -q
	@# a name that only a test cell imports is known in the notebook, and unknown in the library
	$(BIN)/ruff check -q --isolated --select F401,F821 --exclude all.py,_modidx.py sadt_nb
	@echo 'ruff found nothing'

# The library and README.md must be what the notebooks export, and the notebooks clean.
# Where they are not, this target corrects them and fails.
CHECKSUMS = git ls-files -co --exclude-standard -z | xargs -0 sha256sum 2>/dev/null
sync: $(READY)
	@$(CHECKSUMS) > $(VENV)/before
	@$(BIN)/nbdev_export && $(BIN)/nbdev_clean && $(BIN)/python docs/make_readme.py
	@$(CHECKSUMS) > $(VENV)/after
	@if diff $(VENV)/before $(VENV)/after > $(VENV)/changed; then \
	  echo 'library, README and notebooks are up to date'; \
	else \
	  echo 'out of date with the notebooks, now corrected; look at git diff and commit:'; \
	  sed -n 's/^> [0-9a-f]*  /  /p' $(VENV)/changed; \
	  exit 1; \
	fi

# All notebooks but the course, whose ten tutorials run in whole in test-moved and test-all
notebooks-test: $(READY)
	$(ONE) $(QUIET) $(BIN)/nbdev_test --n_workers 2 --timing --skip_folder_re '^[_.]|^tutorials$$'

pytest: $(READY)
	$(ONE) $(QUIET) $(BIN)/python -m pytest -q $(TWO) tests

# The long matrices as well, and the comparisons in notebooks of methods and tutorials (cells marked slow)
SLOW = $(BIN)/nbdev_test --n_workers 2 --timing --flags slow
test-all: test
	for p in methods tutorials; do $(ONE) $(QUIET) $(SLOW) --path nbs/$$p || exit 1; done
	$(ONE) $(QUIET) $(BIN)/python -m pytest -q $(TWO) tests -m slow

# Tests that are too long for make test but not for CI: processes that die on a cluster, in a grid or in a
# group, and whole tutorials
MOVED = other_code or control_c or a_process_dies or a_parent_that_is_killed or (several_processes and sadt1)
test-moved: $(READY)
	$(ONE) $(QUIET) $(BIN)/python -m pytest -q $(TWO) -m slow -k '$(MOVED)' \
	  tests/test_cluster.py tests/test_resume.py
	$(ONE) $(QUIET) $(SLOW) --path nbs/tutorials

# The website from the notebooks as they are: _build/html/index.html. Every warning is an error.
# Nothing is downloaded.
docs: $(READY)
	$(BIN)/python -W ignore docs/build.py

# The website in a real browser: each page, each link, search, formulas, both colour modes, a phone's width
CHROMIUM ?= $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)
test-site: docs dist
	@test -n "$(CHROMIUM)" || \
	  { echo 'no Chromium found: apt-get install chromium, or set CHROMIUM=/path/to/chrome'; exit 2; }
	CHROMIUM=$(CHROMIUM) $(QUIET) $(BIN)/python -m pytest -q --durations=5 docs

# The sdist, and the wheel built from it
dist: $(READY)
	rm -rf dist build
	$(BIN)/python -m build -q --outdir dist .

# The same pytest suite on the wheel, without the development extras, with the newest fastai and fastcore
VERSIONS = 'sadt_nb', sadt_nb.__version__, 'fastai', fastai.__version__, 'fastcore', fastcore.__version__
test-newest: dist
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/pip install -q --disable-pip-version-check dist/*.whl pytest pytest-xdist
	cd $(NEWEST) && bin/python -W ignore -c "import sadt_nb, fastai, fastcore; print('wheel:', $(VERSIONS))"
	rm -rf $(NEWEST)/run && cp -r tests $(NEWEST)/run
	cd $(NEWEST)/run && $(ONE) $(QUIET) ../bin/python -m pytest -q $(TWO) -p no:cacheprovider .
	cd $(NEWEST) && bin/sadt_train --epochs 1 --n_train 200 --bs 50 --root smoke 2>&1 | tail -2

# The same pytest suite on the wheel, with the lowest versions that settings.ini allows
BOUNDS = sed -n 's/^requirements = //p' settings.ini | sed 's/>=/==/g'
test-lowest: dist
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/pip install -q --disable-pip-version-check dist/*.whl $$($(BOUNDS)) pytest pytest-xdist
	rm -rf $(LOWEST)/run && cp -r tests $(LOWEST)/run
	cd $(LOWEST)/run && $(ONE) $(QUIET) ../bin/python -m pytest -q $(TWO) -p no:cacheprovider .

# Run notebooks and keep their outputs: make notebooks NB=nbs/methods/20_sam.ipynb
NB ?= $(shell git ls-files 'nbs/*.ipynb')
notebooks: $(READY)
	for n in $(NB); do $(QUIET) $(BIN)/jupyter execute --inplace --timeout=1200 $$n || exit 1; done
	$(BIN)/nbdev_export && $(BIN)/nbdev_clean

readme: $(READY)
	$(BIN)/python docs/make_readme.py

# The cost of a step, data throughput (needs SADT_DATA), landscapes
bench: $(READY)
	$(QUIET) $(BIN)/python -m benchmarks.step_cost
	$(QUIET) $(BIN)/python -m benchmarks.data_throughput
	$(QUIET) $(BIN)/python -m benchmarks.throughput
	$(QUIET) $(BIN)/python -m benchmarks.landscape

clean:
	rm -rf $(VENV) $(NEWEST) $(LOWEST) build dist _proc _build *.egg-info
