"""Runs the paper's ablations and ours on the tiny teachers, and writes the tables of docs/results.md.

    python tools/reproduce.py                               # everything, three seeds; hours
    python tools/reproduce.py --tables demo --seeds 0 1     # one table, two seeds
    python tools/reproduce.py --quick --out runs/trial      # everything, a few iterations each; minutes
    python tools/reproduce.py --report                      # only the tables, from docs/results.json

A run is a command of a stage, RUNS below; a table is the runs that one command of evaluate.py compares,
TABLES below. OUT/NAME-SEED has a run, OUT/NAME-SEED.json what it was: its command, seed, commit, machine,
date and seconds of CPU. Repeated, the command goes on where it ended. The numbers go to docs/results.json
(with --quick to OUT/results.json), and from there to docs/results.md and results.png.
"""

import datetime
import math
import os
import shlex
import shutil
import statistics
import string
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from metrics.report import read_commit
from metrics.rows import bootstrap_interval, round_values
from support.arguments import Parser, positive, seed_number
from support.checkpoints import find_checkpoint
from support.errors import UserError, launch
from support.files import ROOT, make_folder, read_json, read_json_lines, write_json
from tools.plots import read_iterations, save_gauges, save_plot
from tools.processes import describe_machine, run_script
from tools.tables import write_tables

SDXL = "--teacher assets/tiny-sdxl --seed {seed}"
SHORT = "--no-checkpointing --head-width 128 --betas 0.5 0.99 --clip 1"
ADP = f"adp.py {SDXL} --pairs {{pairs}} {SHORT} --ema 0.99 --batch 64 --iterations 1700 --warmup-lr 1.2e-3"
ADP += " --mse 1 --lr 2e-4 --decay 0.1 --head-lr 1e-3"
WITH_SAM = "--pixel-backbone assets/tiny-sam.pth --warmup 1600"
DISTIL = f"{SHORT} --warmup 60 --decay 0.8 --fake-lr 3e-4 --head-lr 3e-3 --dt 1/8 --r1 0.03 --r2 0.03"
ADM = f"adm.py {SDXL} --prompts prompts/shapes_train.txt {DISTIL} --batch 32 --guidance 1.75"
SHORT_RUN = f"{ADM} --init {{adp}} --ema 0.99"
DEMO = f"{SHORT_RUN} --iterations 450"
TRIAL = f"{SHORT_RUN} --iterations 600"
WORDS = f"{TRIAL.removeprefix('adm.py ')} --lr 3e-5"
HEALTH = f"{SHORT_RUN} --iterations 200"
BARE = "--lr 1e-4 --loss secant --r1 0 --r2 0"
LONG = f"{ADM} --init {{adp}} --ema 0.995"
ALONE = f"{ADM} --steps 1 --ema 0.99 --iterations 600"
SEVERAL = f"--seed {{seed}} {DISTIL} --batch 16 --ema 0.99"
SD3 = f"adm.py --teacher assets/tiny-sd3 --prompts prompts/shapes_train.txt {SEVERAL}"
VIDEO = f"adm.py --teacher assets/tiny-cogvideox --prompts prompts/motion_train.txt {SEVERAL}"

