"""The held-out score of a student that trains: all ranks draw and score, each its share of the prompts."""

import math

import torch

from metrics.images import Images
from metrics.rows import HIDDEN, take_mean
from metrics.scorer import join_columns
from metrics.scorers import SCORERS, check_metric
from support.files import compute_checksum_of_json
from support.inputs import read_held_out_prompts
from support.media import to_image
from support.parallel import add_up, rank, world_size
from support.systems import System


def make_held_out(args, teacher):
    """HeldOut for --eval-every, or None without it. Training's random numbers stay as they were."""
    with torch.random.fork_rng(devices=[]):
        return HeldOut(args, teacher) if args.eval_every else None


class HeldOut:
    """Scores a student of this teacher on the same prompts and noise every time: those with which evaluate.py
    scores its checkpoints.

    `identity` says what a score is of; scores compare where it is the same."""

    def __init__(self, args, teacher):
        """UserError for prompts or a metric that the teacher cannot be scored with, and for a scorer's
        package or weights that are missing."""
        self.batch = args.batch
        self.prompts = read_held_out_prompts(args)
        self.seeds = range(args.eval_seeds)
        teacher.check(self.prompts)
        files = [[None] * len(self.seeds)] * len(self.prompts)
        drawn = Images("the student", "", files, {}, System(teacher))  # of the size of the teacher's own
        check_metric(args.eval_metric, drawn, teacher.video)
        self.scorer = SCORERS[args.eval_metric](args, self.prompts, teacher.video)
        self.identity = {
            "metric": args.eval_metric,
            "scorer": self.scorer.description,
            "prompts": compute_checksum_of_json(self.prompts),
            "seeds": args.eval_seeds,
        }

    def measure(self, method):
        """Scores the student of a method (an ADP or ADM), its moving average if it has one -> {name: number},
        the score first, the same on all ranks, which all call it."""
        system = System(method.teacher, method.student, method.G)
        numbers = choose_share(len(self.prompts))
        parts = []
        if method.teacher.offload:  # all of them, while the encoders are here
            method.teacher.offload.remember([self.prompts[i] for i in numbers])
        with method.ema.use():
            for first in range(0, len(numbers), self.batch):
                parts.append(self._score(system, numbers[first : first + self.batch]))
        columns = {}
        for name, column in join_columns(parts).items():
            own = column.reshape(len(numbers), len(self.seeds))
            columns[name] = join_ranks(own, numbers, len(self.prompts)).flatten()
        scores = [columns]
        return select_numbers(self.scorer.result(scores, scores))

    def _score(self, system, numbers):
        """The scorer's columns of the prompts with these numbers."""
        prompts = [self.prompts[i] for i in numbers]
        prepared = []
        for samples in system.images(prompts, numbers, self.seeds):  # [K, 3, (F,) H, W]
            images = [to_image(sample.flatten(1, -2)) for sample in samples]  # frames below one another
            prepared.append(torch.stack([self.scorer.prepare(image) for image in images]))
        return self.scorer.score(torch.stack(prepared), prompts)


def choose_share(count):
    """The numbers below `count` that are this rank's. It is as many on every rank, as ranks with shares of a
    network's weights need each other's passes: some numbers may come twice."""
    rounds = math.ceil(count / world_size())
    return [(i * world_size() + rank()) % count for i in range(rounds)]


def join_ranks(own, numbers, count):
    """This rank's rows [n, K] of an array and their numbers -> the rows of all ranks, [count, K]."""
    rows = torch.zeros(count, own.shape[1], dtype=torch.float64)
    times = torch.zeros(count, 1, dtype=torch.float64)
    rows[numbers] = torch.from_numpy(own).double()
    times[numbers] = 1
    mean = add_up(rows) / add_up(times)
    return mean.numpy().astype(own.dtype)


def select_numbers(result):
    """What a scorer's result() gives -> what is logged of it, means over the prompts: its numbers, and where
    an oracle reads them the total variation of each attribute that prompts leave open."""
    chosen = {}
    for name, value in result.items():
        if not isinstance(value, dict) and name not in HIDDEN:
            chosen[name] = float(take_mean(value))
    for name, distances in result.get("tv_of", {}).items():
        chosen[f"tv_{name}"] = take_mean(distances)
    return chosen
