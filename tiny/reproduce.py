"""The mean and spread over seeds of reports of evaluate.py, as a Markdown table.

    make seeds                                              # three demos and this table, 35 minutes
    python tiny/reproduce.py runs/demo-*/report.json
"""
import os
import statistics
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import common


def flatten(row):
    """{"tv": {"size": x}} -> {"tv size": x}; only what is a number."""
    flat = {}
    for name, value in row.items():
        flat |= {f"{name} {key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
    return {name: value for name, value in flat.items() if isinstance(value, (int, float))}


def main(paths):
    reports = [common.read_json(path) for path in paths]
    if not reports or not all(reports):
        missing = [path for path, report in zip(paths, reports) if not report]
        raise common.UserError(f"give report.json files of evaluate.py{f'; {missing[0]} is none' if missing else ''}")
    names = [name for name in flatten(reports[0]["rows"][0]) if not name.startswith(("tv_uniform", "accuracy_of", "prompts", "samples"))]
    print("| system | " + " | ".join(names) + " |")
    print("|" + "---|" * (len(names) + 1))
    for rows in zip(*(report["rows"] for report in reports)):
        values = [[flatten(row)[name] for row in rows] for name in names]
        cells = [f"{statistics.mean(v):.3f}" + (f" ± {statistics.stdev(v):.3f}" if len(set(v)) > 1 else "") for v in values]
        print(f"| {rows[0]['system']} | " + " | ".join(cells) + " |")
    minutes = [f"{report['minutes']:.1f}" for report in reports]
    print(f"\nseeds {[report['seed'] for report in reports]}, minutes {', '.join(minutes)}")


if __name__ == "__main__":
    common.launch(lambda: main(sys.argv[1:]))
