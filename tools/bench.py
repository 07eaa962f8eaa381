"""Counts the denoiser passes of a training iteration, and times the loop against the same passes alone.

    python tools/bench.py                                      # a tiny teacher, random weights: 2 minutes
    python tools/bench.py --teacher assets/tiny-sdxl --pixel-backbone assets/tiny-sam.pth --json bench.json
    python tools/bench.py --stages adm --options "" " --no-checkpointing" "--lora 16" "--accumulate 2"
    python tools/bench.py --stages adm --options "" "--shard zero1" "--shard fsdp" --processes 1 2
    python tools/bench.py --teacher sdxl --random-weights --batch 1 --stages adp adm  # real sizes, for a GPU

The stages are adp.py and adm.py themselves, each in processes of its own, for every stage, number of
processes, and set of --options; the student has one step. A pass that classifier-free guidance makes of twice
the batch counts as two; "partial" ends at the discriminator's deepest tap.

After each iteration of a single process it is made again, without all but its passes: what the loop takes
beyond them (optimisers, random numbers, text encoding, reading pairs, logging) is overhead. That of several
processes is what they take beyond as many at the same time that exchange nothing ("apart"), which share the
machine as they do. On a GPU it also prints TFLOP/s of the passes, counted by torch, and their share of
--peak. With one thread on a CPU (the default) and one process, seconds are the process's own, which others
disturb little; else the wall's.

Exit code 1 where a stage makes more passes than its budget; the overhead, which should stay under 10 per
cent, is only printed.
"""

import gc
import itertools
import multiprocessing
import os
import socket
import sys
import tempfile

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from metrics.rows import format_markdown
from support.arguments import Parser, above_zero, positive
from support.errors import UserError, launch
from support.files import write_json
from support.hub import TEACHERS
from tiny import train
from tools.measure import BACKWARD, STAGES, measure

# ----------------------------------------------------------------------------------------------------------
# Processes
# ----------------------------------------------------------------------------------------------------------


def free_port():
    """A port of this machine that nobody has."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_process(rank, port, queue, arguments):
    """One of the processes of a measurement; the first hands over what it measured."""
    _, processes, *_ = arguments
    os.environ["LOCAL_RANK"] = str(rank)
    if port:
        os.environ["RANK"] = str(rank)
        os.environ["WORLD_SIZE"] = str(processes)
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        os.environ["MASTER_PORT"] = str(port)

    def run():
        found = measure(*arguments)
        if rank == 0:
            queue.put(found)

    launch(run)


def measure_in_processes(port, name, processes, extra, options, teacher, folder):
    """`measure` in so many processes at a time, joined if a port is given -> what the first measured."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    workers = []
    for rank in range(processes):
        own = os.path.join(folder, "joined" if port else str(rank))
        arguments = (name, processes, extra, options, teacher, own)
        worker = context.Process(target=run_process, args=(rank, port, queue, arguments))
        worker.start()
        workers.append(worker)
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        command = f"{name} {extra}".strip()
        raise UserError(f"{command} did not run, as is said above")
    return queue.get()


def measure_row(name, processes, extra, options, teacher, folder):
    """A line of the table, as --json writes it -> (row, complaints)."""
    arguments = (name, processes, extra, options, teacher, folder)
    result, complaints = measure_in_processes(None, *arguments)
    if processes > 1:
        apart = result["seconds_iteration"]
        result, complaints = measure_in_processes(free_port(), *arguments)
        result["seconds_apart"] = apart
        result["overhead"] = result["seconds_iteration"] / apart - 1
    return {"stage": name, "processes": processes, "options": extra, **result}, complaints


# ----------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------


