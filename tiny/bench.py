"""Counts the denoiser passes of a training iteration, and times the loop against the same passes alone.

    python tiny/bench.py                                        # the tiny teacher with random weights, 2 minutes on a core
    python tiny/bench.py --teacher assets/tiny-sdxl --pixel-backbone assets/tiny-sam.pth --json bench.json
    python tiny/bench.py --stages adm --options "" "--no-checkpointing" "--lora 16" "--accumulate 2"
    python tiny/bench.py --stages adm --options "" "--shard zero1" "--shard fsdp" --processes 1 2
    python tiny/bench.py --teacher sdxl --random-weights --batch 1 --stages adp adm     # the real size, for a GPU

The loops are those of adp.py and adm.py, each in processes of its own, for every stage, number of processes, and set of --options. A
pass that classifier-free guidance makes of twice the batch counts as two; "partial" ends at the discriminator's deepest tap. After each
iteration its passes are done again, one by one on the same networks: what the loop takes beyond them (optimisers, random numbers,
text encoding, logging) is overhead. That of several processes is what they take beyond as many at the same time that exchange nothing
("apart"), which share the machine as they do. On a GPU it also prints TFLOP/s of the passes of the loop, counted by torch, and their share of --peak.
Exit code 1 where a stage makes more passes than its budget; the overhead, which should stay under 10 per cent, is only printed.

With one thread on a CPU (the default) and one process, seconds are the process's own, which others disturb little; else the wall's.
"""
import collections
import contextlib
import functools
import itertools
import math
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import adm
import adp
import collect_ode
import common
from tiny import train

PROMPTS = os.path.join(ROOT, "prompts", "shapes_train.txt")
BACKWARD = ("G", "f_inputs", "D_inputs", "f_parameters")
WARM_UP = 3  # iterations; passes are counted in the last of them
# stage: (script, its arguments, at most so many full and partial forward passes, and backward passes as in BACKWARD)
STAGES = {
    "adp": (adp.main, ["--warmup", "0"], 1, 2, (1, 0, 1, 0)),
    "adm": (adm.main, ["--r1", "0", "--r2", "0"], 5, 2, (1, 1, 1, 1)),
    "adm+r1r2": (adm.main, [], 5, 4, (1, 1, 1, 1)),
    "dmd": (adm.main, ["--loss", "dmd"], 5, 0, (1, 0, 0, 1)),
}


def clock(processes):
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1 and processes == 1:
        return time.process_time()
    return time.perf_counter()


def counted(forward, batch, counts):
    """`forward` of a denoiser's class, which adds to `counts`: "full" or "partial", and (network, "inputs" or "parameters") once a
    gradient has come back through the whole of the pass."""

    @functools.wraps(forward)
    def wrapper(net, sample, *args, **kwargs):
        passes = math.ceil(len(sample) / batch)
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in net.parameters())
        if trains or torch.is_grad_enabled() and sample.requires_grad:
            # a tensor of its own: only gradients that come through this pass reach its hook
            sample = sample.view_as(sample) if sample.requires_grad else sample.detach().requires_grad_()
            sample.register_hook(lambda grad: counts.update({(net, "parameters" if trains else "inputs"): passes}))
        kind = "partial"
        try:
            output = forward(net, sample, *args, **kwargs)
            kind = "full"
            return output
        finally:
            counts[kind] += passes

    return wrapper


def passes_of(stage, run, pixel_backbone):
    """The passes of an iteration, as a list of functions that each do one, with the loop's own networks, batch and modes."""
    teacher, G, f, heads, args = run.student.teacher, run.parts["G"], run.parts.get("f"), run.parts.get("heads"), run.args
    backbone = common.PixelBackbone(pixel_backbone, teacher.device, teacher.dtype) if pixel_backbone and stage == "adp" else None
    x = torch.randn(args.batch, *teacher.latent_shape, device=teacher.device)
    x_grad = x.clone().requires_grad_()
    t = torch.full((args.batch,), common.T / 2, dtype=torch.float64, device=teacher.device)
    cond = teacher.encode((common.read_prompts(PROMPTS) * args.batch)[: args.batch])

    def to_parameters(net):
        teacher.call(net, x, t, cond).mean().backward()

    def f_to_inputs():
        with common.frozen(f):
            teacher.call(f, x_grad, t, cond).mean().backward()

    @torch.no_grad()
    def f_alone():
        teacher.call(f, x, t, cond)

    @torch.no_grad()
    def guided():
        teacher.guided(x, t, cond, args.guidance)

    def maps(x):
        return teacher.features(x, t, cond) + (backbone.features(teacher.decode(x)) if backbone else [])

    def D_to_inputs():
        with common.frozen(heads):
            heads(maps(x_grad)).mean().backward()

    @torch.no_grad()
    def D_alone():
        return maps(x)

    G_pass, f_pass = functools.partial(to_parameters, G), functools.partial(to_parameters, f)
    if stage == "dmd":
        return [G_pass, f_pass, f_alone, guided]
    groups = 4 if stage == "adm+r1r2" else 2  # real, fake, and each of them perturbed
    seen = [m.repeat(groups, 1, 1, 1) for m in D_alone()]  # [groups * B, C_i, H_i, W_i]
    D_passes = [D_to_inputs, *[D_alone] * (groups - 1), lambda: heads(seen).mean().backward()]
    return [G_pass, *D_passes] if stage == "adp" else [G_pass, f_pass, f_to_inputs, guided, *D_passes]


