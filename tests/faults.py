"""Faults: kills, signals, full disks, damaged files and hostile input, in numbers, at random but repeatable.

    python tests/faults.py                 all of them, about an hour of one core
    python tests/faults.py --only kills,signals --count 20 --seed 3

Each trial runs the real main() of a stage, on one or two forked ranks (tests/forks.py). A trial's outcome is
a few words; those that begin with FAILED are failures, and are printed. What must hold: a killed, told or
starved command, repeated, gives the files of an undisturbed one, bit for bit; damage is noticed, or harms
nothing; a mistake is one sentence and exit code 2."""

import argparse
import collections
import contextlib
import functools
import hashlib
import json
import os
import pathlib
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.dirname(os.path.abspath(__file__))]

import test_images
import test_prompts
import torch
from forks import PATIENCE, SCRIPTS, Command
from odd_teachers import ODD, RIGHT
from PIL import Image

import helpers
from support import arguments, files
from support.files import compute_checksum
from tiny import shapes

# A killed process leaves what it wrote with the system; to wait for the disk, as a power cut would demand,
# takes minutes where others write much.
files.flush = lambda path: None

# ----------------------------------------------------------------------------------------------------------
# The world of the trials
# ----------------------------------------------------------------------------------------------------------


class World:
    """A tiny teacher and all that the stages make of it, made once; commands that make it again elsewhere."""

    def __init__(self, place):
        self.place = place
        self.teacher = helpers.make_teacher(os.path.join(place, "teacher"), seed=0)
        self.sam = helpers.save_sam(helpers.make_sam(seed=0), os.path.join(place, "sam.pth"))
        self.prompts = os.path.join(place, "prompts.txt")
        prompts, _, _ = shapes.split_prompts()
        with open(self.prompts, "w") as file:
            file.write("\n".join(prompts[:6]) + "\n")
        self.expected = {}  # (script, ranks): (digest of its files, seconds)
        self.pairs = self.make("collect_ode")
        self.adp = self.make("adp")
        self.run = self.make("adm")

    def command(self, script, out, ranks=1, words=()):
        """The command of a script that writes to `out`."""
        source = ["--teacher", self.teacher]
        if script in ("adp", "adm"):
            source += [
                "--batch",
                "2",
                "--iterations",
                "6",
                "--save-every",
                "2",
                "--keep",
                "2",
                "--log-every",
                "1",
                "--resume",
            ]
            source += ["--head-width", "32", "--lr", "1e-4", "--head-lr", "1e-4"]
        own = {
            "collect_ode": lambda: f"--count 12 --shard-size 3 --steps 2 --batch 3 --prompts {self.prompts}",
            "adp": lambda: f"--pairs {self.pairs} --pixel-backbone {self.sam} --warmup 2",
            "adm": lambda: f"--prompts {self.prompts} --steps 2 --fake-lr 1e-4 --ema 0.9",
            "sample": lambda: f"--student {self.run} --prompts {self.prompts} --seeds 0 1",
            "evaluate": lambda: (
                f"--steps 1 --student {self.run} --prompts {self.prompts} --seeds 2 --batch 2 --workers 0 "
                "--metrics oracle"
            ),
        }
        words = [*source, *own[script]().split(), "--out", out, *words]
        return Command(script, words, ranks)

    def make(self, script):
        """Runs a script undisturbed -> its folder."""
        self.expect(script, 1)
        return os.path.join(self.place, script)

    def expect(self, script, ranks):
        """(digest, seconds) of an undisturbed command."""
        if (script, ranks) not in self.expected:
            folder = os.path.join(self.place, script if ranks == 1 else f"{script}-{ranks}")
            running = self.command(script, folder, ranks).run(self.place)
            if any(running.codes.values()):
                raise RuntimeError(f"the undisturbed {script} fails: {running.read()}")
            self.expected[script, ranks] = (digest(folder), running.seconds)
        return self.expected[script, ranks]

    @functools.cache  # noqa: B019
    def make_teacher(self, family):
        return helpers.make_teacher(os.path.join(self.place, f"plain-{family}"), 0, family)

    @contextlib.contextmanager
    def folder(self):
        """A folder for a trial, which is removed."""
        place = tempfile.mkdtemp(prefix="trial-", dir=self.place)
        try:
            yield place
        finally:
            shutil.rmtree(place)


