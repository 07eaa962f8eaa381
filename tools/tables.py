"""The tables of docs/results.md and its neighbours, written from docs/results.json."""

import os
import statistics
import textwrap

from metrics.rows import format_markdown
from support.files import write_text

# no report of before 2026-11-28 has tv: it was biased
COLUMNS = (
    "accuracy",
    "valid",
    "tv",
    "tv_uniform",
    "coverage",
    "position_std",
    "pairwise_distance",
    "lpips_random",
)
GAUGES = ("loss_f", "dmd_loss", "cosine", "D_gap", "D_abs", "norm_G")  # of docs/training.md
FILES = {  # of a table that is not in results.md
    "health": "training.md",
    "sd3": "results-steps.md",
    "sd3-causes": "results-steps.md",
    "sd3-control": "results-steps.md",
    "sd3-rate": "results-steps.md",
    "sd3-long": "results-steps.md",
    "video": "results-steps.md",
}
# the paper's tables 4 and 5, to stand beside ours: CLIP score, MPS; training time, CLIP score, MPS
PAPER = {
    "pipeline": {
        "": ("paper: CLIP", "paper: MPS"),
        "A1-uniform": ("27.44", "4.45"),
        "A3": ("33.69", "9.96"),
        "A4": ("33.89", "10.08"),
        "adp": ("35.77", "10.66"),
        "B1-400": ("32.50", "10.90"),
        "B2-400": ("32.75", "8.90"),
        "dmd": ("34.51", "10.60"),
        "dmdx": ("35.26", "11.20"),
    },
    "ttur": {
        "": ("paper: time", "paper: CLIP", "paper: MPS"),
        "dmdx": ("1.00", "35.26", "11.20"),
        "ttur-4": ("1.85", "35.26", "11.27"),
        "ttur-8": ("2.53", "35.33", "11.28"),
    },
}
LABELS = {
    "A1": "A1, rectified flow at ADP's times",
    "A1-uniform": "A1, rectified flow at uniform times",
    "A3": "A3, more weight on pixels",
    "A4": "A4, no pixel discriminator",
    "adp": "ADP (A5)",
    "B1": "B1, ADM without ADP, from T",
    "B1-400": "B1, ADM without ADP, from 0.4 T",
    "B2": "B2, DMD loss without ADP, from T",
    "B2-400": "B2, DMD loss without ADP, from 0.4 T",
    "dmd": "ADP, then the DMD loss (B3)",
    "dmdx": "ADP, then ADM: DMDX (B4)",
    "raven": "DMDX, RAVEN's settings",
    "dmd-range": "the DMD loss at t up to 0.98 T",
    "small-dt": "DMDX, dt = T/64",
    "weak-penalty": "DMDX, a tenth of the penalties",
    "guided": "DMDX, guidance 2.8 where the pairs have 1.75",
    "default-penalty": "DMDX, the default dt and penalties",
    "dmd-fast-f": "the DMD loss, the fake score at 1e-3",
    "dmd-noisy": "the DMD loss at t from 0.3 T to T",
    "dmd-ttur-2": "the DMD loss, two updates of f",
    "projected-ttur-2": "`--project`, two updates of f and D",
    "bare-ttur-2": "`--loss secant --r1 0 --r2 0`, two updates of f and D",
    "ttur-4": "DMDX, four updates of f and D",
    "ttur-8": "DMDX, eight updates of f and D",
    "sd3-start": "the teacher's network in four steps",
    "sd3-adm": "ADM, guidance 2, 600 iterations",
    "sd3-adm-mild": "ADM, guidance 1.5, 600 iterations",
    "sd3-dmd": "the DMD loss, guidance 2",
    "sd3-dmd-slow": "the DMD loss at the line's rate, guidance 2",
    "sd3-dmd-490": "the DMD loss, guidance 2, 490 iterations",
    "sd3-dmd-980": "the DMD loss, guidance 2, 980 iterations",
    "sd3-bare-low-noise": "`--loss secant --r1 0 --r2 0`, guidance 2, t up to T/2",
    "sd3-adm-low-noise": "ADM, guidance 2, t up to T/2",
    "sd3-dmd-low-noise": "the DMD loss, guidance 2, t up to T/2",
    "sd3-adm-unguided": "ADM, no guidance",
    "sd3-adm-300": "ADM, guidance 2",
    "sd3-projected-300": "ADM `--project`, guidance 2",
    "sd3-line-300": "`--loss line`, guidance 2",
    "sd3-straight-line-300": "`--loss line --straight-through`, guidance 2",
    "sd3-line-800": "`--loss line`, guidance 2, 800 iterations",
    "sd3-projected-600": "ADM `--project`, guidance 2, 600 iterations",
    "video-start": "the teacher's network in eight steps",
    "video-dmd": "the DMD loss",
    "video-bare": "`--loss secant --r1 0 --r2 0`",
    "video-adm": "ADM",
}
METHODS = {  # of the runs whose names end with their iterations
    "dmd": "the DMD loss",
    "dmd-slow": "the DMD loss at DMDX's rate",
    "dmd-two": "the DMD loss, two updates of f",
    "dmdx": "DMDX",
    "fast": "DMDX at the DMD loss's rate",
    "projected": "ADM `--project`",
    "secant": "`--loss secant`",
    "bare": "`--loss secant --r1 0 --r2 0`",
    "line": "`--loss line`",
    "straight-dmdx": "DMDX `--straight-through`",
    "straight-bare": "`--loss secant --r1 0 --r2 0 --straight-through`",
    "taps": "ADM, D on the up blocks, too",
    "product": "ADM, heads with an inner product",
    "taps-product": "ADM, the up blocks and an inner product",
    "rows": "ADM, D's gradient normalised a row",
    "times": "ADM, D at four times a sample",
    "memory": "ADM, D with a memory of micro-batches",
    "batch": "ADM, batches of 128 at twice the rates",
    "straight-line": "`--loss line --straight-through`",
}


