"""Measures students beside their teacher and the paper's numbers, with the same prompts and seeds.

    python evaluate.py --teacher assets/tiny-sdxl --student adp=runs/adp --student dmdx=runs/adm \\
        --prompts prompts/shapes_eval.txt
    torchrun --nproc_per_node=8 evaluate.py --teacher sdxl --student dmdx=runs/adm-sdxl --prompts coco.txt \\
        --seeds 1 --metrics clip,pick,hpsv2,mps,fid --out runs/coco
    python evaluate.py --images mine=samples --images theirs=others --prompts coco.txt --out runs/two \\
        --side-by-side mine theirs
    python evaluate.py --student runs/adm-cogvideox --prompts VBench_full_info.json --seeds 5 \\
        --out runs/vbench

Metrics: `oracle` (tiny teachers only: exact numbers), `clip`, `pick` (PickScore), `hpsv2`, `mps`, `lpips`
(diversity), `fid` (to --reference) and `vbench` (videos). Prints a Markdown table with 95 % confidence
intervals, and with the paper's rows where a metric is the paper's. Writes

    OUT/NAME/pictures/0000-0.png ...   prompt number, seed; of a video its frames below one another
    OUT/NAME/index.json                what they are of: a command with other settings is refused
    OUT/NAME/scores.jsonl              every image's scores
    OUT/report.json, table.md          the numbers
    OUT/grid.png, bars.png             examples, scores
    OUT/differences.png                each system's scores minus the reference's, over the prompts
    OUT/best-and-worst-NAME.png        the prompts with the highest and the lowest scores
    OUT/side-by-side.html              two systems, to page through the prompts

An image depends on its prompt's number and its seed alone, and scores on the images: any number of processes
writes the same files. A repeated command goes on where the last one ended, and scores by further metrics.
"""

import support.interrupt  # noqa: F401  Ctrl-C while torch loads
import os
import shlex
import tempfile
import time

from common import FAMILIES
from metrics.images import wait_for_files, wait_for_scores
from metrics.lpips import check_samples
from metrics.paper import select_rows
from metrics.report import check_outputs, write_report, write_scores
from metrics.rows import describe_samples, format_table, make_row, merge_rows, round_values
from metrics.scorers import SCORERS, check_metric
from metrics.systems import find_reference, name_systems, open_systems
from metrics.vbench import check_vbench, read_prompts_of_table, run_vbench
from support import arguments
from support.arguments import positive, seed_number, unix_time, whole
from support.errors import UserError, launch
from support.escapes import make_printable
from support.files import lock_folder, make_folder
from support.media import require_video_writer
from support.packages import check_packages
from support.parallel import is_main, leave_together, world_size
from support.prompts import has_closed_vocabulary

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # they warn of the workers' forks otherwise

METRICS = (*SCORERS, "vbench")


def parse(argv):
    """The command line, with what can be refused before anything is loaded refused."""
    parser = arguments.Parser(__doc__, FAMILIES)
    arguments.add_teacher_arguments(parser, required=False)
    arguments.add_sampler_arguments(parser)
    add = parser.group("what is measured")
    again = "NAME=FOLDER, may be given several times:"
    student = f"{again} a run folder of adp.py or adm.py, one of its checkpoints, or its file best"
    add("--student", student, action="append")
    order = "the same number for every prompt, in the prompts' order"
    add("--images", f"{again} images that are there, {order}", action="append")
    files = f"{arguments.PROMPTS_HELP}; or VBench_full_info.json"
    arguments.add_prompts_arguments(parser, "what is measured", files, required=True)
    add("--seeds", "samples of every prompt", type=positive, default=8)
    add("--seed", "first of the seeds", type=seed_number, default=0)
    reference = "the system that others are compared with; for FID also a folder of images"
    add("--reference", reference, shown="the first system")

    add = parser.group("metrics")
    fitting = "oracle for the tiny teachers, vbench for VBench's prompts, else clip"
    add("--metrics", f"comma-separated: {', '.join(METRICS)}", shown=fitting)
    arguments.add_scorer_arguments(parser, "metrics")
    add("--workers", "processes that decode images, for each process that scores", type=whole, default=2)

    add = parser.group("where it goes")
    add("--out", "folder for all results", shown="a temporary one: only --json and --grid stay")
    page = "two systems' names: writes side-by-side.html"
    add("--side-by-side", page, nargs=2, metavar=("A", "B"))
    add("--json", "file for the numbers", shown="OUT/report.json")
    add("--grid", "file for an image with a row a system", shown="OUT/grid.png")
    since = "Unix time when the reported work began, for its minutes"
    add("--since", since, type=unix_time, default=time.time(), shown="now")
    args = parser.parse_args(argv)

    args.student, args.images = name_systems(args.student or [], args.images or [])
    args.names = [*(["teacher"] if args.teacher else []), *args.student, *args.images]
    if not args.names:
        raise UserError("give a --teacher, a --student, --images, or several of them")
    of_the_teacher = (args.steps, args.guidance, args.negative_prompt)
    if not args.teacher and any(value is not None for value in of_the_teacher):
        its = "--steps, --guidance and --negative-prompt are the teacher's"
        raise UserError(f"{its}, and it is not measured: add --teacher, or leave them out")
    args.reference = args.reference or args.names[0]
    args.metrics = list(dict.fromkeys(args.metrics.split(","))) if args.metrics else []
    arguments.note_idle_scorers(parser, args.metrics or ["clip"])
    if not args.teacher and not args.student:
        of_networks = ["--resolution", "--frames", "--precision", "--variant", "--teacher-lora"]
        parser.note_idle(["--batch", *of_networks, "--offload"], "a --teacher or a --student")
    return args


