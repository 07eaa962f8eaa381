"""The files of a report: numbers, table, plots, sheets of images, the HTML page."""

import json
import os
import subprocess
import time

from metrics.page import save_page
from metrics.plots import save_bars, save_differences, save_examples, save_sheet
from metrics.rows import round_values
from support.checkpoints import STEP
from support.errors import UserError
from support.files import ROOT, remove_leftovers, write_atomically, write_json, write_text
from support.outputs import check_file, check_folder

FILES = ("report.json", "table.md", "grid.png", "bars.png", "differences.png", "side-by-side.html")


def check_outputs(args):
    """UserError for results that could not be written, or would overwrite each other or the prompts."""
    if args.grid and not args.grid.lower().endswith(".png"):
        raise UserError(f"--grid {args.grid}: it is a PNG file, give it a name that ends in .png")
    given = {"report.json": args.json, "grid.png": args.grid}
    paths = list(filter(None, given.values()))
    if args.out:
        check_folder(args.out)
        if os.path.exists(os.path.join(args.out, "index.json")):  # whose grid.png would be lost
            raise UserError(f"{args.out} has what another command made: give another --out")
        sheets = [name_sheet(name) for name in args.names]
        paths += [os.path.join(args.out, file) for file in (*FILES, *sheets) if not given.get(file)]
        for name in args.names:
            check_folder(os.path.join(args.out, name))
    check_places(args)
    taken = {os.path.realpath(args.prompts)}
    for path in paths:
        check_file(path)
        place = os.path.realpath(path)
        if place in taken:
            raise UserError(
                f"two files would be {path}: give --json, --grid and --prompts names of their own"
            )
        taken.add(place)


def check_places(args):
    """UserError for results that would lie among the images that are measured, or fill a student's run."""
    images = list(args.images.values())
    if args.reference not in args.names:
        images.append(args.reference)
    images = {os.path.realpath(folder) for folder in images}
    grid = [os.path.dirname(args.grid) or "."] if args.grid else []
    named = [os.path.join(args.out, name) for name in args.names] if args.out else []
    out = [args.out] if args.out else []
    for folder in out + named + grid:
        if os.path.realpath(folder) in images:
            raise UserError(f"the results in {folder} would be among the images there: give other folders")
    runs = {find_run(path) for path in args.student.values()}
    for folder in out + named:
        if os.path.realpath(folder) in runs:
            raise UserError(f"the results in {folder} would be in the student's run: give another --out")


def find_run(student):
    """The folder of the run that a --student is of: it, one of its checkpoints or its file best or latest."""
    place = os.path.realpath(student)
    is_part = os.path.isfile(place) or STEP.fullmatch(os.path.basename(place))
    return os.path.dirname(place) if is_part else place


def name_sheet(system):
    """The file of a system's best and worst prompts."""
    return f"best-and-worst-{system}.png"


def write_scores(images, columns, prompts):
    """scores.jsonl in the system's folder: a line for every image."""
    samples = len(images.files[0])
    single = {column: array for column, array in columns.items() if array.ndim == 1}
    with write_atomically(os.path.join(images.folder, "scores.jsonl")) as temporary:
        with open(temporary, "w") as file:
            for i in range(samples * len(images.files)):
                p, k = divmod(i, samples)
                line = {"prompt": p, "text": prompts[p], "file": os.path.basename(images.files[p][k])}
                line |= {column: round_values(array[i].item()) for column, array in single.items()}
                file.write(json.dumps(line) + "\n")


def write_numbers(path, args, scorers, rows, paper):
    """report.json."""
    descriptions = {}
    for name in args.metrics:
        descriptions[name] = scorers[name].description if name in scorers else "vbench"
    report = {
        "rows": rows,
        "paper": paper,
        "reference": args.reference,
        "seed": args.seed,
        "commit": read_commit(),
        "minutes": (time.time() - args.since) / 60,
        "metrics": descriptions,
    }
    write_json(path, report)


def read_commit():
    """The repository's commit, "unknown" outside git."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_report(out, args, prompts, systems, scorers, rows, paper, values, text):
    """Everything that --out, --json and --grid ask for. systems {name: Images}, values {name: {metric: [P]}}
    for the prompts' means, text the table."""
    for path in filter(None, (args.json, args.grid)):
        remove_leftovers(*os.path.split(path))
    if args.json or args.out:
        write_numbers(args.json or os.path.join(out, "report.json"), args, scorers, rows, paper)
    if args.grid or args.out:
        save_examples(systems, prompts, args.grid or os.path.join(out, "grid.png"))
    if not args.out:
        return
    write_text(os.path.join(out, "table.md"), text + "\n")
    if scorers:
        save_bars(rows, paper, os.path.join(out, "bars.png"))
    if args.reference in systems:
        save_differences(values, args.reference, os.path.join(out, "differences.png"))
    for name, images in systems.items():
        if values[name]:
            metric, scores = next(iter(values[name].items()))
            save_sheet(images, metric, scores, prompts, os.path.join(out, name_sheet(name)))
    if args.side_by_side:
        first, second = args.side_by_side
        page = os.path.join(out, "side-by-side.html")
        save_page(systems[first], systems[second], values, prompts, page)
