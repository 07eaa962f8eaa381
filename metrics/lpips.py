"""Diversity of the samples of a prompt, by LPIPS."""

import re
import warnings

import numpy as np
import torch

from metrics.scorer import Scorer, read_pixels
from metrics.weights import load_weights, read_weights
from support.errors import UserError, require
from support.files import fetch
from support.packages import LPIPS
from support.parallel import own_device


def check_samples(count):
    """UserError for too few samples a prompt."""
    if count < 2:
        wanted = "give --seeds 2 or more, in training --eval-seeds"
        raise UserError(f"the metric lpips compares images of one prompt: {wanted}")


class Lpips(Scorer):
    """Mean LPIPS distance over all pairs of the images of a prompt, resized with Lanczos, in [-1, 1] as the
    package lpips expects them.

    LPIPS is a weighted square distance of normalised maps, and the mean square distance over all pairs is
    twice the variance: one pass an image. The net `random` is AlexNet with random weights and equal weights
    for its channels: it needs no file, and its numbers, in a column of their own, compare with each other
    only."""

    URL = {
        "alex": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        "vgg": "https://download.pytorch.org/models/vgg16-397923af.pth",
    }

    def __init__(self, args, prompts, video):
        self.device = own_device()
        self.size = args.lpips_size
        if args.lpips_net == "random":
            self.column = "lpips_random"
            self.description = (
                f"AlexNet with RANDOM weights, {self.size} pixels: not LPIPS, compares within this table only"
            )
            self.build("alex", lpips=False)
        else:
            self.column = "lpips"
            self.description = f"{args.lpips_net}, {self.size} pixels, in [-1, 1]"
            self.build(args.lpips_net, lpips=True)
            self.load(args.lpips_net, args.weights_dir)
        self.model.to(self.device).eval()

    @classmethod
    def check(cls, images, video):
        check_samples(len(images.files[0]))

    def build(self, net, lpips):
        """The network with random weights, always the same; channels have LPIPS's weights or equal ones."""
        package = require(*LPIPS)
        self.normalize = package.normalize_tensor
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lpips calls torchvision in a way that it deprecates
            torch.manual_seed(0)
            self.model = package.LPIPS(net=net, pnet_rand=True, lpips=lpips, verbose=False)

    def load(self, net, weights_dir):
        """Loads the backbone's published weights; lpips calls layer i of torchvision's network sliceN.i."""
        path = fetch(self.URL[net], "give --weights-dir DIR with it", weights_dir)
        names = {}
        for name, _ in self.model.net.named_parameters():
            names[re.sub(r"slice\d+", "features", name)] = name
        state = {names.get(name, name): weight for name, weight in read_weights(path).items()}
        load_weights(self.model.net, state, path)

    def note(self, rows):
        if self.column == "lpips":
            return "; the paper's may be of pixels in [0, 1], as DMD2's evaluation feeds them"
        return ""

    def prepare(self, image):
        from PIL import Image

        resized = image.resize((self.size, self.size), Image.Resampling.LANCZOS)
        return read_pixels(resized)

    @torch.no_grad()
    def score(self, images, prompts):
        diversities = [self.measure(samples.to(self.device)) for samples in images]
        return {self.column: np.repeat(diversities, images.shape[1])}

    def measure(self, samples):
        """The mean distance over all pairs of samples [K, 3, H, W]."""
        total = 0
        for i, maps in enumerate(self.model.net(self.model.scaling_layer(samples))):
            spread = 2 * self.normalize(maps).var(0, keepdim=True)  # [1, C, h, w]
            distance = self.model.lins[i](spread) if self.model.lpips else spread.sum(1)
            total += distance.mean().item()
        return total
