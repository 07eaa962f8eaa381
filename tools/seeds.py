"""The mean and spread over seeds of reports of evaluate.py, as a Markdown table.

make seeds                                              # three demos and this table, 35 minutes
python tools/seeds.py runs/demo-*/report.json
"""

import os
import statistics
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from metrics.rows import format_markdown
from support.errors import UserError, launch
from support.files import read_json

LEFT_OUT = ("tv_uniform", "accuracy_of", "prompts", "samples")  # what no column shows, by the names' starts


def flatten(row):
    """A report's row -> {name: number}: {"tv": {"size": x}} becomes {"tv size": x}, text is left out."""
    flat = {}
    for name, value in row.items():
        if isinstance(value, dict):
            for key, inner in value.items():
                flat[f"{name} {key}"] = inner
        else:
            flat[name] = value
    return {name: value for name, value in flat.items() if isinstance(value, (int, float))}


def read_reports(paths):
    """The reports of evaluate.py in these files. UserError where there are none or one is none."""
    wanted = "give report.json files of evaluate.py"
    if not paths:
        raise UserError(wanted)
    reports = []
    for path in paths:
        report = read_json(path)
        if not report:
            raise UserError(f"{wanted}; {path} is none")
        reports.append(report)
    return reports


def format_cell(values):
    """Numbers, one a seed -> "mean ± standard deviation", or the mean alone where they are all the same."""
    cell = f"{statistics.mean(values):.3f}"
    if len(set(values)) > 1:
        cell += f" ± {statistics.stdev(values):.3f}"
    return cell


def main(paths):
    reports = read_reports(paths)
    names = [name for name in flatten(reports[0]["rows"][0]) if not name.startswith(LEFT_OUT)]
    lines = [["system", *names]]
    for rows in zip(*(report["rows"] for report in reports)):
        numbers = [flatten(row) for row in rows]
        cells = [format_cell([row[name] for row in numbers]) for name in names]
        lines.append([str(rows[0]["system"]), *cells])
    print(format_markdown(lines))
    seeds = [report["seed"] for report in reports]
    minutes = [f"{report['minutes']:.1f}" for report in reports]
    print(f"\nseeds {seeds}, minutes {', '.join(minutes)}")


if __name__ == "__main__":
    launch(lambda: main(sys.argv[1:]))
