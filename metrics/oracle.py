"""The oracle's exact numbers for the tiny teachers of tiny/."""

import numpy as np
import torch

from metrics.scorer import Scorer, join_columns, read_pixels
from support.errors import UserError


class Oracle(Scorer):
    """What the oracle of tiny/shapes.py reads. Exact; only for teachers of that world.

    accuracy           share of samples that are valid and show every attribute that their prompt names
    accuracy_of        the same for one attribute, over the prompts that name it
    valid              share of samples that show one clean shape
    tv                 total-variation distance of an attribute's distribution, over the prompts that leave
                       it open, to the reference's (of the reference itself: to uniform, as tv_uniform always)
    position_std       of the centre's coordinates, pixels
    pairwise_distance  root mean square between two samples of one prompt"""

    takes = ("images", "videos")
    description = "exact, tiny/shapes.py"

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

        shares = self.count_shares(columns)
        tv_uniform = {name: compare(share, 1 / len(share)) for name, share in shares.items()}
        tv = tv_uniform
        if reference is not scores:
            shares_of_reference = self.count_shares(join_columns(reference))
            tv = {name: compare(share, shares_of_reference[name]) for name, share in shares.items()}

        variance = (columns["x"].var() + columns["y"].var()) / 2
        result = {
            "accuracy": columns["accuracy"].mean(),
            "valid": columns["valid"].mean(),
            "accuracy_of": accuracy_of,
            "tv": tv,
            "tv_uniform": tv_uniform,
            "position_std": np.sqrt(variance),
        }
        if "pairwise_distance" in columns:
            result["pairwise_distance"] = columns["pairwise_distance"].mean()
        return result

    def count_shares(self, columns):
        """The distribution of each attribute over the samples whose prompt leaves it open, if any."""
        shares = {}
        for name, values in self.attributes.items():
            free = columns[name][columns[f"wanted {name}"] < 0]
            if len(free):
                shares[name] = np.bincount(free, minlength=len(values)) / len(free)
        return shares


def compare(share, other):
    """Total-variation distance of two distributions [n], from 0 to 1."""
    return 0.5 * np.abs(share - other).sum()


def measure_distances(pixels):
    """Samples [P, K, ...] -> for each the mean over its prompt of two samples' RMS distance, [P K]."""
    samples = pixels.shape[1]
    flat = pixels.flatten(2)
    distance = torch.cdist(flat, flat) / flat.shape[2] ** 0.5  # [P, K, K]
    mean = distance.sum((1, 2)) / (samples * (samples - 1))
    return mean.repeat_interleave(samples).numpy()
