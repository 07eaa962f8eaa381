"""Small networks of S members that share nothing, so that S seeds train at once.

Row i of a batch is member i mod S's.
"""

import math

import torch
from torch import nn

import common
from common import T


class Linear(nn.Module):
    """nn.Linear for each of S members: [S, n, inputs] -> [S, n, outputs]."""

    def __init__(self, members, inputs, outputs):
        super().__init__()
        bound = inputs**-0.5  # nn.Linear's
        weight = torch.empty(members, inputs, outputs)
        bias = torch.empty(members, 1, outputs)
        self.weight = nn.Parameter(weight.uniform_(-bound, bound))
        self.bias = nn.Parameter(bias.uniform_(-bound, bound))

    def forward(self, x):
        return torch.baddbmm(self.bias, x, self.weight)


def split(x, members):
    """Rows [S n, ...] -> [S, n, ...]."""
    return x.unflatten(0, (-1, members)).transpose(0, 1)


def join(x):
    """[S, n, ...] -> rows [S n, ...]."""
    return x.transpose(0, 1).flatten(0, 1)


class Network(nn.Module):
    """x [S n, dim] at times t [S n] -> velocity [S n, dim]: a residual network, and x times a number that
    depends on t, since across the plane nothing else is needed."""

    def __init__(self, members, dim, width=64, depth=4):
        super().__init__()
        self.members = members
        self.register_buffer("frequencies", torch.arange(1, 9) * math.pi / 2)
        self.clock = nn.Sequential(
            Linear(members, 16, width),
            nn.SiLU(),
            Linear(members, width, width),
        )
        self.gain = nn.Sequential(nn.SiLU(), Linear(members, width, 1))
        self.enter = Linear(members, dim, width)
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            block = nn.Sequential(nn.SiLU(), Linear(members, width, width))
            self.blocks.append(block)
        self.leave = nn.Sequential(nn.SiLU(), Linear(members, width, dim))

    def forward(self, x, t):
        phase = (t / T).float()[:, None] * self.frequencies
        waves = torch.cat([phase.sin(), phase.cos()], dim=1)
        x = split(x, self.members)
        clock = self.clock(split(waves, self.members))
        hidden = self.enter(x) + clock
        for block in self.blocks:
            hidden = hidden + block(hidden)
        velocity = self.gain(clock) * x + self.leave(hidden)
        return join(velocity)


class Head(nn.Module):
    """D's head on a hidden layer [S n, channels] -> logits [S n]: two linear layers, as there is no map."""

    def __init__(self, members, channels, width):
        super().__init__()
        self.members = members
        self.body = nn.Sequential(
            Linear(members, channels, width),
            nn.SiLU(),
            Linear(members, width, 1),
        )

    def forward(self, layer):
        logits = self.body(split(layer, self.members))
        return join(logits)[:, 0]


class Heads(common.Heads):
    def __init__(self, members, layers, width):
        nn.Module.__init__(self)
        self.heads = nn.ModuleList()
        for layer in layers:
            self.heads.append(Head(members, layer.shape[1], width))
