"""Every stage of every family, end to end, with random tiny teachers on a CPU."""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file

import adm
import adp
import collect_ode
import evaluate
import sample
import support.run
from tiny import train

torch.set_num_threads(1)
ROOT = os.path.dirname(os.path.abspath(__file__))
WEIGHTS = "diffusion_pytorch_model.safetensors"
SHORT = "--batch 2 --iterations 2 --log-every 1 --head-width 128 --lr 1e-4"


def run(command, *torchrun):
    """A script of the repository with its arguments -> what it said."""
    words = [sys.executable, *torchrun, *command.split()]
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = {**os.environ, **settings}
    result = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


MAIN = {
    "tiny/train.py": train.main,
    "collect_ode.py": collect_ode.main,
    "adp.py": adp.main,
    "adm.py": adm.main,
    "sample.py": sample.main,
    "evaluate.py": evaluate.main,
}


def call(command):
    """The same in this process, without the seconds in which its libraries load."""
    script, *words = command.split()
    MAIN[script](words)


def read_json(path):
    return json.loads(path.read_text())


def list_files(folder):
    return sorted(os.listdir(folder))


def check_run(folder, tiny, denoiser="unet", adapter=False):
    """The run's files are there, its numbers are finite, and its student, whole or an adapter, has left the
    teacher."""
    assert (folder / "latest").read_text() == "step_000002\n"
    step = "step_000002"
    for name in (f"samples/{step}.png", f"{step}/meta.json", f"{step}/state/G.pt"):
        assert (folder / name).stat().st_size > 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert all(math.isfinite(value) for value in line.values())
    if adapter:
        student = load_file(folder / step / "pytorch_lora_weights.safetensors")
        assert all(weight.isfinite().all() for weight in student.values())
        assert any(weight.any() for name, weight in student.items() if "lora_B" in name)
        return
    student = load_file(folder / step / "student" / WEIGHTS)
    teacher = load_file(tiny / "teacher" / denoiser / WEIGHTS)
    assert student.keys() == teacher.keys()
    assert all(weight.isfinite().all() for weight in student.values())
    assert not all(student[name].equal(teacher[name].float()) for name in student)


# ----------------------------------------------------------------------------------------------------------
# SDXL, from the command line
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random teacher and SAM's encoder, hardly trained, made as README says."""
    folder = tmp_path_factory.mktemp("tiny")
    call(f"tiny/train.py --random --out {folder}/teacher")
    call(f"tiny/train.py --part sam --sam-steps 1 --out {folder}/sam.pth")
    return folder


