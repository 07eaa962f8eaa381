"""How much of a distribution the samples of one prompt show, less what chance takes from so few."""

import functools
import math

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


def measure_excess_tv_to(values, reference, n):
    """The same between the values of two sets of samples, int [P, K] below n: 0 on average where both are of
    one distribution, be sample k of both from one noise, as evaluate.py draws them, or not.

    Of one distribution sample k could as well be the other set's. What is taken off is the mean total
    variation over all such exchanges, exact."""
    samples = values.shape[1]
    walks = expect_walks(samples)
    expected = 0
    for i in range(n):
        differ = ((values == i) != (reference == i)).sum(1)  # an exchange moves the count by 1, up or down
        expected = expected + walks[differ] / samples
    return measure_tv(count_shares(values, n), count_shares(reference, n)) - 0.5 * expected


def measure_squared_distance(values, reference, n):
    """The squared Euclidean distance between the distributions of two sets of samples, values int [P, K]
    below n, row by row. Without bias: however few they are, and be sample k of both from one noise or not,
    it is on average that of the distributions."""
    samples = values.shape[1]
    shares, others = count_shares(values, n), count_shares(reference, n)
    paired = (values == reference).sum(1)  # of one noise: left out of how often two have one value
    cross = (samples**2 * (shares * others).sum(1) - paired) / (samples * (samples - 1))
    return estimate_square(shares, samples) + estimate_square(others, samples) - 2 * cross


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
def expect_walks(most):
    """How far m steps of 1, each up or down, lead on average, for m from 0 to `most` -> [most + 1]."""
    means = []
    for m in range(most + 1):
        half = (m + 1) // 2
        means.append(2 * half * math.comb(m, half) / 2**m)
    return np.array(means)


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
