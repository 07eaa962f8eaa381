"""A training run: its folder and lock, its metrics, when it saves, how it ends and how it goes on."""

import contextlib
import importlib.util
import itertools
import json
import math
import os
import pickle
import shutil
import signal
import time

import torch
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.utils._pytree import tree_map
from tqdm import tqdm

from support.checkpoints import (
    compute_global_batch,
    count_most,
    describe_files,
    estimate_bytes,
    find_best,
    find_newest,
    follow,
    is_ours,
    list_checkpoints,
    open_checkpoint,
    restore_optimizer,
    save_network,
    write_pointer,
)
from support.errors import UserError, first_line, note
from support.files import (
    as_json,
    compute_checksum_of_json,
    lock_folder,
    make_folder,
    parse_line,
    remove,
    remove_leftovers,
    write_atomically,
    write_sealed,
)
from support.inputs import check_that_no_run_is_there
from support.loading import describe_teacher
from support.lora import Adapted
from support.lora_files import save_adapter
from support.media import save_curves, save_grid, save_video
from support.pairs import identify
from support.parallel import (
    PATIENCE,
    WITHIN_AN_ITERATION,
    average,
    gather,
    gather_zero1,
    get_share,
    is_main,
    lay_out,
    set_patience,
    wait_for_all,
    world_size,
)
from support.rng import RowRNG
from support.tensors import is_finite
from support.training import peak_memory_mb

STATE = ("G", "f", "heads", "ema", "opt_G", "opt_f", "opt_heads")  # of ADP or ADM, where it has them: state/
AHEAD = 256  # prompts of the next iterations that are encoded at once with --offload; Qwen-Image's take 1 GB
STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

# What a run is: with another value it is another run
IDENTITY = ("stage", "fingerprint", "resolution", "frames", "parametrisation", "steps")
IDENTITY_ARGUMENTS = ("loss", "init", "first_time", "seed", "lora", "lora_targets", "head_width")
SWITCHES = ("ema", "lambda_pixel")  # at 0 or not, as they bring a part of the state with them
# What does not change the numbers, or is compared as part of the above
FREE = (
    *("teacher", "variant", "teacher_lora", "init", "out", "resume", "plan", "gpu_gb"),
    *("log_every", "save_every", "save_minutes", "keep", "patience"),
    *("shard", "offload", "compile", "checkpointing"),
    *("eval_every", "eval_prompts", "eval_prompt_column", "eval_metric", "eval_seeds", "weights_dir"),
    *("clip_model", "clip_weights", "clip_prefix", "hps_version", "lpips_net", "lpips_size"),
)


