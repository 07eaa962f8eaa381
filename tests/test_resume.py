"""An interrupted and resumed run is the uninterrupted one, bit for bit; and what a checkpoint is."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from forks import Command
from safetensors.torch import load_file, save_file

import adm
import adp
import common
import evaluate
import helpers
from support import checkpoints, files, inputs, pairs, training
from support import run as runs
from support.checkpoints import compute_global_batch, find_checkpoint
from support.errors import UserError
from support.files import remove
from support.offload import Offload


class Interrupted(Exception):
    pass


@pytest.fixture
def interrupt(monkeypatch):
    """A function that runs main(arguments) up to iteration `step`, after its line of metrics."""

    def run_until(step, main, arguments):
        log = runs.Run.log

        def stop(run, now):
            log(run, now)
            if now == step:
                raise Interrupted

        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(runs.Run, "log", stop)
            main(arguments)

    return run_until


RESUMED = {
    # the checkpoint is in the warm-up, the end is after it
    "adp across the warm-up": (adp, "--warmup 3 --ema 0.9"),
    "adp": (adp, "--warmup 1 --decay 0.5"),
    "adm": (adm, "--ema 0.9 --ttur 2 --steps 2 --decay 0.5"),
    "dmd": (adm, "--loss dmd"),
}


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_run_is_the_uninterrupted_one(request, tmp_path, interrupt, name):
    stage, options = RESUMED[name]
    arguments = request.getfixturevalue(f"{stage.__name__}_arguments") + options.split()
    arguments += ["--iterations", "4", "--save-every", "2"]
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    stage.main([*arguments, "--out", str(whole)])
    interrupt(3, stage.main, [*arguments, "--out", str(parts)])
    assert (parts / "latest").read_text() == "step_000002\n"
    assert [line["step"] for line in helpers.read_metrics(parts)] == [1, 2, 3]
    stage.main([*arguments, "--out", str(parts), "--resume"])

    assert len(helpers.read_metrics(whole)) == 4
    assert helpers.read_metrics(parts) == helpers.read_metrics(whole)
    weights = []
    for run in (whole, parts):
        weights.append(load_file(run / "step_000004/student/diffusion_pytorch_model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    states = [helpers.read_state(run / "step_000004") for run in (whole, parts)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.fixture(scope="session")
def dmd(adm_arguments):
    """A function: a run's folder, further words -> the arguments of a two-step student by the DMD loss."""

    def make_arguments(folder, words=""):
        options = f"--loss dmd --steps 2 --no-checkpointing {words}"
        return [*adm_arguments, "--out", str(folder), *options.split()]

    return make_arguments


@pytest.fixture(scope="module")
def finished(tmp_path_factory, dmd):
    folder = tmp_path_factory.mktemp("runs") / "finished"
    adm.main(dmd(folder, "--save-every 1"))
    return folder


def test_student_is_a_plain_model_folder(finished, teacher):
    net = UNet2DConditionModel.from_pretrained(finished / "step_000002/student")
    assert all(p.isfinite().all() for p in net.parameters())
    pairs = zip(net.parameters(), teacher.denoiser.parameters())
    assert not all(p.equal(q.float()) for p, q in pairs)


def test_checkpoint_says_what_it_holds(finished, teacher):
    for path in (finished, finished / "step_000002"):
        net, student, meta = helpers.load_student(str(path), teacher)
        assert student.parametrisation == "teacher"
        assert student.times == [1000, 500]
        assert meta["step"] == 2
        assert meta["arguments"]["loss"] == "dmd"
    steps = ["step_000001", "step_000002"]
    assert sorted(os.listdir(finished)) == ["curves.png", "latest", "metrics.jsonl", "samples", *steps]
    assert sorted(os.listdir(finished / "samples")) == [f"{step}.png" for step in steps]


def test_a_student_keeps_its_first_time(teacher, dmd, tmp_path):
    """As DMD2's one step: it is the checkpoint's own, also for those that start from it, unless told."""
    adm.main(dmd(tmp_path, "--first-time 0.4 --iterations 1"))
    _, student, _ = common.open_student(str(tmp_path), teacher)
    assert student.times == [400, 200]
    for options, times in (("", [400, 200]), ("--steps 1 --first-time 1", [1000])):
        method = helpers.make_method(adm, dmd(tmp_path / "next", f"--init {tmp_path} {options}"))
        assert method.student.times == times
    with pytest.raises(UserError, match="cannot be resumed: its --first-time is 0.4, not None"):
        adm.main(dmd(tmp_path, "--iterations 2 --resume"))


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(path):
    path.write_text(path.read_text().replace('"step": 2', '"step": "two"'))


