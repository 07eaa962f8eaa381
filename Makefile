# make demo    the whole method on the tiny teacher, 13 minutes on two cores: runs/demo/report.json, runs/demo/grid.png
# make seeds   three of them, and the mean
# make test    every test
# make setup   the virtual environment that all use; make sets it up by itself

SHELL := /bin/bash
VENV ?= .venv
PYTHON := $(VENV)/bin/python
TORCHRUN := OMP_NUM_THREADS=1 $(PYTHON) -m torch.distributed.run --standalone --nproc_per_node=2
SEED ?= 0
DEMO ?= runs/demo
TINY := --teacher assets/tiny-sdxl --seed $(SEED)
SHORT := --no-checkpointing --head-width 128 --betas 0.5 0.99 --clip 1 --ema 0.99
export HF_HUB_OFFLINE ?= 1

.PHONY: setup demo seeds test
setup: $(VENV)/ready

$(VENV)/ready: requirements.txt
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --upgrade pip
	$(PYTHON) -m pip install --quiet -r requirements.txt
	touch $@

demo: setup
	rm -rf $(DEMO)
	mkdir -p $(DEMO)
	date +%s > $(DEMO)/since
	$(TORCHRUN) collect_ode.py $(TINY) --prompts prompts/shapes_train.txt --out $(DEMO)/pairs --count 3072 --shard 256 --batch 64 --guidance 1.75
	$(TORCHRUN) adp.py $(TINY) --pairs $(DEMO)/pairs --pixel-backbone assets/tiny-sam.pth --out $(DEMO)/adp $(SHORT) --batch 32 \
		--warmup 800 --warmup-lr 1.2e-3 --mse 1 --iterations 1000 --lr 2e-4 --decay 0.1 --head-lr 1e-3
	$(TORCHRUN) adm.py $(TINY) --init $(DEMO)/adp --prompts prompts/shapes_train.txt --out $(DEMO)/adm $(SHORT) --batch 16 \
		--warmup 60 --iterations 1200 --lr 1e-4 --decay 0.8 --fake-lr 5e-4 --head-lr 3e-3 --guidance 1.2 --dt 0.125 --r1 8 --r2 8
	$(PYTHON) evaluate.py $(TINY) --guidance 1.75 --student adp=$(DEMO)/adp --student dmdx=$(DEMO)/adm --prompts prompts/shapes_eval.txt \
		--seeds 16 --batch 64 --json $(DEMO)/report.json --grid $(DEMO)/grid.png --since $$(cat $(DEMO)/since)

seeds: setup
	for seed in 0 1 2; do $(MAKE) demo SEED=$$seed DEMO=runs/demo-$$seed || exit 1; done
	$(PYTHON) tiny/reproduce.py runs/demo-*/report.json

test: setup
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q