def check_arguments(args, dimensions):
    """UserError for what cannot work. dimensions: of the prompts, None where they are not VBench's."""
    systems = f"none of the systems {', '.join(args.names)}"
    for name in args.metrics:
        if name not in METRICS:
            raise UserError(f"there is no metric {name!r}; known are {', '.join(METRICS)}")
        check_packages(name)
    has_reference = args.reference in args.names or ("fid" in args.metrics and os.path.isdir(args.reference))
    if not has_reference:
        other = "only --metrics fid takes a folder of images, too"
        raise UserError(f"--reference {args.reference!r} is {systems}; {other}")
    if "fid" in args.metrics and args.names == [args.reference]:
        raise UserError("--metrics fid compares with other images: give --reference a folder of them")
    if "lpips" in args.metrics and (args.teacher or args.student):
        check_samples(args.seeds)
    for name in args.side_by_side or ():
        if name not in args.names:
            raise UserError(f"--side-by-side {name!r} is {systems}")
        if args.side_by_side.count(name) > 1:
            raise UserError(f"--side-by-side compares two systems, not {name!r} with itself")
    if not args.out and (world_size() > 1 or args.side_by_side or "vbench" in args.metrics):
        these = "several processes, --side-by-side and --metrics vbench"
        raise UserError(f"{these} need a folder for the results: give --out")
    if args.weights_dir and not os.path.isdir(args.weights_dir):
        raise UserError(f"there is no folder --weights-dir {args.weights_dir!r}")
    if "vbench" in args.metrics:
        require_video_writer()
        path = os.path.abspath(args.out)
        if shlex.quote(path) != path:
            plain = "letters without accents, digits, / . - and _"
            raise UserError(f"VBench gives {path!r} to a shell: give an --out of {plain} alone")
        if not dimensions:
            wanted = "give its VBench_full_info.json as --prompts"
            raise UserError(f"--metrics vbench wants VBench's own prompts: {wanted}")
    check_outputs(args)


def main(argv=None):
    args = parse(argv)
    prompts, dimensions = read_prompts_of_table(args.prompts, args.prompt_column)
    if dimensions and not args.metrics:
        args.metrics = ["vbench"]
    check_arguments(args, dimensions)
    if "vbench" in args.metrics:
        check_vbench(prompts, dimensions, args.seeds)
    with tempfile.TemporaryDirectory() as temporary:
        out = args.out or temporary
        with lock_folder(out):
            evaluate(args, prompts, dimensions, out)
    leave_together()


def evaluate(args, prompts, dimensions, out):
    """Measures everything. dimensions: of every prompt, for VBench."""
    systems, teacher = open_systems(args, prompts, out)
    if not args.metrics:
        is_tiny = teacher is not None and has_closed_vocabulary(teacher.pipe.tokenizer)
        args.metrics = ["oracle"] if is_tiny else ["clip"]
    measured = dict(systems)
    if args.reference not in systems:
        measured[args.reference] = find_reference(out, args.reference)
    video = bool(teacher and teacher.video)
    if video and args.images:
        raise UserError(f"--images are single pictures, and {args.teacher} makes videos: measure them apart")
    for images in measured.values():
        images.check()
        images.measure()
        names = args.metrics if images.name in args.names else ["fid"]
        for name in names:
            check_metric(name, images, video)
    scorers = {name: SCORERS[name](args, prompts, video) for name in args.metrics if name in SCORERS}
    for path in filter(None, (args.json, args.grid)):
        make_folder(os.path.dirname(path) or ".")
    for images in measured.values():
        images.prepare_folder()

    seconds = draw(args, prompts, systems)
    scores = score(args, prompts, measured, scorers)
    if not is_main():
        return

    references = {}
    for metric in scorers:
        name = args.reference if metric == "fid" or args.reference in systems else args.names[0]
        references[metric] = scores[name, metric]
    rows, values = [], {}
    for name, images in systems.items():
        own = {metric: scores[name, metric] for metric in scorers}
        row, columns, values[name] = make_row(images, scorers, own, references)
        if "vbench" in args.metrics:
            folder = os.path.join(images.folder, "vbench")
            row["vbench"] = run_vbench(folder, images.write_videos(), prompts, dimensions)
        if seconds[name]:
            row["seconds_per_image"] = seconds[name]
        rows.append(round_values(row))
        write_scores(images, columns, prompts)

    paper = select_rows(merge_rows(rows), args)
    interval = "± is half of a 95 % bootstrap interval over the prompts"
    reference = f"; reference: {make_printable(args.reference)}" if len(measured) > 1 else ""
    text = f"{format_table(rows, paper)}\n\n{describe_samples(rows)}{reference}; {interval}.\n"
    for name, scorer in scorers.items():
        text += f"{name}: {make_printable(scorer.description)}{scorer.note(rows)}.\n"
    print(text)
    write_report(out, args, prompts, systems, scorers, rows, paper, values, text)


def draw(args, prompts, systems):
    """Draws this rank's share of the images, waits for the others' -> {name: seconds an image, or None}."""
    seeds = range(args.seed, args.seed + args.seeds)
    seconds = {name: images.draw(prompts, seeds, args.batch) for name, images in systems.items()}
    for images in systems.values():
        wait_for_files(path for row in images.files for path in row)
    return seconds


def score(args, prompts, measured, scorers):
    """Scores this rank's share -> on the main rank {(name, metric): list of what a scorer's score() gave}."""
    paths = {}
    for name, images in measured.items():
        known = scorers if name in args.names else {"fid": scorers["fid"]}
        texts = prompts if name in args.names else [""] * len(images.files)
        for metric, scorer in known.items():
            paths[name, metric] = images.score(metric, scorer, texts, args.workers)
    if not is_main():
        return {}
    return {key: wait_for_scores(files) for key, files in paths.items()}


if __name__ == "__main__":
    launch(main)
