"""Measures a stage's own run: the passes of its iterations, and their seconds with and without the rest."""

import contextlib
import functools
import os
import statistics
import time
from dataclasses import dataclass
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

import adm
import adp
import collect_ode
import common
import support.rng
from support.errors import UserError
from support.files import ROOT, read_json
from support.pairs import Pairs
from support.run import Run
from support.training import peak_memory_mb
from tools.passes import count_passes

BACKWARD = {  # name: what is counted under it, a network and where its gradient goes
    "G": ("G", "parameters"),
    "f_inputs": ("f", "inputs"),
    "D_inputs": ("D", "inputs"),
    "f_parameters": ("f", "parameters"),
}
WARM_UP = 3  # iterations; passes are counted in the last of them
BRIEF_WARM_UP = 1


@dataclass
class Stage:
    """What is measured of a stage, and the most passes that its iteration may make."""

    module: object  # adm or adp
    arguments: list  # of its command line
    full: int
    partial: int
    backward: tuple  # as in BACKWARD


ONE_STEP = ["--steps", "1"]  # else backward simulation adds passes, a random number of them
STAGES = {
    "adp": Stage(adp, ["--warmup", "0"], 1, 2, (1, 0, 1, 0)),
    "adm": Stage(adm, [*ONE_STEP, "--r1", "0", "--r2", "0"], 5, 2, (1, 1, 1, 1)),
    "adm+r1r2": Stage(adm, ONE_STEP, 5, 4, (1, 1, 1, 1)),
    "secant": Stage(adm, [*ONE_STEP, "--loss", "secant"], 5, 4, (1, 1, 0, 1)),
    "line": Stage(adm, [*ONE_STEP, "--loss", "line"], 5, 0, (1, 1, 0, 1)),
    "straight": Stage(adm, [*ONE_STEP, "--loss", "secant", "--straight-through"], 5, 4, (1, 0, 0, 1)),
    "dmd": Stage(adm, [*ONE_STEP, "--loss", "dmd"], 5, 0, (1, 0, 0, 1)),
}

# ----------------------------------------------------------------------------------------------------------
# The passes alone
# ----------------------------------------------------------------------------------------------------------


class ConstantRNG(support.rng.RowRNG):
    """Stands in for RowRNG: its numbers are made once."""

    def __init__(self, rows, key, device):
        self.device = device
        self.count = len(rows)

    def normal(self, *shape):
        return make_normal(self.device, self.count, *shape)

    def uniform(self):
        return make_uniform(self.device, self.count)

    def integers(self, high):
        return [i % high for i in range(self.count)]


@functools.cache
def make_normal(device, *shape):
    return torch.randn(shape, device=device)


@functools.cache
def make_uniform(device, count):
    return torch.rand(count, dtype=torch.float64, device=device)


def go_back(loss_of, batch, net, optimizer, clip):
    """A stage's minimise without its update."""
    for b in batch:
        (loss_of(b) / len(batch)).backward()
    optimizer.zero_grad(set_to_none=True)
    return torch.zeros(())


class PassesAlone:
    """Iterations of a method that are their passes and nothing else: random numbers, conditions and pairs are
    made once, nothing is updated."""

    def __init__(self, iterate, method):
        self.iterate = iterate
        self.method = method
        self.conditions = {}
        self.real_encode = method.teacher.encode
        self.read = functools.cache(Pairs.read)

    def encode(self, prompts):
        key = tuple(prompts)
        if key not in self.conditions:
            self.conditions[key] = self.real_encode(prompts)
        return self.conditions[key]

    def run(self, step):
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(support.rng, "RowRNG", ConstantRNG))
            stack.enter_context(mock.patch.object(Pairs, "read", self.read))
            stack.enter_context(mock.patch.object(self.method.teacher, "encode", self.encode))
            stack.enter_context(mock.patch.object(self.method.ema, "step"))
            self.iterate(self.method, step, go_back)


# ----------------------------------------------------------------------------------------------------------
# A run that is watched
# ----------------------------------------------------------------------------------------------------------


