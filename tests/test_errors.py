"""Wrong input: one sentence that says what is wrong, exit code 2, no traceback, and the disk as it was."""

import contextlib
import errno
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from forks import Command

import adm
import adp
import collect_ode
import evaluate
import helpers
import sample
from support.errors import UserError, explain, launch, note
from support.files import lock_folder, read_json, write_atomically
from support.inputs import check_inputs
from support.pairs import find_problem

MAIN = {
    "collect_ode.py": collect_ode.main,
    "adp.py": adp.main,
    "adm.py": adm.main,
    "sample.py": sample.main,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, teacher_folder, prompts_file, pairs_folder):
    """A folder with two teachers, pairs, runs and prompt files, some of them damaged."""
    place = tmp_path_factory.mktemp("place")
    with contextlib.chdir(place):
        shutil.copytree(teacher_folder, "teacher")
        helpers.make_teacher("other", seed=1)
        helpers.make_teacher("video", 0, "cogvideox")
        helpers.make_teacher("flux", 0, "flux")
        os.mkdir("not-a-teacher")
        os.mkdir("half-a-teacher")
        shutil.copy("teacher/model_index.json", "half-a-teacher")

        shutil.copy(prompts_file, "prompts.txt")
        (place / "empty.txt").write_text("\n \n")
        (place / "binary.txt").write_bytes(bytes(range(256)) * 4)
        (place / "zeros.txt").write_bytes(bytes(100))
        (place / "unknown.txt").write_text("a small red circle\na small pink hexagon\n")
        (place / "text.pth").write_text("not a checkpoint\n")
        (place / "table.csv").write_text("description\na small red circle\n")

        shutil.copytree(pairs_folder, "pairs")
        shutil.copytree(pairs_folder, "pairs-damaged")
        os.truncate("pairs-damaged/00001.safetensors", 2000)
        shutil.copytree(pairs_folder, "pairs-incomplete")
        os.remove("pairs-incomplete/00002.safetensors")
        shutil.copytree(pairs_folder, "pairs-unknown")
        os.remove("pairs-unknown/index.json")
        os.mkdir("pairs-bare")
        (place / "pairs-bare/index.json").write_text('{"count": 1}')
        words = "--teacher other --prompts prompts.txt --out pairs-other --count 2 --steps 1"
        helpers.collect(*words.split())

        words = "--teacher teacher --pairs pairs --out run --lambda-pixel 0"
        adp.main([*helpers.QUICK, "--iterations", "1", *words.split()])
        shutil.copytree("run", "run-half")
        shutil.rmtree("run-half/step_000001/state")
    return place