def write_tables(folder, results):
    """Puts every table of `results` between its marks in the Markdown files of the folder, or at their ends
    -> {file: its text}."""
    texts = {}
    for name, entry in results.items():
        file = FILES.get(name, "results.md")
        if file not in texts:
            texts[file] = read_text(os.path.join(folder, file))
        table = f"{format_table(name, entry)}\n\n{describe(entry)}\n"
        texts[file] = put_table(texts[file], name, table)
    for file, text in texts.items():
        write_text(os.path.join(folder, file), text)
    return texts


def read_text(path):
    """A file's text, none where there is no file."""
    if not os.path.exists(path):
        return ""
    with open(path, encoding="utf-8") as file:
        return file.read()


def put_table(text, name, table):
    """The text with a table between its marks, in the place of what is there, or at its end."""
    begin = f"<!-- table {name} -->\n"
    end = "<!-- end -->\n"
    before, found, after = text.partition(begin)
    _, closed, rest = after.partition(end)
    if not found or not closed:
        return f"{text}\n## The table {name}\n\n{begin}{table}{end}"
    return before + begin + table + end + rest


def format_table(table, entry):
    """An entry of results.json -> a Markdown table: the teacher, and each run with mean and standard
    deviation over its seeds."""
    teacher = entry["teacher"]
    columns = [name for name in COLUMNS if name in teacher]
    attributes = list(teacher["tv_uniform_of"])
    gauges = GAUGES if table == "health" else ()
    gains = entry.get("gains", {})
    paper = PAPER.get(table, {})
    further = [*gauges, *paper.get("", ())]
    if gains:
        further.insert(0, "gain in accuracy")
    heads = ["student", "NFE", *columns, f"tv_uniform of {', '.join(attributes)}", "CPU minutes", *further]
    blank = [""] * len(further)
    lines = [heads, ["teacher", *format_numbers([teacher], columns, attributes), "", *blank]]
    groups = group_runs(entry)
    first = next(iter(groups.values()))
    for name, runs in groups.items():
        numbers = format_numbers([run["row"] for run in runs], columns, attributes)
        minutes = statistics.mean(run["cpu_seconds"] for run in runs) / 60
        cells = [format_gain(gains.get(name), list_gains(runs, first))] if gains else []
        cells += [f"{statistics.mean(run['gauges'][gauge] for run in runs):.3f}" for gauge in gauges]
        cells += paper.get(name, blank[len(cells) :])
        lines.append([label_run(name), *numbers, f"{minutes:.1f}", *cells])
    return format_markdown(lines)


def label_run(name):
    """A run's name -> what a table calls it."""
    method, _, iterations = name.rpartition("-")
    if method in METHODS and iterations.isdecimal():
        return f"{METHODS[method]}, {int(iterations):,} iterations"
    return LABELS.get(name, name)


def format_numbers(rows, columns, attributes):
    """Rows of reports, one a seed -> the cells of a line: NFE, the columns, the attributes' variation."""
    cells = [str(rows[0]["nfe"])]
    for name in columns:
        cells.append(format_cell([row[name] for row in rows]))
    variation = []
    for name in attributes:
        variation.append(f"{statistics.mean(row['tv_uniform_of'][name] for row in rows):.2f}")
    return [*cells, " ".join(variation)]


def list_gains(runs, first):
    """What each of the runs has in accuracy over that of the runs `first` with its seed."""
    start = {run["seed"]: run["row"]["accuracy"] for run in first}
    return [run["row"]["accuracy"] - start[run["seed"]] for run in runs]


def format_gain(gain, of_seeds):
    """[mean, low, high] -> "mean ± half of the interval's width", signed, and each seed's where there are
    several; nothing for None."""
    if gain is None:
        return ""
    mean, low, high = gain
    cell = f"{mean:+.3f} ± {(high - low) / 2:.3f}"
    if len(of_seeds) > 1:
        cell += f" ({' '.join(f'{own:+.3f}' for own in of_seeds)})"
    return cell


def format_cell(values):
    """Numbers, one a seed -> "mean ± standard deviation", or the mean alone where they are all the same."""
    cell = f"{statistics.mean(values):.3f}"
    return f"{cell} ± {statistics.stdev(values):.3f}" if len(set(values)) > 1 else cell


def group_runs(entry):
    """{name: its runs, one a seed}."""
    groups = {}
    for run in entry["runs"]:
        groups.setdefault(run["name"], []).append(run)
    return groups


def describe(entry):
    """What stands below a table: seeds, samples, intervals, machine, date."""
    runs, teacher = entry["runs"], entry["teacher"]
    seeds = sorted({run["seed"] for run in runs})
    dates = sorted({run["date"] for run in runs})
    machines = sorted({run["machine"] for run in runs})
    widest = max(measure_reach(run["row"]) for run in runs)
    samples = teacher["samples"] // teacher["prompts"]
    which = f"Seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"Seed {seeds[0]} alone"
    text = (
        f"{which}; {teacher['prompts']} prompts, {samples} samples each; one seed's accuracy has an interval "
        f"of at most {widest:.3f} on either side. {'; '.join(machines)}; {', '.join(dates)}."
    )
    return textwrap.fill(text, 118)


def measure_reach(row):
    """How far the interval of a row's accuracy reaches to its wider side."""
    low, high = row["ci"]["accuracy"]
    return max(row["accuracy"] - low, high - row["accuracy"])