# {name} is the folder of another run of the same seed, which comes first
RUNS = {
    "pairs": f"collect_ode.py {SDXL} --prompts prompts/shapes_train.txt --count 6144 --steps 12"
    " --shard-size 256 --batch 64 --guidance 1.75",
    "adp": f"{ADP} {WITH_SAM}",
    # the paper's names of its ablations
    "A1": f"{ADP} --lambda-pixel 0 --warmup 1700",
    "A1-uniform": f"{ADP} --lambda-pixel 0 --warmup 1700 --time-power 1",
    "A3": f"{ADP} {WITH_SAM} --lambda-latent 0.7 --lambda-pixel 0.3",
    "A4": f"{ADP} --lambda-latent 1 --lambda-pixel 0 --warmup 1600",
    "B1": f"{ALONE} --lr 3e-5",
    "B2": f"{ALONE} --lr 1e-4 --loss dmd",
    "B1-400": f"{ALONE} --lr 3e-5 --first-time 0.4",
    "B2-400": f"{ALONE} --lr 1e-4 --loss dmd --first-time 0.4",
    "dmd": f"{DEMO} --lr 1e-4 --loss dmd",
    "dmdx": f"{DEMO} --lr 3e-5",
    "ttur-4": f"{DEMO} --lr 3e-5 --ttur 4",
    "ttur-8": f"{DEMO} --lr 3e-5 --ttur 8",
    # ADM for 860 iterations, or 1100 without penalties and D's gradient, or 1170 without that of f's step,
    # takes as long as the DMD loss for 1500; 2870 and 3650: for 5000
    "dmd-150": f"{SHORT_RUN} --iterations 150 --lr 1e-4 --loss dmd",
    "dmd-600": f"{TRIAL} --lr 1e-4 --loss dmd",
    "dmd-1500": f"{LONG} --iterations 1500 --lr 1e-4 --loss dmd",
    "dmd-5000": f"{LONG} --iterations 5000 --lr 1e-4 --loss dmd",
    "dmd-slow-600": f"{TRIAL} --lr 3e-5 --loss dmd",
    "dmdx-600": f"{TRIAL} --lr 3e-5",
    "dmdx-860": f"{LONG} --iterations 860 --lr 3e-5",
    "dmdx-2870": f"{LONG} --iterations 2870 --lr 3e-5",
    "projected-600": f"{TRIAL} --lr 1e-4 --project",
    "projected-860": f"{LONG} --iterations 860 --lr 1e-4 --project",
    "secant-600": f"{TRIAL} --lr 1e-4 --loss secant",
    "bare-600": f"{TRIAL} {BARE}",
    "line-600": f"{TRIAL} --lr 1e-4 --loss line",
    # without a pass back through the fake score's step
    "straight-dmdx-600": f"{TRIAL} --lr 3e-5 --straight-through",
    "straight-bare-600": f"{TRIAL} {BARE} --straight-through",
    "straight-line-600": f"{TRIAL} --lr 1e-4 --loss line --straight-through",
    "bare-1100": f"{LONG} --iterations 1100 {BARE}",
    "straight-bare-1170": f"{LONG} --iterations 1170 {BARE} --straight-through",
    "bare-3650": f"{LONG} --iterations 3650 {BARE}",
    # what else ADM could be trained with
    "fast-600": f"{TRIAL} --lr 1e-4",
    "raven": f"{TRIAL} --lr 3e-5 --betas 0 0.999 --weight-decay 0 --ttur 2 --clip 1e9 --ema 0.98"
    " --t-range 0.02 0.98",
    "dmd-range": f"{TRIAL} --lr 1e-4 --loss dmd --t-range 0.02 0.98",
    "dmd-noisy": f"{TRIAL} --lr 1e-4 --loss dmd --t-range 0.3 1",
    "small-dt": f"{TRIAL} --lr 3e-5 --dt 1/64",
    "default-penalty": f"{TRIAL} --lr 3e-5 --dt 1/64 --r1 0.004 --r2 0.004",
    "weak-penalty": f"{TRIAL} --lr 3e-5 --r1 0.003 --r2 0.003",
    "guided": f"{TRIAL} --lr 3e-5 --guidance 2.8",
    # what could make D better (tools/variants.py), and a larger batch at rates that are higher by its root
    "taps-600": f"tools/variants.py taps {WORDS}",
    "product-600": f"tools/variants.py product {WORDS}",
    "taps-product-600": f"tools/variants.py taps-product {WORDS}",
    "rows-600": f"tools/variants.py rows {WORDS}",
    "times-600": f"tools/variants.py times {WORDS}",
    "memory-600": f"tools/variants.py memory {WORDS}",
    "batch-600": f"{TRIAL} --batch 128 --lr 6e-5 --fake-lr 6e-4 --head-lr 6e-3",
    # two updates of f (and D) for one of the student, or a faster f
    "dmd-ttur-2": f"{TRIAL} --lr 1e-4 --loss dmd --ttur 2",
    "dmd-two-1500": f"{LONG} --iterations 1500 --lr 1e-4 --loss dmd --ttur 2",
    "dmd-fast-f": f"{TRIAL} --lr 1e-4 --loss dmd --fake-lr 1e-3",
    "projected-ttur-2": f"{TRIAL} --lr 1e-4 --project --ttur 2",
    "bare-ttur-2": f"{TRIAL} {BARE} --ttur 2",
    # docs/training.md: one that is healthy, and what ails the others
    "healthy": f"{HEALTH} --lr 3e-5",
    "slow-f": f"{HEALTH} --lr 3e-5 --fake-lr 3e-6",
    "slow-D": f"{HEALTH} --lr 3e-5 --head-lr 3e-5",
    "fast-student": f"{HEALTH} --lr 1e-3",
    "no-penalty": f"{HEALTH} --lr 3e-5 --r1 0 --r2 0",
    "guidance-12": f"{HEALTH} --lr 3e-5 --guidance 12",
    "sd3-start": f"{SD3} --guidance 2 --iterations 1 --warmup 1",
    "sd3-adm": f"{SD3} --guidance 2 --iterations 600 --lr 1.5e-5",
    "sd3-adm-mild": f"{SD3} --guidance 1.5 --iterations 600 --lr 1.5e-5",
    "sd3-dmd": f"{SD3} --guidance 2 --iterations 300 --lr 5e-5 --loss dmd",
    "sd3-dmd-low-noise": f"{SD3} --guidance 2 --iterations 300 --lr 5e-5 --loss dmd --t-range 0 0.5",
    "sd3-bare-low-noise": f"{SD3} --guidance 2 --iterations 300 --lr 5e-5 --loss secant --r1 0 --r2 0"
    " --t-range 0.125 0.5",
    "sd3-adm-low-noise": f"{SD3} --guidance 2 --iterations 300 --lr 3e-5 --t-range 0.125 0.5",
    "sd3-adm-unguided": f"{SD3} --guidance 1 --iterations 300 --lr 3e-5",
    # as many iterations as the DMD loss's; --project or --loss is all that they differ in. 490 iterations of
    # the DMD loss take as long as 300 of ADM, and 980 as 600 and as 800 of the line
    "sd3-adm-300": f"{SD3} --guidance 2 --iterations 300 --lr 3e-5",
    "sd3-dmd-490": f"{SD3} --guidance 2 --iterations 490 --lr 5e-5 --loss dmd",
    "sd3-projected-300": f"{SD3} --guidance 2 --iterations 300 --lr 3e-5 --project",
    "sd3-line-300": f"{SD3} --guidance 2 --iterations 300 --lr 3e-5 --loss line",
    "sd3-straight-line-300": f"{SD3} --guidance 2 --iterations 300 --lr 3e-5 --loss line --straight-through",
    "sd3-dmd-980": f"{SD3} --guidance 2 --iterations 980 --lr 5e-5 --loss dmd",
    "sd3-projected-600": f"{SD3} --guidance 2 --iterations 600 --lr 3e-5 --project",
    "sd3-dmd-slow": f"{SD3} --guidance 2 --iterations 300 --lr 3e-5 --loss dmd",
    "sd3-line-800": f"{SD3} --guidance 2 --iterations 800 --lr 3e-5 --loss line",
    "video-start": f"{VIDEO} --guidance 2 --iterations 1 --warmup 1",
    "video-dmd": f"{VIDEO} --guidance 2 --iterations 300 --lr 5e-5 --loss dmd",
    "video-bare": f"{VIDEO} --guidance 2 --iterations 300 --lr 5e-5 --loss secant --r1 0 --r2 0",
    "video-adm": f"{VIDEO} --guidance 2 --iterations 300 --lr 2e-5",
}

