"""ODE pairs on the disk: what collect_ode.py writes and adp.py reads."""

import math
import os

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from support.errors import UserError
from support.files import compute_checksum_of_json, read_sealed, write_atomically
from support.loading import name_both
from support.parallel import rank, world_size
from support.tensors import is_finite

INDEX = {"teacher", "fingerprint", "latent_shape", "count", "shard", "prompts"}  # what is read of index.json
TENSORS = ("x_T", "x_0", "prompt")  # of a shard: [n, C, (F,) H, W] twice, and prompt numbers [n]


class Pairs:
    """A folder of ODE pairs; rows are read from disk as they are asked for.

    UserError where the folder is not there, not complete, damaged, or of another teacher."""

    def __init__(self, folder, teacher=None):
        self.index = read_index(folder)
        if teacher:
            self._check(folder, teacher)
        identity = identify(self.index)
        self.shards = []
        for k in range(math.ceil(self.index["count"] / self.index["shard"])):
            path = shard_path(folder, k)
            problem = find_problem(path, identity, thorough=k % world_size() == rank())
            if problem:
                raise UserError(f"the shard {path} is {problem}: delete it, and run collect_ode.py again")
            self.shards.append(safe_open(path, "pt"))

    def _check(self, folder, teacher):
        if self.index["fingerprint"] != teacher.fingerprint:
            source = self.index["teacher"]
            own = name_both(teacher.path, teacher.lora)
            raise UserError(f"the pairs in {folder} come from the teacher {source}, not from {own}")
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
        """Numbers of n pairs -> (x_T [n, ...], x_0 [n, ...])."""
        x_T = torch.stack([self.read(i, "x_T").float() for i in numbers])
        x_0 = torch.stack([self.read(i, "x_0").float() for i in numbers])
        return x_T, x_0


def read_index(folder):
    """The index of a folder of pairs: a dictionary with INDEX. UserError where there is none, or a damaged
    one."""
    path = os.path.join(folder, "index.json")
    if not os.path.exists(path):
        raise UserError(
            f"there are no ODE pairs in {folder!r}: run collect_ode.py --teacher ... --out {folder} first"
        )
    index = read_sealed(path)
    if index is None or not set(index) >= INDEX:
        raise UserError(f"{path} is damaged, or was edited: collect the pairs again, with another --out")
    return index


def shard_path(folder, k):
    return os.path.join(folder, f"{k:05d}.safetensors")


def write_shard(path, tensors, identity):
    """Writes a shard of the pairs of this identity. tensors: {name of TENSORS: tensor}."""
    metadata = {"checksums": f"{identity} {compute_checksum(tensors)}"}
    with write_atomically(path) as temporary:
        save_file(tensors, temporary, metadata)  # of one entry: several would have a random order


def find_problem(path, identity, thorough=True):
    """What is wrong with a shard, in a word or two; None if it is of the pairs of this identity, whole, and,
    which takes reading all of it (thorough), as it was written."""
    if not os.path.exists(path):
        return "missing"
    with open(path, "rb"):  # OSError where it may be whole, and cannot be read
        pass
    try:
        with safe_open(path, "pt") as shard:
            checksums = (shard.metadata() or {}).get("checksums", "").split()
            if not set(shard.keys()) >= set(TENSORS) or len(checksums) != 2:
                return "damaged"
            if checksums[0] != identity:
                return "not of these pairs"
            if not thorough:
                return None
            tensors = {name: shard.get_tensor(name) for name in TENSORS}
    except (OSError, SafetensorError):
        return "damaged"
    if compute_checksum(tensors) != checksums[1]:
        return "damaged"
    return None if all(is_finite(tensor) for tensor in tensors.values()) else "not finite"


def identify(index):
    """The checksum of what makes pairs what they are: all but their teacher's path, which may move, and has
    a fingerprint."""
    values = {name: value for name, value in index.items() if name != "teacher"}
    return compute_checksum_of_json(values)


def compute_checksum(tensors):
    """The xxh3 hash of a shard's tensors."""
    digest = xxhash.xxh3_128()
    for name in TENSORS:
        digest.update(tensors[name].contiguous().numpy())
    return digest.hexdigest()
