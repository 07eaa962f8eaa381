"""The plots of docs/results.md and docs/training.md."""

from support.files import read_json_lines
from support.media import collect_curves, save_figure
from tools.tables import group_runs

METHODS = {"dmd": "DMD loss", "dmdx": "ADM", "projected": "ADM --project"}
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
    """Accuracy against variation in excess of chance, a point a seed, of the runs of the tables demo and
    longer."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    colours = dict(zip(METHODS, ("C0", "C3", "C2")))
    drawn = False
    for table in ("demo", "longer"):
        for name, runs in group_runs(results.get(table, {"runs": []})).items():
            method, _, iterations = name.partition("-")
            label = (
                f"{METHODS.get(method, 'ADP, where all start')} {iterations or '600' * (method in METHODS)}"
            )
            tv = [run["row"]["tv"] for run in runs]
            accuracy = [run["row"]["accuracy"] for run in runs]
            marker = "^" if iterations else "o"
            axes.scatter(tv, accuracy, color=colours.get(method, "black"), marker=marker, label=label)
            drawn = True
    if not drawn:
        return
    axes.set_xlabel("tv: variety lost within a prompt, in excess of chance (0: none)")
    axes.set_ylabel("accuracy")
    axes.set_title("One-step students of tiny-sdxl, a point a seed; iterations after the method's name")
    axes.grid(alpha=0.3)
    handles = dict(zip(axes.get_legend_handles_labels()[1], axes.get_legend_handles_labels()[0]))
    axes.legend(handles.values(), handles, fontsize=9)
    save_figure(figure, path)