def digest(folder):
    """{file below a folder: hash of what any repetition has to reproduce}."""
    found = {}
    for path in files.list_files(folder):
        name = os.path.relpath(path, folder)
        # of a run its end counts: where it was told to stop there is one checkpoint more, and a preview that
        # it had no time for is not drawn again
        if re.search(r"step_00000[1-5]|^samples/", name):
            continue
        with open(path, "rb") as file:
            content = file.read()
        if os.path.basename(name) in ("report.json", "curves.png", "table.md", "bars.png"):
            content = b""  # seconds
        if os.path.basename(name) in ("meta.json", "index.json", "metrics.jsonl"):
            content = drop_times(content)
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def drop_times(content):
    """The lines of JSON without what differs from run to run."""
    differ = ('"out":', '"checksum":', '"student":', '"written":')
    kept = [line for line in content.decode().splitlines() if not any(word in line for word in differ)]
    parsed = []
    for line in kept:
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict):
                value = {name: v for name, v in value.items() if name not in ("seconds", "peak_mb")}
                line = json.dumps(value)
        parsed.append(line)
    return "\n".join(parsed).encode()


def compare(folder, expected):
    """None where a folder's digest is as expected, or what differs."""
    found = digest(folder)
    different = sorted(
        name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)
    )
    return f"{len(different)} files differ: {', '.join(different[:3])}" if different else None


def repeat(world, script, ranks, out):
    """Repeats a disturbed command -> what is wrong with the result, or None."""
    running = world.command(script, out, ranks).run(world.place)
    if any(running.codes.values()):
        return f"the repetition ends with {list(running.codes.values())}: {running.read()[-300:]}"
    return running.find_fault(script) or compare(out, world.expect(script, ranks)[0])


# ----------------------------------------------------------------------------------------------------------
# The faults
# ----------------------------------------------------------------------------------------------------------

STAGES = ("collect_ode", "adp", "adm", "evaluate")  # those of several ranks


def kill(world, dice):
    """SIGKILL to a rank at any moment, once or twice; then the command again."""
    script = dice.choice(STAGES)
    ranks = dice.choice((1, 2))
    _, seconds = world.expect(script, ranks)
    with world.folder() as place:
        out = os.path.join(place, "out")
        for _ in range(dice.choice((1, 2))):
            running = world.command(script, out, ranks).start(place)
            wait_until(running, dice.uniform(0, 1.2 * seconds))
            running.send(signal.SIGKILL, dice.randrange(ranks))
            running.wait()
        problem = repeat(world, script, ranks, out)
        return f"FAILED: {problem}" if problem else f"{script}: the same files in the end"


def wait_until(running, seconds):
    while running.poll() and time.monotonic() - running.since < seconds:
        time.sleep(0.005)