EVALUATE = "evaluate.py --teacher assets/tiny-sdxl --guidance 1.75 --steps 12"
EVALUATE += " --prompts prompts/shapes_eval.txt --seeds 64 --batch 64 --metrics oracle"
# this teacher and that of videos take the paper's steps, and so long that they draw a quarter as much
EVALUATE_SD3 = "evaluate.py --teacher assets/tiny-sd3 --guidance 2 --steps 25"
EVALUATE_SD3 += " --prompts prompts/shapes_eval.txt --seeds 16 --batch 64 --metrics oracle"
EVALUATE_VIDEO = "evaluate.py --teacher assets/tiny-cogvideox --guidance 2 --steps 100"
EVALUATE_VIDEO += " --prompts prompts/motion_eval.txt --seeds 16 --batch 32 --metrics oracle"
SMALL_LPIPS = "--lpips-net random --lpips-size 64"
# the runs of a table, and the command that measures them
TABLES = {
    "demo": ("adp dmd dmdx", f"{EVALUATE},lpips {SMALL_LPIPS}"),
    "600": ("adp dmd-150 dmd-600 dmd-slow-600 dmdx-600 fast-600 projected-600 secant-600 bare-600", EVALUATE),
    "1500": ("adp dmd-1500 dmd-two-1500 dmdx-860 projected-860 bare-1100 straight-bare-1170", EVALUATE),
    "5000": ("adp dmd-5000 bare-3650", EVALUATE),
    "2870": ("adp dmdx-2870", EVALUATE),
    "variants": ("dmdx-600 raven small-dt default-penalty weak-penalty dmd-600 dmd-noisy", EVALUATE),
    "discriminators": (
        "adp dmdx-600 taps-600 product-600 taps-product-600 rows-600 times-600 memory-600",
        EVALUATE,
    ),
    "batch": ("adp dmdx-600 batch-600", EVALUATE),
    "lag": (
        "adp dmd-600 dmd-ttur-2 dmd-fast-f projected-600 projected-ttur-2 bare-600 bare-ttur-2",
        EVALUATE,
    ),
    "choices": ("A1 A1-uniform B1 B1-400 B2 B2-400 dmd-600 dmd-range dmdx-600 guided", EVALUATE),
    "weight": ("adp dmd-150 dmd-600 dmdx bare-600 line-600", EVALUATE),
    "straight": (
        "adp dmdx-600 straight-dmdx-600 bare-600 straight-bare-600 line-600 straight-line-600",
        EVALUATE,
    ),
    "pipeline": ("A1-uniform A3 A4 adp B1-400 B2-400 dmd dmdx", EVALUATE),
    "ttur": ("dmdx ttur-4 ttur-8", EVALUATE),
    "health": ("healthy slow-f slow-D fast-student no-penalty guidance-12", EVALUATE),
    "sd3": ("sd3-start sd3-adm sd3-adm-mild", EVALUATE_SD3),
    "sd3-causes": (
        "sd3-start sd3-dmd sd3-dmd-low-noise sd3-bare-low-noise sd3-adm-low-noise sd3-adm-unguided",
        EVALUATE_SD3,
    ),
    "sd3-control": (
        "sd3-start sd3-dmd sd3-dmd-490 sd3-adm-300 sd3-projected-300 sd3-line-300 sd3-straight-line-300",
        EVALUATE_SD3,
    ),
    "sd3-rate": ("sd3-start sd3-dmd sd3-dmd-slow sd3-line-300", EVALUATE_SD3),
    "sd3-long": ("sd3-start sd3-dmd-980 sd3-projected-600 sd3-line-800", EVALUATE_SD3),
    "video": ("video-start video-dmd video-bare video-adm", EVALUATE_VIDEO),
}
# with --quick behind every command: argparse takes the last
QUICK = {
    "collect_ode.py": "--count 64 --shard-size 32 --batch 32 --steps 2",
    "adp.py": "--iterations 4 --warmup 2 --batch 4",
    "adm.py": "--iterations 2 --warmup 1 --batch 2",
    "tools/variants.py": "--iterations 2 --warmup 1 --batch 2",
    "evaluate.py": "--seeds 2",
}


