"""How much of a distribution the samples of one prompt show, less what chance takes from so few."""

import functools

import numpy as np
import torch


def count_shares(values, n):
    """values int [P, K] below n, K samples of each of P prompts -> the share of each value [P, n]."""
    return np.stack([(values == i).mean(1) for i in range(n)], axis=1)


def measure_tv(shares, reference):
    """The total variation distance of distributions [P, n], row by row, from 0 to 1."""
    return 0.5 * np.abs(shares - reference).sum(1)


def measure_excess_tv(shares, samples):
    """The total variation of the shares [P, n] of so many samples to uniform, less what as many samples of a
    uniform distribution have on average: 0 on average where the distribution is uniform."""
    n = shares.shape[1]
    return measure_tv(shares, 1 / n) - expect_tv_to_uniform(n, samples)


def measure_excess_tv_to(shares, samples, reference, samples_of_reference):
    """The same to the shares of a reference [P, n], which are counted on samples, too: 0 on average where
    both have one distribution, for which the reference's shares stand."""
    expected = [expect_tv_between(tuple(row), samples, samples_of_reference) for row in reference.tolist()]
    return measure_tv(shares, reference) - np.array(expected)


def measure_squared_distance(shares, samples, reference, samples_of_reference):
    """The squared Euclidean distance between two distributions, row by row, by the shares [P, n] of so many
    samples of each. Without bias: whatever their number, it is on average that of the distributions."""
    own = estimate_square(shares, samples)
    other = estimate_square(reference, samples_of_reference)
    return own + other - 2 * (shares * reference).sum(1)


def estimate_square(shares, samples):
    """The sum of a distribution's squared probabilities, row by row, by the shares of so many samples: how
    often two of them have one value."""
    return (samples * np.square(shares).sum(1) - 1) / (samples - 1)


@functools.cache
def expect_tv_to_uniform(n, samples):
    """The mean total variation of `samples` samples of a uniform distribution over n values to it, exact."""
    counts = torch.arange(samples + 1)
    distance = (counts / samples - 1 / n).abs()
    return 0.5 * n * float((count_probabilities(1 / n, samples) * distance).sum())


@functools.cache
def expect_tv_between(shares, samples, others):
    """The mean total variation between two sets of samples, so many and so many others, of one distribution,
    the tuple `shares`; exact."""
    one = torch.arange(samples + 1)[:, None] / samples
    other = torch.arange(others + 1) / others
    distance = (one - other).abs()
    total = 0.0
    for share in shares:
        p = count_probabilities(share, samples)
        q = count_probabilities(share, others)
        total += float(p @ distance.double() @ q)
    return 0.5 * total


def count_probabilities(share, samples):
    """The probability [samples + 1] of each count of a value that has this share; binomial, float64."""
    share = torch.tensor(share, dtype=torch.float64)
    counts = torch.arange(samples + 1, dtype=torch.float64)
    return torch.distributions.Binomial(samples, probs=share).log_prob(counts).exp()


def measure_coverage(shares):
    """The share of the values of each row of shares [P, n] that occur at least half as often as where all
    are equally frequent -> [P]."""
    n = shares.shape[1]
    return (shares >= 0.5 / n).mean(1)


def measure_spread(x, y):
    """Coordinates [P, K] -> the standard deviation of a coordinate among each prompt's samples [P]."""
    return np.sqrt((x.var(1, ddof=1) + y.var(1, ddof=1)) / 2)