class Run:
    """RUN/step_000500/{student/, state/, meta.json}, RUN/latest, RUN/best, metrics.jsonl, curves.png and
    samples/.

    `method` is an ADP or ADM. student/ is a plain diffusers model folder with the weights to sample with;
    with --lora a LoRA file stands in its place. state/ has a file for each of STATE, the same for any number
    of ranks and any --shard: all that training goes on from. meta.json says what made them, with their
    checksums. `held_out` (metrics.held_out.HeldOut, or None) scores the student: `best` names the checkpoint
    with the highest score. UserError if the folder holds a run and --resume is not given, or a run of another
    kind, or something else, or if it is in use."""

    def __init__(self, stage, args, method, held_out=None):
        self.args = args
        self.method = method
        self.held_out = held_out
        self.student = method.student
        self.teacher = method.teacher
        self.parts = {name: getattr(method, name) for name in STATE if getattr(method, name, None)}
        self.folder = args.out
        self.metrics = os.path.join(self.folder, "metrics.jsonl")
        self.updates = getattr(args, "ttur", 1)  # draws of an iteration
        self.ahead = max(1, AHEAD // (args.batch * args.accumulate * self.updates))  # iterations
        self.start = 0
        self.signal = None  # what asked this rank to stop
        self.leaving = False  # whether the ranks have agreed to
        self.left_out = 0  # updates since the last line of metrics whose gradients were not finite
        self.streak = 0  # iterations in a row with such an update
        self.score = None  # of this iteration, if it has one
        self.best = -math.inf  # the highest of all scores
        self.meta = {
            "stage": stage,
            "teacher": describe_teacher(args.teacher),
            "variant": args.variant,
            "teacher_lora": args.teacher_lora and os.path.abspath(args.teacher_lora),
            "fingerprint": self.teacher.fingerprint,
            "resolution": self.teacher.resolution,
            "frames": self.teacher.frames,
            "negative_prompt": self.teacher.null_prompt,
            "parametrisation": self.student.parametrisation,
            "steps": self.student.steps,
            "first_time": self.student.first_time,
            "data": describe_data(method),
            "processes": world_size(),
            "arguments": vars(args),
            "torch": torch.__version__,
        }
        tell_of_no_scheduler(self.student)
        with contextlib.ExitStack() as stack:
            stack.enter_context(lock_folder(self.folder))
            self._open(stage)
            self.lock = stack.pop_all()  # `iterations` releases it

    def _open(self, stage):
        check_that_no_run_is_there(self.args)  # again, now that nobody else can write there
        found = find_newest(self.folder, "state", together=True)
        if found:
            self._restore(*found)
        else:
            self._check_that_nothing_foreign_is_there()
        best_folder = None
        if self.held_out:
            best_folder, self.best = find_best(self.folder, self.held_out.identity, self.start)
        wait_for_all()  # every rank has looked before the main one writes
        make_folder(os.path.join(self.folder, "samples"))
        if is_main():
            self._tidy()
            if best_folder:  # a process may have been killed between the checkpoint and `best`
                self._point("best", best_folder)
            self._look_at_the_disk()
        self.bar = tqdm(
            desc=stage,
            total=self.args.iterations,
            initial=self.start,
            disable=not is_main(),
            mininterval=1,
            dynamic_ncols=True,
        )
        self.clock = time.perf_counter()
        self.saved = self.clock  # when the last checkpoint was written
        self.logged = self.start  # the iteration of the last line of metrics

    def _check_that_nothing_foreign_is_there(self):
        """UserError where a new run would write over something that no run of this project wrote."""
        if self._has_own_metrics():
            return
        for name in ("metrics.jsonl", "curves.png", "latest", "best"):
            if os.path.exists(os.path.join(self.folder, name)):
                raise UserError(f"{self.folder}/{name} is no run's of this project: give another --out")

    def _has_own_metrics(self):
        """Whether metrics.jsonl is what a run leaves that ended before its first checkpoint."""
        if not os.path.isfile(self.metrics):
            return False
        with open(self.metrics, encoding="utf-8", errors="replace") as file:
            first = file.readline()
        line = parse_line(first)
        if not line:
            return not first
        return {"step", "seconds", "peak_mb"} <= set(line) or {"step", "held_out_seconds"} <= set(line)

    def _tidy(self):
        """Removes what a killed process left: half a checkpoint, and lines of iterations that will come
        again."""
        for place in (self.folder, os.path.join(self.folder, "samples")):
            remove_leftovers(place, of_all=True)
        if not os.path.exists(self.metrics):
            return
        with write_atomically(self.metrics) as temporary, open(temporary, "w") as kept:
            with open(self.metrics, encoding="utf-8", errors="replace") as file:
                for text in file:
                    line = parse_line(text)
                    if line and line.get("step", math.inf) <= self.start:
                        kept.write(json.dumps(line) + "\n")

    def _look_at_the_disk(self):
        """Says so where it has no room for the checkpoints to come."""
        missing = max(0, count_most(self.args) - len(list_checkpoints(self.folder)))
        wanted = missing * estimate_bytes(self.parts) / 1e9
        free = shutil.disk_usage(self.folder).free / 1e9
        if free < wanted:
            note(
                f"{self.folder} has {free:.1f} GB left, and checkpoints will take {wanted:.1f} more: "
                "make room, or give a smaller --keep or another --out"
            )

    # Going on ---------------------------------------------------------------------------------------------

    def _restore(self, folder, meta):
        self._compare(folder, meta)
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
        note(f"going on from {folder}")
        if self.start >= self.args.iterations:
            note(f"which has all of --iterations {self.args.iterations}: nothing is left to do")

    def _compare(self, folder, meta):
        """UserError where the checkpoint is another run's; says what else differs."""
        ours = as_json(self.meta)
        before, now = meta["arguments"], ours["arguments"]
        values = {name: (meta[name], ours[name]) for name in IDENTITY}
        for name in IDENTITY_ARGUMENTS:
            values[name_option(name)] = (before.get(name), now.get(name))
        if "heads" not in self.parts:
            del values["--head-width"]
        values["--init"] = [path and os.path.abspath(path) for path in values["--init"]]
        for name in SWITCHES:
            old, new = before.get(name), now.get(name)
            if bool(old) != bool(new):
                values[name_option(name)] = (old, new)
        for name, (old, new) in values.items():
            if old != new:
                raise UserError(f"{folder} cannot be resumed: its {name} is {old}, not {new}")
        for name, value in now.items():
            old = before.get(name)
            if name not in FREE and old != value:
                note(f"{name_option(name)} was {old}, and is {value} from here on")
        for name in ("data", "processes"):
            if meta.get(name) != ours[name]:
                note(f"the {name} were {meta.get(name)}, and are {ours[name]} from here on")
        old, new = compute_global_batch(meta), compute_global_batch(ours)
        if old != new:
            note(f"the global batch was {old} samples, and is {new} from here on")

    def iterations(self):
        """The numbers of the iterations that are left.

        SIGTERM, SIGINT and SIGHUP end them, on all ranks together, after the present one and its
        checkpoint, so that a preempted job goes on with --resume. The handler only notes the signal; the
        ranks agree in `finish`. What a parent ignores, as nohup does SIGHUP, stays ignored. Raises
        KeyboardInterrupt at the end where it was SIGINT."""

        def remember(number, frame):
            self.signal = number

        before = {}
        for number in STOP:
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, remember)
        try:
            for step in range(self.start, self.args.iterations):
                if self.args.offload and (step == self.start or step % self.ahead == 0):
                    self._encode_ahead(step)
                if step > self.start:  # with --compile the first takes longer
                    set_patience(WITHIN_AN_ITERATION, self.args)
                yield step
                if self.leaving:
                    break
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.lock.close()
            with contextlib.suppress(OSError):  # nobody may read it any more
                self.bar.close()
        if self.leaving and self.signal == signal.SIGINT:
            raise KeyboardInterrupt

    def _encode_ahead(self, step):
        """Encodes the prompts of the group of iterations that `step` is one of: the same ones together after
        an interruption, too, since an encoder's last bits depend on who is in its batch."""
        first = step - step % self.ahead
        prompts = []
        for later in range(first, min(first + self.ahead, self.args.iterations)):
            for update in range(self.updates):
                for b in self.method.draw(later, update):
                    prompts += b.prompts
        self.teacher.offload.encode_ahead(prompts)

    # Saying how it goes -----------------------------------------------------------------------------------

    def log(self, step):
        """A line of the iteration's metrics, averaged over the ranks. UserError after --patience iterations
        in a row with an update that was left out, since its gradient was not finite."""
        self._show()
        metrics = self.method.log.take()
        self._count_left_out(metrics)
        if step % self.args.log_every:
            return
        values = average(metrics)
        now = time.perf_counter()
        seconds = (now - self.clock) / (step - self.logged)
        self.clock, self.logged = now, step
        if not is_main():
            return
        line = {"step": step, **values, "left_out": self.left_out}
        line |= {"seconds": seconds, "peak_mb": peak_memory_mb()}
        self._write_line(line)
        shown = {name: f"{value:.3g}" for name, value in list(values.items())[:4]}
        if self.left_out:
            shown["left_out"] = self.left_out
        self._show(shown)
        self.left_out = 0

    def _show(self, values=None):
        """Moves the bar on, or with {name: text} writes these beside it. Where nobody reads it any more, it
        ends alone."""
        try:
            if values:
                self.bar.set_postfix(values)
            else:
                self.bar.update()
        except OSError:
            self.bar.disable = True

    def _write_line(self, line):
        with self._spare_the_run("metrics.jsonl"), open(self.metrics, "a") as file:
            file.write(json.dumps(line) + "\n")

    def _count_left_out(self, metrics):
        norms = {name: value for name, value in metrics.items() if name.startswith("norm_")}
        bad = [name for name, norm in norms.items() if not math.isfinite(norm)]
        self.left_out += len(bad)
        self.streak = self.streak + 1 if bad else 0
        if self.streak >= self.args.patience:
            raise UserError(
                f"{self.streak} iterations in a row made no update, as {' and '.join(bad)}, the norm of a "
                "gradient, was not finite: lower the learning rates or --guidance, and go on from an earlier "
                f"checkpoint with --resume (delete those in {self.folder} that are of after)"
            )

    @contextlib.contextmanager
    def _spare_the_run(self, what):
        """Inside, what cannot be written is said, and training goes on: a full disk may be emptied in
        time."""
        try:
            yield
        except (OSError, UserError) as error:
            note(f"{what} was not written: {first_line(error)}")

    # Saving -----------------------------------------------------------------------------------------------

    def finish(self, step, prompts):
        """What is due after an iteration: a held-out score, and a checkpoint: every --save-every,
        --save-minutes after the last one, at the end, when a rank was told to stop, and of a student that is
        better than all before it."""
        set_patience(PATIENCE, self.args)
        is_late = self._agree()
        is_best = False
        self.score = None
        if self._is_score_due(step):
            is_best = self._measure(step)
            is_late = self._agree() or is_late  # a signal may have come meanwhile
        last = step == self.args.iterations
        is_due = self.leaving or last or is_late or step % self.args.save_every == 0
        if is_due or is_best:
            self.save(step, prompts, is_best)
            self._agree()  # a signal meanwhile: there is a checkpoint of this iteration

    def _is_score_due(self, step):
        """Whether the student is scored after this iteration."""
        if not self.held_out or self.leaving:  # a run that was told to stop saves at once
            return False
        return step == self.args.iterations or step % self.args.eval_every == 0

    def _measure(self, step):
        """Scores the student, in a line of its own in metrics.jsonl -> whether the score is higher than all
        before. The ranks agree, as they all have the same score."""
        began = time.perf_counter()
        values = self.held_out.measure(self.method)
        seconds = time.perf_counter() - began
        self.clock += seconds  # no iteration's
        if is_main():
            line = {f"held_out_{name}": value for name, value in values.items()}
            self._write_line({"step": step, **line, "held_out_seconds": seconds})
        score = next(iter(values.values()))
        self.score = score if math.isfinite(score) else None
        is_best = average({"best": float(score > self.best)})["best"] == 1  # on a slow disk they may differ
        if is_best:
            self.best = score
        return is_best

    def _agree(self):
        """Sets self.leaving on all ranks where one was told to stop -> whether --save-minutes are over for
        one."""
        is_late = time.perf_counter() - self.saved >= 60 * self.args.save_minutes
        share = average({"told": float(self.signal is not None), "late": float(is_late)})
        if share["told"] and not self.leaving:
            note("told to stop: the run ends with a checkpoint of this iteration")
            if "TORCHELASTIC_RUN_ID" in os.environ:
                note("torchrun kills what takes longer than its --shutdown-timeout, 30 s if none is given")
        self.leaving = share["told"] > 0
        return share["late"] > 0

    def save(self, step, prompts, is_best=False):
        """A checkpoint, in one move, and samples of the first prompts from fixed noise. All ranks gather and
        sample, the main one writes. `latest`, and `best` if it is that, name the checkpoint only when it is
        there, and only then do others go. UserError where weights are not finite, and where the disk is
        full."""
        began = time.perf_counter()
        self._check_finite(step)
        net = self.method.G
        folder = os.path.join(self.folder, f"step_{step:06d}")
        place = write_atomically(folder) if is_main() else contextlib.nullcontext()
        with place as temporary:
            weights = self._write_state(temporary)
            with self.method.ema.use():
                if isinstance(net, Adapted):
                    if is_main():
                        save_adapter(self.student, net.read_layers(), temporary)
                else:
                    if self.method.ema.average:
                        weights = gather(net.state_dict())
                    if is_main():
                        save_network(self.teacher.denoiser, weights, os.path.join(temporary, "student"))
            if is_main():
                meta = {"step": step, **self.meta, "files": describe_files(temporary)}
                if self.score is not None:
                    meta["held_out"] = {"score": self.score, "of": self.held_out.identity}
                write_sealed(os.path.join(temporary, "meta.json"), meta)
                self._make_way_for(folder)
        if is_main():
            self._point("latest", folder)
            if is_best:
                self._point("best", folder)
            self._prune(folder)
            with self._spare_the_run("curves.png"):
                save_curves(self.metrics, os.path.join(self.folder, "curves.png"))
        with self.method.ema.use(), self._spare_the_run("the preview"):
            path = os.path.join(self.folder, "samples", f"step_{step:06d}")
            save_preview(self.student, net, prompts, self.args, path)
        wait_for_all()
        self.saved = time.perf_counter()
        self.clock += self.saved - began  # no iteration's

    def _check_finite(self, step):
        """UserError where a network's weights are not finite, before a good checkpoint goes for them."""
        parts = [part for part in self.parts.values() if isinstance(part, torch.nn.Module)]
        finite = all(is_finite(get_share(p)) for part in parts for p in part.parameters())
        if average({"finite": float(finite)})["finite"] < 1:
            raise UserError(
                f"after {step} iterations weights are not finite, and are not saved: lower the learning "
                "rates, and go on from the last checkpoint with --resume"
            )

    def _write_state(self, folder):
        """Writes every part -> the student's whole weights, so that they need not be gathered twice."""
        if is_main():
            os.makedirs(os.path.join(folder, "state"))
            # meta.json has checksums of our own: torch's would take a sixth of the time
            torch.serialization.set_crc32_options(False)
        for name, part in self.parts.items():
            zero1 = isinstance(part, ZeroRedundancyOptimizer)
            state = gather_zero1(part) if zero1 else gather(part.state_dict())
            if is_main():
                torch.save(state, os.path.join(folder, "state", f"{name}.pt"))
            if name == "G":
                weights = state
            del state  # before the next part's
        return weights

    def _make_way_for(self, folder):
        """A checkpoint of this number, which was passed over, goes; what is not ours moves aside."""
        if not os.path.lexists(folder):
            return
        if os.path.isdir(folder) and is_ours(folder):
            remove(folder)
        else:
            os.rename(folder, f"{folder}.not-ours-{time.time_ns()}")

    def _point(self, name, folder):
        write_pointer(os.path.join(self.folder, name), folder)

    def _prune(self, newest):
        """Removes all but the newest --keep whole checkpoints and the one that `best` names; none while
        updates are left out, as the newest may be of no use. Those after `newest`, the one just written, were
        passed over as damaged: they neither count nor go."""
        if self.streak:
            return
        best = follow(os.path.join(self.folder, "best"))
        folders = list_checkpoints(self.folder)
        kept = 0
        for folder in folders[folders.index(newest) :]:
            if kept < self.args.keep:
                _, problem = open_checkpoint(folder)
                if problem is None:
                    kept += 1
            elif is_ours(folder) and os.path.basename(folder) != os.path.basename(best):
                try:
                    remove(folder)
                except OSError as error:  # of NFS, where somebody reads it
                    note(f"{folder} is not removed: {first_line(error)}")


