# make demo    the whole method on the tiny teacher, 15 minutes on two cores: runs/demo/report.json, runs/demo/grid.png
# make test    every test
# make setup   the virtual environment that both use; make sets it up by itself

SHELL := /bin/bash
VENV ?= .venv
PYTHON := $(VENV)/bin/python
TORCHRUN := OMP_NUM_THREADS=1 $(PYTHON) -m torch.distributed.run --standalone --nproc_per_node=2
SEED ?= 0
DEMO ?= runs/demo
export HF_HUB_OFFLINE ?= 1

.PHONY: setup demo test
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
	$(TORCHRUN) collect_ode.py --teacher assets/tiny-sdxl --prompts prompts/shapes_train.txt --count 4096 --guidance 3.5 --batch 64 \
		--seed $(SEED) --out $(DEMO)/pairs
	$(TORCHRUN) adp.py --teacher assets/tiny-sdxl --pairs $(DEMO)/pairs --pixel-backbone assets/tiny-sam.pth --no-checkpointing \
		--seed $(SEED) --out $(DEMO)/adp
	$(TORCHRUN) adm.py --teacher assets/tiny-sdxl --init $(DEMO)/adp --prompts prompts/shapes_train.txt --no-checkpointing \
		--seed $(SEED) --out $(DEMO)/adm
	$(PYTHON) evaluate.py --teacher assets/tiny-sdxl --guidance 3.5 --student adp=$(DEMO)/adp --student dmdx=$(DEMO)/adm \
		--prompts prompts/shapes_eval.txt --seeds 16 --batch 64 --seed $(SEED) --json $(DEMO)/report.json --grid $(DEMO)/grid.png \
		--since $$(cat $(DEMO)/since)

test: setup
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q