WEIGHTS = "student/diffusion_pytorch_model.safetensors"
META = "its meta.json is missing or damaged"
DAMAGE = {  # what happens to a file of the newest checkpoint, and what is said of it
    "no meta": ("meta.json", remove, META),
    "half a meta": ("meta.json", lambda path: os.truncate(path, 99), META),
    "an edited meta": ("meta.json", edit, META),
    "another meta": ("meta.json", lambda path: path.write_text("[]"), META),
    "no state": ("state", remove, "its state/G.pt is missing"),
    "no config": ("student/config.json", remove, "its student/config.json is missing"),
    "a bit of state": ("state/opt_f.pt", flip_a_byte, "its state/opt_f.pt is damaged"),
    "half a state": ("state/f.pt", lambda path: os.truncate(path, 5000), "its state/f.pt is damaged"),
    "a bit of the student": (WEIGHTS, flip_a_byte, f"its {WEIGHTS} is damaged"),
}


@pytest.mark.parametrize("is_damaged", (True, False))
def test_ranks_share_the_reading_of_a_checkpoint(finished, monkeypatch, is_damaged):
    """Each of two compares every second file of the state, and hears what the other one found."""
    read = []
    compute = checkpoints.compute_checksum
    monkeypatch.setattr(checkpoints, "compute_checksum", lambda path: read.append(path) or compute(path))
    monkeypatch.setattr(checkpoints, "agree", lambda number: True)
    folder = str(finished / "step_000002")
    names = [name for name in checkpoints.open_checkpoint(folder)[0]["files"] if name.startswith("state/")]
    seen = torch.zeros(len(names))
    seen[2] = is_damaged
    problem = f"its {names[2]} is damaged" if is_damaged else None
    monkeypatch.setattr(checkpoints, "add_up", lambda own: own + seen)
    for number in (0, 1):
        monkeypatch.setenv("RANK", str(number))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert checkpoints.open_checkpoint(folder, "state", together=True)[1] == problem
    assert read == [os.path.join(folder, name) for name in names[0::2] + names[1::2]]


@pytest.mark.parametrize("name", DAMAGE)
def test_the_newest_whole_checkpoint_is_taken(finished, teacher, dmd, tmp_path, capfd, name):
    """Whatever `latest` says, which names the damaged one; and what was passed over, and why, is said."""
    run = shutil.copytree(finished, tmp_path / "run")
    newest = run / "step_000002"
    file, damage, reason = DAMAGE[name]
    damage(newest / file)
    capfd.readouterr()
    if "state" not in reason:
        _, _, meta = helpers.load_student(str(run), teacher)
        assert meta["step"] == 1
        assert f"{newest} is passed over: {reason}" in capfd.readouterr().err
        with pytest.raises(UserError, match="is not a complete checkpoint: its"):
            helpers.load_student(str(newest), teacher)
    if "student/" not in reason or "config" in reason:
        adm.main(dmd(run, "--resume"))
        errors = capfd.readouterr().err
        assert f"{newest} is passed over: {reason}" in errors
        assert f"going on from {run / 'step_000001'}" in errors
        assert helpers.read_metrics(run) == helpers.read_metrics(finished)
        states = [helpers.read_state(folder / "step_000002") for folder in (run, finished)]
        torch.testing.assert_close(*states, rtol=0, atol=0)