class Watch:
    """Measures the iterations of a run: `start` comes before them, `note` after each."""

    def __init__(self, iterate, processes, brief=False):
        self.iterate = iterate
        self.processes = processes
        self.warm_up = BRIEF_WARM_UP if brief else WARM_UP
        self.measures_alone = processes == 1 and not brief
        self.result = {}
        self.iterations = []  # seconds of each
        self.alone = []  # seconds of its passes alone

    def start(self, run, passes):
        self.passes = passes
        self.passes_alone = PassesAlone(self.iterate, run.method)
        self.began = self.read_clock()

    def note(self, run, step):
        """step: the number of iterations that are done."""
        seconds = self.read_clock() - self.began
        if step == self.warm_up:
            self.result = count(self.passes)
            self.result["rows"] = run.args.batch * run.args.accumulate
            self.result["peak_mb"] = peak_memory_mb()
        if step > self.warm_up:
            self.iterations.append(seconds)
        if step >= self.warm_up and self.measures_alone:
            self._run_alone(run, step)
        run.method.log.take()  # of the passes alone
        self.passes.clear()
        self.began = self.read_clock()

    def _run_alone(self, run, step):
        began = self.read_clock()
        # its first time fills the caches
        if step == self.warm_up and not run.args.compile:
            with FlopCounterMode(display=False) as flops:
                self.passes_alone.run(step - 1)
            self.result["tflop"] = flops.get_total_flops() / 1e12
        else:
            self.passes_alone.run(step - 1)
        if step > self.warm_up:
            self.alone.append(self.read_clock() - began)

    def read_clock(self):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        elif torch.get_num_threads() == 1 and self.processes == 1:
            return time.process_time()
        return time.perf_counter()

    def finish(self):
        """What --json writes. UserError where the run was told to stop before anything was measured."""
        if not self.iterations:
            raise UserError("the run was told to stop, and nothing was measured")
        seconds = statistics.median(self.iterations)
        self.result["seconds_iteration"] = seconds
        if self.alone:
            alone = statistics.median(self.alone)
            self.result["seconds_passes"] = alone
            self.result["overhead"] = seconds / alone - 1
        return self.result


def count(passes):
    """Passes -> what --json writes of them."""
    backward = {name: passes.backward[key] for name, key in BACKWARD.items()}
    for key, number in passes.backward.items():
        if key not in BACKWARD.values():
            backward["_".join(key)] = number
    return {"forward_full": passes.full, "forward_partial": passes.partial, "backward": backward}


def find_excesses(name, result):
    """What of a stage is over its budget: a list of sentences."""
    stage = STAGES[name]
    budget = {"full forward": stage.full, "partial forward": stage.partial}
    for kind, most in zip(BACKWARD, stage.backward):
        budget[f"backward {kind}"] = most
    found = {"full forward": result["forward_full"], "partial forward": result["forward_partial"]}
    for kind, number in result["backward"].items():
        found[f"backward {kind}"] = number
    excesses = []
    for kind, number in found.items():
        most = budget.get(kind, 0)
        if number > most:
            excesses.append(f"{name}: an iteration makes {number} {kind} passes, its budget is {most}")
    return excesses


@contextlib.contextmanager
def watch_runs(watch):
    """Inside, the iterations of a stage's run are measured, and it saves nothing."""
    iterations = Run.iterations
    log = Run.log

    def iterate(run):
        with count_passes(run.method) as passes:
            watch.start(run, passes)
            yield from iterations(run)

    def log_and_note(run, step):
        log(run, step)
        watch.note(run, step)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(Run, "iterations", iterate))
        stack.enter_context(mock.patch.object(Run, "log", log_and_note))
        stack.enter_context(mock.patch.object(Run, "save"))
        yield


def measure(name, processes, extra, options, teacher, folder):
    """Runs a stage in one of so many processes -> (what --json writes of it, a list of complaints).

    name: of STAGES; extra: more arguments of the stage, in one string; options: of this script; folder: to
    write to."""
    torch.set_num_threads(options.threads)
    stage = STAGES[name]
    watch = Watch(stage.module.iterate, processes, options.brief)
    iterations = watch.warm_up + options.iterations
    arguments = list_arguments(stage, options, iterations, teacher, folder)
    if stage.module is adp:
        arguments += ["--pairs", collect_pairs(teacher, 2 * options.batch, folder)]
    arguments = [*stage.arguments, *arguments, *extra.split()]
    with watch_runs(watch):
        stage.module.main(arguments)
    result = watch.finish()
    complaints = [] if extra else find_excesses(name, result)
    return result, complaints


def list_arguments(stage, options, iterations, teacher, folder):
    """The command line of a stage, without ADP's pairs."""
    arguments = ["--teacher", teacher, "--out", os.path.join(folder, "run"), "--log-every", "1"]
    arguments += ["--batch", str(options.batch), "--iterations", str(iterations)]
    if not options.checkpointing:
        arguments.append("--no-checkpointing")
    if stage.module is adm:
        return arguments + ["--prompts", choose_prompts(teacher)]
    if options.pixel_backbone:
        return arguments + ["--pixel-backbone", options.pixel_backbone]
    return arguments + ["--lambda-pixel", "0"]


def collect_pairs(teacher, count, folder):
    """Runs collect_ode.py -> the folder of so many pairs."""
    pairs = os.path.join(folder, "pairs")
    number = str(count)
    arguments = ["--teacher", teacher, "--prompts", choose_prompts(teacher), "--out", pairs]
    collect_ode.main([*arguments, "--count", number, "--shard-size", number, "--steps", "2"])
    return pairs


def choose_prompts(teacher):
    """Prompts that a tiny teacher can express, and any other as well."""
    index = read_json(os.path.join(teacher, "model_index.json")) or {}
    pipeline = index.get("_class_name")
    known = pipeline in common.FAMILIES or pipeline in common.OTHER_FAMILIES
    video = known and common.find_family(pipeline).video
    name = "motion_train.txt" if video else "shapes_train.txt"
    return os.path.join(ROOT, "prompts", name)