def test_every_stage(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(support.run, "save_curves", lambda *_: None)  # a third of a short run
    teacher = f"--teacher {tiny}/teacher"
    prompts = f"--prompts {ROOT}/prompts/shapes_train.txt"
    call(f"collect_ode.py {teacher} {prompts} --out {tmp_path}/pairs --count 8 --shard-size 4 --steps 2")
    assert list_files(tmp_path / "pairs") == ["00000.safetensors", "00001.safetensors", "index.json"]
    source = f"--pairs {tmp_path}/pairs --pixel-backbone {tiny}/sam.pth"
    call(f"adp.py {teacher} {source} --warmup 1 --out {tmp_path}/adp {SHORT}")
    from_adp = f"{teacher} {prompts} --init {tmp_path}/adp"
    call(f"adm.py {from_adp} --ema 0.9 --out {tmp_path}/one {SHORT}")
    call(f"adm.py {from_adp} --loss dmd --out {tmp_path}/dmd {SHORT}")
    run(f"adm.py {teacher} {prompts} --steps 4 --out {tmp_path}/four {SHORT}")
    assert (tmp_path / "four" / "curves.png").stat().st_size > 0
    students = {"one": ("velocity", 1), "four": ("teacher", 4), "dmd": ("velocity", 1)}
    for name, expected in students.items():
        check_run(tmp_path / name, tiny)
        meta = read_json(tmp_path / name / "step_000002/meta.json")
        assert (meta["parametrisation"], meta["steps"]) == expected
    check_run(tmp_path / "adp", tiny)

    run(f"sample.py --student {tmp_path}/one --prompt circle square --seeds 0 1 --out {tmp_path}/images")
    images = ["0000-0.png", "0000-1.png", "0001-0.png", "0001-1.png"]
    assert list_files(tmp_path / "images") == [*images, "grid.png", "index.json"]

    students = f"--student one={tmp_path}/one --student four={tmp_path}/four"
    (tmp_path / "two.txt").write_text("a red circle\na small square on a black background\n")
    settings = f"--steps 2 --prompts {tmp_path}/two.txt --seeds 3"
    output = f"--json {tmp_path}/report.json --grid {tmp_path}/grid.png"
    table = run(f"evaluate.py {teacher} {students} {settings} {output}")
    rows = read_json(tmp_path / "report.json")["rows"]
    expected = [("teacher", 4, 6), ("one", 1, 6), ("four", 4, 6)]
    assert [(row["system"], row["nfe"], row["samples"]) for row in rows] == expected
    assert all(f"| {row['system']} |" in table for row in rows)
    assert (tmp_path / "grid.png").stat().st_size > 0


@pytest.mark.slow
def test_training_in_two_processes(tiny, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    source = f"--teacher {tiny}/teacher --prompts {ROOT}/prompts/shapes_train.txt"
    run(f"adm.py {source} --steps 4 --ema 0.9 --out {tmp_path}/four {SHORT}", *torchrun)
    check_run(tmp_path / "four", tiny)
    call(f"sample.py --student {tmp_path}/four --prompt circle --out {tmp_path}/images")
    assert list_files(tmp_path / "images") == ["0000-0.png", "grid.png", "index.json"]


# ----------------------------------------------------------------------------------------------------------
# The other families
# ----------------------------------------------------------------------------------------------------------


@dataclass
class Family:
    steps: int  # of its students, if the command line does not say it
    size: str = ""  # options, where the tiny teacher's configs do not say it
    video: bool = False
    denoiser: str = "transformer"
    prompts: tuple = ("a red circle", "a small square")


SMALL = "--resolution 32"
MOVING = ("a red circle moving left", "a small square moving")
FAMILIES = {
    "sd3": Family(4),
    "cogvideox": Family(8, video=True, prompts=MOVING),
    "stable-diffusion": Family(4, denoiser="unet"),
    "wan": Family(8, f"{SMALL} --frames 9", video=True, prompts=MOVING),
    "z-image": Family(8, SMALL),
    "qwen-image": Family(4, SMALL),
    "flux": Family(4, SMALL),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_stage_of_the_other_families(tmp_path, monkeypatch, name):
    monkeypatch.setattr(support.run, "save_curves", lambda *_: None)
    family = FAMILIES[name]
    call(f"tiny/train.py --family {name} --random --out {tmp_path}/teacher")
    (tmp_path / "two.txt").write_text("\n".join(family.prompts) + "\n")
    teacher = f"--teacher {tmp_path}/teacher {family.size}"
    prompts = f"--prompts {tmp_path}/two.txt"

    call(f"collect_ode.py {teacher} {prompts} --out {tmp_path}/pairs --count 4 --steps 2")
    pixel = "--lambda-pixel 0" if family.video else f"--pixel-backbone {ROOT}/assets/tiny-sam.pth"
    call(f"adp.py {teacher} --pairs {tmp_path}/pairs {pixel} --warmup 1 --out {tmp_path}/adp {SHORT}")
    runs = {"adp": ("velocity", 1), "one": ("velocity", 1), "many": ("teacher", family.steps)}
    call(f"adm.py {teacher} {prompts} --init {tmp_path}/adp --out {tmp_path}/one {SHORT}")
    call(f"adm.py {teacher} {prompts} --lora 4 --out {tmp_path}/many {SHORT}")
    for run_name, expected in runs.items():
        check_run(tmp_path / run_name, tmp_path, family.denoiser, adapter=run_name == "many")
        meta = read_json(tmp_path / run_name / "step_000002/meta.json")
        assert (meta["parametrisation"], meta["steps"]) == expected

    student = f"--student {tmp_path}/many"
    call(f"sample.py {student} {prompts} --side-by-side --steps 2 --out {tmp_path}/drawn")
    suffix = "mp4" if family.video else "png"
    samples = [f"0000-0.{suffix}", f"0001-0.{suffix}"]
    assert list_files(tmp_path / "drawn") == [*samples, "grid.png", "index.json"]

    settings = f"--steps 2 --student many={tmp_path}/many {prompts} --seeds 2"
    call(f"evaluate.py {teacher} {settings} --json {tmp_path}/report.json --grid {tmp_path}/grid.png")
    rows = read_json(tmp_path / "report.json")["rows"]
    passes = 2 if name == "flux" else 4  # of two steps
    expected = [("teacher", passes, 4), ("many", family.steps, 4)]
    assert [(row["system"], row["nfe"], row["samples"]) for row in rows] == expected
    assert ("motion" in rows[0]["tv_of"]) == family.video
