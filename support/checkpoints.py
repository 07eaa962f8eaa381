"""A training run's folder: checkpoints, metrics, previews, and how a run goes on from them."""

import contextlib
import hashlib
import importlib.util
import json
import os
import pickle
import re
import signal
import time

import torch
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.utils._pytree import tree_map
from tqdm import tqdm

from support.errors import UserError, first_line
from support.files import (
    make_folder,
    read_json,
    read_json_lines,
    remove,
    short_name,
    write_atomically,
    write_json,
)
from support.lora import Adapted
from support.media import save_curves, save_grid, save_video
from support.parallel import average, gather, gather_zero1, is_main, lay_out, wait_for_all
from support.rows import Rows
from support.training import peak_memory_mb

META = {"step", "stage", "fingerprint", "parametrisation", "steps"}  # what is read of meta.json
PARTS = ("G", "f", "heads", "ema", "opt_G", "opt_f", "opt_heads")  # of ADP or ADM, where it has them: state/
AHEAD = 64  # iterations whose prompts are encoded at once with --offload


def compute_fingerprint(net, scheduler_config):
    """Tells this teacher from any other, whatever the precision it was loaded in: its configurations and a
    few of its weights."""
    configs = []
    for config in (net.config, scheduler_config):
        configs.append({name: value for name, value in dict(config).items() if not name.startswith("_")})
    digest = hashlib.sha256(json.dumps(configs, sort_keys=True, default=str).encode())
    weights = list(net.parameters())
    for weight in weights[:: max(1, len(weights) // 16)]:
        bits = weight.detach().flatten()[:256].to(torch.bfloat16).view(torch.int16)
        digest.update(bits.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def find_checkpoint(path):
    """A run or one of its step folders -> (step folder, meta). UserError where it is not there or not
    complete."""
    if not os.path.isdir(path):
        raise UserError(f"there is no checkpoint {path!r}: give a run folder, or one of its step_... folders")
    latest = os.path.join(path, "latest")
    if os.path.isfile(latest):
        with open(latest) as file:
            path = os.path.join(path, file.read().strip())
    meta = read_json(os.path.join(path, "meta.json")) or {}
    parts = [os.path.join(path, part) for part in ("student/config.json", "state")]
    if not set(meta) >= META or not all(map(os.path.exists, parts)):
        raise UserError(
            f"{path} is not a complete checkpoint (student/, state/, meta.json); "
            "give another step_... folder of the run"
        )
    return path, meta


class Run:
    """RUN/step_000500/{student/, state/, meta.json}, RUN/latest, metrics.jsonl, curves.png and samples/.

    `method` is an ADP or ADM. student/ is a plain diffusers model folder with the weights to sample with;
    state/ has a file for each of PARTS, the same for any number of ranks and any --shard: all that training
    goes on from. UserError if the folder holds a run and --resume is not given, or a run of another kind."""

    def __init__(self, stage, args, method):
        self.args = args
        self.method = method
        self.student = method.student
        self.teacher = method.teacher
        self.parts = {name: getattr(method, name) for name in PARTS if getattr(method, name, None)}
        self.folder = args.out or os.path.join("runs", f"{stage}-{short_name(args.teacher)}")
        self.metrics = os.path.join(self.folder, "metrics.jsonl")
        self.meta = {
            "stage": stage,
            "teacher": args.teacher,
            "variant": args.variant,
            "fingerprint": self.teacher.fingerprint,
            "resolution": self.teacher.resolution,
            "frames": self.teacher.frames,
            "parametrisation": self.student.parametrisation,
            "steps": self.student.steps,
            "arguments": vars(args),
            "torch": torch.__version__,
        }
        self.updates = getattr(args, "ttur", 1)  # draws of an iteration
        self.start = 0
        self.stopping = False
        if os.path.exists(os.path.join(self.folder, "latest")):
            if not args.resume:
                raise UserError(
                    f"{self.folder} holds a run already: add --resume to go on with it, or give another --out"
                )
            self._restore()
        elif args.resume and self._has_checkpoints():
            raise UserError(f"{self.folder} has no complete checkpoint to resume from; give another --out")
        # this waits for all, too: every rank has looked before the main one writes
        if average({"start": self.start})["start"] != self.start:
            raise UserError(f"{self.folder} is not the same on all nodes: give an --out that they share")
        make_folder(os.path.join(self.folder, "samples"))
        if is_main():
            self._tidy()
        self.bar = tqdm(
            desc=stage,
            total=args.iterations,
            initial=self.start,
            disable=not is_main(),
            mininterval=1,
            dynamic_ncols=True,
        )
        self.clock = time.perf_counter()

    def _has_checkpoints(self):
        names = os.listdir(self.folder) if os.path.isdir(self.folder) else []
        return any(name.startswith("step_") for name in names)

    def _tidy(self):
        """Removes what a killed process left: half a checkpoint, and lines of iterations that will come
        again."""
        for name in os.listdir(self.folder):
            if ".tmp" in name:
                remove(os.path.join(self.folder, name))
        lines = [line for line in read_json_lines(self.metrics) if line["step"] <= self.start]
        with write_atomically(self.metrics) as temporary, open(temporary, "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    # Going on ---------------------------------------------------------------------------------------------

    def _restore(self):
        folder, meta = find_checkpoint(self.folder)
        for name in ("stage", "fingerprint", "parametrisation", "steps"):
            if meta[name] != self.meta[name]:
                raise UserError(
                    f"{folder} cannot be resumed: its {name} is {meta[name]}, not {self.meta[name]}"
                )
        kept = {name.removesuffix(".pt") for name in os.listdir(os.path.join(folder, "state"))}
        if kept != set(self.parts):
            ours, theirs = ", ".join(sorted(self.parts)), ", ".join(sorted(kept))
            raise UserError(
                f"{folder} cannot be resumed with these settings: its state is of {theirs}, not of {ours}"
            )
        try:
            for name, part in self.parts.items():
                path = os.path.join(folder, "state", f"{name}.pt")
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                if isinstance(part, torch.optim.Optimizer):
                    restore_optimizer(part, state)
                else:
                    part.load_state_dict(tree_map(lay_out, state, part.state_dict()))
        except (RuntimeError, KeyError, ValueError, OSError, EOFError, pickle.UnpicklingError) as error:
            reason = first_line(error)
            raise UserError(f"{folder} cannot be resumed with these settings: {reason}") from error
        self.start = meta["step"]

    def iterations(self):
        """The numbers of the iterations that are left.

        SIGTERM and SIGINT end them after the present one and its checkpoint, so that a preempted job goes
        on with --resume; a second Ctrl-C ends the process."""

        def stop(number, frame):
            self.stopping = True
            if number == signal.SIGINT:  # schedulers repeat SIGTERM, which must not end the save
                signal.signal(number, before[number])

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            for step in range(self.start, self.args.iterations):
                if self.args.offload and (step - self.start) % AHEAD == 0:
                    self._encode_ahead(step)
                yield step
                if self.stopping:
                    break
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _encode_ahead(self, step):
        prompts = []
        for later in range(step, min(step + AHEAD, self.args.iterations)):
            for update in range(self.updates):
                for b in self.method.draw(later, update):
                    prompts += b.prompts
        self.teacher.offload.encode_ahead(prompts)

    # Saying how it goes -----------------------------------------------------------------------------------

    def log(self, step):
        """A line of the iteration's metrics, averaged over the ranks."""
        self.bar.update()
        metrics = self.method.log.take()
        if step % self.args.log_every:
            return
        values = average(metrics)
        now = time.perf_counter()
        seconds = (now - self.clock) / self.args.log_every
        self.clock = now
        if not is_main():
            return
        line = {"step": step, **values, "seconds": seconds, "peak_mb": peak_memory_mb()}
        with open(self.metrics, "a") as file:
            file.write(json.dumps(line) + "\n")
        shown = list(values.items())[:4]
        self.bar.set_postfix({name: f"{value:.3g}" for name, value in shown})

    # Saving -----------------------------------------------------------------------------------------------

    def is_due(self, step):
        """Whether to save now: every --save-every, at the end, and on every rank when one was told to
        stop."""
        self.stopping = bool(average({"stopping": float(self.stopping)})["stopping"])
        last = step == self.args.iterations
        return self.stopping or last or step % self.args.save_every == 0

    def save(self, step, prompts):
        """A checkpoint, in one move, and samples of the first prompts from fixed noise. All ranks gather and
        sample, the main one writes."""
        net = self.method.G
        folder = os.path.join(self.folder, f"step_{step:06d}")
        with write_atomically(folder) if is_main() else contextlib.nullcontext() as temporary:
            weights = self._write_state(temporary)
            with self.method.ema.use():
                if isinstance(net, Adapted):
                    weights = net.merge()
                elif self.method.ema.average:
                    weights = gather(net.state_dict())
                if is_main():
                    save_network(self.teacher.denoiser, weights, os.path.join(temporary, "student"))
            if is_main():
                write_json(os.path.join(temporary, "meta.json"), {"step": step, **self.meta})
                remove(folder)
        if is_main():
            name = os.path.basename(folder)
            with write_atomically(os.path.join(self.folder, "latest")) as temporary:
                with open(temporary, "w") as file:
                    file.write(name + "\n")
            self._prune(step)
            save_curves(self.metrics, os.path.join(self.folder, "curves.png"))
        with self.method.ema.use():
            path = os.path.join(self.folder, "samples", f"step_{step:06d}")
            save_preview(self.student, net, prompts, self.args.seed, path)
        wait_for_all()
        self.clock = time.perf_counter()

    def _write_state(self, folder):
        """Writes every part -> the student's whole weights, so that they need not be gathered twice."""
        if is_main():
            os.makedirs(os.path.join(folder, "state"))
        for name, part in self.parts.items():
            zero1 = isinstance(part, ZeroRedundancyOptimizer)
            state = gather_zero1(part) if zero1 else gather(part.state_dict())
            if is_main():
                torch.save(state, os.path.join(folder, "state", f"{name}.pt"))
            if name == "G":
                weights = state
            del state  # before the next part's
        return weights

    def _prune(self, newest):
        """Removes all but the newest --keep checkpoints."""
        steps = []
        for name in os.listdir(self.folder):
            match = re.fullmatch(r"step_(\d+)", name)
            if match and int(match[1]) < newest:
                steps.append((int(match[1]), name))
        surplus = max(0, len(steps) + 1 - self.args.keep)
        for _, name in sorted(steps)[:surplus]:
            remove(os.path.join(self.folder, name))


def restore_optimizer(optimizer, state):
    """Loads a whole state_dict into an optimiser whose states may be laid out over the ranks."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, values in state["state"].items():
        for name, value in values.items():
            if value.ndim:
                values[name] = lay_out(value, parameters[i])
    optimizer.load_state_dict(state)
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        optimizer.state.clear()  # a second copy of this rank's share
        for p, values in optimizer.optim.state.items():
            # left on the CPU, where AdamW's fused kernel does not want it
            values["step"] = values["step"].to(p.device)


def save_network(like, state, folder):
    """A state dictionary -> a diffusers model folder, of a network with the class and configuration of
    `like`."""
    with torch.device("meta"):
        net = type(like).from_config(like.config)
    net.load_state_dict(state, assign=True)
    net.float().save_pretrained(folder)


@torch.no_grad()
def save_preview(student, net, prompts, seed, path):
    """Samples of fixed noise and of the first prompts: 16 images to path.png, or 4 videos to path.mp4 and
    their frames to path.png. All ranks draw them, since shares of `net` are of no use alone; the main one
    writes."""
    teacher = student.teacher
    count = 4 if teacher.video else 16
    prompts = (prompts * count)[:count]
    latents = student.sample(
        net, Rows(range(count), ("preview", seed), teacher.device), teacher.encode(prompts)
    )
    if not is_main():
        return
    pixels = teacher.decode(latents).clamp(-1, 1)
    save_grid(pixels, f"{path}.png")
    if teacher.video and importlib.util.find_spec("imageio_ffmpeg") and importlib.util.find_spec("imageio"):
        side_by_side = torch.cat(list(pixels), dim=-1)
        save_video(side_by_side, f"{path}.mp4", teacher.fps)