def test_a_run_without_a_whole_checkpoint_starts_anew(finished, dmd, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    for step in ("step_000001", "step_000002"):
        remove(run / step / "meta.json")
    arguments = dmd(run, "--save-every 1")
    before = helpers.take_snapshot(run)
    with pytest.raises(UserError, match="holds a run already"):
        adm.main(arguments)
    assert helpers.take_snapshot(run) == before
    adm.main([*arguments, "--resume"])
    states = [helpers.read_state(folder / "step_000002") for folder in (run, finished)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_a_run_goes_on_without_the_checkpoint_that_it_started_from(finished, dmd, tmp_path):
    """It becomes what it would have without an interruption, however --init is spelt."""
    init = shutil.copytree(finished, tmp_path / "init")
    adm.main(dmd(tmp_path / "whole", f"--init {init} --iterations 2"))
    adm.main(dmd(tmp_path / "parts", f"--init {init} --iterations 1"))
    remove(init)
    adm.main(dmd(tmp_path / "parts", f"--init {init}/ --iterations 2 --resume"))
    states = [helpers.read_state(tmp_path / run / "step_000002") for run in ("whole", "parts")]
    torch.testing.assert_close(*states, rtol=0, atol=0)


OTHER_RUNS = (
    ("--loss dmd --steps 4", "its steps is 2, not 4"),
    ("--steps 2", "its --loss is dmd, not adm"),
    ("--loss dmd --steps 2 --seed 1", "its --seed is 0, not 1"),
    ("--loss dmd --steps 2 --lora 2", "its --lora is 0, not 2"),
    ("--loss dmd --steps 2 --ema 0.5", "its --ema is 0.0, not 0.5"),
    ("--loss dmd --steps 2 --resolution 64", r"its resolution is \[32, 32\], not \[64, 64\]"),
)


@pytest.mark.parametrize("options, reason", OTHER_RUNS)
def test_resuming_as_another_kind_of_run_is_refused(finished, adm_arguments, options, reason):
    before = helpers.take_snapshot(finished)
    with pytest.raises(UserError, match=reason):
        adm.main([*adm_arguments, "--out", str(finished), *options.split(), "--resume"])
    assert helpers.take_snapshot(finished) == before


def test_resuming_with_other_settings_says_so(finished, dmd, tmp_path, capfd):
    run = shutil.copytree(finished, tmp_path / "run")
    other = tmp_path / "other.txt"
    other.write_text("a small red circle\n")
    words = f"--resume --iterations 3 --lr 2e-4 --guidance 3 --batch 1 --prompts {other} --keep 9"
    capfd.readouterr()
    adm.main(dmd(run, words))
    errors = capfd.readouterr().err
    said = [line for line in errors.splitlines() if " from here on" in line]
    assert len(said) == 7
    for words in ("--lr was 0.0001, and is 0.0002", "--guidance was 8.0, and is 3.0", "--iterations was 2"):
        assert words in errors
    assert f"and is {other} from here on" in errors
    assert "the data were" in errors
    assert "the global batch was 2 samples, and is 1" in errors
    assert compute_global_batch({"arguments": {"batch": 2, "accumulate": 3}, "processes": 4}) == 24


@pytest.mark.parametrize("loss, is_refused", (("secant", True), ("dmd", False)))
def test_heads_of_another_width_are_another_run(adm_arguments, tmp_path, loss, is_refused):
    """Where there are heads."""
    words = [*adm_arguments, "--loss", loss, "--iterations", "1", "--out", str(tmp_path / "run")]
    adm.main(words)
    words += ["--resume", "--head-width", "64"]
    if not is_refused:
        adm.main(words)
        return
    with pytest.raises(UserError, match="its --head-width is 128, not 64"):
        adm.main(words)


def test_other_settings_of_the_optimisers_and_the_average_are_taken(adm_arguments, tmp_path):
    """As the note says."""
    run = tmp_path / "run"
    words = [*adm_arguments, "--loss", "dmd", "--out", str(run)]
    adm.main([*words, "--ema", "0.9", "--iterations", "1"])
    other = "--ema 0.5 --betas 0.5 0.7 --weight-decay 0.25 --iterations 2 --resume"
    adm.main([*words, *other.split()])
    state = helpers.read_state(run / "step_000002")
    for name in ("opt_G", "opt_f"):
        (group,) = state[name]["param_groups"]
        assert (tuple(group["betas"]), group["weight_decay"]) == ((0.5, 0.7), 0.25)
        assert all(values["step"] == 2 for values in state[name]["state"].values())
    assert state["ema"]["decay"] == 0.5


def test_prompts_are_encoded_in_the_same_groups_after_an_interruption(adm_arguments, tmp_path, monkeypatch):
    """With --offload: an encoder's last bits depend on what else is in its batch."""
    groups = []
    encode = Offload.encode_ahead
    monkeypatch.setattr(runs, "AHEAD", 9)  # of 4 iterations, whose batch is 2
    monkeypatch.setattr(
        Offload, "encode_ahead", lambda own, prompts: groups.append(prompts) or encode(own, prompts)
    )
    run = tmp_path / "run"
    words = [*adm_arguments, "--loss", "dmd", "--out", str(run), "--offload"]
    words += ["--iterations", "6", "--save-every", "3"]
    adm.main(words)
    whole = list(groups)
    assert len(whole) == 2
    assert len(whole[0]) == 2 * len(whole[1])
    groups.clear()
    remove(run / "step_000006")
    adm.main([*words, "--resume"])
    assert groups == whole


# ----------------------------------------------------------------------------------------------------------
# Whose folder it is
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("metrics.jsonl", "curves.png", "latest", "best"))
def test_what_no_run_wrote_is_not_written_over(adm_arguments, tmp_path, name):
    run = tmp_path / "run"
    run.mkdir()
    for own in (name, "notes.tmp5.txt", ".writing-not-ours"):
        (run / own).write_text('{"step": 1, "of": "another program"}\n')
    before = helpers.take_snapshot(run)
    with pytest.raises(UserError, match=f"{name} is no run's of this project"):
        adm.main([*adm_arguments, "--out", str(run)])
    assert helpers.take_snapshot(run) == before


def test_only_what_was_left_by_dead_processes_is_removed(adm_arguments, tmp_path):
    run = tmp_path / "run"
    (run / "samples").mkdir(parents=True)
    own = ("notes.tmp5.txt", ".writing-not-ours", "a.tmp", "samples/mine.png", "step_2", "step_000002.txt")
    for name in own:
        (run / name).write_text("mine")
    process = subprocess.Popen(["true"])
    process.wait()
    left = (
        f".writing-{files.HOST}-{process.pid}-step_000001",
        f".writing-{files.HOST}-{os.getpid()}-step_000001",  # of a container that has started again
        ".writing-another-1-curves.png",
    )
    for name in left:
        (run / name).mkdir()
    (run / "samples" / left[0]).write_text("half")
    adm.main([*adm_arguments, "--out", str(run), "--loss", "dmd", "--iterations", "1"])
    names = os.listdir(run) + [f"samples/{name}" for name in os.listdir(run / "samples")]
    assert set(own) <= set(names)
    assert [name for name in names if ".writing" in name] == [".writing-not-ours"]


def test_a_folder_has_one_command_at_a_time(adm_arguments, teacher_folder, prompts_file, tmp_path):
    """The second is refused and leaves no trace; the lock goes with a holder that is killed."""
    folder = tmp_path / "folder"
    holder = (
        "import sys, time; from support.files import lock_folder\n"
        "with lock_folder(sys.argv[1]): print('locked', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", holder, str(folder)]
    process = subprocess.Popen(command, cwd=helpers.ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    before = helpers.take_snapshot(folder)
    source = ["--teacher", teacher_folder, "--prompts", prompts_file, "--count", "2", "--steps", "1"]
    with pytest.raises(UserError, match=f"another process works in {folder}"):
        adm.main([*adm_arguments, "--out", str(folder)])
    with pytest.raises(UserError, match=f"another process works in {folder}"):
        helpers.collect(*source, "--out", str(folder))
    with pytest.raises(UserError, match=f"another process works in {folder}"):
        evaluate.main(["--teacher", teacher_folder, "--prompts", prompts_file, "--out", str(folder)])
    assert helpers.take_snapshot(folder) == before
    process.kill()
    process.wait()
    helpers.collect(*source, "--out", str(folder))
    assert sorted(os.listdir(folder)) == ["00000.safetensors", "index.json"]


def test_files_have_the_mode_of_the_umask(finished, pairs_folder):
    mode = 0o666 & ~files.UMASK
    paths = [finished / "latest", finished / "metrics.jsonl", finished / "curves.png"]
    paths += files.list_files(finished / "step_000002") + files.list_files(pairs_folder)
    assert {os.stat(path).st_mode & 0o777 for path in paths} == {mode}


# ----------------------------------------------------------------------------------------------------------
# Ends
# ----------------------------------------------------------------------------------------------------------


def test_killed_in_the_middle_of_a_save_it_goes_on_from_the_checkpoint_before(
    finished, dmd, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    arguments = dmd(run, "--save-every 1")
    save = torch.save

    def save_and_die(value, path):
        save(value, path)
        if "step_000002" in str(path):
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save_and_die)
        assert Command("adm", arguments).start(tmp_path).wait() == [-signal.SIGKILL]
    assert (run / "latest").read_text() == "step_000001\n"
    assert not (run / "step_000002").exists()
    assert [name for name in os.listdir(run) if name.startswith(".writing")]
    adm.main([*arguments, "--resume"])
    assert not [name for name in os.listdir(run) if name.startswith(".")]
    assert helpers.read_metrics(run) == helpers.read_metrics(finished)
    states = [helpers.read_state(folder / "step_000002") for folder in (run, finished)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_a_signal_that_the_parent_ignores_ends_no_run(adm_arguments, tmp_path, monkeypatch):
    """As nohup ignores SIGHUP, so that a run outlives its terminal."""
    iterate = adm.iterate

    def hang_up(*arguments):
        os.kill(os.getpid(), signal.SIGHUP)
        iterate(*arguments)

    monkeypatch.setattr(adm, "iterate", hang_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        adm.main([*adm_arguments, "--loss", "dmd", "--out", str(tmp_path / "run"), "--iterations", "3"])
    finally:
        signal.signal(signal.SIGHUP, before)
    assert [line["step"] for line in helpers.read_metrics(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.slow
def test_sigterm_saves_and_the_run_goes_on(adm_arguments, tmp_path):
    """Told to stop between two checkpoints, the ranks leave one of the iteration that they were at."""
    run = tmp_path / "run"
    words = "--loss dmd --iterations 100000 --save-every 100000"
    arguments = [*adm_arguments, "--out", str(run), *words.split()]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *torchrun, "adm.py", *arguments]
    process = subprocess.Popen(command, cwd=helpers.ROOT, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (run / "metrics.jsonl").exists() or len(helpers.read_metrics(run)) < 2:
        assert time.time() < deadline
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.wait(60)  # torchrun has a code of its own for it

    _, meta = find_checkpoint(str(run))
    last = meta["step"]
    assert [line["step"] for line in helpers.read_metrics(run)] == list(range(1, last + 1))
    adm.main([*arguments, "--resume", "--iterations", str(last + 1), "--batch", "4"])
    assert helpers.read_metrics(run)[-1]["step"] == last + 1


def test_a_signal_during_a_checkpoint_asks_for_no_second_one(dmd, tmp_path, monkeypatch):
    """Those of real teachers take minutes."""
    save = runs.Run.save

    def save_and_hear(run, *arguments):
        save(run, *arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(runs.Run, "save", save_and_hear)
    adm.main(dmd(tmp_path / "run", "--iterations 4 --save-every 2"))
    assert [line["step"] for line in helpers.read_metrics(tmp_path / "run")] == [1, 2]
    assert find_checkpoint(str(tmp_path / "run"))[1]["step"] == 2


def test_what_ctrl_c_ended_did_not_succeed(dmd, tmp_path, monkeypatch):
    """A shell does not go on with the next command; the checkpoint is there."""
    log = runs.Run.log

    def log_and_hear(run, step):
        log(run, step)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(runs.Run, "log", log_and_hear)
    # a shell that began this in the background had it ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            adm.main(dmd(tmp_path / "run", "--iterations 4"))
    finally:
        signal.signal(signal.SIGINT, before)
    assert find_checkpoint(str(tmp_path / "run"))[1]["step"] == 1


def test_a_checkpoint_is_due_by_the_clock_too(dmd, tmp_path):
    """An iteration of a video takes minutes, and --save-every of them days."""
    for minutes, kept in ((1e-9, [1, 2, 3]), (60, [3])):
        run = tmp_path / str(minutes)
        adm.main(dmd(run, f"--iterations 3 --save-every 99 --keep 9 --save-minutes {minutes}"))
        assert sorted(run.glob("step_*")) == [run / f"step_{step:06d}" for step in kept]
    for seconds, is_late in ((60, False), (180, True)):
        args = SimpleNamespace(save_minutes=2)
        saved = time.perf_counter() - seconds
        run = SimpleNamespace(args=args, saved=saved, signal=None, leaving=False)
        assert runs.Run._agree(run) is is_late


@pytest.mark.parametrize("told, late", ((True, False), (False, True)))
def test_what_one_rank_of_two_hears_counts_for_all(monkeypatch, told, late):
    monkeypatch.setattr(runs, "average", lambda values: {name: x / 2 for name, x in values.items()})
    args = SimpleNamespace(save_minutes=2)
    number = signal.SIGTERM if told else None
    saved = time.perf_counter() - 180 * late
    run = SimpleNamespace(args=args, saved=saved, signal=number, leaving=False)
    assert runs.Run._agree(run) is late
    assert run.leaving is told


def test_a_checkpoint_that_cannot_be_removed_ends_no_run(dmd, tmp_path, monkeypatch, capfd):
    """As on NFS, where somebody reads it."""

    def refuse(path):
        raise OSError(errno.ENOTEMPTY, "Directory not empty", path)

    monkeypatch.setattr(runs, "remove", refuse)
    adm.main(dmd(tmp_path / "run", "--iterations 2 --save-every 1 --keep 1"))
    assert (tmp_path / "run/step_000002/meta.json").exists()
    assert "step_000001 is not removed: " in capfd.readouterr().err


def test_ranks_that_would_start_from_two_checkpoints_stop(finished, dmd, tmp_path, monkeypatch):
    """As where the run of --init still trains."""
    monkeypatch.setattr(inputs, "agree", lambda step: False)
    with pytest.raises(UserError, match="is not the newest on all nodes: give --init a step_... folder"):
        adm.main(dmd(tmp_path / "run", f"--init {finished}"))


def test_a_node_that_has_not_the_run_that_goes_on_stops_with_it(finished, dmd, tmp_path, monkeypatch):
    """Its --out is a folder of its own."""
    monkeypatch.setattr(checkpoints, "agree", lambda found: found is not False)
    with pytest.raises(UserError, match="is not the same on all nodes: give an --out that they share"):
        adm.main(dmd(tmp_path / "run", f"--init {finished} --resume"))


def test_only_the_newest_checkpoints_are_kept(adm_arguments, tmp_path):
    """By number, not as text. A folder with other things in it is no checkpoint of ours, and a later one,
    which was passed over as damaged, does not count."""
    run = tmp_path / "run"
    for name in ("step_000000", "step_1000000"):
        (run / name).mkdir(parents=True)
    (run / "step_000000/notes.txt").write_text("mine")
    words = "--loss dmd --iterations 4 --save-every 1 --keep 2 --resume"
    adm.main([*adm_arguments, "--out", str(run), *words.split()])
    kept = sorted(name for name in os.listdir(run) if name.startswith("step_"))
    assert kept == ["step_000000", "step_000003", "step_000004", "step_1000000"]


def test_no_damaged_checkpoint_is_kept_in_a_whole_ones_place(finished, dmd, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")

    def go_on(words):
        adm.main(dmd(run, f"--resume --save-every 1 {words}"))
        return sorted(name for name in os.listdir(run) if name.startswith("step_"))

    os.rename(run / "step_000002", run / "step_000003")
    with open(run / "step_000003/state/G.pt", "r+b") as file:
        file.write(b"\0" * 99)
    assert go_on("--keep 1 --iterations 2") == ["step_000002", "step_000003"]  # the later one was passed over
    assert go_on("--keep 1 --iterations 3") == ["step_000003"]
    assert go_on("--keep 3 --iterations 5") == ["step_000003", "step_000004", "step_000005"]
    remove(run / "step_000005/meta.json")
    words = "--save-every 2 --keep 2 --iterations 6"
    assert go_on(words) == ["step_000004", "step_000005", "step_000006"]


def make_run(**args):
    """A Run that only counts and logs; the lines of its metrics are in `lines`."""
    run = runs.Run.__new__(runs.Run)
    run.args = SimpleNamespace(**args)
    run.left_out = run.streak = run.logged = 0
    run.clock = 0.0
    run.lines = []
    run._write_line = run.lines.append
    run._show = lambda *shown: None
    return run


def test_a_good_update_ends_the_streak_of_bad_ones():
    run = make_run(patience=3)
    for _ in range(4):
        run._count_left_out({"norm_G": torch.tensor(float("inf"))})
        run._count_left_out({"norm_G": torch.tensor(1.0)})
    assert (run.streak, run.left_out) == (0, 4)


def test_a_line_of_metrics_is_of_the_iterations_since_the_last(monkeypatch):
    """Its seconds are an iteration's, and what was left out is counted once."""
    run = make_run(patience=9, log_every=2, out="")
    norms = iter([float("inf"), 1.0, 1.0, 1.0])
    run.method = SimpleNamespace(log=SimpleNamespace(take=lambda: {"norm_G": torch.tensor(next(norms))}))
    clock = iter([20.0, 30.0])
    monkeypatch.setattr(runs.time, "perf_counter", lambda: next(clock))
    for step in (1, 2, 3, 4):
        run.log(step)
    assert [line["left_out"] for line in run.lines] == [1, 0]
    assert [line["seconds"] for line in run.lines] == [10.0, 5.0]


def test_peak_memory_is_in_mebibytes(monkeypatch):
    usage = SimpleNamespace(ru_maxrss=2048)  # Linux: in KiB
    monkeypatch.setattr(training.resource, "getrusage", lambda who: usage)
    assert training.peak_memory_mb() == 2


def test_a_damaged_student_is_no_start(teacher, teacher_folder, prompts_file, tmp_path):
    student = helpers.save_checkpoint(tmp_path / "student", teacher)
    flip_a_byte(Path(student, "student/diffusion_pytorch_model.safetensors"))
    words = f"--teacher {teacher_folder} --prompts {prompts_file} --init {student} --out {tmp_path / 'run'}"
    args = helpers.training_arguments("adm", words.split())
    with pytest.raises(UserError, match="is damaged"):
        common.start_student(args, teacher)


@pytest.mark.parametrize("checkpoints, is_told", ((1.9, True), (2.1, False)))
def test_a_disk_without_room_for_the_checkpoints_to_come_is_told_of(
    finished, dmd, tmp_path, monkeypatch, capfd, checkpoints, is_told
):
    """There are two, and --keep has three and one that is written."""
    run = shutil.copytree(finished, tmp_path / "run")
    size = sum(path.stat().st_size for path in (run / "step_000002").rglob("*") if path.is_file())
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=checkpoints * size))
    adm.main(dmd(run, "--resume --keep 3"))
    assert ("checkpoints will take" in capfd.readouterr().err) == is_told


def test_offloading_forgets_the_prompts_of_before():
    """Those of a real encoder fill the machine's memory otherwise."""

    def encode(prompts):
        return {"text": torch.zeros(len(prompts))}

    offload = Offload(SimpleNamespace(), [], encode, torch.device("cpu"))
    offload.encode_ahead(["a"])
    offload.encode_ahead(["b"])
    assert list(offload.conditions) == ["b"]


def test_runs_that_are_not_finite_end_and_keep_their_checkpoints(finished, dmd, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    arguments = dmd(run, "--save-every 1 --keep 2")
    arguments += ["--resume", "--iterations", "40", "--lr", "1e30", "--patience", "3"]
    with pytest.raises(UserError, match="3 iterations in a row made no update, as .*norm_G.*lower the learn"):
        adm.main(arguments)
    assert (run / "step_000002").exists()
    counts = [line["left_out"] for line in helpers.read_metrics(run) if line["step"] > 2]
    assert counts[0] == 0
    assert min(counts[1:]) >= 1


def test_weights_that_are_not_finite_are_not_saved(finished, dmd, tmp_path, monkeypatch):
    run = shutil.copytree(finished, tmp_path / "run")
    iterate = adm.iterate

    def spoil(method, step, minimise):
        iterate(method, step, minimise)
        next(method.f.parameters()).data.view(-1)[0] = float("inf")

    monkeypatch.setattr(adm, "iterate", spoil)
    arguments = dmd(run, "--resume --iterations 3")
    with pytest.raises(UserError, match="after 3 iterations weights are not finite, and are not saved"):
        adm.main(arguments)
    names = sorted(name for name in os.listdir(run) if "step_" in name)
    assert names == ["step_000001", "step_000002"]


def test_previews_are_drawn_a_batch_at_a_time_and_are_the_same(teacher, tmp_path, monkeypatch):
    drawn = []
    sizes = []

    def save_grid(images, path):
        drawn.append(images)

    def encode(prompts):
        sizes.append(len(prompts))
        return teacher_encode(prompts)

    teacher_encode = teacher.encode
    monkeypatch.setattr(runs, "save_grid", save_grid)
    monkeypatch.setattr(teacher, "encode", encode)
    student = common.Student(teacher, "teacher", 2)
    for batch in (16, 5):
        args = SimpleNamespace(batch=batch, seed=0)
        runs.save_preview(student, teacher.denoiser, ["a circle", "a square"], args, str(tmp_path / "x"))
    assert sizes == [16, 5, 5, 5, 1]
    torch.testing.assert_close(drawn[0], drawn[1], rtol=0, atol=1e-4)


def test_a_preview_brings_the_encoders_to_the_device_once(teacher, tmp_path, monkeypatch):
    encoders = ["text_encoder", "text_encoder_2"]
    offload = Offload(teacher.pipe, encoders, teacher._encode, teacher.device)
    resident = offload.resident
    visits = []
    monkeypatch.setattr(offload, "resident", lambda *names: visits.append(names) or resident(*names))
    monkeypatch.setattr(teacher, "offload", offload)
    student = common.Student(teacher, "teacher", 1)
    prompts = [f"a {size} {colour} circle" for size in ("small", "large") for colour in ("red", "blue")]
    args = SimpleNamespace(batch=1, seed=0)
    runs.save_preview(student, teacher.denoiser, prompts, args, str(tmp_path / "x"))
    assert visits.count(tuple(encoders)) == 1


def test_the_ranks_share_the_reading_of_pairs(pairs_folder, monkeypatch):
    looks = []
    monkeypatch.setattr(
        pairs, "find_problem", lambda path, identity, thorough: looks.append((path, thorough))
    )
    monkeypatch.setattr(pairs, "world_size", lambda: 2)
    for number in ("0", "1"):
        monkeypatch.setenv("RANK", number)
        pairs.Pairs(pairs_folder)
    read = [path for path, thorough in looks if thorough]
    assert sorted(read) == sorted({path for path, _ in looks})


def test_a_full_disk_is_said_and_costs_nothing_that_was_written(finished, dmd, tmp_path, monkeypatch):
    """A checkpoint's ends the run with a sentence; a preview's or curve's is said, and training goes on."""
    run = shutil.copytree(finished, tmp_path / "run")
    arguments = dmd(run, "--resume")
    flush = files.flush
    full = []

    def fail(path):
        if full[0] in path:
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(path)

    monkeypatch.setattr(files, "flush", fail)
    full.append("state/G.pt")
    before = helpers.take_snapshot(run)
    with pytest.raises(
        UserError,
        match=r"step_000003 cannot be written: the disk is full, or your share of it \(.* GB free\)",
    ):
        adm.main([*arguments, "--iterations", "3"])
    after = helpers.take_snapshot(run)
    assert {path: digest for path, digest in after.items() if "metrics" not in path}.items() <= before.items()
    full[0] = ".png"
    adm.main([*arguments, "--iterations", "3"])
    assert (run / "latest").read_text() == "step_000003\n"
    assert not (run / "samples/step_000003.png").exists()


def test_curves_of_a_long_run_read_no_more_than_those_of_a_short_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    line = json.dumps({"step": 1234567, "loss_G": 1.0, "padding": "x" * 60})
    path.write_text(f"{line}\n" * 100000)
    lines = files.sample_json_lines(str(path), 2000)
    assert len(lines) == 2000
    assert all(line["step"] == 1234567 for line in lines)


def test_a_damaged_line_of_metrics_costs_that_line_alone(finished, dmd, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    first, second = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(f"{first}\n\0\0{{\n{second}\n")
    adm.main(dmd(run, "--iterations 3 --resume"))
    assert [line["step"] for line in helpers.read_metrics(run)] == [1, 2, 3]


@pytest.mark.parametrize("same", (0, 1))
def test_nodes_that_see_other_things_of_a_run_stop(finished, monkeypatch, same):
    """In its list of checkpoints, or in one of them, as by a view of a disk that is late: the one that the
    main rank sees whole would be passed over, and written over later."""
    answers = iter([True] * same + [False])
    monkeypatch.setattr(checkpoints, "agree", lambda number: next(answers))
    with pytest.raises(UserError, match="is not the same on all nodes"):
        checkpoints.find_newest(str(finished), "state", together=True)


def test_nodes_that_find_different_checkpoints_are_refused(adm_arguments, tmp_path, monkeypatch):
    """As where another node's --out is another disk's."""
    monkeypatch.setattr(checkpoints, "agree", lambda found: False)
    with pytest.raises(UserError, match="not the same on all nodes"):
        adm.main([*adm_arguments, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------------
# Pairs and teachers
# ----------------------------------------------------------------------------------------------------------


def test_pairs_that_are_not_finite_are_not_written(teacher_folder, prompts_file, tmp_path):
    place = ["--teacher", teacher_folder, "--prompts", prompts_file, "--out", str(tmp_path / "pairs")]
    with pytest.raises(UserError, match="not finite at --guidance 1e\\+06"):
        helpers.collect(*place, "--count", "2", "--steps", "2", "--guidance", "1e6")
    assert not (tmp_path / "pairs/00000.safetensors").exists()


@pytest.mark.parametrize("part", ("unet", "vae", "text_encoder"))
@pytest.mark.parametrize("fault, sentence", (("missing", "is missing"), ("nan", "is not finite")))
def test_no_weight_of_a_teacher_is_made_up(teacher_folder, tmp_path, part, fault, sentence):
    folder = shutil.copytree(teacher_folder, tmp_path / "teacher")
    (path,) = (folder / part).glob("*.safetensors")
    weights = load_file(path)
    name = sorted(name for name in weights if name.endswith("weight"))[0]
    if fault == "missing":
        del weights[name]
    else:
        weights[name].view(-1)[0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=sentence):
        helpers.load_teacher(str(folder), torch.device("cpu"))


def test_a_users_folder_makes_way_for_a_checkpoint_and_stays(dmd, tmp_path):
    run = tmp_path / "run"
    adm.main(dmd(run, "--iterations 1"))
    (run / "step_000002").mkdir()
    (run / "step_000002/notes.txt").write_text("mine")
    adm.main(dmd(run, "--iterations 2 --resume"))
    assert (run / "step_000002/meta.json").exists()
    [kept] = run.glob("step_000002.not-ours-*/notes.txt")
    assert kept.read_text() == "mine"


def test_checkpoints_of_adapters_go_too(dmd, tmp_path):
    adm.main(dmd(tmp_path / "run", "--lora 2 --iterations 2 --save-every 1 --keep 1"))
    assert [path.name for path in (tmp_path / "run").glob("step_*")] == ["step_000002"]


@pytest.mark.parametrize("name", ["stage", "fingerprint", "resolution", "frames", "parametrisation", "steps"])
def test_a_run_with_another_identity_is_another_run(finished, name):
    meta = find_checkpoint(str(finished))[1]
    ours = SimpleNamespace(meta=meta | {name: "another"}, parts={})
    with pytest.raises(UserError, match=f"cannot be resumed: its {name} is .*, not another"):
        runs.Run._compare(ours, "run", meta)