def excesses(stage, result):
    """What of a stage is over its budget: a list of sentences."""
    *_, full, partial, backward = STAGES[stage]
    budget = {"full forward": full, "partial forward": partial} | {f"backward {name}": n for name, n in zip(BACKWARD, backward)}
    found = {"full forward": result["forward_full"], "partial forward": result["forward_partial"]}
    found |= {f"backward {name}": n for name, n in result["backward"].items()}
    return [f"{stage}: an iteration makes {n} {name} passes, its budget is {budget.get(name, 0)}"
            for name, n in found.items() if n > budget.get(name, 0)]


def measure(stage, processes, extra, options, teacher, folder):
    """Runs a stage's own loop, in one of so many processes -> (what --json writes of it, a list of complaints)."""
    torch.set_num_threads(options.threads)
    main, arguments, *_ = STAGES[stage]
    arguments = [*arguments, "--teacher", teacher, "--out", os.path.join(folder, "run"), "--batch", str(options.batch), "--log-every", "1",
                 "--iterations", str(WARM_UP + options.iterations), *([] if options.checkpointing else ["--no-checkpointing"])]
    if stage == "adp":
        pairs = os.path.join(folder, "pairs")
        collect_ode.main(["--teacher", teacher, "--prompts", PROMPTS, "--out", pairs, "--count", str(2 * options.batch), "--steps", "2",
                          "--shard", str(2 * options.batch)])
        arguments += ["--pairs", pairs, *(["--pixel-backbone", options.pixel_backbone] if options.pixel_backbone else ["--lambda-pixel", "0"])]
    else:
        arguments += ["--prompts", PROMPTS]
    arguments += extra.split()
    counts, result, complaints, passes, seconds_iteration, seconds_passes = collections.Counter(), {}, [], [], [], []
    original_log, original_iterations, began, flops = common.Run.log, common.Run.iterations, 0.0, FlopCounterMode(display=False)
    patches = contextlib.ExitStack()

    def iterations(run, *args):
        """Everything is built: from here on passes are counted."""
        cls = next(kind for kind in type(run.student.teacher.denoiser).__mro__ if "forward" in vars(kind))  # FSDP puts a class of its own first
        patches.enter_context(mock.patch.object(cls, "forward", counted(cls.forward, run.args.batch, counts)))
        return original_iterations(run, *args)

    def summary(run):
        """The passes counted since the last time."""
        names = {run.parts["G"]: "G", run.parts.get("f"): "f"}
        backward = dict.fromkeys(BACKWARD, 0)
        for (net, mode), n in ((key, n) for key, n in counts.items() if isinstance(key, tuple)):
            name = f"{names.get(net, 'D')}_{mode}"
            backward["G" if name == "G_parameters" else name] = n
        value = {"forward_full": counts["full"], "forward_partial": counts["partial"], "backward": backward}
        counts.clear()
        return value

    def log(run, step, values):
        nonlocal began, passes
        original_log(run, step, values)
        took, of_loop = clock(processes) - began, summary(run)
        if step == WARM_UP:
            result.update(of_loop, rows=run.args.batch * run.args.accumulate, peak_mb=common.peak_mb())
            passes = passes_of(stage, run, options.pixel_backbone) if not extra and processes == 1 else []
        if step >= WARM_UP and passes:
            counts.clear()
            began = clock(processes)
            with flops if step == WARM_UP else contextlib.nullcontext():
                for run_pass in passes:
                    run_pass()
            alone, of_passes = clock(processes) - began, summary(run)
            if step == WARM_UP:
                stale = f"{stage}: the passes timed alone are not the loop's, bring passes_of up to date: {of_passes}"
                complaints.extend(excesses(stage, of_loop) or [stale] * (of_passes != of_loop))
                result["tflop"] = flops.get_total_flops() / 1e12
            for name in {"G", "f", "heads"} & run.parts.keys():
                run.parts[name].zero_grad()
            if step > WARM_UP:
                seconds_passes.append(alone)
        if step > WARM_UP:
            seconds_iteration.append(took)
        began = clock(processes)

    with patches, mock.patch.object(common.Run, "iterations", iterations), mock.patch.object(common.Run, "log", log), \
            mock.patch.object(common.Run, "save", lambda *_: None):
        main(arguments)
    result["seconds_iteration"] = statistics.median(seconds_iteration)
    if seconds_passes:
        result["seconds_passes"] = statistics.median(seconds_passes)
        result["overhead"] = result["seconds_iteration"] / result["seconds_passes"] - 1
    return result, complaints


