"""The base of all scorers, and how an image becomes pixels."""

import numpy as np
import torch


class Scorer:
    """Judges the images of a prompt. The scorers whose result is a mean over the images inherit `result`.

    Every scorer is made from the arguments of evaluate.py or of a stage that scores its student, all prompts,
    and whether the images are frames of videos. Its weights come from --weights-dir, laid out as
    DIR/OWNER/REPOSITORY/FILE, or from the caches of the hub and of torch, or from the network. All are read
    as tensors; nothing is unpickled."""

    takes = ("images",)  # what it is for: "images", "videos"
    model = None  # its network, if it has one
    distances = ()  # results that are distances to the reference, and of the reference itself something else
    description = ""  # model, weights and settings: what has to stand beside a number

    @classmethod
    def check(cls, images, video):
        """UserError for images (metrics.images.Images) that it cannot score. video: as above."""

    def prepare(self, image):
        """An RGB PIL image (of a video its frames below one another) -> tensor. Runs in DataLoader's
        workers."""
        raise NotImplementedError

    def score(self, prepared, prompts):
        """Prepared images [P, K, ...], K samples of each of P prompts -> {column: array [P K, ...]}.

        A number that belongs to a prompt as a whole is repeated for each of its samples."""
        raise NotImplementedError

    def result(self, scores, reference):
        """Lists of what score() gave, a system's and the reference's (the same list, of the reference itself)
        -> {name: value}. A value is a number, an array [P] with one a prompt, NaN where a prompt has none, or
        {name: value}."""
        return {name: column.mean() for name, column in join_columns(scores).items()}

    def list_weights(self):
        """The tensors that scores depend on: those made with others are not used again."""
        return [] if self.model is None else [*self.model.parameters(), *self.model.buffers()]

    def note(self, rows):
        """What has to stand below a table of these rows, beside the description: the end of a sentence."""
        return ""


def join_columns(scores):
    """A list of {column: array} -> {column: one array over all samples}."""
    columns = {}
    for name in scores[0]:
        columns[name] = np.concatenate([part[name] for part in scores])
    return columns


def cut_square(image):
    """A PIL image -> the square in its middle, as large as it has one."""
    side = min(image.size)
    left = (image.width - side) // 2
    top = (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def read_pixels(image):
    """PIL image, RGB -> [3, H, W] in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image))
    return pixels.permute(2, 0, 1) / 127.5 - 1
