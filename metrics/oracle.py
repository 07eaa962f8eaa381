"""The oracle's exact numbers for the tiny teachers of tiny/."""

import numpy as np
import torch

from metrics.scorer import Scorer, join_columns, read_pixels
from metrics.variety import (
    count_shares,
    estimate_square,
    measure_coverage,
    measure_excess_tv,
    measure_excess_tv_to,
    measure_spread,
    measure_squared_distance,
)
from support.errors import UserError

FEW = 64  # samples of a prompt, of which a value of six is hardly ever missed


class Oracle(Scorer):
    """What the oracle of tiny/shapes.py reads. Exact; only for teachers of that world.

    accuracy           share of samples that are valid and show every attribute that their prompt names
    accuracy_of        share of samples, valid or not, that show one attribute, over the prompts that name it
    valid              share of samples that show one clean shape

    Where there are several samples a prompt, the variety among them, each a mean over the prompts:

    tv                 total variation of an attribute that the prompt leaves open to the reference's samples
                       of that prompt, less what so few samples have by chance; mean over such attributes. Of
                       the reference itself: to uniform, as tv_uniform is of all
    tv_of              the same for one attribute, over the prompts that leave it open
    squared_distance   squared Euclidean distance of such an attribute's shares to the reference's, without
                       bias; of the reference itself as tv
    coverage           share of an open attribute's values that have at least half their rate
    position_std       of the centre's coordinates, pixels
    pairwise_distance  root mean square between two samples"""

    takes = ("images", "videos")
    distances = ("tv", "squared_distance")
    description = "exact counts, prompt by prompt, in the world of tiny/shapes.py"

    def __init__(self, args, prompts, video):
        from tiny import shapes

        self.video = video
        self.parse = shapes.parse
        self.side = shapes.SIDE
        self.attributes = shapes.VIDEO if video else shapes.ATTRIBUTES
        self.oracle = shapes.VideoOracle() if video else shapes.Oracle()
        try:
            for prompt in prompts:
                self.parse(prompt)
        except ValueError as error:
            raise UserError(f"the metric oracle: {error}") from error

    @classmethod
    def check(cls, images, video):
        from tiny import shapes

        wanted = (shapes.SIDE, shapes.SIDE * shapes.FRAMES if video else shapes.SIDE)
        for width, height in images.sizes - {wanted}:
            raise UserError(
                f"the metric oracle is for the tiny teachers' images of {wanted[0]}x{wanted[1]} pixels; "
                f"{images.name} has one of {width}x{height}"
            )

    def prepare(self, image):
        pixels = read_pixels(image)
        return pixels.unflatten(1, (-1, self.side)) if self.video else pixels

    def score(self, pixels, prompts):
        """Each attribute as read, int; each as wanted, -1 where the prompt leaves it open; accuracy; the mean
        distance to the other samples, if there are any."""
        samples = pixels.shape[1]
        try:
            columns = self.oracle.read(pixels.flatten(0, 1).numpy())
        except ValueError as error:
            raise UserError(f"the metric oracle is for the tiny teachers: {error}") from error
        wanted = [self.parse(prompt) for prompt in prompts]
        right = columns["valid"].copy()
        for name in self.attributes:
            indices = [-1 if want.get(name) is None else want[name] for want in wanted]
            want = np.repeat(indices, samples)
            columns[f"wanted {name}"] = want
            right &= (want < 0) | (columns[name] == want)
        columns["accuracy"] = right.astype(np.float32)
        columns["samples"] = np.full(len(right), samples)
        if samples > 1:
            columns["pairwise_distance"] = measure_distances(pixels)
        return columns

    def result(self, scores, reference):
        columns = join_columns(scores)
        accuracy_of = {}
        for name in self.attributes:
            want = columns[f"wanted {name}"]
            named = want >= 0
            if named.any():
                accuracy_of[name] = (columns[name] == want)[named].mean()
        result = {
            "accuracy": columns["accuracy"].mean(),
            "valid": columns["valid"].mean(),
            "accuracy_of": accuracy_of,
        }
        if columns["samples"][0] > 1:
            other = None if reference is scores else join_columns(reference)
            result |= self.measure_variety(columns, other)
        return result

    def note(self, rows):
        few = [row for row in rows if row["samples"] < FEW * row["prompts"]]
        return f"; coverage is low by chance with fewer than {FEW} samples a prompt" if few else ""

    def measure_variety(self, columns, reference):
        """-> {name: array [P], or {attribute: array [P]}}, NaN for a prompt that names the attribute.
        reference: another system's columns, or None. As many samples of both are compared as the smaller set
        has; tv and squared_distance are left out where that is one."""
        samples = int(columns["samples"][0])
        both = min(samples, int(reference["samples"][0])) if reference else samples
        tv_uniform, tv, squared, coverage = {}, {}, {}, {}
        for name, known in self.attributes.items():
            is_open = columns[f"wanted {name}"].reshape(-1, samples)[:, 0] < 0
            if not is_open.any():
                continue
            n = len(known)
            values = columns[name].reshape(-1, samples)
            shares = count_shares(values, n)
            excess = measure_excess_tv(shares, samples)
            tv_uniform[name] = np.where(is_open, excess, np.nan)
            coverage[name] = np.where(is_open, measure_coverage(shares), np.nan)
            distance = estimate_square(shares, samples) - 1 / n  # to uniform, too
            if both < 2:
                continue
            if reference:
                others = reference[name].reshape(len(values), -1)
                excess = measure_excess_tv_to(values[:, :both], others[:, :both], n)
                distance = measure_squared_distance(values[:, :both], others[:, :both], n)
            tv[name] = np.where(is_open, excess, np.nan)
            squared[name] = np.where(is_open, distance, np.nan)

        x = columns["x"].reshape(-1, samples)
        y = columns["y"].reshape(-1, samples)
        distances = columns["pairwise_distance"].reshape(-1, samples)
        result = {"position_std": measure_spread(x, y), "pairwise_distance": distances[:, 0]}
        if coverage:
            result = {"coverage": average(coverage)} | result
            result |= {"tv_uniform": average(tv_uniform), "tv_uniform_of": tv_uniform}
        if tv:
            result = {"tv": average(tv), "tv_of": tv, "squared_distance": average(squared)} | result
        return result


def average(measured):
    """{attribute: array [P]} -> the mean over the attributes that are no NaN [P], NaN where all are."""
    stacked = np.stack(list(measured.values()))
    count = np.isfinite(stacked).sum(0)
    return np.where(count > 0, np.nansum(stacked, 0) / np.maximum(count, 1), np.nan)


def measure_distances(pixels):
    """Samples [P, K, ...] -> for each the mean over its prompt of two samples' RMS distance, [P K]."""
    samples = pixels.shape[1]
    flat = pixels.flatten(2)
    distance = torch.cdist(flat, flat) / flat.shape[2] ** 0.5  # [P, K, K]
    mean = distance.sum((1, 2)) / (samples * (samples - 1))
    return mean.repeat_interleave(samples).numpy()