def free_port():
    """A port of this machine that nobody has."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def worker(rank, port, queue, *arguments):
    """One of the processes of a measurement; the first hands over what it measured."""
    stage, processes, *_ = arguments
    os.environ["LOCAL_RANK"] = str(rank)
    if port:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def run():
        found = measure(*arguments)
        if rank == 0:
            queue.put(found)

    common.launch(run)


def together(port, stage, processes, extra, options, teacher, folder):
    """`measure` in `processes` processes of their own at the same time, joined if a port is given -> what the first measured."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    folders = [os.path.join(folder, "joined" if port else str(rank)) for rank in range(processes)]
    workers = [context.Process(target=worker, args=(rank, port, queue, stage, processes, extra, options, teacher, folders[rank])) for rank in range(processes)]
    for process in workers:
        process.start()
    for process in workers:
        process.join()
    if any(process.exitcode for process in workers):
        raise common.UserError(f"{f'{stage} {extra}'.strip()} did not run, as is said above")
    return queue.get()


def main():
    parser = common.Parser(__doc__)
    parser.add("--teacher", "a known name, a pipeline folder, or a hub id (default the tiny one of train.py with random weights)")
    parser.add("--random-weights", "of a known teacher: its real sizes, weights random, so that nothing is fetched", action="store_true")
    parser.add("--pixel-backbone", "ADP's pixel discriminator, as in adp.py (default none)")
    parser.add("--stages", "which", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add("--options", "sets of further arguments of the stages, each in quotes; the first is what the others are compared with", nargs="+", default=[""])
    parser.add("--processes", "numbers of processes, each with --batch rows", type=common.positive, nargs="+", default=[1])
    parser.add("--batch", "rows", type=common.positive, default=32)
    parser.add("--iterations", "that are timed in each stage", type=common.positive, default=15)
    parser.add("--threads", "of torch on a CPU", type=common.positive, default=1)
    parser.add("--checkpointing", "gradient checkpointing, whose second forward passes are not counted", action="store_true")
    parser.add("--peak", "the card's TFLOP/s in bf16", type=common.above_zero, default=989.0)  # H100 and H200, dense
    parser.add("--json", "file for the numbers")
    args = parser.parse_args()
    if args.random_weights and args.teacher not in common.TEACHERS:
        raise common.UserError(f"--random-weights is for a known teacher: {', '.join(common.TEACHERS)}")

    if args.json:
        os.makedirs(os.path.dirname(os.path.abspath(args.json)), exist_ok=True)
    rows, complaints = [], []
    with tempfile.TemporaryDirectory() as folder:
        teacher = args.teacher if args.teacher and not args.random_weights else os.path.join(folder, "teacher")
        if args.random_weights:
            train.build_real(args.teacher).save_pretrained(teacher)
        elif not args.teacher:
            train.build_sdxl().to(dtype=torch.float16).save_pretrained(teacher)
        for i, (stage, processes, extra) in enumerate(itertools.product(args.stages, args.processes, args.options)):
            arguments = (stage, processes, extra, args, teacher, os.path.join(folder, str(i)))
            result, found = together(None, *arguments)
            if processes > 1:
                apart = result["seconds_iteration"]
                result, found = together(free_port(), *arguments)
                result |= {"seconds_apart": apart, "overhead": result["seconds_iteration"] / apart - 1}
            rows.append({"stage": stage, "processes": processes, "options": extra, **result})
            complaints += found

    print(table(rows, args.peak))
    if args.json:
        common.write_json(args.json, rows)
    if complaints:
        print("\n".join(complaints), file=sys.stderr)
        raise SystemExit(1)


def table(rows, peak):
    """Rows -> a Markdown table; "ratio" is seconds a row of a process's batch over those of the stage's first line."""
    names = ["stage", "processes", "options", "full", "partial", "backward " + ", ".join(BACKWARD), "s/iteration", "ratio", "s/passes", "s/apart",
             "overhead", "peak MB"]
    names += ["TFLOP/s", "of peak"] if torch.cuda.is_available() else []
    lines = [names, ["---"] * len(names)]
    for r in rows:
        first = next(row for row in rows if row["stage"] == r["stage"])
        seconds = r["seconds_iteration"]
        ratio = seconds / r["rows"] / (first["seconds_iteration"] / first["rows"])
        line = [r["stage"], r["processes"], r["options"], r["forward_full"], r["forward_partial"], ", ".join(map(str, r["backward"].values())),
                f"{seconds:.3f}", f"{ratio:.2f}", *(f"{r[name]:.3f}" if name in r else "" for name in ("seconds_passes", "seconds_apart")),
                f"{r['overhead']:.1%}" if "overhead" in r else "", f"{r['peak_mb']:.0f}"]
        if torch.cuda.is_available():
            line += [f"{r['tflop'] / seconds:.0f}", f"{r['tflop'] / seconds / peak:.0%}"] if "tflop" in r else ["", ""]
        lines.append(line)
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


if __name__ == "__main__":
    common.launch(main)