def list_runs(table):
    """The names of the runs of a table."""
    return TABLES[table][0].split()


def list_needed(name):
    """The names of the runs that the run `name` begins with."""
    fields = [field for _, field, _, _ in string.Formatter().parse(RUNS[name]) if field]
    return [field for field in fields if field != "seed"]


def order_runs(tables, seeds):
    """All runs of these tables, (name, seed), each after those that it needs."""
    ordered = []

    def add(name, seed):
        for needed in list_needed(name):
            add(needed, seed)
        if (name, seed) not in ordered:
            ordered.append((name, seed))

    for table in tables:
        for seed in seeds:
            for name in list_runs(table):
                add(name, seed)
    return ordered


class Runs:
    """The runs below a folder `out`."""

    def __init__(self, out, quick):
        self.out = out
        self.quick = quick

    def folder(self, name, seed):
        return os.path.join(self.out, f"{name}-{seed}")

    def complete(self, command):
        """The words of a command of RUNS or TABLES, as they are typed behind `python`."""
        words = shlex.split(command)
        return words + shlex.split(QUICK[words[0]]) if self.quick else words

    def command(self, name, seed):
        """The words of a run's command."""
        folders = {needed: self.folder(needed, seed) for needed in list_needed(name)}
        words = self.complete(RUNS[name].format(seed=seed, **folders))
        return [*words, "--out", self.folder(name, seed)]

    def read(self, name, seed):
        """What is known of a run that is complete, else None. UserError where it was of another command."""
        path = self.folder(name, seed) + ".json"
        record = read_json(path)
        wanted = shlex.join(self.command(name, seed))
        if record and record["command"] != wanted:
            raise UserError(f"{path} is of another command than {wanted!r}: give another --out")
        return record

    def make(self, name, seed):
        """Runs one, or goes on with it. UserError where it fails, or is told to end before its time."""
        words = self.command(name, seed)
        trains = words[0] != "collect_ode.py"
        resume = ["--resume"] if trains else []
        record = run_command([*words, *resume], self.folder(name, seed) + ".log")
        if trains:
            _, meta = find_checkpoint(self.folder(name, seed))
            if meta["step"] < read_iterations(words):  # after a signal a stage saves, and ends with 0
                raise UserError(
                    f"{name}-{seed} was stopped at iteration {meta['step']}: start again to go on"
                )
        write_json(self.folder(name, seed) + ".json", record | {"command": shlex.join(words), "seed": seed})

    def make_all(self, runs, jobs):
        """Runs those that are not complete, `jobs` at a time, each after those that it needs."""
        left = [run for run in runs if not self.read(*run)]
        running = {}
        with ThreadPoolExecutor(jobs) as pool:
            while left or running:
                for name, seed in list(left):
                    is_ready = all(self.read(needed, seed) for needed in list_needed(name))
                    if is_ready and len(running) < jobs:
                        left.remove((name, seed))
                        print(f"{time.strftime('%H:%M')} {name}, seed {seed}", flush=True)
                        running[pool.submit(self.make, name, seed)] = name
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    del running[future]
                    future.result()

    def evaluate(self, table, seeds):
        """Measures the runs of a table -> its entry of results.json."""
        names, command = list_runs(table), TABLES[table][1]
        folder = os.path.join(self.out, f"table-{table}")
        words = self.complete(command)
        for seed in seeds:
            for name in names:
                words += ["--student", f"{name}-{seed}={self.folder(name, seed)}"]
        record = run_command([*words, "--out", folder], folder + ".log")
        report = read_json(os.path.join(folder, "report.json"))
        rows = {row["system"]: row for row in report["rows"]}
        runs = []
        for name in names:
            for seed in seeds:
                run = {"name": name, **self.read(name, seed), "row": rows[f"{name}-{seed}"]}
                runs.append(run | {"gauges": self.average_gauges(name, seed)})
        gains = {name: self.measure_gain(folder, names[0], name, seeds) for name in names[1:]}
        entry = {"command": shlex.join(words), "teacher": rows["teacher"], "runs": runs, "gains": gains}
        return record | entry

    @staticmethod
    def measure_gain(folder, first, name, seeds):
        """What the runs `name` have in accuracy over the runs `first` of the same seeds, prompt by prompt, in
        an evaluation's folder -> [mean, low and high end of its 95 % interval over the prompts]."""
        gains = []
        for seed in seeds:
            own, other = (read_accuracy(f"{folder}/{student}-{seed}") for student in (name, first))
            gains.append(own - other)
        of_prompts = np.mean(gains, axis=0)
        return round_values((of_prompts.mean(), *bootstrap_interval(of_prompts)))

    def average_gauges(self, name, seed):
        """What a run logged, {name: mean over the last third of its lines}."""
        lines = read_json_lines(os.path.join(self.folder(name, seed), "metrics.jsonl"))
        late = lines[-math.ceil(len(lines) / 3) :]
        gauges = {}
        for gauge in sorted(set().union(*late) - {"step"}):
            values = [line[gauge] for line in late if gauge in line]
            gauges[gauge] = round(statistics.mean(values), 5)
        return gauges


