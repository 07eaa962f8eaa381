"""The plots of docs/results.md and docs/training.md."""

import math
import re
import shlex
import statistics

from support.files import read_json_lines
from support.media import collect_curves, save_figure
from tools.tables import group_runs

METHODS = {  # (name, colour, cost of an iteration by docs/benchmarks.md, the DMD loss's being 1)
    "dmd": ("DMD loss", "C0", 1.0),
    "dmd-slow": ("DMD loss, rate 3e-5", "C6", 1.0),
    "dmdx": ("ADM, rate 3e-5", "C3", 1.75),
    "fast": ("ADM, rate 1e-4", "C1", 1.75),
    "projected": ("ADM --project, rate 1e-4", "C2", 1.75),
    "secant": ("--loss secant", "C4", 1.73),
    "bare": ("--loss secant, no penalties", "C5", 1.37),
    "straight-bare": ("the same, straight through", "C7", 1.24),
    "dmd-two": ("DMD loss, two updates of f", "C8", 1.4),
}
TABLES = ("demo", "600", "1500", "5000", "2870")  # of docs/results.json, whose runs are comparable
GAUGES = {
    "loss_f": "loss_f: the fake score's loss",
    "dmd_loss": "dmd_loss: half the squared DMD direction",
    "cosine": "cosine of D's gradient with x_real - x_fake",
    "D_gap": "D_gap: D(x_real) - D(x_fake)",
    "D_abs": "D_abs: mean size of D",
    "norm_G": "norm_G: of the student's gradient",
}


def save_gauges(metrics, path):
    """{run: its metrics.jsonl} -> a panel for each of GAUGES with a line a run."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(13, 7), layout="constrained")
    grid = figure.subplots(2, 3)
    for axes, (gauge, title) in zip(grid.flat, GAUGES.items()):
        for run, file in metrics.items():
            curves = collect_curves(read_json_lines(file))
            if gauge in curves:
                axes.plot(*curves[gauge], label=run)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("iteration")
        axes.grid(alpha=0.3)
        if gauge in ("loss_f", "dmd_loss", "D_abs", "norm_G"):
            axes.set_yscale("log")
    grid[0, 0].legend(fontsize=9)
    save_figure(figure, path)


def save_plot(results, path):
    """The runs of TABLES: accuracy against tv_uniform, a point a seed; and both against time, the means over
    the seeds with their standard deviations."""
    import matplotlib.figure

    groups = {}
    for table in TABLES:  # a run that is in several is the same, but for its seeds: the first has most
        groups = group_runs(results.get(table, {"runs": []})) | groups
    if not groups:
        return
    figure = matplotlib.figure.Figure(figsize=(15, 6), layout="constrained")
    plane, *curves = figure.subplots(1, 3)
    figure.suptitle("One-step students of tiny-sdxl; the number is of iterations")
    for runs in groups.values():
        method, iterations = read_run(runs[0])
        label, colour = "ADP, where all start", "black"
        if method in METHODS:
            title, colour, _ = METHODS[method]
            label = f"{title} {iterations}"
        tv = [run["row"]["tv_uniform"] for run in runs]
        accuracy = [run["row"]["accuracy"] for run in runs]
        plane.scatter(tv, accuracy, s=math.sqrt(iterations), color=colour, alpha=0.6, label=label)
    plane.set_xlabel("tv_uniform: variety that is missing within a prompt, less chance")
    plane.set_ylabel("accuracy")
    plane.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    for axes, column in zip(curves, ("accuracy", "tv_uniform")):
        for method in METHODS:
            draw_curve(axes, groups, method, column)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_xlabel("time, in iterations of the DMD loss")
        axes.set_ylabel(column)
    curves[0].legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    for axes in (plane, *curves):
        axes.grid(alpha=0.3)
    save_figure(figure, path)


def read_run(run):
    """A run of results.json -> (its method, its iterations)."""
    method = re.sub(r"-\d+$", "", run["name"])
    return method, read_iterations(shlex.split(run["command"]))


def read_iterations(words):
    """The words of a training command -> its iterations: the last --iterations, as argparse has it."""
    counts = [int(word) for option, word in zip(words, words[1:]) if option == "--iterations"]
    return counts[-1]


def draw_curve(axes, groups, method, column):
    """A column of a method's runs, mean and standard deviation over the seeds, against their time."""
    title, colour, cost = METHODS[method]
    points = []
    for runs in groups.values():
        own, iterations = read_run(runs[0])
        if own == method:
            values = [run["row"][column] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0
            points.append((cost * iterations, statistics.mean(values), spread))
    if points:
        times, means, spreads = zip(*sorted(points))
        axes.errorbar(times, means, spreads, marker="o", capsize=3, label=title, color=colour)
