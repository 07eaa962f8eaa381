"""A Gaussian mixture in a plane of any number of dimensions: its diffused score and its masses, exactly."""

import math

import torch

from support.rng import generator

SHAPES = (  # weight and width of each mode
    (0.20, 0.16),
    (0.04, 0.08),
    (0.16, 0.12),
    (0.06, 0.16),
    (0.14, 0.08),
    (0.08, 0.12),
    (0.12, 0.16),
    (0.10, 0.08),
    (0.10, 0.20),
)
MODES = len(SHAPES)
LIGHT = 1  # the mode of the least weight
RADIUS = 1.4  # of the ring of all modes but the last
FAR = (4.6, 2.0)  # the centre of the last
ACROSS = 0.15  # the width across the plane, of all modes
REACH = 3.0  # a sample is in a mode if it lies within that many of its widths
COVERED = 0.25  # a mode is covered if it has that share of its mass
EDGES = torch.arange(-2.6, 6.01, 0.2)  # of the plane's cells, in both coordinates


class Mixture:
    """p(x) = sum_k w_k N(x; m_k, s_k^2 I) in a plane of R^dim, times N(0, ACROSS^2 I) across it; float32."""

    def __init__(self, dim):
        self.dim = dim
        self.weights, self.widths = torch.tensor(SHAPES).unbind(1)
        angles = torch.arange(MODES - 1) * (2 * math.pi / (MODES - 1))
        ring = RADIUS * torch.stack([angles.cos(), angles.sin()], dim=1)
        self.centres = torch.cat([ring, torch.tensor([FAR])])  # [modes, 2]
        numbers = torch.randn(dim, 2, generator=generator("mixture plane", dim))
        self.plane, _ = torch.linalg.qr(numbers)  # [dim, 2], orthonormal columns

    def project(self, x):
        """x [n, dim] -> its coordinates in the plane [n, 2]."""
        return x @ self.plane

    def embed(self, inside):
        """Coordinates in the plane [n, 2] -> [n, dim]."""
        return inside @ self.plane.T

    def remove(self, x):
        """x [n, dim] -> what of it is across the plane [n, dim]."""
        return x - self.embed(self.project(x))

    def sample(self, n, random):
        """n samples [n, dim], with a torch.Generator."""
        modes = torch.multinomial(self.weights, n, replacement=True, generator=random)
        spread = torch.randn(n, 2, generator=random)
        inside = self.centres[modes] + self.widths[modes, None] * spread
        across = ACROSS * torch.randn(n, self.dim, generator=random)
        return across + self.embed(inside - self.project(across))

    def denoise(self, x_t, alpha, sigma):
        """x_t = alpha x_0 + sigma eps [n, dim], alpha and sigma [n, 1] -> (E[x_0 | x_t], E[eps | x_t]).

        The score of the diffused mixture is -E[eps | x_t] / sigma. Nothing here divides by alpha or sigma."""
        inside = self.project(x_t)
        variance = (alpha * self.widths) ** 2 + sigma**2  # [n, modes]
        offset = inside[:, None] - alpha[:, :, None] * self.centres  # [n, modes, 2]
        distance = offset.square().sum(2)
        log_share = self.weights.log() - variance.log() - distance / (2 * variance)
        share = log_share.softmax(dim=1)[:, :, None]
        slope = offset / variance[:, :, None]
        shrink = alpha * self.widths**2
        x_0 = self.centres + shrink[:, :, None] * slope
        x_0 = (share * x_0).sum(1)
        eps = sigma * (share * slope).sum(1)

        variance = (alpha * ACROSS) ** 2 + sigma**2
        slope = self.remove(x_t) / variance
        x_0 = self.embed(x_0) + alpha * ACROSS**2 * slope
        eps = self.embed(eps) + sigma * slope
        return x_0, eps

    def find_modes(self, x):
        """x [n, dim] -> the mode that each sample is in [n]; MODES where it is in none."""
        offset = self.project(x)[:, None] - self.centres
        distance = offset.norm(dim=2) / self.widths
        nearest, mode = distance.min(1)
        return mode.where(nearest < REACH, MODES)

    def count_modes(self, x):
        """Samples [n, dim] -> the share of them in each mode and in none, [MODES + 1]."""
        counts = torch.bincount(self.find_modes(x), minlength=MODES + 1)
        return counts / len(x)

    def exact_modes(self):
        """The same of the mixture itself, exact but for what a mode has within another's reach (1e-6)."""
        within = 1 - math.exp(-(REACH**2) / 2)
        inside = self.weights * within
        return torch.cat([inside, 1 - inside.sum()[None]])

    def count_cells(self, x):
        """Samples [n, dim] -> the share of them in each cell of the plane and outside of all, [cells + 1]."""
        sides = len(EDGES) - 1
        place = torch.bucketize(self.project(x), EDGES) - 1
        is_inside = ((place >= 0) & (place < sides)).all(1)
        cell = place[:, 0] * sides + place[:, 1]
        cell = cell.where(is_inside, sides**2)
        counts = torch.bincount(cell, minlength=sides**2 + 1)
        return counts / len(x)

    def exact_cells(self):
        """The same of the mixture itself, exact."""
        below = (EDGES - self.centres[:, :, None]) / self.widths[:, None, None]
        share = torch.special.ndtr(below).diff(dim=2)  # [modes, 2, cells a side]
        column, row = share.unbind(1)
        inside = torch.einsum("k,kx,ky->xy", self.weights, column, row).flatten()
        return torch.cat([inside, 1 - inside.sum()[None]])

    def judge(self, x):
        """Samples [n, dim] -> {name: number}. Total variations are to the mixture itself."""
        exact, found = self.exact_modes(), self.count_modes(x)
        is_covered = found > COVERED * exact
        across = self.remove(x).square().sum(1) / max(1, self.dim - 2)
        numbers = {
            "covered": is_covered[:MODES].sum(),
            "tv_modes": measure_variation(found, exact),
            "tv_cells": measure_variation(self.count_cells(x), self.exact_cells()),
            "in_none": found[MODES],
            "far": found[MODES - 1],
            "width": across.mean().sqrt(),
        }
        numbers = {name: round(value.item(), 5) for name, value in numbers.items()}
        numbers["masses"] = [round(mass, 5) for mass in found.tolist()]
        return numbers


def measure_variation(p, q):
    """The total variation between two lists of masses, from 0 to 1."""
    return (p - q).abs().sum() / 2