COLLECT = "collect_ode.py --teacher teacher --out new"
COLLECT_AGAIN = "collect_ode.py --teacher teacher --out pairs --prompts prompts.txt --count 12 --shard-size 5"
COLLECT_AGAIN += " --steps 2"
ADP = "adp.py --teacher teacher --out new"
LATENT = f"{ADP} --lambda-pixel 0"
ADM = "adm.py --teacher teacher --out new"
WITH_PROMPTS = f"{ADM} --prompts prompts.txt"
SAMPLE = "sample.py --out new"
CASES = (
    # teachers
    ("adm.py --out new", "the following arguments are required: --teacher"),
    ("adm.py --teacher nowhere --prompts prompts.txt --out new", "there is no teacher 'nowhere'"),
    ("collect_ode.py --teacher nowhere --prompts prompts.txt --out new", "there is no teacher 'nowhere'"),
    (
        "adm.py --teacher not-a-teacher --prompts prompts.txt --out new",
        "the teacher 'not-a-teacher' could not be loaded",
    ),
    (
        "adm.py --teacher nobody/nothing --prompts prompts.txt --out new",
        "the teacher 'nobody/nothing' could not be loaded",
    ),
    (
        "adm.py --teacher half-a-teacher --out new --plan",
        "the config in half-a-teacher/scheduler cannot be read",
    ),
    # prompts
    (f"{COLLECT} --prompts empty.txt", "the prompt file empty.txt has no prompts"),
    (f"{ADM} --prompts empty.txt", "the prompt file empty.txt has no prompts"),
    (f"{ADM} --prompts binary.txt", "the prompt file binary.txt is not UTF-8 text"),
    (f"{ADM} --prompts zeros.txt", "the prompt file zeros.txt is not text"),
    (f"{ADM} --prompts nowhere.txt", "the prompt file nowhere.txt cannot be read"),
    (f"{ADM} --prompts teacher", "the prompt file teacher cannot be read"),
    (
        f"{ADM} --prompts unknown.txt",
        "'a small pink hexagon' has words that this teacher's tokenizer does not know: pink, hexagon",
    ),
    (f"{COLLECT} --prompts unknown.txt", "does not know: pink, hexagon"),
    # pairs
    (
        f"{LATENT} --pairs pairs-other",
        "/other, not from teacher",
    ),
    (f"{LATENT} --pairs pairs-damaged", "the shard pairs-damaged/00001.safetensors is damaged"),
    (
        f"{LATENT} --pairs pairs-incomplete",
        "the shard pairs-incomplete/00002.safetensors is missing",
    ),
    (f"{LATENT} --pairs pairs-bare", "pairs-bare/index.json is damaged, or was edited"),
    (f"{LATENT} --pairs nowhere", "there are no ODE pairs in 'nowhere'"),
    (
        "collect_ode.py --teacher teacher --prompts prompts.txt --out pairs --steps 3",
        "pairs holds results of other settings: its steps is 2, not 3",
    ),
    (
        f"{COLLECT.replace('new', 'pairs-unknown')} --prompts prompts.txt --count 2 --steps 1",
        "nobody knows of what the results in pairs-unknown are",
    ),
    # pixel backbones
    (f"{ADP} --pairs pairs --pixel-backbone nowhere.pth", "there is no SAM checkpoint at 'nowhere.pth'"),
    (f"{ADP} --pairs pairs --pixel-backbone text.pth", "'text.pth' is not a SAM checkpoint"),
    (
        "adp.py --teacher teacher --plan --pixel-backbone nowhere.pth",
        "there is no SAM checkpoint at 'nowhere.pth'",
    ),
    ("adp.py --teacher cogvideox --plan", "the pixel discriminator sees single pictures, not video"),
    # runs and checkpoints
    (f"{WITH_PROMPTS} --init nowhere", "there is no checkpoint 'nowhere'"),
    (f"{WITH_PROMPTS} --init run-half", "run-half has no complete checkpoint"),
    (
        "adm.py --teacher other --out new --prompts prompts.txt --init run",
        "/teacher, not from other",
    ),
    ("adp.py --teacher teacher --out run --pairs pairs --lambda-pixel 0", "run holds a run already"),
    (
        "adp.py --teacher teacher --out run-half --pairs pairs --lambda-pixel 0",
        "run-half holds a run already",
    ),
    (
        "adm.py --teacher teacher --out run --prompts prompts.txt --resume",
        "run/step_000001 cannot be resumed: its stage is adp, not adm",
    ),
    # samples
    (f"{SAMPLE} --student nowhere --prompt circle", "there is no checkpoint 'nowhere'"),
    (f"{SAMPLE} --student run", "give prompts: either --prompt TEXT ... or --prompts FILE"),
    (f"{SAMPLE} --teacher teacher --prompt=", "a --prompt is empty"),
    (
        f"{SAMPLE} --teacher teacher --prompt circle --side-by-side",
        "--side-by-side compares a --student with its teacher",
    ),
    ("sample.py --student run --export pairs", "pairs is there already"),
    (f"{SAMPLE} --teacher teacher --prompt circle --report x", "--report is for the model card of --export"),
    # numbers
    (f"{WITH_PROMPTS} --resolution 33", "--resolution 33x33 is not a multiple of 8"),
    (
        f"{WITH_PROMPTS} --resolution 32x",
        "argument --resolution: must be a number of pixels or HEIGHTxWIDTH, not 32x",
    ),
    (
        f"{WITH_PROMPTS} --resolution 32x00",
        "argument --resolution: must be a number of pixels or HEIGHTxWIDTH, not 32x00",
    ),
    (f"{WITH_PROMPTS} --frames 9", "--frames is for video teachers"),
    (f"{WITH_PROMPTS} --steps 0", "argument --steps: must be from 1 to 1000, not 0"),
    (
        f"{COLLECT} --prompts prompts.txt --steps 1001",
        "argument --steps: must be from 1 to 1000, not 1001",
    ),
    (f"{WITH_PROMPTS} --seed 99999999999999999999", "argument --seed: must be from 0 to 2^63 - 1"),
    (f"{WITH_PROMPTS} --batch 0", "argument --batch: must be at least 1, not 0"),
    (f"{LATENT} --pairs pairs --batch -1", "argument --batch: must be at least 1, not -1"),
    (f"{COLLECT} --prompts prompts.txt --count 0", "argument --count: must be at least 1, not 0"),
    (f"{WITH_PROMPTS} --lr -1", "argument --lr: must be at least 0"),
    (f"{WITH_PROMPTS} --lr nan", "argument --lr: must be at least 0"),
    (f"{WITH_PROMPTS} --dt 0", "--dt: must be between 0 and 1, not 0"),
    (f"{WITH_PROMPTS} --dt 1e400", "--dt: must be between 0 and 1, not 1e400"),
    (f"{WITH_PROMPTS} --dt 1e-99999999", "--dt: must be between 0 and 1, not 1e-99999999"),
    (f"{WITH_PROMPTS} --batch 99999999999", "--batch: must be at most 1000000000, not 99999999999"),
    (f"{WITH_PROMPTS} --dt 1/0", "--dt: invalid number value: '1/0'"),
    (f"{WITH_PROMPTS} --t-range 1/4 1/8", "--t-range: HIGH must be above LOW and above --dt, not 0.125"),
    (f"{WITH_PROMPTS} --first-time 3/2", "--first-time: must be from 0.001 to 1, not 3/2"),
    (
        f"{WITH_PROMPTS} --first-time 0.003 --steps 4 --iterations 1",
        "--first-time 0.003 with 4 steps: times are whole",
    ),
    (f"{WITH_PROMPTS} --first-time 0.0004", "--first-time: must be from 0.001 to 1, not 0.0004"),
    (f"{WITH_PROMPTS} --t-range 0.6 0.5", "--t-range: HIGH must be above LOW and above --dt, not 0.5"),
    (
        f"{WITH_PROMPTS} --dt 1/8 --t-range 0.02 0.1",
        "--t-range: HIGH must be above LOW and above --dt, not 0.1",
    ),
    # what a shell makes of a variable that is not set
    (f"{WITH_PROMPTS} --init=", "--init is empty: give it a value, or leave it out"),
    (f"{LATENT} --pairs=", "--pairs is empty"),
    ("sample.py --student run --export=", "--export is empty"),
    (f"{ADM} --teacher none --prompts table.csv --prompt-column description", "no teacher 'none'"),
    (f"{COLLECT} --teacher none --prompts table.csv --prompt-column description", "no teacher 'none'"),
    (f"{SAMPLE} --teacher none --prompts table.csv --prompt-column description", "no teacher 'none'"),
    (f"{COLLECT_AGAIN} --guidance 3", "its guidance is 5.0, not 3.0"),
    (f"{COLLECT_AGAIN} --guidance 0", "its guidance is 5.0, not 0.0"),
    (f"{COLLECT_AGAIN} --seed 1", "its seed is 0, not 1"),
    (f"{COLLECT_AGAIN} --precision bf16", "its precision is 'float32', not 'bfloat16'"),
    (f"{LATENT} --pairs pairs --resolution 64 --iterations 1", "check --resolution"),
    (
        f"{SAMPLE} --teacher teacher --prompt circle --fps 4",
        "--fps is for videos, and the teacher teacher draws",
    ),
    (f"{SAMPLE} --student= --teacher teacher --prompts prompts.txt", "--student is empty"),
    (f"{COLLECT} --prompts prompts.txt --teacher-lora=", "--teacher-lora is empty"),
    # options that would do nothing
    (f"{SAMPLE} --student run --prompt circle --seeds 1 0 1", "--seeds has 1 twice"),
    (f"{WITH_PROMPTS} --loss dmd --project", "--project is for --loss adm"),
    (f"{WITH_PROMPTS} --loss dmd --straight-through", "--straight-through is not for --loss dmd"),
    (f"{WITH_PROMPTS} --lora-targets to_q", "--lora-targets says what --lora adapts"),
    (f"{WITH_PROMPTS} --lora 2 --compile", "--compile is for networks that train whole"),
    (f"{WITH_PROMPTS} --gpu-gb 24", "--gpu-gb is what --plan compares with"),
    (f"{LATENT} --pairs pairs --lambda-latent 0", "after the warm-up nothing moves the student"),
    (
        f"{SAMPLE} --student run --prompt circle --steps 2",
        "leave them out, or add --side-by-side",
    ),
    (f"{SAMPLE} --student run --prompt circle --guidance 0", "or add --side-by-side"),
    (f"{SAMPLE} --student run --prompt circle --negative-prompt x", "or add --side-by-side"),
    # within what is not the command's own
    (
        f"{SAMPLE.replace('new', 'run/step_000001')} --student run --prompt circle",
        "run/step_000001, a checkpoint",
    ),
    (f"{WITH_PROMPTS.replace('--out new', '--out teacher/new')}", "/teacher, a checkpoint or a pipeline"),
    ("sample.py --student run --export run/step_000001/new", "run/step_000001, a checkpoint"),
    # what is looked at before a teacher is: there is none
    ("adm.py --teacher none --prompts prompts.txt --init nowhere", "there is no checkpoint 'nowhere'"),
    ("adm.py --teacher none --prompts prompts.txt --out run", "run holds a run already"),
    ("adm.py --teacher none --prompts prompts.txt --out text.pth", "text.pth is no folder"),
    ("adp.py --teacher none --pairs nowhere", "there are no ODE pairs in 'nowhere'"),
    (
        "adp.py --teacher none --pairs pairs --eval-every 1 --eval-prompts nowhere.txt",
        "the prompt file nowhere.txt cannot be read",
    ),
    (
        "adp.py --teacher none --pairs pairs --eval-every 1 --eval-prompts table.csv",
        "choose one with --eval-prompt-column NAME",
    ),
)