def tell(world, dice):
    """SIGTERM, SIGINT or SIGHUP to a rank at any moment, once or twice; then the command again."""
    script = dice.choice((*STAGES, "adp", "adm"))
    ranks = dice.choice((1, 2))
    number = dice.choice((signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
    _, seconds = world.expect(script, ranks)
    with world.folder() as place:
        out = os.path.join(place, "out")
        running = world.command(script, out, ranks).start(place)
        moment = dice.uniform(0, 1.1 * seconds)
        for _ in range(dice.choice((1, 2))):
            wait_until(running, moment)
            running.send(number, dice.randrange(ranks))
            moment += dice.uniform(0, 0.1)
        codes = running.wait()
        errors = running.read()
        if "Traceback" in errors:
            return f"FAILED: traceback at {number.name}: {errors[-300:]}"
        if running.seconds > PATIENCE:
            return "FAILED: hangs"
        saved = os.path.exists(os.path.join(out, "latest"))
        problem = repeat(world, script, ranks, out)
        if problem:
            return f"FAILED after {number.name}: {problem}"
        before = all(code < 0 for code in codes) or not saved
        return f"{script}: ends {'at once' if before else 'saved'}, the same files in the end"


def fill_disk(world, dice):
    """A disk that is full at any moment; then the command again with room."""
    script = dice.choice((*STAGES, "sample", "adp", "adm"))
    expected, _ = world.expect(script, 1)
    with world.folder() as place:
        disk = os.path.join(place, "disk")
        os.mkdir(disk)
        needed = sum(os.path.getsize(path) for path in files.list_files(os.path.join(world.place, script)))
        size = int(needed * dice.uniform(0.02, 1.4)) + 8192
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk]
        if subprocess.run(mount, capture_output=True).returncode:
            return "NOT RUN: no right to mount a disk of a chosen size here"
        try:
            out = os.path.join(disk, "out")
            running = world.command(script, out).run(place)
            fault = running.find_fault(script)
            sentence = running.read_sentence(script)
            room = os.path.join(place, "room")
            shutil.copytree(out, room) if os.path.isdir(out) else os.mkdir(room)
        finally:
            subprocess.run(["umount", disk], check=True)
        if fault:
            return f"FAILED: {fault}"
        if any(running.codes.values()) and "the disk is full" not in sentence:
            return f"FAILED: says {sentence!r}"
        problem = repeat(world, script, 1, room)
        if problem:
            return f"FAILED: {problem}"
        how = "one sentence" if any(running.codes.values()) else "training goes on"
        return f"{how}, the same files in the end"


def spoil(path, dice):
    """Damages a file, or removes it -> how."""
    size = os.path.getsize(path)
    kind = dice.choice(("cut", "flip", "zeros", "gone", "longer", "empty", "folder"))
    if kind == "gone":
        os.remove(path)
    elif kind == "folder":
        os.remove(path)
        os.mkdir(path)
    elif kind == "cut":
        os.truncate(path, dice.randrange(max(1, size)))
    elif kind == "empty":
        os.truncate(path, 0)
    elif kind == "longer":
        with open(path, "ab") as file:
            file.write(dice.randbytes(100))
    else:
        with open(path, "r+b") as file:
            start = dice.randrange(max(1, size))
            file.seek(start)
            byte = file.read(1) or b"\0"
            file.seek(start)
            file.write(bytes(64) if kind == "zeros" else bytes([byte[0] ^ (1 << dice.randrange(8))]))
    return kind


# what is damaged: what the command reads of the world (True), or what it wrote itself and reads again
READERS = (
    ("collect_ode", "teacher"),
    ("collect_ode", "out"),
    ("adp", "collect_ode"),
    ("adp", "sam.pth"),
    ("adp", "out"),
    ("adm", "prompts.txt"),
    ("adm", "out"),
    ("adm", "out"),
    ("sample", "adm"),
    ("evaluate", "adm"),
    ("evaluate", "out"),
    ("evaluate", "out"),
)


def damage(world, dice):
    """A damaged file among those that a command reads: noticed, or the result is as without it."""
    script, what = dice.choice(READERS)
    with world.folder() as place:
        out = os.path.join(place, "out")
        if what == "out":
            world.expect(script, 1)
            shutil.copytree(os.path.join(world.place, script), out)
            target = out
        else:
            target = os.path.join(place, what)
            source = os.path.join(world.place, what)
            shutil.copytree(source, target) if os.path.isdir(source) else shutil.copy(source, target)
        paths = sorted(files.list_files(target))
        path = dice.choice(paths)
        how = spoil(path, dice)
        name = os.path.relpath(path, place)
        command = world.command(script, out)
        moved = [word.replace(os.path.join(world.place, what), target) for word in command.words]
        further = ["--iterations", "8"] if what == "out" and script in ("adp", "adm") else []
        running = Command(script, [*moved, *further]).run(place)
        fault = running.find_fault(script)
        if fault:
            return f"FAILED: {name} ({how}): {fault}"
        if any(running.codes.values()):
            return "refused with a sentence"
        if "is passed over" in running.read():
            return "the checkpoint before is taken"
        if further or is_weights_of_others(name):
            return "taken as it is"
        problem = compare(out, world.expect(script, 1)[0])
        if problem is None:
            return "harmless: the same files in the end"
        if problem == f"1 files differ: {os.path.relpath(path, out)}" and name.endswith(".png"):
            return "not read again: what is made of it is there"
        harmless = name.endswith((".txt", ".json", ".model")) and what in ("prompts.txt", "teacher")
        return "taken as it is" if harmless else f"FAILED: {name} ({how}): unnoticed, {problem}"


def is_weights_of_others(name):
    """Whether it is a file of weights that no command of this project wrote, and that has no checksum."""
    return name.startswith(("teacher/", "sam.pth"))


# ----------------------------------------------------------------------------------------------------------
# Command lines
# ----------------------------------------------------------------------------------------------------------

VALUES = [
    "",
    " ",
    "0",
    "-1",
    "1",
    "2",
    "3",
    "4",
    "8",
    "0.5",
    "1/8",
    "1/0",
    "nan",
    "inf",
    "-inf",
    "1e-30",
    "1e30",
]
VALUES += [
    "0x10",
    "1_0",
    "٣",
    "99999999999999999999",
    "true",
    "None",
    "x",
    "..",
    "/",
    ".",
    "-",
    "--",
    "~",
    "$HOME",
]
VALUES += [
    "a/b/c",
    "a" * 300,
    "a b",
    "'",
    '"',
    "\n",
    "\udcff",
    "名",
    "*",
    "a=b",
    "=",
    "=x",
    "x=",
    "a,b",
    ",",
    "32x32",
]
VALUES += [
    "/dev/null",
    "/proc/x",
    "file.txt",
    "folder",
    "folder/",
    "sdxl",
    "cogvideox",
    "owner/name",
    "clip,fid",
]


def list_options(script):
    """[(option, its choices or None, whether it takes a value)] of a script."""
    found = []

    class Found(Exception):
        pass

    def collect(parser, argv=None):
        found.extend(parser._actions)
        raise Found

    parse_args = arguments.Parser.parse_args
    arguments.Parser.parse_args = collect
    try:
        with contextlib.suppress(Found):
            SCRIPTS[script].main([])
    finally:
        arguments.Parser.parse_args = parse_args
    return [(action.option_strings[-1], action.choices, action.nargs != 0) for action in found]


def type_command(world, dice):
    """A command line with one to three options changed, added or left half: it runs, or says one sentence."""
    script = dice.choice(list(SCRIPTS))
    with world.folder() as place:
        with open(os.path.join(place, "file.txt"), "w") as file:
            file.write("a small red circle\n")
        os.mkdir(os.path.join(place, "folder"))
        words = world.command(script, "out").words
        if script in ("adp", "adm"):
            words += ["--iterations", "1"]
        for _ in range(dice.randint(1, 3)):
            words = [*words, *choose_words(script, dice)]
        running = Command(script, words).start(place)
        wait_until(running, 20)
        if running.poll():
            running.send(signal.SIGKILL, 0)
            running.wait()
            return "runs for long"
        running.wait()
        fault = running.find_fault(script)
        if fault:
            return f"FAILED: {script} {shlex.join(words[2:])}: {fault}"
        return "refused with a sentence" if any(running.codes.values()) else "runs"


def choose_words(script, dice):
    """An option with a value, at times half or misspelt."""
    option, choices, takes_value = dice.choice(list_options(script))
    value = dice.choice([*choices, *VALUES[:3]] if choices else VALUES)
    if dice.random() < 0.1:
        return dice.choice(([option], [option[:-1], value], [value], [f"{option}={value}"]))
    return [option, value] if takes_value else [option]


# ----------------------------------------------------------------------------------------------------------
# Other people's files
# ----------------------------------------------------------------------------------------------------------


def try_teacher(odd, world, dice):
    """An odd teacher of tests/odd_teachers.py, loaded by a command: right, or refused by name."""
    with world.folder() as place:
        folder = os.path.join(place, "teacher")
        shutil.copytree(world.make_teacher(odd.family), folder)
        odd.change(folder)
        words = f"--teacher {folder} --count 2 --steps 2 --prompts {world.prompts} --out pairs"
        command = Command("collect_ode", words.split())
        running = command.run(place)
        fault = running.find_fault(command.script)
        return judge(odd.name, odd.expected == RIGHT, running, fault, command.script)


def try_file(name, content, is_right, world, dice):
    """A picture or a prompt file of tests/test_images.py or tests/test_prompts.py, evaluated."""
    with world.folder() as place:
        prompts = os.path.join(place, "prompts.txt")
        pictures = os.path.join(place, "pictures")
        os.mkdir(pictures)
        if callable(content):
            with open(prompts, "w") as file:
                file.write("a red circle\n")
            content(pathlib.Path(pictures, name))
            shutil.copy(os.path.join(pictures, name), os.path.join(pictures, f"b{name}"))
        else:
            prompts = os.path.join(place, name)
            with open(prompts, "wb") as file:
                file.write(content)
            for i in range(4):
                Image.new("RGB", (64, 64), (40 * i, 0, 0)).save(os.path.join(pictures, f"{i}.png"))
        words = f"--images x={pictures} --prompts {prompts} --metrics lpips --lpips-net random".split()
        command = Command("evaluate", [*words, "--lpips-size", "64", "--workers", "0"])
        running = command.run(place)
        return judge(name, is_right, running, running.find_fault(command.script), command.script)


def judge(name, is_right, running, fault, script):
    """The outcome of what is to be taken, or to be refused with a sentence."""
    is_taken = not any(running.codes.values())
    if fault:
        return f"FAILED: {name}: {fault}"
    if is_taken != is_right:
        return f"FAILED: {name}: {'taken' if is_taken else running.read_sentence(script)}"
    return "right, and taken" if is_right else "refused with a sentence"


def list_strange_files():
    """Trials of all pictures and prompt files that the tests know."""
    trials = []
    for module in (test_images, test_prompts):
        for cases, is_right in ((module.RIGHT, True), (module.WRONG, False)):
            for name, content, *_ in cases.values():
                trials.append(functools.partial(try_file, name, content, is_right))
    return trials


FAULTS = {  # name: the trials
    "kills": 100 * [kill],
    "signals": 100 * [tell],
    "full disks": 50 * [fill_disk],
    "damage": 300 * [damage],
    "command lines": 1000 * [type_command],
    "teachers": [functools.partial(try_teacher, odd) for odd in ODD],
    "files": list_strange_files(),
}


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help=f"comma-separated: {', '.join(FAULTS)}")
    parser.add_argument("--count", type=int, help="trials of each kind")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    chosen = args.only.split(",") if args.only else list(FAULTS)
    failures = 0
    with tempfile.TemporaryDirectory() as place:
        world = World(place)
        for name in chosen:
            failures += run_trials(world, name, args)
        print(f"checksums: {measure_checksums(place):.1f} GB/s of a file in memory")
    print(f"{failures} failures")
    return int(failures > 0)


def measure_checksums(place):
    """How fast a file is checked, in 1e9 bytes a second, where the disk does not hold it up."""
    path = os.path.join(place, "large")
    with open(path, "wb") as file:
        file.write(os.urandom(2**20) * 512)
    start = time.monotonic()
    compute_checksum(path)
    return os.path.getsize(path) / 1e9 / (time.monotonic() - start)


def run_trials(world, name, args):
    """Runs the trials of a kind, prints the counts by outcome -> the number of failures."""
    trials = FAULTS[name][: args.count]
    outcomes = collections.Counter()
    start = time.monotonic()
    for i, trial in enumerate(trials):
        outcome = trial(world, random.Random(f"{args.seed}/{name}/{i}"))
        if outcome.startswith("FAILED"):
            print(f"{name} {i}: {outcome}", flush=True)
            outcome = "FAILED"
        outcomes[outcome] += 1
    print(f"\n{name}: {len(trials)} trials, {time.monotonic() - start:.0f} s")
    for outcome, number in outcomes.most_common():
        print(f"  {number:4} {outcome}")
    print(flush=True)
    return sum(number for outcome, number in outcomes.items() if outcome.startswith(("FAILED", "NOT RUN")))


if __name__ == "__main__":
    raise SystemExit(main())
