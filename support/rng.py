"""Random numbers that depend on a row of the global batch alone, never on the rank that draws them."""

import numpy as np
import torch

from support.parallel import rank, world_size


class RowRNG:
    """Random numbers for the rows of a global batch.

    paper silent: random numbers: keyed by their use, the seed, the iteration and the row.

    key is the name of a use and integers. A row's numbers depend on (key, row) alone, so that any number of
    ranks, any resumption and any device gives the same; nothing has to be saved. Drawn on the CPU, moved to
    `device`."""

    def __init__(self, rows, key, device):
        self.device = device
        self.generators = [generator(*key, row) for row in rows]

    def normal(self, *shape):
        """[rows, *shape], float32."""
        noise = []
        for g in self.generators:
            noise.append(torch.randn(shape, generator=g))
        return torch.stack(noise).to(self.device)

    def normal_like(self, x):
        """x [rows, ...] -> as many normal numbers, float32."""
        return self.normal(*x.shape[1:])

    def uniform(self):
        """[rows], float64, in [0, 1)."""
        numbers = []
        for g in self.generators:
            numbers.append(torch.rand(1, dtype=torch.float64, generator=g))
        return torch.cat(numbers).to(self.device)

    def integers(self, high):
        """A list of one int in [0, high) a row."""
        return [int(torch.randint(high, (1,), generator=g)) for g in self.generators]

    def choose(self, items):
        """A list of one of the items a row."""
        return [items[i] for i in self.integers(len(items))]


def draw_integer(high, *key):
    """An int in [0, high) that is the same on every rank."""
    return int(torch.randint(high, (1,), generator=generator(*key)))


def generator(use, *key):
    """A generator seeded by the name of its use, which nothing else has, and non-negative integers, well
    mixed."""
    words = (len(use), *use.encode(), *key)
    state = np.random.SeedSequence(words).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))


def make_rngs(args, device, use, *key):
    """A RowRNG for each of this rank's --accumulate micro-batches: its rows of the global batch."""
    rngs = []
    for part in range(args.accumulate):
        first = (part * world_size() + rank()) * args.batch
        numbers = range(first, first + args.batch)
        rngs.append(RowRNG(numbers, (use, args.seed, *key), device))
    return rngs