def parse_arguments(argv):
    parser = Parser(__doc__)
    add = parser.group("teacher")
    shown = "the tiny one of tiny/train.py with random weights"
    add("--teacher", "a known name, a pipeline folder, or a hub id", shown=shown)
    random = "of a known teacher: its real sizes, weights random, so that nothing is fetched"
    add("--random-weights", random, action="store_true")
    add("--pixel-backbone", "ADP's pixel discriminator, as in adp.py", shown="none")

    add = parser.group("measurement")
    add("--stages", "which", nargs="+", choices=list(STAGES), default=list(STAGES), shown="all")
    options = (
        "sets of further arguments of the stages, each in quotes (a single one with a blank before it); the "
        "first is what the others are compared with"
    )
    add("--options", options, nargs="+", type=str.strip, default=[""], shown="none")
    processes = "numbers of processes, each with --batch rows"
    add("--processes", processes, type=positive, nargs="+", default=[1], shown="1")
    add("--batch", "rows", type=positive, default=32)
    add("--iterations", "that are timed in each stage", type=positive, default=15)
    add("--threads", "of torch on a CPU", type=positive, default=1)
    brief = "one iteration comes before those that are timed instead of three, and no passes alone after them"
    add("--brief", brief, action="store_true")
    checkpointing = "gradient checkpointing, whose second forward passes are not counted"
    add("--checkpointing", checkpointing, action="store_true")
    # an H100 or H200, dense
    add("--peak", "the card's TFLOP/s in bf16", type=above_zero, default=989.0)
    add("--json", "file for the numbers")
    args = parser.parse_args(argv)
    if args.random_weights and args.teacher not in TEACHERS:
        names = ", ".join(TEACHERS)
        raise UserError(f"--random-weights is for a known teacher: {names}")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    if args.json:
        os.makedirs(os.path.dirname(os.path.abspath(args.json)), exist_ok=True)
    measured = []
    complaints = []
    with tempfile.TemporaryDirectory() as folder:
        teacher = find_teacher(args, folder)
        for i, case in enumerate(itertools.product(args.stages, args.processes, args.options)):
            row, found = measure_row(*case, args, teacher, os.path.join(folder, str(i)))
            measured.append(row)
            complaints += found
    print(format_table(measured, args.peak))
    if args.json:
        write_json(args.json, measured)
    if complaints:
        print("\n".join(complaints), file=sys.stderr)
        raise SystemExit(1)


def find_teacher(args, folder):
    """The teacher to measure with; one of random weights is written into the folder."""
    if args.teacher and not args.random_weights:
        return args.teacher
    path = os.path.join(folder, "teacher")
    if args.random_weights:
        write_random(args.teacher, path)
    else:
        train.build_sdxl().to(dtype=torch.float16).save_pretrained(path)
    return path


def write_random(name, path):
    """A known teacher's pipeline, weights random. A GPU makes them in a moment, a CPU takes minutes."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        train.build_real(name).save_pretrained(path)
    gc.collect()  # a pipeline refers to itself, and the stages' processes need its memory
    torch.cuda.empty_cache()


def format_table(measured, peak):
    """Rows -> a Markdown table; "ratio" is seconds a row of a process's batch over those of the stage's first
    line."""
    first = {}  # row of each stage
    lines = []
    for row in measured:
        first.setdefault(row["stage"], row)
        lines.append(format_row(row, first[row["stage"]], peak))
    return format_markdown([list(lines[0]), *(list(line.values()) for line in lines)])


def format_row(row, first, peak):
    """{title of the column: text}."""
    seconds = row["seconds_iteration"]
    of_row = seconds / row["rows"]
    of_first = first["seconds_iteration"] / first["rows"]
    backward = [str(number) for number in row["backward"].values()]
    line = {
        "stage": row["stage"],
        "processes": str(row["processes"]),
        "options": row["options"],
        "full": str(row["forward_full"]),
        "partial": str(row["forward_partial"]),
        f"backward {', '.join(BACKWARD)}": ", ".join(backward),
        "s/iteration": f"{seconds:.3f}",
        "ratio": f"{of_row / of_first:.2f}",
        "s/passes": f"{row['seconds_passes']:.3f}" if "seconds_passes" in row else "",
        "s/apart": f"{row['seconds_apart']:.3f}" if "seconds_apart" in row else "",
        "overhead": f"{row['overhead']:.1%}" if "overhead" in row else "",
        "peak MB": f"{row['peak_mb']:.0f}",
    }
    if torch.cuda.is_available():
        speed = row["tflop"] / seconds if "tflop" in row else None
        line["TFLOP/s"] = f"{speed:.0f}" if speed else ""
        line["of peak"] = f"{speed / peak:.0%}" if speed else ""
    return line


if __name__ == "__main__":
    launch(main)
