"""Drawings of tiny/mixture.py's runs: samples before and after, an animation of them, and curves.

moments is {(start, loss): samples in the plane [moments, n, 2]}.
"""

import numpy as np
import torch

from support.files import write_atomically
from tiny.gaussians import EDGES, MODES

SHOWN = {"xlim": (-2.2, 5.6), "ylim": (-2.2, 3.0)}  # of the plane


def list_names(moments):
    """The starts and the losses of runs, each in the order in which they came."""
    starts = dict.fromkeys(start for start, _ in moments)
    losses = dict.fromkeys(loss for _, loss in moments)
    return list(starts), list(losses)


def compute_density(mixture, size=200):
    """p_real's density in the plane on a grid over EDGES, [size, size]; rows are the second coordinate."""
    axis = torch.linspace(EDGES[0], EDGES[-1], size)
    x, y = torch.meshgrid(axis, axis, indexing="xy")
    points = torch.stack([x, y], dim=2)[:, :, None]
    distance = (points - mixture.centres).square().sum(3)
    variance = mixture.widths**2
    bumps = (-distance / (2 * variance)).exp() / (2 * np.pi * variance)
    return (mixture.weights * bumps).sum(2)


def make_panels(mixture, starts, columns):
    """-> (figure with a panel for every start and column, {(start, column): its points}), p_real in grey."""
    import matplotlib.figure

    density = compute_density(mixture).sqrt().numpy()
    low, high = EDGES[0].item(), EDGES[-1].item()
    width, height = 2.2 * len(columns), 1.5 * len(starts) + 0.6
    figure = matplotlib.figure.Figure(figsize=(width, height), layout="constrained", dpi=80)
    grid = figure.subplots(len(starts), len(columns), squeeze=False)
    panels = {}
    for line, start in zip(grid, starts):
        line[0].set_ylabel(f"{start} start", fontsize=13)
        for axes, column in zip(line, columns):
            axes.imshow(
                density,
                extent=(low, high, low, high),
                origin="lower",
                cmap="Greys",
                vmax=2,
            )
            axes.set(xticks=[], yticks=[], **SHOWN)
            panels[start, column] = axes.scatter([], [], s=2, color="tab:red")
    for axes, column in zip(grid[0], columns):
        axes.set_title(column, fontsize=13)
    return figure, panels


def save_figure(mixture, moments, path):
    """The paper's Figure 4, drawn from runs: samples before training, and after it by each loss."""
    starts, losses = list_names(moments)
    figure, panels = make_panels(mixture, starts, ["before", *losses])
    for (start, loss), points in moments.items():
        panels[start, "before"].set_offsets(points[0])
        panels[start, loss].set_offsets(points[-1])
    with write_atomically(path) as temporary:
        figure.savefig(temporary, format="png")


def save_animation(mixture, moments, iterations, path):
    """The samples while they train, as a GIF."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    figure, panels = make_panels(mixture, *list_names(moments))
    figure.set_dpi(60)  # a file of less than 1 MB
    canvas = FigureCanvasAgg(figure)
    last = len(next(iter(moments.values()))) - 1
    frames = []
    for i in range(last + 1):
        figure.suptitle(f"iteration {iterations * i // last}", fontsize=13)
        for name, points in moments.items():
            panels[name].set_offsets(points[i])
        canvas.draw()
        picture = np.asarray(canvas.buffer_rgba())[:, :, :3]
        frames.append(Image.fromarray(picture).quantize(16))
    first, *others = frames
    durations = [200] * last + [3000]
    with write_atomically(path) as temporary:
        first.save(temporary, save_all=True, append_images=others, duration=durations, loop=0)


def save_curves(rows, mixture, iterations, path):
    """The far mode's mass and the modes' total variation while they train: a panel a start, a line a loss.
    rows: those of report.json; drawn are the first dimension's."""
    import matplotlib.figure

    rows = [row for row in rows if "history" in row and row["dim"] == rows[0]["dim"]]
    starts = list(dict.fromkeys(row["start"] for row in rows))
    width = 1 + 3.2 * len(starts)
    figure = matplotlib.figure.Figure(figsize=(width, 6), layout="constrained", dpi=80)
    grid = figure.subplots(2, len(starts), squeeze=False, sharex=True, sharey="row")
    labels = {"far": "mass of the far mode", "tv_modes": "total variation with gaps"}
    for row in rows:
        for line, name in zip(grid, labels):
            axes = line[starts.index(row["start"])]
            values = row["history"][name]
            steps = np.linspace(0, iterations, len(values))
            axes.plot(steps, values, label=row["loss"])
    for line, label in zip(grid, labels.values()):
        line[0].set_ylabel(label)
    for axes, start in zip(grid[0], starts):
        axes.set_title(f"{start} start")
        exact = mixture.exact_modes()[MODES - 1]
        axes.axhline(exact, color="grey", linestyle=":")
    for axes in grid[1]:
        axes.set_xlabel("iteration")
    grid[1, 0].set_ylim(0, 0.5)
    lines, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=3)
    with write_atomically(path) as temporary:
        figure.savefig(temporary, format="png")
