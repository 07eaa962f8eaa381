"""Plots of the scores, and sheets of images, of all systems."""

import math
import textwrap

import numpy as np
import torch

from metrics.rows import bootstrap_interval, merge_rows
from support.media import save_figure, save_labelled_grid

MEANINGS = {
    "accuracy": "Share of samples that show what the prompt says (higher is better)",
    "valid": "Share of samples that show one clean shape (higher is better)",
    "tv": "Total variation to the reference of what is left open, in excess of chance (lower is nearer)",
    "coverage": "Share of the values left open with at least half their rate (higher is better)",
    "position_std": "Spread of a prompt's shapes in pixels (higher is more diverse)",
    "squared_distance": "Squared distance to the reference of what a prompt leaves open (lower is nearer)",
    "pairwise_distance": "RMS distance of a prompt's samples (higher is more diverse)",
    "clip": "CLIP score (higher is better)",
    "pick": "PickScore (higher is better)",
    "hpsv2": "HPSv2 (higher is better)",
    "hpsv2.1": "HPSv2.1 (higher is better)",
    "mps": "MPS (higher is better)",
    "lpips": "LPIPS of a prompt's samples (higher is more diverse)",
    "lpips_random": "LPIPS with random weights of a prompt's samples (higher is more diverse)",
    "fid": "FID (lower is better)",
}


def write_title(name):
    """A metric's meaning in words, in two lines where it is long."""
    meaning = MEANINGS.get(name, name)
    return meaning.replace(" (", "\n(") if len(meaning) > 36 else meaning


def save_bars(rows, paper, path):
    """A panel a metric: the systems with their 95 % confidence intervals, and the paper's rows, grey."""
    import matplotlib.figure

    names = [name for name, value in merge_rows(rows).items() if isinstance(value, float)]
    names = [name for name in names if name != "seconds_per_image"]
    shown = [row for row in (*rows, *paper) if any(row.get(name) is not None for name in names)]
    columns = min(3, len(names))
    lines = math.ceil(len(names) / columns)
    size = (3 + 5 * columns, lines * (1.2 + 0.3 * len(shown)))
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    grey = "; grey: the paper's numbers" if paper else ""
    figure.suptitle(f"Means with 95 % confidence intervals{grey}")
    # a shared axis has its labels on the left-most panels only
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for axes, name in zip(grid.flat, names):
        draw_bars(axes, shown, name)
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    grid[0, 0].set_yticks(range(len(shown)), [row["system"] for row in shown])
    grid[0, 0].invert_yaxis()
    save_figure(figure, path)


def draw_bars(axes, rows, name):
    """The bars of one metric, row i at height i; a row without it has none."""
    places = [i for i, row in enumerate(rows) if row.get(name) is not None]
    values = np.array([rows[i][name] for i in places])
    intervals = [rows[i].get("ci", {}).get(name, (rows[i][name], rows[i][name])) for i in places]
    ends = np.abs(np.array(intervals).T - values)  # [2, n], from the bar's end down and up
    colours = ["C0" if "ci" in rows[i] else "lightgrey" for i in places]
    axes.barh(places, values, xerr=ends, color=colours)
    axes.set_title(write_title(name), fontsize=11)
    low = (values - ends[0]).min()
    high = (values + ends[1]).max()
    if low > 0.5 * high:  # differences are small beside the numbers
        margin = 0.01 * high
        axes.set_xlim(low - 0.2 * (high - low) - margin, high + margin)
        axes.set_xlabel("the axis does not begin at 0")


def save_differences(values, reference, path):
    """values {system: {metric: [P]}} -> for every other system a row of panels, one a metric: the histogram
    over the prompts of what it differs by from the reference, for metrics that all have. No file where there
    is nothing to compare."""
    import matplotlib.figure

    others = [system for system in values if system != reference]
    names = [name for name in values[reference] if all(name in own for own in values.values())]
    if not others or not names:
        return
    size = (1 + 4 * len(names), 1 + 2.5 * len(others))
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    figure.suptitle(f"Each prompt's score minus that of {reference}")
    grid = figure.subplots(len(others), len(names), squeeze=False)
    for line, system in zip(grid, others):
        line[0].set_ylabel(f"{system} - {reference}\nnumber of prompts", fontsize=11)
        for axes, name in zip(line, names):
            draw_difference(axes, values[system][name] - values[reference][name])
    for axes, name in zip(grid[0], names):
        axes.set_title(write_title(name), fontsize=11)
    save_figure(figure, path)


def draw_difference(axes, difference):
    """The histogram of differences [P], one a prompt, NaN where it has none, and their mean with its 95 %
    interval."""
    difference = difference[np.isfinite(difference)]
    axes.hist(difference, bins=30)
    axes.axvline(0, color="black", linewidth=1)
    label = f"mean {difference.mean():.3g}"
    if interval := bootstrap_interval(difference):
        label += " ({:.3g} to {:.3g})".format(*interval)
    axes.axvline(difference.mean(), color="C1", label=label)
    axes.legend(fontsize=9)
    axes.set_xlabel(f"higher in {(difference > 0).mean():.0%} of the prompts")


def save_sheet(images, name, values, prompts, path):
    """The eight best prompts by the score `name`, values [P], and below them the eight worst."""
    import matplotlib.figure

    order = np.argsort(-values, kind="stable")
    columns = min(8, math.ceil(len(order) / 2))
    chosen = [*order[:columns], *order[::-1][:columns]]
    figure = matplotlib.figure.Figure(figsize=(max(5, 2 * columns), 6), layout="constrained")
    meaning = MEANINGS.get(name, name)
    samples = len(images.files[0])
    which = f", mean of {samples} samples, of which the first is shown" if samples > 1 else ""
    figure.suptitle(f"{images.name}: the highest above, the lowest below, by\n{meaning}{which}", fontsize=11)
    for i, p in enumerate(chosen):
        axes = figure.add_subplot(2, columns, i + 1)
        axes.imshow(images.read_frames(p)[0])
        prompt = textwrap.fill(textwrap.shorten(prompts[p], 90), 26)
        axes.set_title(f"{name} {values[p]:.3f}\n{prompt}", fontsize=7, parse_math=False)
        axes.axis("off")
    save_figure(figure, path)


def save_examples(systems, prompts, path):
    """The first sample of the first prompts, a row a system: 16 prompts, a column each; or 2 prompts of
    videos, a row each, with a column a frame, 9 at most."""
    first = next(iter(systems.values()))
    size = first.read_frames(0)[0].size
    if first.frames == 1:
        shown = prompts[:16]
        rows = []
        for images in systems.values():
            rows.append(torch.stack([images.read_pixels(p, size=size) for p in range(len(shown))]))
        save_labelled_grid(torch.stack(rows), list(systems), shown, path)
        return

    chosen = np.linspace(0, first.frames - 1, min(9, first.frames)).round().astype(int)
    rows, labels = [], []
    for name, images in systems.items():
        for p, prompt in enumerate(prompts[:2]):
            frames = images.read_pixels(p, size=size)[:, chosen]
            rows.append(frames.transpose(0, 1))
            labels.append(f"{name}: {prompt}")
    save_labelled_grid(torch.stack(rows), labels, [f"frame {i}" for i in chosen], path)
