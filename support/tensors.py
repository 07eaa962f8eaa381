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


def is_finite(x):
    """Whether all numbers of a tensor are finite. Its extremes tell, on a CPU in a twentieth of the time that
    a look at each number takes: minutes, for a teacher's weights."""
    return not x.numel() or bool(torch.stack(torch.aminmax(x)).isfinite().all())


def sample_bits(weights):
    """Some numbers of each of these tensors, as bytes, to know them by, whatever the precision that they are
    in."""
    samples = []
    for weight in weights:
        numbers = weight.detach().flatten()
        step = max(1, len(numbers) // 64)
        samples.append(numbers[::step].to(torch.bfloat16))
    bits = torch.cat(samples).view(torch.int16) if samples else torch.zeros(0)
    return bits.cpu().numpy().tobytes()


def detach(maps):
    """A list of maps without their graphs."""
    return [m.detach() for m in maps]


def pad_rows(rows, length):
    """Rows [n_i, D] -> ([B, length, D] with zeros after each of them, their numbers n_i [B])."""
    padded = rows[0].new_zeros(len(rows), length, rows[0].shape[1])
    for place, row in zip(padded, rows):
        place[: len(row)] = row
    return padded, torch.tensor([len(row) for row in rows], device=padded.device)


def split_rows(padded, lengths):
    """The inverse: [B, length, D] and [B] -> rows [n_i, D]. On the meta device, which has no numbers, all
    are whole."""
    if lengths.is_meta:
        return list(padded)
    return [row[:n] for row, n in zip(padded, lengths.tolist())]


def cut_rows(padded, lengths):
    """[B, length, D] and [B] -> [B, n, D], n as the longest row, and what of it is no padding [B, n], None if
    all. On the meta device nothing is cut."""
    if lengths.is_meta:
        return padded, None
    counts = lengths.tolist()
    longest = max(counts)
    mask = None
    if min(counts) < longest:
        mask = torch.arange(longest, device=padded.device) < lengths[:, None]
    return padded[:, :longest], mask
