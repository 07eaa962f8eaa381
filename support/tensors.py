"""Small things that are done with tensors everywhere."""

import torch


def broadcast(values, x):
    """values [B] -> in x's dtype, shaped to broadcast over x [B, ...]."""
    ones = [1] * (x.ndim - 1)
    return values.to(x.dtype).view(-1, *ones)


def mean_of_rows(x):
    """x [B, ...] -> the mean of each row, shaped to broadcast over x."""
    dims = tuple(range(1, x.ndim))
    return x.mean(dims, keepdim=True)


def concatenate(*conditions):
    """Conditions of n_1, n_2, ... rows -> one of their sum."""
    together = {}
    for name in conditions[0]:
        together[name] = torch.cat([c[name] for c in conditions])
    return together


def detach(maps):
    """A list of maps without their graphs."""
    return [m.detach() for m in maps]
