"""Variants of Algorithm 1 that were tried, each a subclass of adm.py's ADM.

    python tools/variants.py memory --teacher assets/tiny-sdxl --init runs/adp --prompts prompts.txt

The words behind the variant's name are adm.py's. docs/results.md, "What else was tried", has what they gave.
"""

import collections
import copy
import dataclasses
import os
import sys

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import adm
from common import Heads
from support.errors import UserError, launch
from support.tensors import mean_of_rows


class Variant(adm.ADM):
    """The base of all: each changes D, so that Algorithm 1's own loss is wanted."""

    def __init__(self, args, teacher, prompts):
        if args.loss != "adm":
            raise UserError(f"the variants are of --loss adm, not of --loss {args.loss}")
        super().__init__(args, teacher, prompts)


class UpTaps(Variant):
    """D reads the U-Net's up blocks, too, so that its backbone's pass goes on to the end."""

    def __init__(self, args, teacher, prompts):
        if teacher.denoiser_name != "unet":
            raise UserError(f"up blocks are a U-Net's, and {args.teacher} has none")
        teacher = copy.copy(teacher)  # the planner makes several of these from one
        teacher.taps = teacher.taps + [(block, lambda out: out) for block in teacher.denoiser.up_blocks]
        super().__init__(args, teacher, prompts)


class InnerProductHeads(Heads):
    """Heads for lists of maps of which the last is x itself [B, C, H, W]. To each map's logit comes its inner
    product with x, mean x * A(map) with A a normalisation and a 1x1 convolution, made as large as x."""

    def __init__(self, maps, width):
        *maps, x = maps
        super().__init__(maps, width)
        self.readings = nn.ModuleList()
        for m in maps:
            channels = m.shape[1]
            reading = nn.Sequential(nn.GroupNorm(1, channels), nn.Conv2d(channels, x.shape[1], 1))
            self.readings.append(reading)

    def forward(self, *groups):
        *maps, x = (torch.cat(parts).float() for parts in zip(*groups))
        products = []
        for reading, m in zip(self.readings, maps):
            direction = F.interpolate(reading(m), x.shape[2:])
            products.append((x * direction).flatten(1).mean(1))
        logits = super().forward(maps) + torch.stack(products, dim=1)
        return logits.chunk(len(groups)) if len(groups) > 1 else logits


class InnerProduct(Variant):
    """The heads also read their maps by an inner product with x, which gives the gradient a direct way."""

    def __init__(self, args, teacher, prompts):
        if teacher.video:
            raise UserError("the inner product is written for pictures, not video")
        teacher = copy.copy(teacher)
        read_maps = teacher.features

        def features(x_t, t, cond):
            return [*read_maps(x_t, t, cond), x_t]

        def make_heads(width):
            x = torch.zeros(1, *teacher.latent_shape, device=teacher.device)
            maps = features(x, torch.ones(1, device=teacher.device), teacher.null(1))
            return InnerProductHeads(maps, width).to(teacher.device)

        teacher.features = features
        teacher.make_heads = make_heads
        super().__init__(args, teacher, prompts)


class UpTapsInnerProduct(UpTaps, InnerProduct):
    """Both."""


class NormalisedRows(Variant):
    """D's gradient goes on through f divided by its mean size in the row, as the DMD loss's direction is."""

    def step_ode(self, b):
        x_fake = super().step_ode(b)
        if x_fake.requires_grad:
            x_fake.register_hook(lambda g: g / mean_of_rows(g.abs()).clamp(min=1e-30) / g.numel())
        return x_fake


class MoreTimes(Variant):
    """D learns from every sample at four times t, where line 3 draws one."""

    def discriminator_loss(self, b):
        losses = [super().discriminator_loss(b)]
        for _ in range(3):
            with torch.no_grad():
                self.generator_loss(b)  # for what line 4 needs of it
            losses.append(super().discriminator_loss(b))
        return sum(losses) / len(losses)


class Memory(Variant):
    """D learns from the micro-batches of 10, 20 and 30 ago, too. The memory is not saved."""

    def __init__(self, args, teacher, prompts):
        super().__init__(args, teacher, prompts)
        self.memory = collections.deque(maxlen=30)

    def discriminator_loss(self, b):
        losses = [super().discriminator_loss(b)]
        for age in (10, 20, 30):
            if age <= len(self.memory):
                losses.append(super().discriminator_loss(self.memory[-age]))
        self.memory.append(dataclasses.replace(b, x0_hat=None, x_t_prime=None))
        return sum(losses) / len(losses)


VARIANTS = {
    "taps": UpTaps,
    "product": InnerProduct,
    "taps-product": UpTapsInnerProduct,
    "rows": NormalisedRows,
    "times": MoreTimes,
    "memory": Memory,
}


def main():
    words = sys.argv[1:]
    name = words.pop(0) if words else None
    if name not in VARIANTS:
        raise UserError(f"give one of {', '.join(VARIANTS)}, and the words of adm.py behind it")
    adm.ADM = VARIANTS[name]
    adm.main(words)


if __name__ == "__main__":
    launch(main)
