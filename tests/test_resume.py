"""An interrupted and resumed run is the uninterrupted one, bit for bit; and what a checkpoint is."""
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

import adm
import adp
import common
import helpers


class Interrupted(Exception):
    pass


@pytest.fixture
def interrupted(monkeypatch):
    """A function that runs main(arguments) up to the middle of iteration `step`, after its line of metrics."""
    def run_until(step, main, arguments):
        log = common.Run.log

        def stop(self, now, values):
            log(self, now, values)
            if now == step:
                raise Interrupted

        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(common.Run, "log", stop)
            main(arguments)

    return run_until


@pytest.mark.parametrize("stage, options", (
    (adp, "--warmup 3 --ema 0.9"),  # the checkpoint is in the warm-up, the end is after it
    (adp, "--warmup 1 --decay 0.5"),
    (adm, "--ema 0.9 --ttur 2 --steps 2 --decay 0.5"),
    (adm, "--loss dmd")), ids=("adp across the warm-up", "adp", "adm", "dmd"))
def test_resumed_run_is_the_uninterrupted_one(request, tmp_path, interrupted, stage, options):
    arguments = [*request.getfixturevalue(f"{stage.__name__}_arguments"), *options.split(), "--iterations", "4", "--save-every", "2"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    stage.main([*arguments, "--out", str(whole)])
    interrupted(3, stage.main, [*arguments, "--out", str(parts)])
    assert (parts / "latest").read_text() == "step_000002\n" and [line["step"] for line in helpers.metrics(parts)] == [1, 2, 3]
    stage.main([*arguments, "--out", str(parts), "--resume"])

    assert helpers.metrics(parts) == helpers.metrics(whole) and len(helpers.metrics(whole)) == 4
    weights = [load_file(run / "step_000004/student/diffusion_pytorch_model.safetensors") for run in (whole, parts)]
    assert weights[0].keys() == weights[1].keys() and all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    states = [helpers.state(run / "step_000004") for run in (whole, parts)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, adm_arguments):
    folder = tmp_path_factory.mktemp("runs") / "finished"
    adm.main([*adm_arguments, "--out", str(folder), "--loss", "dmd", "--steps", "2", "--save-every", "1"])
    return folder


def test_student_is_a_plain_model_folder(finished, teacher):
    net = UNet2DConditionModel.from_pretrained(finished / "step_000002/student")
    assert all(p.isfinite().all() for p in net.parameters())
    assert not all(p.equal(q.float()) for p, q in zip(net.parameters(), teacher.denoiser.parameters()))


def test_checkpoint_says_what_it_holds(finished, teacher):
    for path in (finished, finished / "step_000002"):
        net, student, meta = common.load_student(str(path), teacher)
        assert (student.parametrisation, student.times, meta["step"], meta["arguments"]["loss"]) == ("teacher", [1000, 500], 2, "dmd")
    assert sorted(os.listdir(finished)) == ["curves.png", "latest", "metrics.jsonl", "samples", "step_000001", "step_000002"]
    assert sorted(os.listdir(finished / "samples")) == ["step_000001.png", "step_000002.png"]


@pytest.mark.parametrize("missing", ("meta.json", "state", "student/config.json"))
def test_half_a_checkpoint_is_refused(finished, teacher, adm_arguments, tmp_path, missing):
    half = shutil.copytree(finished, tmp_path / "half")
    common.remove(half / "step_000002" / missing)
    before = helpers.snapshot(half)
    with pytest.raises(common.UserError, match="not a complete checkpoint"):
        common.load_student(str(half), teacher)
    with pytest.raises(common.UserError, match="not a complete checkpoint"):
        adm.main([*adm_arguments, "--out", str(half), "--loss", "dmd", "--steps", "2", "--resume"])
    assert helpers.snapshot(half) == before


def test_resuming_as_another_kind_of_run_is_refused(finished, adm_arguments):
    before = helpers.snapshot(finished)
    for options, reason in (("--steps 4", "its steps is 2, not 4"), ("--steps 2 --head-width 64", "with these settings"), ("--steps 2 --ema 0.5", "with these settings")):
        with pytest.raises(common.UserError, match=reason):
            adm.main([*adm_arguments, "--out", str(finished), *options.split(), "--resume"])
    assert helpers.snapshot(finished) == before


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


def test_killed_in_the_middle_of_a_save_it_goes_on_from_the_checkpoint_before(finished, adm_arguments, tmp_path):
    run = tmp_path / "run"
    arguments = [*adm_arguments, "--out", str(run), "--loss", "dmd", "--steps", "2", "--save-every", "1"]
    (tmp_path / "killed.py").write_text(KILLED.format(root=helpers.ROOT, arguments=arguments))
    assert helpers.command(str(tmp_path / "killed.py")).returncode == -signal.SIGKILL
    assert (run / "latest").read_text() == "step_000001\n" and not (run / "step_000002").exists()
    assert [name for name in os.listdir(run) if name.startswith("step_000002.tmp")]
    adm.main([*arguments, "--resume"])
    assert not [name for name in os.listdir(run) if ".tmp" in name]
    assert helpers.metrics(run) == helpers.metrics(finished)
    torch.testing.assert_close(*(helpers.state(folder / "step_000002") for folder in (run, finished)), rtol=0, atol=0)


@pytest.mark.parametrize("processes", (1, 2))
def test_sigterm_saves_and_the_run_goes_on(adm_arguments, tmp_path, processes):
    """Told to stop between two checkpoints, the run leaves one of the iteration that it was at, and exits with 0."""
    run = tmp_path / "run"
    arguments = [*adm_arguments, "--loss", "dmd", "--out", str(run), "--iterations", "100000", "--save-every", "100000"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if processes == 2 else []
    process = subprocess.Popen([sys.executable, *torchrun, "adm.py", *arguments], cwd=helpers.ROOT, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (run / "metrics.jsonl").exists() or len(helpers.metrics(run)) < 2:
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    code = process.wait(60)
    assert code == 0 or processes == 2  # torchrun has a code of its own for it
    folder, meta = common.find_checkpoint(str(run))
    assert [line["step"] for line in helpers.metrics(run)] == list(range(1, meta["step"] + 1))
    result = helpers.command("adm.py", *arguments, "--resume", "--iterations", str(meta["step"] + 1), "--batch", str(2 * processes))
    assert result.returncode == 0 and helpers.metrics(run)[-1]["step"] == meta["step"] + 1


def test_only_the_newest_checkpoints_are_kept(adm_arguments, tmp_path):
    run = tmp_path / "run"
    (run / "step_000001.tmp123").mkdir(parents=True)  # a killed process's
    adm.main([*adm_arguments, "--loss", "dmd", "--out", str(run), "--iterations", "4", "--save-every", "1", "--keep", "2"])
    assert sorted(name for name in os.listdir(run) if name.startswith("step_")) == ["step_000003", "step_000004"]


def test_nodes_that_find_different_checkpoints_are_refused(adm_arguments, tmp_path, monkeypatch):
    """The main process's mean of all starts is not its own where another node's --out is another disk's."""
    means = common.means
    monkeypatch.setattr(common, "means", lambda values: {"start": 250.0} if "start" in values else means(values))
    with pytest.raises(common.UserError, match="not the same on all nodes"):
        adm.main([*adm_arguments, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()