def tell_of_no_scheduler(student):
    """Says before it trains that a student will not be exported."""
    try:
        student.scheduler()
    except UserError as error:
        note(f"sample.py will draw this student, and not export it: {error}")


def describe_data(method):
    """A short name for what a method learns from: its pairs or its prompts."""
    is_of_pairs = hasattr(method, "pairs")
    checksum = identify(method.pairs.index) if is_of_pairs else compute_checksum_of_json(method.prompts)
    return checksum[:8]


def name_option(name):
    return f"--{name.replace('_', '-')}"


@torch.no_grad()
def save_preview(student, net, prompts, args, path):
    """Samples of fixed noise and of the first prompts, --batch at a time: 16 images to path.png, or 4 videos
    to path.mp4 and their frames to path.png. All ranks draw them, since shares of `net` are of no use alone;
    the main one writes."""
    teacher = student.teacher
    count = 4 if teacher.video else 16
    prompts = list(itertools.islice(itertools.cycle(prompts), count))
    latents = []
    if teacher.offload:
        teacher.offload.remember(prompts)  # all of them, while the encoders are here
    for first in range(0, count, args.batch):
        some = prompts[first : first + args.batch]
        rng = RowRNG(range(first, first + len(some)), ("preview", args.seed), teacher.device)
        latents.append(student.sample(net, rng, teacher.encode(some)))
    if not is_main():
        return
    pixels = teacher.decode(torch.cat(latents)).clamp(-1, 1)
    save_grid(pixels, f"{path}.png")
    if teacher.video and importlib.util.find_spec("imageio_ffmpeg") and importlib.util.find_spec("imageio"):
        side_by_side = torch.cat(list(pixels), dim=-1)
        save_video(side_by_side, f"{path}.mp4", teacher.fps)
