"""The tables of docs/results.md, written from docs/results.json."""

import os
import re
import statistics

from metrics.rows import format_markdown
from support.errors import UserError
from support.files import write_atomically

COLUMNS = ("accuracy", "valid", "tv", "coverage", "position_std", "pairwise_distance", "lpips_random")
# the paper's tables 4 and 5, to stand beside ours: CLIP score, MPS; training time, CLIP score, MPS
PAPER = {
    "pipeline": {
        "": ("paper: CLIP", "paper: MPS"),
        "A1": ("27.44", "4.45"),
        "A3": ("33.69", "9.96"),
        "A4": ("33.89", "10.08"),
        "adp": ("35.77", "10.66"),
        "B1": ("32.50", "10.90"),
        "B2": ("32.75", "8.90"),
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
    "A1": "A1, rectified flow",
    "A3": "A3, more weight on pixels",
    "A4": "A4, no pixel discriminator",
    "adp": "ADP (A5)",
    "B1": "B1, ADM without ADP",
    "B2": "B2, DMD loss without ADP",
    "dmd": "ADP, then the DMD loss (B3)",
    "dmdx": "ADP, then ADM: DMDX (B4)",
    "projected": "ADP, then ADM `--project`",
}


def write_tables(path, results):
    """Puts every table of `results` between its marks in the Markdown file `path`, or in a new one -> the
    text. UserError where a mark is missing."""
    marks = [f"<!-- table {name} -->\n<!-- end -->\n" for name in results]
    text = "\n".join(marks)
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            text = file.read()
    for name, entry in results.items():
        found = re.search(f"(<!-- table {name} -->\n).*?(<!-- end -->)", text, re.DOTALL)
        if not found:
            raise UserError(f"{path} has no place for the table {name}: <!-- table {name} -->, <!-- end -->")
        table = f"{format_table(name, entry)}\n\n{describe(entry)}\n"
        text = text[: found.end(1)] + table + text[found.start(2) :]
    with write_atomically(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
    return text


def format_table(table, entry):
    """An entry of results.json -> a Markdown table: the teacher, and each run with mean and standard
    deviation over its seeds."""
    teacher = entry["teacher"]
    columns = [name for name in COLUMNS if name in teacher]
    attributes = list(teacher["tv_of"])
    paper = PAPER.get(table, {})
    blank = [""] * len(paper.get("", ()))
    heads = ["student", "NFE", *columns, f"tv of {', '.join(attributes)}", "CPU minutes", *paper.get("", ())]
    lines = [heads, ["teacher", *format_numbers([teacher], columns, attributes), "", *blank]]
    for name, runs in group_runs(entry).items():
        rows = [run["row"] for run in runs]
        minutes = statistics.mean(run["cpu_seconds"] for run in runs) / 60
        numbers = format_numbers(rows, columns, attributes)
        label = LABELS.get(name, name)
        lines.append([label, *numbers, f"{minutes:.1f}", *paper.get(name, blank)])
    return format_markdown(lines)


def format_numbers(rows, columns, attributes):
    """Rows of reports, one a seed -> the cells of a line: NFE, the columns, the attributes' variation."""
    cells = [str(rows[0]["nfe"])]
    for name in columns:
        cells.append(format_cell([row[name] for row in rows]))
    variation = []
    for name in attributes:
        variation.append(f"{statistics.mean(row['tv_of'][name] for row in rows):.2f}")
    return [*cells, " ".join(variation)]


def format_cell(values):
    """Numbers, one a seed -> "mean ± standard deviation", or the number alone where there is one."""
    cell = f"{statistics.mean(values):.3f}"
    return f"{cell} ± {statistics.stdev(values):.3f}" if len(values) > 1 else cell


def group_runs(entry):
    """{name: its runs, one a seed}."""
    groups = {}
    for run in entry["runs"]:
        groups.setdefault(run["name"], []).append(run)
    return groups


def describe(entry):
    """What stands below a table: seeds, samples, intervals, machine, date, commit."""
    runs, teacher = entry["runs"], entry["teacher"]
    seeds = sorted({run["seed"] for run in runs})
    dates = sorted({run["date"] for run in runs})
    commits = sorted({run["commit"][:7] for run in runs})
    machines = sorted({run["machine"] for run in runs})
    low, high = zip(*(run["row"]["ci"]["accuracy"] for run in runs))
    widest = max(b - a for a, b in zip(low, high)) / 2
    samples = teacher["samples"] // teacher["prompts"]
    return (
        f"Seeds {', '.join(map(str, seeds))}; ± is the standard deviation over them. {teacher['prompts']} "
        f"prompts, {samples} samples each; one seed's accuracy has an interval of at most {widest:.3f} on "
        f"either side. {'; '.join(machines)}; {', '.join(dates)}; commit {', '.join(commits)}."
    )
