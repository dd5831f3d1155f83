# Two commands: `make demo` and `make test`. Both set up .venv once; nothing is installed twice.
.DEFAULT_GOAL := help
.PHONY: help demo generate vqgan weights test test-all clients lint bench compare ablations photos fuzz soak check-python

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
OUTPUT ?= output
# Folder of the weights of LPIPS's and FID's networks; torch hub's folder unless set.
WEIGHTS_DIR ?=
WEIGHTS_FLAG := $(if $(WEIGHTS_DIR),--weights_dir $(WEIGHTS_DIR))
EXP := demo
DEMO = $(OUTPUT)/results/$(EXP)/best/fashion-mnist-sample
# A photograph by a trained model that comes with the repository.
PHOTO = $(OUTPUT)/results/photos/coffee-whole
PHOTOS = $(OUTPUT)/results/photos-64/best/photos
# A run that fits 2 CPU cores and a few minutes; the paper's settings are main.py's defaults.
DEMO_FLAGS ?= --recipe best --batch_size 64 --max_steps 1800
# First stage and prior of generate, in less than 10 minutes on 2 CPU cores.
STAGE_FLAGS ?= --recipe best --latent_channels 8 --batch_size 64 --max_steps 1000
PRIOR_FLAGS ?= --class_conditional --width 128 --layers 4 --schedule cosine --max_steps 800
# Flags of compare and ablations; their pages do not replace those in docs/results.
RUN_FLAGS ?= --steps 300 --num_test 2000 --jobs 2 --docs $(OUTPUT)/docs
# Flags besides those of --preset photos-64.
VQGAN_FLAGS ?=
TABLES := headline codebook dimension anchor offline contrastive interpolation ingredients recipes

help:
	@echo "make demo      train, test and evaluate on bundled Fashion-MNIST images, 2 to 4 minutes on 2 cores"
	@echo "make generate  train a first stage and a prior on the bundled images, draw 100 new ones, less than 10 minutes on 2 cores"
	@echo "make test      run the tests of unit/ and scripts/, about 5 minutes on 2 cores"
	@echo "make test-all  also run those of robustness/: damage, kills, random input; about 5 minutes on 2 cores"
	@echo "make clients   run the tests that need accelerate, transformers and ONNX, and install these; a minute or two on 2 cores"
	@echo "make weights   fetch the networks of LPIPS and FID; the demo prints LPIPS from then on"
	@echo "make lint      check with ruff and mypy"
	@echo "make bench     measure speed and memory against peers, about 25 minutes on 2 cores; writes docs/results/benchmarks.*, docs/results/loader.*"
	@echo "make compare   compare LooC with other quantisers on Fashion-MNIST, about two hours on 2 cores; writes $(OUTPUT)/docs/compare-*"
	@echo "make ablations measure the tables of the flags, about an hour on 2 cores; writes $(OUTPUT)/docs/ablation-*"
	@echo "make vqgan     train, test and evaluate a small VQGAN (--preset photos-64), about an hour on 2 cores"
	@echo "make photos    fetch photographs and cut them, for vqgan and experiments/compare.py --suite photos"
	@echo "make fuzz      test 1,000 damaged images, checkpoints and command lines each"
	@echo "make soak      measure 20,000 steps, 200,000 images, 20,000 pairs; writes docs/results/soak.md"

check-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "$(PYTHON) is older than Python 3.10; use make PYTHON=/path/to/python3"; exit 1; }

$(PY): | check-python
	@$(PYTHON) -m venv $(VENV) \
	  || { rm -rf $(VENV); echo "no venv module: install it (Debian, Ubuntu: apt install python3-venv)"; exit 1; }

$(VENV)/.installed: requirements.txt | $(PY)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

# The extras of pyproject.toml: dev, bench, vqgan, clients.
$(VENV)/.installed-%: pyproject.toml $(VENV)/.installed
	$(PY) -m pip install --quiet --disable-pip-version-check -e ".[$*]"
	@touch $@

bench: $(VENV)/.installed-bench
	$(PY) -m benchmarks
	$(PY) -m benchmarks.loader

compare: $(VENV)/.installed-bench
	$(PY) experiments/compare.py --suite fashion-mnist $(RUN_FLAGS) $(WEIGHTS_FLAG)

ablations: $(VENV)/.installed-bench
	for table in $(TABLES); do \
	  $(PY) experiments/ablations.py --table $$table $(RUN_FLAGS) $(WEIGHTS_FLAG) || exit 1; done

photos: data/photos

data/photos: | $(VENV)/.installed
	$(PY) experiments/photos.py

vqgan: $(VENV)/.installed-vqgan weights data/photos
	$(PY) main.py --preset photos-64 --output_folder $(OUTPUT) --exp_name photos-64 $(VQGAN_FLAGS) $(WEIGHTS_FLAG)
	$(PY) test.py --output_folder $(OUTPUT) --model_name photos-64/best.pt --save_codes
	$(PY) evaluation.py --metrics l1 ssim psnr lpips kid $(WEIGHTS_FLAG) \
	  --gt_path $(PHOTOS)/original/ -g_path $(PHOTOS)/rec
	@$(PY) -m utils.report.summary $(PHOTOS)

fuzz: $(VENV)/.installed-dev
	LOOC_FUZZ=1000 $(PY) -m pytest tests/robustness/test_fuzz.py

soak: $(VENV)/.installed
	$(PY) -m benchmarks.soak --output docs/results/soak.md

demo: $(VENV)/.installed
	$(PY) main.py --output_folder $(OUTPUT) --exp_name $(EXP) --overwrite $(DEMO_FLAGS)
	$(PY) test.py --output_folder $(OUTPUT) --model_name $(EXP)/best.pt --save_codes
	$(PY) evaluation.py --metrics l1 ssim psnr $$($(PY) -m utils.weights lpips $(WEIGHTS_DIR)) $(WEIGHTS_FLAG) \
	  --gt_path $(DEMO)/original/ -g_path $(DEMO)/rec
	@$(PY) -m utils.report.summary $(DEMO)
	$(PY) test.py --output_folder $(OUTPUT) --model_name photos --save_codes --images \
	  $$($(PY) -c 'import os, skimage; print(os.path.dirname(skimage.__file__) + "/data/coffee.png")')
	$(PY) evaluation.py --metrics ssim psnr --gt_path $(PHOTO)/original -g_path $(PHOTO)/rec
	@$(PY) -m utils.report.summary $(PHOTO)

generate: $(VENV)/.installed
	$(PY) main.py --output_folder $(OUTPUT) --exp_name small --overwrite $(STAGE_FLAGS)
	$(PY) generate.py train --output_folder $(OUTPUT) --first_stage small/best.pt --exp_name small_prior --overwrite $(PRIOR_FLAGS)
	$(PY) generate.py sample --output_folder $(OUTPUT) --model_name small_prior/best.pt --overwrite

weights: $(VENV)/.installed
	$(PY) evaluation.py --fetch_weights $(WEIGHTS_FLAG)

test: $(VENV)/.installed-dev
	$(PY) -m pytest -n 2 --dist loadfile tests/unit tests/scripts

test-all: test
	$(PY) -m pytest -n 2 --dist loadfile tests/robustness tests/gpu

clients: $(VENV)/.installed-dev $(VENV)/.installed-clients
	$(PY) -m pytest -n 2 -m "slow or not slow" tests/unit/test_export.py tests/unit/test_state.py

lint: $(VENV)/.installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy .
