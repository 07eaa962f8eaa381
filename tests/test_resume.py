"""An interrupted and resumed run is the uninterrupted one, bit for bit; and what a checkpoint is."""

import os
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

import adm
import adp
import common
import helpers
from support import checkpoints
from support.checkpoints import find_checkpoint
from support.errors import UserError
from support.files import remove


class Interrupted(Exception):
    pass


@pytest.fixture
def interrupt(monkeypatch):
    """A function that runs main(arguments) up to iteration `step`, after its line of metrics."""

    def run_until(step, main, arguments):
        log = checkpoints.Run.log

        def stop(run, now):
            log(run, now)
            if now == step:
                raise Interrupted

        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(checkpoints.Run, "log", stop)
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


@pytest.fixture(scope="module")
def finished(tmp_path_factory, adm_arguments):
    folder = tmp_path_factory.mktemp("runs") / "finished"
    words = "--loss dmd --steps 2 --save-every 1"
    adm.main([*adm_arguments, "--out", str(folder), *words.split()])
    return folder


def test_student_is_a_plain_model_folder(finished, teacher):
    net = UNet2DConditionModel.from_pretrained(finished / "step_000002/student")
    assert all(p.isfinite().all() for p in net.parameters())
    pairs = zip(net.parameters(), teacher.denoiser.parameters())
    assert not all(p.equal(q.float()) for p, q in pairs)


def test_checkpoint_says_what_it_holds(finished, teacher):
    for path in (finished, finished / "step_000002"):
        net, student, meta = common.load_student(str(path), teacher)
        assert student.parametrisation == "teacher"
        assert student.times == [1000, 500]
        assert meta["step"] == 2
        assert meta["arguments"]["loss"] == "dmd"
    steps = ["step_000001", "step_000002"]
    assert sorted(os.listdir(finished)) == ["curves.png", "latest", "metrics.jsonl", "samples", *steps]
    assert sorted(os.listdir(finished / "samples")) == [f"{step}.png" for step in steps]


@pytest.mark.parametrize("missing", ("meta.json", "state", "student/config.json"))
def test_half_a_checkpoint_is_refused(finished, teacher, adm_arguments, tmp_path, missing):
    half = shutil.copytree(finished, tmp_path / "half")
    remove(half / "step_000002" / missing)
    before = helpers.take_snapshot(half)
    with pytest.raises(UserError, match="not a complete checkpoint"):
        common.load_student(str(half), teacher)
    words = "--loss dmd --steps 2 --resume"
    with pytest.raises(UserError, match="not a complete checkpoint"):
        adm.main([*adm_arguments, "--out", str(half), *words.split()])
    assert helpers.take_snapshot(half) == before


OTHER_RUNS = (
    ("--steps 4", "its steps is 2, not 4"),
    ("--steps 2 --head-width 64", "with these settings"),
    ("--steps 2 --ema 0.5", "with these settings"),
)


@pytest.mark.parametrize("options, reason", OTHER_RUNS)
def test_resuming_as_another_kind_of_run_is_refused(finished, adm_arguments, options, reason):
    before = helpers.take_snapshot(finished)
    with pytest.raises(UserError, match=reason):
        adm.main([*adm_arguments, "--out", str(finished), *options.split(), "--resume"])
    assert helpers.take_snapshot(finished) == before


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import torch, adm
save = torch.save

def save_and_die(value, path):
    save(value, path)
    if "step_000002" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = save_and_die
torch.set_num_threads(1)
adm.main({arguments!r})
"""


def test_killed_in_the_middle_of_a_save_it_goes_on_from_the_checkpoint_before(
    finished, adm_arguments, tmp_path
):
    run = tmp_path / "run"
    words = "--loss dmd --steps 2 --save-every 1"
    arguments = [*adm_arguments, "--out", str(run), *words.split()]
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(root=helpers.ROOT, arguments=arguments))
    assert helpers.run_script(str(script)).returncode == -signal.SIGKILL
    assert (run / "latest").read_text() == "step_000001\n"
    assert not (run / "step_000002").exists()
    assert [name for name in os.listdir(run) if name.startswith("step_000002.tmp")]
    adm.main([*arguments, "--resume"])
    assert not [name for name in os.listdir(run) if ".tmp" in name]
    assert helpers.read_metrics(run) == helpers.read_metrics(finished)
    states = [helpers.read_state(folder / "step_000002") for folder in (run, finished)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.parametrize("processes", (1, 2))
def test_sigterm_saves_and_the_run_goes_on(adm_arguments, tmp_path, processes):
    """Told to stop between two checkpoints, the run leaves one of the iteration that it was at, and exits
    with 0."""
    run = tmp_path / "run"
    words = "--loss dmd --iterations 100000 --save-every 100000"
    arguments = [*adm_arguments, "--out", str(run), *words.split()]
    torchrun = []
    if processes == 2:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *torchrun, "adm.py", *arguments]
    process = subprocess.Popen(command, cwd=helpers.ROOT, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (run / "metrics.jsonl").exists() or len(helpers.read_metrics(run)) < 2:
        assert time.time() < deadline
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    code = process.wait(60)
    assert code == 0 or processes == 2  # torchrun has a code of its own for it

    _, meta = find_checkpoint(str(run))
    last = meta["step"]
    assert [line["step"] for line in helpers.read_metrics(run)] == list(range(1, last + 1))
    further = ["--resume", "--iterations", str(last + 1), "--batch", str(2 * processes)]
    result = helpers.run_script("adm.py", *arguments, *further)
    assert result.returncode == 0
    assert helpers.read_metrics(run)[-1]["step"] == last + 1


def test_only_the_newest_checkpoints_are_kept(adm_arguments, tmp_path):
    run = tmp_path / "run"
    (run / "step_000001.tmp123").mkdir(parents=True)  # a killed process's
    words = "--loss dmd --iterations 4 --save-every 1 --keep 2"
    adm.main([*adm_arguments, "--out", str(run), *words.split()])
    kept = sorted(name for name in os.listdir(run) if name.startswith("step_"))
    assert kept == ["step_000003", "step_000004"]


def test_the_millionth_checkpoint_is_newer_than_those_with_a_digit_less(adm_arguments, tmp_path):
    run = tmp_path / "run"
    for name in ("step_999999", "step_1000000"):
        (run / name).mkdir(parents=True)
    method = types.SimpleNamespace(folder=str(run), args=types.SimpleNamespace(keep=2))
    checkpoints.Run._prune(method, 1000001)
    assert sorted(os.listdir(run)) == ["step_1000000"]


def test_a_damaged_line_of_metrics_costs_that_line_alone(finished, adm_arguments, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    first, second = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(f"{first}\n\0\0{{\n{second}\n")
    words = "--loss dmd --steps 2 --iterations 3 --resume"
    adm.main([*adm_arguments, "--out", str(run), *words.split()])
    assert [line["step"] for line in helpers.read_metrics(run)] == [1, 2, 3]


def test_nodes_that_find_different_checkpoints_are_refused(adm_arguments, tmp_path, monkeypatch):
    """The main rank's mean of all starts is not its own where another node's --out is another disk's."""
    average = checkpoints.average

    def average_with_another(values):
        return {"start": 250.0} if "start" in values else average(values)

    monkeypatch.setattr(checkpoints, "average", average_with_another)
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
        common.load_teacher(str(folder), torch.device("cpu"))
