# make demo        the whole method on a tiny teacher, 14 minutes on two cores; results in runs/demo
# make seeds       its runs with three seeds, an hour of CPU: docs/results.json, docs/results.md
# make demo-sd3    a four-step student of tiny-sd3, 6 minutes, which ADM may make worse: runs/demo-sd3
# make demo-video  an eight-step student of tiny-cogvideox, 6 minutes: runs/demo-video
# make test        ruff, and the tests that are not slow
# make test-slow   the slow ones: whole commands of every family, nodes, faults, networks of full size
# make faults      kills, signals, full disks, damage, odd commands and files, half an hour; docs/tests.md
# make mutations   how many careless changes of one line no test notices; docs/tests.md
# make full-size   iterations of the real architectures with random weights, on a CPU with 24 GB; docs/memory.md
# make setup       the virtual environment that all use; make sets it up by itself

SHELL := /bin/bash
VENV ?= .venv
PYTHON := $(VENV)/bin/python
TORCHRUN := OMP_NUM_THREADS=1 $(PYTHON) -m torch.distributed.run --standalone --nproc_per_node=2
SEED ?= 0
DEMO ?= runs/demo
TINY := --teacher assets/tiny-sdxl --seed $(SEED)
SHORT := --no-checkpointing --head-width 128 --betas 0.5 0.99 --clip 1 --ema 0.99
# ADM on teachers of this size: a long step, a penalty to match, all else faster than the student
DISTIL := --decay 0.8 --fake-lr 3e-4 --head-lr 3e-3 --dt 1/8 --r1 0.03 --r2 0.03
FROM_ADP = $(TINY) --init $(DEMO)/adp --prompts prompts/shapes_train.txt $(SHORT) --batch 16 --iterations 450 \
	--warmup 60 --guidance 1.75 $(DISTIL)
export HF_HUB_OFFLINE ?= 1
# all on CPUs, unless the environment names GPUs: the demo's two processes want two
export CUDA_VISIBLE_DEVICES ?=

.PHONY: setup demo seeds demo-sd3 demo-video test test-slow faults mutations full-size
setup: $(VENV)/ready

$(VENV)/ready: requirements.txt
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "the packages need python3 3.11 or newer")'
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --upgrade pip
	$(PYTHON) -m pip install --quiet -r requirements.txt
	touch $@

demo: setup
	rm -rf $(DEMO)
	mkdir -p $(DEMO)
	date +%s > $(DEMO)/since
	$(TORCHRUN) collect_ode.py $(TINY) --prompts prompts/shapes_train.txt --out $(DEMO)/pairs \
		--count 6144 --steps 12 --shard-size 256 --batch 64 --guidance 1.75
	$(TORCHRUN) adp.py $(TINY) --pairs $(DEMO)/pairs --pixel-backbone assets/tiny-sam.pth --out $(DEMO)/adp \
		$(SHORT) --batch 32 --iterations 1700 --warmup 1600 --warmup-lr 1.2e-3 --mse 1 \
		--lr 2e-4 --decay 0.1 --head-lr 1e-3 --save-every 1700
	$(TORCHRUN) adm.py $(FROM_ADP) --out $(DEMO)/dmd --loss dmd --lr 1e-4
	$(TORCHRUN) adm.py $(FROM_ADP) --out $(DEMO)/adm --lr 3e-5
	$(TORCHRUN) evaluate.py $(TINY) --guidance 1.75 --steps 12 --student adp=$(DEMO)/adp \
		--student dmd=$(DEMO)/dmd --student dmdx=$(DEMO)/adm \
		--prompts prompts/shapes_eval.txt --seeds 64 --batch 64 --metrics oracle --out $(DEMO)/evaluation \
		--json $(DEMO)/report.json --grid $(DEMO)/grid.png --since $$(cat $(DEMO)/since)

seeds: setup
	$(PYTHON) tools/reproduce.py --tables demo

demo-sd3: FAMILY := sd3
demo-sd3: PROMPTS := shapes
demo-sd3: LENGTH := --warmup 60 --iterations 200 --lr 1.5e-5
demo-video: FAMILY := cogvideox
demo-video: PROMPTS := motion
demo-video: LENGTH := --warmup 60 --iterations 300 --lr 2e-5
demo-sd3 demo-video: DEMO = runs/$@
demo-sd3 demo-video: TINY = --teacher assets/tiny-$(FAMILY) --seed $(SEED)
demo-sd3 demo-video: setup
	rm -rf $(DEMO)
	mkdir -p $(DEMO)
	date +%s > $(DEMO)/since
	$(PYTHON) adm.py $(TINY) --prompts prompts/$(PROMPTS)_train.txt --out $(DEMO)/start \
		--iterations 1 --warmup 1 --batch 8
	$(TORCHRUN) adm.py $(TINY) --prompts prompts/$(PROMPTS)_train.txt --out $(DEMO)/adm \
		$(SHORT) --batch 8 $(LENGTH) --guidance 2 $(DISTIL)
	$(TORCHRUN) evaluate.py $(TINY) --guidance 2 --student start=$(DEMO)/start --student adm=$(DEMO)/adm \
		--prompts prompts/$(PROMPTS)_eval.txt --seeds 8 --batch 32 --metrics oracle --out $(DEMO)/evaluation \
		--json $(DEMO)/report.json --grid $(DEMO)/grid.png --since $$(cat $(DEMO)/since)
	head -n 8 prompts/$(PROMPTS)_eval.txt > $(DEMO)/prompts.txt
	$(PYTHON) sample.py --student $(DEMO)/adm --prompts $(DEMO)/prompts.txt --side-by-side --guidance 2 \
		--out $(DEMO)/samples

# files in their own order: by their number of tests the longest would come last, and one core would wait
PYTEST := OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
test: setup
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTEST) -m "not slow"

test-slow: setup
	$(PYTEST) -m slow

faults: setup
	$(PYTHON) tests/faults.py

mutations: setup
	$(PYTHON) tests/mutate.py

full-size: setup
	$(PYTHON) tools/full_size.py
