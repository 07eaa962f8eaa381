"""Scores become rows, averages with confidence intervals, and rows a Markdown table."""

import numpy as np

from metrics.paper import VBENCH_NOTE
from metrics.scorer import join_columns
from metrics.vbench import SUMMARY

HIDDEN = (
    "prompts",
    "samples",
    "tv_uniform",
    "accuracy_of",
    "ci",
    "vbench",
    "seconds_per_image",
    "fid_images",
)


def make_row(images, scorers, scores, references):
    """The row of a system: scores {metric: list of what score() gave}, references the same of the reference
    -> (row, columns {column: array over samples}, values {column: mean of each prompt [P]}).

    The row has "ci", {column: 95 % interval}, of all numbers that are means over the prompts."""
    prompts, samples = len(images.files), len(images.files[0])
    row = {"system": images.name, "steps": None, "nfe": None}
    if images.system:
        row |= {"steps": images.system.steps, "nfe": images.system.nfe}
    row |= {"prompts": prompts, "samples": prompts * samples, "ci": {}}
    columns, values = {}, {}
    for metric, scorer in scorers.items():
        joined = join_columns(scores[metric])
        result = scorer.result(scores[metric], references[metric])
        for column in result:
            if column in joined:
                per_sample = joined[column].reshape(prompts, samples).astype(np.float64)
                values[column] = per_sample.mean(1)
                row["ci"][column] = bootstrap_interval(values[column])
        columns |= joined
        row |= result
    return row, columns, values


def bootstrap_interval(values):
    """The 95 % interval of a mean, from 1000 resamplings: values [P], one a prompt -> (low, high)."""
    rng = np.random.default_rng(0)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(1000)]
    return tuple(np.quantile(means, (0.025, 0.975)).tolist())


def round_values(value):
    """Numbers of numpy, in dictionaries and tuples -> Python's own, rounded to what means something."""
    if isinstance(value, dict):
        return {name: round_values(v) for name, v in value.items()}
    if isinstance(value, tuple):
        return [round_values(v) for v in value]
    if value is None or isinstance(value, (str, int)):
        return value
    return round(float(value), 5)


def describe_samples(rows):
    """How many samples the numbers are of."""
    prompts = rows[0]["prompts"]
    counts = {row["system"]: row["samples"] // prompts for row in rows}
    if len(set(counts.values())) == 1:
        return f"{prompts} prompts, {rows[0]['samples'] // prompts} samples each"
    parts = [f"{count} of {system}" for system, count in counts.items()]
    return f"{prompts} prompts, samples each: {', '.join(parts)}"


def format_table(rows, paper=()):
    """Our rows, and the paper's below them -> a Markdown table, half of the confidence interval's width after
    ±; a dictionary's values are joined by slashes. VBench has a table of its own, with a row a dimension."""
    columns = [name for name in rows[0] if name not in HIDDEN]
    heads = []
    for name in columns:
        value = rows[0][name]
        heads.append(f"{name} {'/'.join(value)}" if isinstance(value, dict) else name)
    lines = [heads]
    for row in (*rows, *(row for row in paper if "vbench" not in row)):
        lines.append([format_cell(row, name) for name in columns])
    text = format_markdown(lines)
    if any(row.get("vbench") for row in rows):
        text += "\n\n" + format_vbench([*rows, *paper])
    return text


def format_cell(row, name):
    value = row.get(name)
    if value is None:
        return ""
    if isinstance(value, dict):
        return "/".join(f"{x:.2f}" for x in value.values())
    if name in row.get("ci", {}):
        low, high = row["ci"][name]
        return f"{value:.3f} ± {(high - low) / 2:.3f}"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def format_vbench(rows):
    """A column a system, a row a dimension; the summary in per cent above them."""
    rows = [row for row in rows if row.get("vbench")]
    lines = [["VBench", *(row["system"] for row in rows)]]
    for name in dict.fromkeys((*SUMMARY, *rows[0]["vbench"])):
        head, digits = (f"{name}, %", 3) if name in SUMMARY else (name, 4)
        values = [row["vbench"].get(name) for row in rows]
        cells = ["" if value is None else f"{value:.{digits}f}" for value in values]
        lines.append([head, *cells])
    return format_markdown(lines) + f"\n\n{VBENCH_NOTE}"


def format_markdown(lines):
    """Lists of cells, the heads first -> a Markdown table."""
    rule = ["---"] * len(lines[0])
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:]))