def read_accuracy(folder):
    """The accuracy for each prompt, [P], of what evaluate.py scored in a student's folder."""
    lines = read_json_lines(os.path.join(folder, "scores.jsonl"))
    prompts = 1 + lines[-1]["prompt"]  # each with as many samples, in order
    return np.reshape([line["accuracy"] for line in lines], (prompts, -1)).mean(1)


def run_command(words, log):
    """Runs `python WORDS` on one thread -> {commit, machine, date, cpu_seconds}. UserError where it fails."""
    record = {"commit": read_commit(), "machine": describe_machine()}
    with open(log, "a") as file:
        code, usage = run_script(words, file, threads=1)
    if code != 0:
        raise UserError(f"{shlex.join(words)} failed: its output is in {log}")
    record["date"] = datetime.date.today().isoformat()
    record["cpu_seconds"] = round(usage.ru_utime + usage.ru_stime)
    return record


def main():
    parser = Parser(__doc__)
    add = parser.group("what is run")
    add("--tables", "of docs/results.md", nargs="+", choices=list(TABLES), default=list(TABLES))
    add("--seeds", "of the runs", nargs="+", type=seed_number, default=[0, 1, 2])
    add("--quick", "a few iterations of everything", action="store_true")
    add("--report", "nothing: only the tables again", action="store_true")
    add("--jobs", "runs at a time, each on one core", type=positive, default=2)
    add("--out", "folder for the runs", shown="runs/reproduce, or runs/reproduce-quick")
    args = parser.parse_args()

    default = "runs/reproduce-quick" if args.quick else "runs/reproduce"
    out = os.path.relpath(args.out, ROOT) if args.out else default
    os.chdir(ROOT)
    make_folder(out)
    docs = out if args.quick else "docs"
    path = os.path.join(docs, "results.json")
    if not args.report:
        runs = Runs(out, args.quick)
        runs.make_all(order_runs(args.tables, args.seeds), args.jobs)
        for table in args.tables:
            print(f"{time.strftime('%H:%M')} table {table}", flush=True)
            entry = runs.evaluate(table, args.seeds)
            # read again: others may have been written meanwhile
            write_json(path, (read_json(path) or {}) | {table: entry})
        if "health" in args.tables:
            names = list_runs("health")
            metrics = {name: runs.folder(name, args.seeds[0]) + "/metrics.jsonl" for name in names}
            save_gauges(metrics, os.path.join(docs, "training.png"))
            shutil.copyfile(os.path.join(out, "table-health/grid.png"), os.path.join(docs, "gallery.png"))
    results = read_json(path) or {}
    texts = write_tables(docs, results)
    save_plot(results, os.path.join(docs, "results.png"))
    print(f"written: {', '.join(os.path.join(docs, file) for file in texts)}")


if __name__ == "__main__":
    launch(main)
