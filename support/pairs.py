"""ODE pairs on the disk: what collect_ode.py writes and adp.py reads."""

import math
import os

import torch
from safetensors import SafetensorError, safe_open

from support.errors import UserError
from support.files import read_json

INDEX = {"teacher", "fingerprint", "latent_shape", "count", "shard", "prompts"}  # what is read of index.json
TENSORS = {"x_T", "x_0", "prompt"}  # of a shard: [n, C, (F,) H, W] twice, and prompt numbers [n]


class Pairs:
    """A folder of ODE pairs; rows are read from disk as they are asked for.

    UserError where the folder is not there, not complete, or of another teacher."""

    def __init__(self, folder, teacher=None):
        self.index = read_json(os.path.join(folder, "index.json")) or {}
        if not set(self.index) >= INDEX:
            raise UserError(
                f"there are no ODE pairs in {folder!r}: run collect_ode.py --teacher ... --out {folder} first"
            )
        if teacher:
            self._check(folder, teacher)
        self.shards = []
        for k in range(math.ceil(self.index["count"] / self.index["shard"])):
            path = shard_path(folder, k)
            if not is_complete(path):
                raise UserError(
                    f"the shard {path} is missing or damaged: delete it, and run collect_ode.py again"
                )
            self.shards.append(safe_open(path, "pt"))

    def _check(self, folder, teacher):
        if self.index["fingerprint"] != teacher.fingerprint:
            source = self.index["teacher"]
            raise UserError(f"the pairs in {folder} come from the teacher {source}, not from {teacher.path}")
        shape = self.index["latent_shape"]
        if tuple(shape) != teacher.latent_shape:
            wanted = list(teacher.latent_shape)
            raise UserError(f"the pairs in {folder} have latents {shape}, not {wanted}; check --resolution")

    def __len__(self):
        return self.index["count"]

    def read(self, i, name):
        """Tensor `name` of pair i."""
        shard, row = divmod(i, self.index["shard"])
        return self.shards[shard].get_slice(name)[row : row + 1][0]

    def prompts(self, numbers):
        """Numbers of pairs -> list of prompts."""
        return [self.index["prompts"][self.read(i, "prompt")] for i in numbers]

    def batch(self, numbers):
        """Numbers of n pairs -> (x_T [n, ...], x_0 [n, ...], list of prompts)."""
        x_T = torch.stack([self.read(i, "x_T").float() for i in numbers])
        x_0 = torch.stack([self.read(i, "x_0").float() for i in numbers])
        return x_T, x_0, self.prompts(numbers)


def shard_path(folder, k):
    return os.path.join(folder, f"{k:05d}.safetensors")


def is_complete(path):
    """Whether the shard is there and undamaged."""
    try:
        with safe_open(path, "pt") as shard:
            return set(shard.keys()) >= TENSORS
    except (OSError, SafetensorError):
        return False
