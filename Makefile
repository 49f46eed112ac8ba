# Every command makes the virtual environment it needs. `make` alone prints this list.
PYTHON ?= python3
PY := .venv/bin/python
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
LONGEST := notebooks/05_training.ipynb notebooks/own_data.ipynb# first: all else fits beside them
TESTS ?= not slow# make test TESTS="slow or not slow" runs all of them
INSTALLED := .venv/installed
NBCONVERT := $(PY) -m jupyter nbconvert --log-level ERROR --to notebook --inplace

.PHONY: help lab run test test-browser lint format bench detector html slides clean

help: ## Print what there is
	@echo "Faster R-CNN from scratch. Commands:"
	@sed -n 's/^\([a-z-]*\):.*## /  make \1|/p' Makefile | awk -F'|' '{printf "%-22s%s\n", $$1, $$2}'

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

lab: $(INSTALLED) ## Open JupyterLab on the notebooks
	$(PY) -m jupyter lab --notebook-dir=notebooks

run: $(INSTALLED) ## Execute all notebooks in order, in place, and refresh figures/ (5 to 10 minutes)
	@set -e; export FRCNN_STILL=1; for notebook in $(NOTEBOOKS); do \
		$(NBCONVERT) --execute --ExecutePreprocessor.record_timing=False "$$notebook"; \
		$(NBCONVERT) --coalesce-streams "$$notebook"; \
	done

test: $(INSTALLED) ## Run the unit tests and every notebook, without a network
	@scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && \
	FRCNN_STILL=1 HF_HUB_OFFLINE=1 FRCNN_DATA=glyphs FRCNN_FIGURES="$$scratch/figures" FRCNN_CHECKPOINTS="$$scratch/checkpoints" \
		$(PY) -m pytest -q -n auto --maxschedchunk 1 -m "$(TESTS)" --nbmake --nbmake-timeout=900 --durations=5 \
		$(LONGEST) tests $(filter-out $(LONGEST),$(NOTEBOOKS))

test-browser: html slides ## Open JupyterLab, the site and the slides in Chromium (Debian: chromium, chromium-driver)
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
		{ [ "$$(id -u)" = 0 ] && apt-get update -q && apt-get install -y -q chromium chromium-driver; } || \
		{ echo "chromium and chromedriver are missing: sudo apt-get install chromium chromium-driver"; exit 1; }
	$(PY) -m pytest -q tests/browser.py

html: $(INSTALLED) ## Write the notebooks as a site for a room without a network: site/index.html
	$(PY) build_site.py html

slides: $(INSTALLED) ## Write a deck for each notebook: site/index.slides.html
	$(PY) build_site.py slides

lint: $(INSTALLED) ## Check style and formatting, notebooks included
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(INSTALLED) ## Format the code
	$(PY) -m ruff format .

bench: $(INSTALLED) ## Time everything against torchvision, then train both tiny detectors, three seeds (about 20 minutes)
	$(PY) benchmarks/speed.py
	$(PY) benchmarks/training.py

detector: $(INSTALLED) ## Train the detector that comes with the course anew: tiny_detector.pt
	$(PY) -m frcnn_common train --model tiny --source glyphs --checkpoint checkpoints/shipped.pt
	$(PY) -c 'import frcnn_common as f; model, _ = f.load_checkpoint("checkpoints/shipped.pt"); \
		f.save_checkpoint(f.TINY_DETECTOR, model.half())'

clean: ## Remove the environment, caches and checkpoints
	rm -rf .venv site .pytest_cache .ruff_cache *.egg-info __pycache__ tests/__pycache__ benchmarks/__pycache__ checkpoints
