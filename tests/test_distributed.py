"""Two processes do what one does: the same losses for the same global batch, the same ODE pairs."""
import os

import pytest
import torch

import adm
import adp
import helpers

# Adam's first steps follow a gradient's sign, so entries that are zero but for rounding move by the whole learning rate: it is small
# here, and the gradients themselves are compared. A long step dt, because the gap of two almost equal samples is mostly rounding.
SMALL = "--lr 1e-6 --head-lr 1e-6 --batch 2 --iterations 3"
RUNS = (("adp", f"--warmup 1 {SMALL}"), *(("adm", f"{options} --fake-lr 1e-6 {SMALL}") for options in ("--dt 0.25", "--dt 0.25 --ttur 2 --steps 2", "--loss dmd", "--dt 0.25 --shard zero1")))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, adp_arguments, adm_arguments):
    """All runs, one after the other, in two processes that torchrun started -> their folders."""
    folder = tmp_path_factory.mktemp("two")
    lines = ["import adm, adp, common"]
    for i, (stage, options) in enumerate(RUNS):
        arguments = adp_arguments if stage == "adp" else adm_arguments
        lines.append(f"{stage}.main({[*arguments, '--out', str(folder / str(i)), *options.split()]!r})")
    script = folder / "runs.py"
    script.write_text(f"import sys\nsys.path.insert(0, {helpers.ROOT!r})\n" + "\n".join(lines) + "\ncommon.dist.destroy_process_group()\n")
    result = helpers.command(str(script), processes=2)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("i", range(len(RUNS)), ids=("adp", "adm", "adm --ttur 2 --steps 2", "dmd", "zero1"))
def test_two_processes_lose_what_one_does(two_processes, adp_arguments, adm_arguments, tmp_path, i):
    stage, options = RUNS[i]
    main, arguments = (adp.main, adp_arguments) if stage == "adp" else (adm.main, adm_arguments)
    main([*arguments, "--out", str(tmp_path), *options.split(), "--batch", "4"])
    compare(tmp_path, two_processes / str(i))


@pytest.mark.parametrize("i", range(4), ids=("adp", "adm", "adm --ttur 2 --steps 2", "dmd"))
def test_micro_batches_lose_what_one_batch_does(adp_arguments, adm_arguments, tmp_path, i):
    stage, options = RUNS[i]
    main, arguments = (adp.main, adp_arguments) if stage == "adp" else (adm.main, adm_arguments)
    for name, split in (("whole", "--batch 4"), ("parts", "--batch 1 --accumulate 4")):
        main([*arguments, "--out", str(tmp_path / name), *options.split(), *split.split()])
    compare(tmp_path / "whole", tmp_path / "parts")


def compare(*folders):
    """Two runs' metrics of every iteration, and their gradients, whose averages Adam keeps."""
    for one, two in zip(*map(helpers.metrics, folders), strict=True):
        for name in one.keys() - {"cosine", "D_gap"}:  # which are small differences
            assert two[name] == pytest.approx(one[name], rel=1e-3 if name.startswith("norm") else 2e-4, abs=1e-5), name
    states = [torch.load(folder / "step_000003/state.pt", weights_only=True) for folder in folders]
    for name in states[0]:
        if name.startswith("opt") and states[0][name]["state"]:
            one, two = (torch.cat([part["exp_avg"].flatten() for part in state[name]["state"].values()]) for state in states)
            assert one.norm() > 1e-4 and (one - two).norm() < 2e-3 * one.norm(), name


@pytest.fixture
def collect_arguments(teacher_folder, prompts_file):
    return ["--teacher", teacher_folder, "--prompts", prompts_file, "--count", "9", "--shard", "2", "--steps", "2", "--batch", "2"]


def test_two_processes_collect_the_same_pairs(collect_arguments, tmp_path):
    helpers.collect(*collect_arguments, "--out", str(tmp_path / "one"))
    result = helpers.command("collect_ode.py", *collect_arguments, "--out", str(tmp_path / "two"), processes=2)
    assert result.returncode == 0, result.stderr
    one, two = ({os.path.basename(path): digest for path, digest in helpers.snapshot(tmp_path / name).items()} for name in ("one", "two"))
    assert one == two and set(one) == {"index.json", *(f"{k:05d}.safetensors" for k in range(5))}


def test_all_shards_are_made_when_one_process_is_late(collect_arguments, tmp_path, monkeypatch):
    """The second process looks for work after the first has finished all of its own."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        helpers.collect(*collect_arguments, "--out", str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == [*(f"{k:05d}.safetensors" for k in range(5)), "index.json"]


def test_missing_and_damaged_shards_are_made_again_and_no_other(collect_arguments, tmp_path):
    arguments = [*collect_arguments, "--out", str(tmp_path)]
    helpers.collect(*arguments)
    before, ages = helpers.snapshot(tmp_path), {name: os.stat(tmp_path / name).st_mtime_ns for name in os.listdir(tmp_path)}
    os.remove(tmp_path / "00001.safetensors")
    os.truncate(tmp_path / "00003.safetensors", 1000)
    helpers.collect(*arguments)
    assert helpers.snapshot(tmp_path) == before
    changed = {name for name, age in ages.items() if os.stat(tmp_path / name).st_mtime_ns != age}
    assert changed - {"index.json"} == {"00001.safetensors", "00003.safetensors"}
