"""Every stage of every family from the command line, end to end, with random tiny teachers on a CPU."""

import json
import math
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

ROOT = os.path.dirname(os.path.abspath(__file__))
WEIGHTS = "diffusion_pytorch_model.safetensors"
SHORT = "--batch 2 --iterations 2 --log-every 1 --head-width 128 --lr 1e-4"


def run(command, processes=1):
    """A script of the repository with its arguments, with torchrun for several processes -> what it said."""
    torchrun = []
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    words = [sys.executable, *torchrun, *command.split()]
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = {**os.environ, **settings}
    result = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def read_json(path):
    return json.loads(path.read_text())


def list_files(folder):
    return sorted(os.listdir(folder))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random teacher and SAM's encoder, hardly trained, made as README says."""
    folder = tmp_path_factory.mktemp("tiny")
    run(f"tiny/train.py --random --out {folder}/teacher")
    run(f"tiny/train.py --part sam --sam-steps 1 --out {folder}/sam.pth")
    return folder


def check_run(folder, tiny, denoiser="unet"):
    """The run's files are there, its numbers are finite, and its student has left the teacher."""
    assert (folder / "latest").read_text() == "step_000002\n"
    step = "step_000002"
    for name in ("curves.png", f"samples/{step}.png", f"{step}/meta.json", f"{step}/state/G.pt"):
        assert (folder / name).stat().st_size > 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert all(math.isfinite(value) for value in line.values())
    student = load_file(folder / step / "student" / WEIGHTS)
    teacher = load_file(tiny / "teacher" / denoiser / WEIGHTS)
    assert student.keys() == teacher.keys()
    assert all(weight.isfinite().all() for weight in student.values())
    assert not all(student[name].equal(teacher[name].float()) for name in student)


@pytest.mark.parametrize("processes", (1, 2))
def test_every_stage(tiny, tmp_path, processes):
    teacher = f"--teacher {tiny}/teacher"
    prompts = "--prompts prompts/shapes_train.txt"
    run(f"collect_ode.py {teacher} {prompts} --out {tmp_path}/pairs --count 8 --shard 4 --steps 2", processes)
    assert list_files(tmp_path / "pairs") == ["00000.safetensors", "00001.safetensors", "index.json"]

    source = f"--pairs {tmp_path}/pairs --pixel-backbone {tiny}/sam.pth"
    run(f"adp.py {teacher} {source} --warmup 1 --out {tmp_path}/adp {SHORT}", processes)
    check_run(tmp_path / "adp", tiny)

    init = f"--init {tmp_path}/adp"
    stages = {"one": f"{init} --ema 0.9", "four": "--steps 4", "dmd": f"{init} --loss dmd"}
    for name in stages if processes == 1 else ("one",):
        run(f"adm.py {teacher} {prompts} {stages[name]} --out {tmp_path}/{name} {SHORT}", processes)
        check_run(tmp_path / name, tiny)
        meta = read_json(tmp_path / name / "step_000002/meta.json")
        expected = ("teacher", 4) if name == "four" else ("velocity", 1)
        assert (meta["parametrisation"], meta["steps"]) == expected

    run(f"sample.py --student {tmp_path}/one --prompt circle square --seeds 0 1 --out {tmp_path}/images")
    images = ["0000-0.png", "0000-1.png", "0001-0.png", "0001-1.png"]
    assert list_files(tmp_path / "images") == [*images, "grid.png", "index.json"]

    students = ["one", "four"] if processes == 1 else ["one"]
    systems = " ".join(f"--student {name}={tmp_path}/{name}" for name in students)
    (tmp_path / "two.txt").write_text("a red circle\na small square on a black background\n")
    settings = f"--steps 2 --prompts {tmp_path}/two.txt --seeds 3"
    output = f"--json {tmp_path}/report.json --grid {tmp_path}/grid.png"
    table = run(f"evaluate.py {teacher} {systems} {settings} {output}")
    nfe = {"teacher": 4, "one": 1, "four": 4}
    expected = [(name, nfe[name], 6) for name in ("teacher", *students)]
    rows = read_json(tmp_path / "report.json")["rows"]
    assert [(row["system"], row["nfe"], row["samples"]) for row in rows] == expected
    assert all(f"| {name} |" in table for name in ("teacher", *students))
    assert (tmp_path / "grid.png").stat().st_size > 0


SD3 = {
    "family": "sd3",
    "steps": 4,  # the paper's number of steps is the family's default
    "suffix": "png",
    "prompts": ("a red circle", "a small square"),
    "pixel": "--pixel-backbone assets/tiny-sam.pth",
    "processes": 1,
    "scheduler": "FlowMatchEulerDiscreteScheduler",
}
COGVIDEOX = {
    "family": "cogvideox",
    "steps": 8,
    "suffix": "mp4",
    "prompts": ("a red circle moving left", "a small square moving"),
    "pixel": "--lambda-pixel 0",
    "processes": 2,
    "scheduler": "LCMScheduler",
}


@pytest.mark.parametrize("case", (SD3, COGVIDEOX), ids=("sd3", "cogvideox"))
def test_every_stage_of_the_other_families(tmp_path, case):
    run(f"tiny/train.py --family {case['family']} --random --out {tmp_path}/teacher")
    (tmp_path / "two.txt").write_text("\n".join(case["prompts"]) + "\n")
    teacher = f"--teacher {tmp_path}/teacher"
    prompts = f"--prompts {tmp_path}/two.txt"
    run(f"collect_ode.py {teacher} {prompts} --out {tmp_path}/pairs --count 4 --steps 2")
    source = f"--pairs {tmp_path}/pairs {case['pixel']}"
    run(f"adp.py {teacher} {source} --warmup 1 --out {tmp_path}/adp {SHORT}")
    check_run(tmp_path / "adp", tmp_path, "transformer")
    run(f"adm.py {teacher} {prompts} --out {tmp_path}/adm {SHORT}", case["processes"])
    check_run(tmp_path / "adm", tmp_path, "transformer")
    meta = read_json(tmp_path / "adm/step_000002/meta.json")
    assert (meta["parametrisation"], meta["steps"]) == ("teacher", case["steps"])

    student = f"--student {tmp_path}/adm"
    run(f"sample.py {student} {prompts} --side-by-side --steps 2 --out {tmp_path}/drawn")
    samples = [f"0000-0.{case['suffix']}", f"0001-0.{case['suffix']}"]
    assert list_files(tmp_path / "drawn") == [*samples, "grid.png", "index.json"]
    run(f"sample.py {student} --export {tmp_path}/exported")
    assert read_json(tmp_path / "exported/model_index.json")["scheduler"][1] == case["scheduler"]

    settings = f"--steps 2 --student adm={tmp_path}/adm {prompts} --seeds 2"
    run(f"evaluate.py {teacher} {settings} --json {tmp_path}/report.json --grid {tmp_path}/grid.png")
    rows = read_json(tmp_path / "report.json")["rows"]
    expected = [("teacher", 4, 4), ("adm", case["steps"], 4)]
    assert [(row["system"], row["nfe"], row["samples"]) for row in rows] == expected
    assert ("motion" in rows[0]["tv_of"]) == (case["family"] == "cogvideox")