def check(code, errors, script, sentence, wanted=2):
    assert code == wanted
    assert "Traceback" not in errors
    said = [line for line in errors.splitlines() if line.startswith(f"{script}: ")]
    assert len(said) == 1, errors
    assert sentence in said[0]


def find_case(words):
    """The case with these words in its command."""
    return next(case for case in CASES if words in case[0])


@pytest.mark.parametrize("words, sentence", CASES, ids=[words for words, _ in CASES])
def test_wrong_input(place, monkeypatch, capfd, words, sentence):
    script, *arguments = words.split()
    before = helpers.take_snapshot(place)
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.argv", [script, *arguments])
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        launch(MAIN[script])
    check(end.value.code, capfd.readouterr().err, script, sentence)
    assert helpers.take_snapshot(place) == before


EVALUATE = "evaluate.py --teacher teacher --prompts prompts.txt"
IDLE = (
    (f"{ADM} --r1 0 --r2 0 --r-noise 0.2", "--r-noise: of no effect without an --r1 or --r2 above 0"),
    (f"{ADM} --r1 0 --r-noise 0.2", ""),
    (
        f"{ADM} --loss line --r1 0.1 --head-lr 1e-3 --head-width 64",
        "--r1, --head-lr, --head-width: of no effect without a discriminator, which --loss line has not",
    ),
    (f"{ADM} --loss secant --r1 0.1 --head-lr 1e-3", ""),
    (f"{ADP} --warmup 0 --warmup-lr 1e-3", "--warmup-lr: of no effect without a --warmup above 0"),
    (f"{ADP} --warmup 9 --warmup-lr 1e-3", ""),
    (
        "evaluate.py --images x=run --prompts prompts.txt --batch 2 --offload",
        "--batch, --offload: of no effect without a --teacher or a --student",
    ),
    (
        f"{LATENT} --pixel-backbone text.pth",
        "--pixel-backbone: of no effect without a --lambda-pixel above 0",
    ),
    (f"{ADP} --pixel-backbone text.pth", ""),
    (
        f"{LATENT} --eval-seeds 2 --eval-prompts x",
        "--eval-prompts, --eval-seeds: of no effect without --eval",
    ),
    (f"{ADM} --lpips-net vgg", "--lpips-net: of no effect without the metric lpips"),
    (f"{ADM} --eval-every 1 --eval-prompts x --eval-metric lpips --lpips-net vgg", ""),
    (f"{EVALUATE} --metrics fid,clip --hps-version 2.1 --clip-prefix x", "--hps-version: of no effect"),
    (f"{EVALUATE} --metrics hpsv2 --hps-version 2.1", ""),
    (f"{EVALUATE} --clip-prefix x", ""),  # the metric of most teachers
    ("sample.py --student run --export new --seeds 1 2 --batch 2", "--seeds, --batch: of no effect without"),
    ("sample.py --student run --prompt circle --seeds 1 2 --batch 2", ""),
)
PARSE = {
    "adm.py": lambda words: helpers.training_arguments("adm", words),
    "adp.py": lambda words: helpers.training_arguments("adp", words),
    "sample.py": sample.parse_arguments,
    "evaluate.py": evaluate.parse,
}


@pytest.mark.parametrize("words, sentence", IDLE)
def test_options_without_effect_are_told_of(place, monkeypatch, capfd, words, sentence):
    monkeypatch.chdir(place)
    script, *rest = words.split()
    PARSE[script](rest)
    said = capfd.readouterr().err
    assert sentence in said if sentence else not said


KNOWN_WITHOUT_WEIGHTS = (
    (f"{ADP} --pairs pairs --pixel-backbone nowhere.pth", "there is no SAM checkpoint at 'nowhere.pth'"),
    (
        f"{ADP} --pairs pairs --pixel-backbone not-a-teacher",
        "the pixel backbone 'not-a-teacher' could not be",
    ),
    ("adp.py --teacher video --out new --pairs pairs", "the pixel discriminator sees single pictures"),
    (f"{WITH_PROMPTS} --student-guidance 2", "--student-guidance is for teachers that are told"),
    (f"{WITH_PROMPTS} --init run --lora 2", "or from a student of the same --lora and --lora-targets; run/"),
    (f"{WITH_PROMPTS} --lora 2", "pip install peft"),
    (WITH_PROMPTS, "pip install matplotlib"),
    (WITH_PROMPTS, "pip install torchvision"),
    (f"{ADP} --pairs pairs", "pip install segment-anything"),
    (f"{WITH_PROMPTS} --teacher-lora text.pth", "pip install peft"),
    (f"{COLLECT} --prompts prompts.txt --teacher-lora nowhere", "there is no file --teacher-lora nowhere"),
    (
        f"{SAMPLE} --teacher teacher --prompt circle --teacher-lora text.pth",
        "text.pth is no .safetensors file",
    ),
    (
        f"{WITH_PROMPTS} --eval-every 1 --eval-prompts prompts.txt --eval-metric clip",
        "pip install open_clip_torch",
    ),
    (
        f"{ADP} --pairs pairs --eval-every 1 --eval-prompts prompts.txt --eval-metric lpips",
        "pip install lpips",
    ),
    ("evaluate.py --teacher teacher --prompts prompts.txt --metrics fid,hpsv2", "pip install torchmetrics"),
    ("evaluate.py --teacher none --prompts table.csv --prompt-column description", "no teacher 'none'"),
    (
        f"{COLLECT} --teacher flux --prompts prompts.txt --negative-prompt red",
        "guided by a second pass; this is not",
    ),
)


@pytest.mark.parametrize("words, sentence", KNOWN_WITHOUT_WEIGHTS)
def test_what_is_known_without_weights_is_said_before_they_are_read(place, monkeypatch, words, sentence):
    """Those of a real teacher take minutes."""
    monkeypatch.chdir(place)
    monkeypatch.setattr("support.loading.load_part", None)
    if sentence.startswith("pip install "):
        package = sentence.split()[-1].removesuffix("_torch").replace("-", "_")
        for name in (package, f"{package}.modeling"):
            monkeypatch.setitem(sys.modules, name, None)
    script, *rest = words.split()
    with pytest.raises(UserError, match=re.escape(sentence)):
        (MAIN | {"evaluate.py": evaluate.main})[script](rest)
    assert not os.path.exists("new")


def test_wrong_input_to_the_real_command(place):
    words, sentence = find_case("adm.py --teacher nowhere")
    script, *arguments = words.split()
    before = helpers.take_snapshot(place)
    result = helpers.run_script(script, *arguments, folder=place)
    check(result.returncode, result.stderr, script, sentence)
    assert result.stdout == ""
    assert helpers.take_snapshot(place) == before


def test_wrong_input_to_two_processes(place):
    """They end, and one of them speaks."""
    words, sentence = find_case("pairs-other")
    before = helpers.take_snapshot(place)
    running = Command("adp", words.split()[1:], ranks=2).run(place)
    errors = running.read()
    shutil.rmtree(running.folder)
    assert 2 in running.codes.values()
    assert 0 not in running.codes.values()
    assert errors.count(sentence) == 1
    assert "adp.py: " in errors
    assert "UserError" not in errors
    assert helpers.take_snapshot(place) == before


# ----------------------------------------------------------------------------------------------------------
# What is no mistake in an argument
# ----------------------------------------------------------------------------------------------------------

ENDS = (
    (KeyboardInterrupt(), 130, "interrupted"),
    (OSError(errno.ENOSPC, "No space left on device", "runs/a"), 2, "runs/a: No space left on device"),
    (PermissionError(errno.EACCES, "Permission denied", "runs/a"), 2, "runs/a: Permission denied"),
    (torch.OutOfMemoryError("CUDA out of memory"), 2, "the GPU's memory is full: lower --batch"),
    (RuntimeError("CUDA error: invalid device ordinal"), 2, "there are fewer GPUs on this machine"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "the machine's memory is full"),
    (MemoryError(), 2, "the machine's memory is full"),
    (
        ValueError(
            "Error initializing torch.distributed using env:// rendezvous: environment variable MASTER_ADDR "
            "expected, but not set"
        ),
        2,
        "MASTER_ADDR expected, but not set: start with torchrun",
    ),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), 2, "give --workers 0"),
    (BrokenPipeError(errno.EPIPE, "Broken pipe"), 2, "the output was closed before the end"),
    (
        RuntimeError("[pair.cc] Connection closed by peer [::1]:5"),
        2,
        "the connection to another rank is lost",
    ),
)


def end_with(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize("rank", ("0", "1"))
@pytest.mark.parametrize("error, code, sentence", ENDS, ids=[end[2] for end in ENDS])
def test_ends_of_any_rank_are_a_sentence(monkeypatch, capfd, error, code, sentence, rank):
    """The main rank speaks at once, another one after a while, in which torchrun may end it."""
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setattr("sys.argv", ["adm.py"])
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as end:
        launch(end_with(error))
    check(end.value.code, capfd.readouterr().err, "adm.py", sentence, code)
    assert bool(waited) == (rank == "1" or "connection" in sentence)


@pytest.mark.parametrize("script", (*MAIN, "evaluate.py"))
def test_a_full_gpu_is_told_options_that_the_script_has(monkeypatch, script):
    monkeypatch.setattr("sys.argv", [script])
    says = explain(torch.OutOfMemoryError("CUDA out of memory"))
    assert ("--plan" in says) == (script in ("adp.py", "adm.py"))
    assert ("metrics" in says) == (script == "evaluate.py")
    assert ("--offload" in says) == (script in ("sample.py", "collect_ode.py", "evaluate.py"))


def test_a_wrong_option_is_said_by_the_main_rank_even_if_it_is_late(monkeypatch, capfd):
    """torchrun ends all ranks when one does."""
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("sys.argv", ["adm.py", "--teacher", "none", "--batch", "0"])
    with pytest.raises(SystemExit) as end:
        launch(adm.main)
    check(end.value.code, capfd.readouterr().err, "adm.py", "argument --batch: must be at least 1")
    assert waited and waited[0] > 1


HALF_RANKS = (
    ({"WORLD_SIZE": "2"}, "the environment has WORLD_SIZE=2: start with torchrun"),
    ({"RANK": "1"}, "the environment has RANK=1: start with torchrun"),
    ({"RANK": "", "WORLD_SIZE": "1"}, "the environment has RANK= and WORLD_SIZE=1"),
    ({"RANK": "2", "WORLD_SIZE": "2"}, "the environment has RANK=2 and WORLD_SIZE=2"),
    ({"RANK": "0", "WORLD_SIZE": "two"}, "the environment has RANK=0 and WORLD_SIZE=two"),
    ({"RANK": "one", "WORLD_SIZE": "2"}, "the environment has RANK=one and WORLD_SIZE=2"),
)


@pytest.mark.parametrize("environment, sentence", HALF_RANKS)
def test_ranks_without_torchrun(monkeypatch, capfd, environment, sentence):
    """Else a process with RANK=1 alone would train, and write nothing."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("sys.argv", ["adm.py"])
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        launch(lambda: pytest.fail("the work began"))
    check(end.value.code, capfd.readouterr().err, "adm.py", sentence)


def test_samples_are_drawn_by_one_process(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="start it without torchrun"):
        sample.main(["--teacher", "sdxl", "--prompt", "a circle"])


def test_output_that_the_shell_has_closed_goes_nowhere(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    launch(lambda: print("a picture"))
    sys.stdout.close()


class DeadTerminal:
    """Standard error whose terminal was closed."""

    def write(self, text):
        raise OSError(errno.EIO, "Input/output error")

    def flush(self):
        self.write("")


@pytest.mark.parametrize("part", ("the bar", "the notes"))
def test_training_outlives_its_terminal(adm_arguments, tmp_path, monkeypatch, part):
    """And leaves the checkpoint that it leaves when the terminal's end tells it to stop."""
    monkeypatch.setattr("support.run.save_preview", lambda *args: None)
    if part == "the notes":

        def agree(run):
            monkeypatch.setattr("sys.stderr", DeadTerminal())
            note("told to stop")
            return False

        monkeypatch.setattr("support.run.Run._agree", agree)
    else:

        def break_pipe(bar, *args):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

        monkeypatch.setattr("support.run.tqdm.update", break_pipe)
        monkeypatch.setattr("support.run.tqdm.close", break_pipe)
    adm.main([*adm_arguments, "--loss", "dmd", "--iterations", "2", "--out", str(tmp_path / "run")])
    assert (tmp_path / "run" / "step_000002" / "meta.json").exists()


FULL_DISK = (
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    OSError(errno.EFBIG, "File too large"),
    RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 2772096 vs 2772048"),
    RuntimeError("[enforce fail at inline_container.cc:659] . PytorchStreamWriter: file write failed"),
    Exception("Error while serializing: I/O error: Disk quota exceeded (os error 122)"),
)


@pytest.mark.parametrize("error", FULL_DISK, ids=str)
def test_a_full_disk_and_a_full_quota_are_one_sentence(tmp_path, error):
    with pytest.raises(UserError, match="the disk is full, or your share of it"):
        with write_atomically(str(tmp_path / "file")):
            raise error
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("read", (read_json, lambda path: find_problem(path, "")), ids=("json", "shard"))
def test_what_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch, read):
    """It may be whole, and what is damaged is written anew. (root reads all, so that no mode would do.)"""
    path = tmp_path / "file"
    path.write_text("{}")

    def refuse(path, *args, **options):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(PermissionError):
        read(str(path))


def test_a_stream_of_prompts_is_read_once(tmp_path, monkeypatch):
    """As the shell's <(...), which is empty after."""
    os.mkfifo(tmp_path / "stream")
    (tmp_path / "file").write_text("a circle\n")
    read = []
    monkeypatch.setattr("support.inputs.read_held_out_prompts", lambda args: read.append(args.eval_prompts))
    words = ["--teacher", "sdxl", "--out", str(tmp_path / "run"), "--eval-every", "1", "--eval-prompts"]
    for name in ("stream", "file"):
        check_inputs(helpers.training_arguments("adm", [*words, str(tmp_path / name)]))
    assert read == [str(tmp_path / "file")]


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        launch(lambda: 1 / 0)


def test_output_that_nobody_reads_or_that_is_no_unicode():
    words = "from support.errors import launch; launch(lambda: print('\\u00fc' * {}))"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", words.format(1)]
    options = {"cwd": helpers.ROOT, "env": environment, "text": True, "timeout": 100}
    result = subprocess.run(command, capture_output=True, **options)
    assert (result.returncode, result.stdout, result.stderr) == (0, "\\xfc\n", "")
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", words.format(100000)]
    result = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, **options)
    assert (result.returncode, result.stderr) == (2, "-c: the output was closed before the end\n")


def test_interrupted_while_the_libraries_load():
    command = [sys.executable, "-c", "import support.interrupt; raise KeyboardInterrupt"]
    result = subprocess.run(command, cwd=helpers.ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (130, "-c: interrupted\n")


@pytest.mark.parametrize("script", (*MAIN, "evaluate.py"))
def test_every_script_is_launched(script):
    """From its first import to its end it says what is wrong in a sentence."""
    with open(os.path.join(helpers.ROOT, script)) as file:
        lines = file.read().splitlines()
    imports = [line for line in lines if line.startswith(("import ", "from "))]
    assert imports[0].startswith("import support.interrupt")
    assert lines[-2:] == ['if __name__ == "__main__":', "    launch(main)"]


def test_a_disk_without_locks_is_named(tmp_path, monkeypatch, capsys):
    def flock(lock, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with lock_folder(str(tmp_path)):
        assert f"{tmp_path}/.lock cannot be locked (No locks available)" in capsys.readouterr().err
