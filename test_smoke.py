"""Every stage of every family from the command line, end to end, with random tiny teachers on a CPU: one process, and two."""
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
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run([sys.executable, *torchrun, *command.split()], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


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
    for name in ("curves.png", "samples/step_000002.png", "step_000002/meta.json", "step_000002/state/G.pt"):
        assert (folder / name).stat().st_size > 0
    lines = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    assert [line["step"] for line in lines] == [1, 2] and all(math.isfinite(value) for line in lines for value in line.values())
    student, teacher = load_file(folder / "step_000002/student" / WEIGHTS), load_file(tiny / "teacher" / denoiser / WEIGHTS)
    assert student.keys() == teacher.keys() and all(weight.isfinite().all() for weight in student.values())
    assert not all(student[name].equal(teacher[name].float()) for name in student)


@pytest.mark.parametrize("processes", (1, 2))
def test_every_stage(tiny, tmp_path, processes):
    teacher, prompts = f"--teacher {tiny}/teacher", "--prompts prompts/shapes_train.txt"
    run(f"collect_ode.py {teacher} {prompts} --out {tmp_path}/pairs --count 8 --shard 4 --steps 2", processes)
    assert sorted(os.listdir(tmp_path / "pairs")) == ["00000.safetensors", "00001.safetensors", "index.json"]

    run(f"adp.py {teacher} --pairs {tmp_path}/pairs --pixel-backbone {tiny}/sam.pth --warmup 1 --out {tmp_path}/adp {SHORT}", processes)
    check_run(tmp_path / "adp", tiny)

    stages = {"one": f"--init {tmp_path}/adp --ema 0.9", "four": "--steps 4", "dmd": f"--init {tmp_path}/adp --loss dmd"}
    for name, options in stages.items() if processes == 1 else (("one", stages["one"]),):
        run(f"adm.py {teacher} {prompts} {options} --out {tmp_path}/{name} {SHORT}", processes)
        check_run(tmp_path / name, tiny)
        meta = json.load(open(tmp_path / name / "step_000002/meta.json"))
        assert (meta["parametrisation"], meta["steps"]) == (("teacher", 4) if name == "four" else ("velocity", 1))

    students = ["one", "four"] if processes == 1 else ["one"]
    run(f"sample.py --student {tmp_path}/one --prompt circle square --seeds 0 1 --out {tmp_path}/pictures")
    assert sorted(os.listdir(tmp_path / "pictures")) == ["0000-0.png", "0000-1.png", "0001-0.png", "0001-1.png", "grid.png"]
    chosen = " ".join(f"--student {name}={tmp_path}/{name}" for name in students)
    (tmp_path / "two.txt").write_text("a red circle\na small square on a black background\n")
    table = run(f"evaluate.py {teacher} --steps 2 {chosen} --prompts {tmp_path}/two.txt --seeds 3 --json {tmp_path}/report.json --grid {tmp_path}/grid.png")
    rows = json.load(open(tmp_path / "report.json"))["rows"]
    nfe = {"teacher": 4, "one": 1, "four": 4}
    assert [(row["system"], row["nfe"], row["samples"]) for row in rows] == [(name, nfe[name], 6) for name in ("teacher", *students)]
    assert all(f"| {name} |" in table for name in ("teacher", *students)) and (tmp_path / "grid.png").stat().st_size > 0


@pytest.mark.parametrize("family, steps, suffix", [("sd3", 4, "png"), ("cogvideox", 8, "mp4")])
def test_every_stage_of_the_other_families(tmp_path, family, steps, suffix):
    run(f"tiny/train.py --family {family} --random --out {tmp_path}/teacher")
    teacher = f"--teacher {tmp_path}/teacher"
    names = ("a red circle moving left", "a small square moving") if suffix == "mp4" else ("a red circle", "a small square")
    (tmp_path / "two.txt").write_text("\n".join(names) + "\n")
    prompts, pixel = f"--prompts {tmp_path}/two.txt", "--lambda-pixel 0" if suffix == "mp4" else "--pixel-backbone assets/tiny-sam.pth"
    run(f"collect_ode.py {teacher} {prompts} --out {tmp_path}/pairs --count 4 --steps 2")
    run(f"adp.py {teacher} --pairs {tmp_path}/pairs {pixel} --warmup 1 --out {tmp_path}/adp {SHORT}")
    run(f"adm.py {teacher} {prompts} --out {tmp_path}/adm {SHORT}", processes=2 if suffix == "mp4" else 1)
    for stage in ("adp", "adm"):
        check_run(tmp_path / stage, tmp_path, "transformer")
    meta = json.load(open(tmp_path / "adm/step_000002/meta.json"))
    assert (meta["parametrisation"], meta["steps"]) == ("teacher", steps)  # the paper's number of steps is the family's default

    run(f"sample.py --student {tmp_path}/adm {prompts} --side-by-side --steps 2 --out {tmp_path}/drawn")
    assert sorted(os.listdir(tmp_path / "drawn")) == [f"0000-0.{suffix}", f"0001-0.{suffix}", "grid.png"]
    run(f"sample.py --student {tmp_path}/adm --export {tmp_path}/exported")
    assert json.load(open(tmp_path / "exported/model_index.json"))["scheduler"][1] == ("LCMScheduler" if suffix == "mp4" else "FlowMatchEulerDiscreteScheduler")
    run(f"evaluate.py {teacher} --steps 2 --student adm={tmp_path}/adm {prompts} --seeds 2 --json {tmp_path}/report.json --grid {tmp_path}/grid.png")
    rows = json.load(open(tmp_path / "report.json"))["rows"]
    assert [(row["system"], row["nfe"], row["samples"]) for row in rows] == [("teacher", 4, 4), ("adm", steps, 4)]
    assert ("motion" in rows[0]["tv"]) == (suffix == "mp4")
