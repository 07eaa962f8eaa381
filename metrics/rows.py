"""Scores become rows, averages with confidence intervals, and rows a Markdown table."""

import numpy as np

from metrics.paper import VBENCH_NOTE
from metrics.scorer import join_columns
from metrics.vbench import SUMMARY
from support.errors import UserError
from support.escapes import make_cell

HIDDEN = (
    "prompts",
    "samples",
    "tv_uniform",
    "tv_uniform_of",
    "accuracy_of",
    "ci",
    "vbench",
    "seconds_per_image",
    "fid_images",
)


def make_row(images, scorers, scores, references):
    """The row of a system: scores {metric: list of what score() gave}, references the same of the reference
    -> (row, columns {column: array over samples}, values {column: mean of each prompt [P]}). UserError for
    scores that are no numbers.

    The row has "ci", {column: 95 % interval}, of all numbers that are means over the prompts. The values are
    for comparing systems: the reference has none of its distances to itself."""
    prompts, samples = len(images.files), len(images.files[0])
    row = {"system": images.name, "steps": None, "nfe": None}
    if images.system:
        row |= {"steps": images.system.steps, "nfe": images.system.nfe}
    row |= {"prompts": prompts, "samples": prompts * samples, "ci": {}}
    columns, values = {}, {}
    for metric, scorer in scorers.items():
        joined = join_columns(scores[metric])
        result = scorer.result(scores[metric], references[metric])
        for name, value in result.items():
            if name in joined:
                check_numbers(images, metric, joined[name])
                per_sample = joined[name].reshape(prompts, samples).astype(np.float64)
                value = per_sample.mean(1)
            is_own = scores[metric] is references[metric] and name in scorer.distances
            if isinstance(value, np.ndarray) and not is_own:
                values[name] = value
            row[name] = take_mean(value)
            if (interval := take_interval(value)) is not None:
                row["ci"][name] = interval
        columns |= joined
    return row, columns, values


def check_numbers(images, metric, column):
    """UserError where a network gave an image no number."""
    bad = np.flatnonzero(~np.isfinite(column))
    if len(bad):
        p, k = divmod(int(bad[0]), len(images.files[0]))
        raise UserError(
            f"the metric {metric} gave no number for {len(bad)} of {len(column)} images of {images.name}, "
            f"{images.files[p][k]} the first: its weights may be damaged"
        )


def take_mean(value):
    """What a scorer's result() has -> the same with the means of its arrays over the prompts."""
    if isinstance(value, dict):
        return {name: take_mean(inner) for name, inner in value.items()}
    return float(np.nanmean(value)) if isinstance(value, np.ndarray) else value


def take_interval(value):
    """The same -> the 95 % intervals of these means, None where there is no array."""
    if isinstance(value, dict):
        intervals = {name: take_interval(inner) for name, inner in value.items()}
        return {name: interval for name, interval in intervals.items() if interval} or None
    return bootstrap_interval(value[np.isfinite(value)]) if isinstance(value, np.ndarray) else None


def bootstrap_interval(values):
    """The 95 % interval of a mean, from 1000 resamplings: values [P], one a prompt -> (low, high). None of
    fewer than two; of fewer than 20 it is too narrow."""
    if len(values) < 2:
        return None
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


def merge_rows(rows):
    """{name: a value} of all that any row has: a system of one sample a prompt has no variety, for one."""
    merged = {}
    for row in rows:
        for name, value in row.items():
            if merged.get(name) is None:
                merged[name] = value
    return merged


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
    merged = merge_rows(rows)
    columns = [name for name in merged if name not in HIDDEN]
    heads = []
    for name in columns:
        value = merged[name]
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
    rows = []
    for line in (lines[0], rule, *lines[1:]):
        cells = [make_cell(cell) for cell in line]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)
