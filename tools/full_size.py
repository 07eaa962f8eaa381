"""Trains known teachers at their real size for a few iterations, on a CPU, with random weights.

    python tools/full_size.py                                       # those that 24 GB hold
    python tools/full_size.py --teachers sdxl --json full-size.json

What the real classes do at their real sizes, a GPU apart: pictures of 256 pixels, videos of 9 frames of 128
pixels, bf16, LoRA of rank 16, one sample a batch; ADM for three iterations, and ADP for one where the
teacher draws pictures. Losses must be finite, and a gradient must reach the student, the fake score and the
heads: else the exit code is 2. Prints the seconds of an iteration, and the process's peak memory, which has
Python's packages in it, beside what `--plan` adds up for the training alone, without text encoders: the
random teacher's are small.
"""

import math
import os
import shlex
import statistics
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import adm
import common
from metrics.rows import format_markdown
from support.arguments import Parser, parse_adm_arguments, positive
from support.errors import UserError, launch
from support.files import ROOT, read_json, read_json_lines, write_json
from support.hub import TEACHERS
from tools.bench import write_random
from tools.measure import choose_prompts
from tools.plan import GB, Networks, add_up, count_activations, count_states
from tools.processes import run_script

FITTING = ("sd1.5", "sdxl", "sd3-medium", "wan2.1-1.3b", "cogvideox-2b", "wan2.2-5b")
WORDS = "--batch 1 --precision bf16 --lora 16"
PICTURES = "--resolution 256"
VIDEOS = "--resolution 128 --frames 9"  # at 256 an iteration of Wan's eight steps takes eight minutes
PAIRS = "--count 2 --shard-size 2 --batch 1 --steps 1 --guidance 1 --precision bf16"
# Freed tensors of so many bytes go back to the system; of themselves C's libraries would keep those of up to
# 32 MB, gigabytes of SDXL's activations.
GIVEN_BACK = str(4 * 10**6)
SAM = os.path.join(ROOT, "assets/tiny-sam.pth")


def run(words, out, threads):
    """Runs a stage, which writes to `out` -> GB of memory at most. UserError where it fails."""
    with open(out + ".log", "w") as log:
        code, usage = run_script(words, log, threads, MALLOC_MMAP_THRESHOLD_=GIVEN_BACK)
    if code != 0:
        with open(out + ".log") as log:
            raise UserError(f"{shlex.join(words)} failed: {log.read().strip()[-1000:]}")
    return usage.ru_maxrss * 1024 / GB


def plan(words):
    """GB that --plan adds up for the words of an adm.py command, without text encoders."""
    args = parse_adm_arguments(__doc__, words, common.FAMILIES, adm.ADM)
    networks = Networks(args, adm.ADM, adm.iterate)
    rows = count_states(args, networks, 1) | count_activations(args, networks)
    rows.pop("text encoders", None)
    return add_up(rows) / GB


def find_faults(name, gradients, lines):
    """What is wrong in the lines of a run: a list of sentences. gradients: the names of their norms."""
    faults = []
    for line in lines:
        for key, value in line.items():
            if not math.isfinite(value):
                faults.append(f"{name}: {key} is {value} at iteration {line['step']}")
        if line.get("left_out"):
            faults.append(f"{name}: an update was left out at iteration {line['step']}")
    for gradient in gradients:
        if not any(line.get(gradient, 0) > 0 for line in lines):
            faults.append(f"{name}: no gradient, {gradient} is never above 0")
    return faults


def measure(name, folder, threads):
    """Trains a known teacher's random twin in the folder -> (a row of the table, faults)."""
    teacher = os.path.join(folder, "teacher")
    write_random(name, teacher)
    pipeline = read_json(os.path.join(teacher, "model_index.json"))["_class_name"]
    video = common.find_family(pipeline).video
    settings = [*WORDS.split(), *(VIDEOS if video else PICTURES).split()]
    words = [*settings, "--prompts", choose_prompts(teacher)]
    lines, peak = train("adm.py", ["--teacher", teacher, *words, "--iterations", "3"], folder, threads)
    row = {
        "teacher": name,
        "ADM, s/iteration": f"{statistics.median(line['seconds'] for line in lines[1:]):.0f}",
        "peak GB": f"{peak:.1f}",
        "planned GB": f"{plan(['--teacher', name, *words]):.1f}",
        "ADP, s/iteration": "",
    }
    faults = find_faults(f"adm.py, {name}", ("norm_G", "norm_f", "norm_D"), lines)
    if not video:
        pairs = os.path.join(folder, "pairs")
        collect = ["--teacher", teacher, "--prompts", choose_prompts(teacher), *PICTURES.split()]
        run(["collect_ode.py", *collect, *PAIRS.split(), "--out", pairs], pairs, threads)
        words = ["--teacher", teacher, *settings, "--pairs", pairs, "--pixel-backbone", SAM]
        lines, _ = train("adp.py", [*words, "--iterations", "1"], folder, threads)
        row["ADP, s/iteration"] = f"{lines[0]['seconds']:.0f}"
        faults += find_faults(f"adp.py, {name}", ("norm_G", "norm_heads"), lines)
    return row, faults


def train(stage, words, folder, threads):
    """Runs a training stage without a warm-up -> (its lines of metrics.jsonl, GB of memory at most)."""
    out = os.path.join(folder, stage.removesuffix(".py"))
    peak = run([stage, *words, "--warmup", "0", "--log-every", "1", "--out", out], out, threads)
    return read_json_lines(os.path.join(out, "metrics.jsonl")), peak


def main():
    parser = Parser(__doc__)
    add = parser.group("what is tried")
    add("--teachers", "known ones", nargs="+", choices=list(TEACHERS), default=FITTING)
    add("--threads", "of a stage's process", type=positive, default=os.cpu_count(), shown="one a core")
    add("--json", "file for the numbers")
    args = parser.parse_args()
    rows, faults = [], []
    for name in args.teachers:
        with tempfile.TemporaryDirectory() as folder:
            row, found = measure(name, folder, args.threads)
        rows.append(row)
        faults += found
        print(" ".join(row.values()), flush=True)
    print(format_markdown([list(rows[0]), *(list(row.values()) for row in rows)]))
    if args.json:
        write_json(args.json, rows)
    if faults:
        raise UserError("; ".join(faults))


if __name__ == "__main__":
    launch(main)
