"""Two processes do what one does: the same losses for the same global batch, the same ODE pairs."""
import os
import shutil
import subprocess
import sys
from unittest import mock

import pytest
import torch

import adm
import adp
import common
import helpers
from tiny import bench

SAVE = common.Run.save
STEPS = 5
# A long step dt, because the gap of two almost equal samples is mostly rounding. The learning rates are those of QUICK.
ADP, ADM = f"--warmup 1 --iterations {STEPS}", f"--dt 0.25 --iterations {STEPS}"
OPTIONS = {(stage, family): options for stage, options in (("adp", ADP), ("adm", f"--ema 0.5 {ADM}")) for family in ("sdxl", "sd3", "cogvideox")}
OPTIONS["adp", "cogvideox"] += " --lambda-latent 1 --lambda-pixel 0"
RUNS = {  # name: (script, teacher, options, those of several processes alone)
    **{f"{stage} {family} {shard}": (stage, family, options, f"--shard {shard}") for (stage, family), options in OPTIONS.items()
       for shard in ("ddp", "zero1", "fsdp")},
    "adm --ttur 2 --steps 2": ("adm", "sdxl", f"--ttur 2 --steps 2 {ADM}", ""),
    "dmd": ("adm", "sdxl", f"--loss dmd {ADM}", ""),
    "adm fsdp, accumulated": ("adm", "sd3", f"--ema 0.5 {ADM}", "--shard fsdp --batch 1 --accumulate 2"),
    "adm lora": ("adm", "sd3", f"--lora 4 {ADM}", ""),
    "adm lora fsdp": ("adm", "cogvideox", f"--lora 4 {ADM} --lr 1e-3", "--shard fsdp"),
}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, prompts_file, adp_arguments, adm_arguments):
    """A function: the name of a run -> (its main, arguments)."""
    others = {}
    for family in ("sd3", "cogvideox"):
        folder = tmp_path_factory.mktemp(family)
        teacher, pairs = helpers.random_teacher(folder / "teacher", 0, family), str(folder / "pairs")
        helpers.collect("--teacher", teacher, "--prompts", prompts_file, "--out", pairs, "--count", "8", "--steps", "1")
        others[family] = {"adm": ["--teacher", teacher], "adp": ["--teacher", teacher, "--pairs", pairs]}

    def of(name):
        stage, family, options, _ = RUNS[name]
        script, shared = {"adp": (adp, adp_arguments), "adm": (adm, adm_arguments)}[stage]
        return script.main, [*shared, *others.get(family, {}).get(stage, []), *options.split()]

    return of


@pytest.fixture(autouse=True)
def steady(monkeypatch):
    """No pictures either, which take a run's second."""
    monkeypatch.setattr(common, "adamw", helpers.steady(common.adamw))
    monkeypatch.setattr(common, "save_preview", lambda *_: None)
    monkeypatch.setattr(common, "save_curves", lambda *_: None)


STEADY = f"""
import sys
sys.path[:0] = {[helpers.ROOT, os.path.dirname(os.path.abspath(__file__))]!r}
import adm, adp, common, helpers
common.adamw, common.save_preview, common.save_curves = helpers.steady(common.adamw), lambda *_: None, lambda *_: None
"""


@pytest.fixture(scope="module")
def processes(tmp_path_factory, arguments):
    """A function: how many processes, names of runs -> the folder of these runs, one after the other in processes that torchrun started."""

    def run(count, *names):
        folder = tmp_path_factory.mktemp(f"processes{count}")
        lines = [STEADY]
        for name in names:
            main, words = arguments(name)
            words = [*words, "--out", str(folder / name), "--batch", str(4 // count), *RUNS[name][3].split()]
            lines.append(f"{main.__module__}.main({words!r})")
        (folder / "runs.py").write_text("\n".join([*lines, "common.dist.destroy_process_group()"]))
        result = helpers.command(str(folder / "runs.py"), processes=count)
        assert result.returncode == 0, result.stderr
        return folder

    return run


@pytest.fixture(scope="module")
def two_processes(processes):
    return processes(2, *RUNS)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, arguments):
    """A function: the name of a run -> its folder, made by one process; --shard says nothing to it, so that three runs are one."""
    folders = {}

    def run(name):
        key = RUNS[name][:3]
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("one")
            main, words = arguments(name)
            main([*words, "--out", str(folders[key]), "--batch", "4"])
        return folders[key]

    return run


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_lose_what_one_does(two_processes, one_process, name):
    compare(one_process(name), two_processes / name)


def test_four_processes_lose_what_one_does(processes, one_process):
    names = ("adm sdxl ddp", "adm sdxl fsdp")
    folder = processes(4, *names)
    for name in names:
        compare(one_process(name), folder / name)


@pytest.mark.parametrize("name", ("adp sdxl ddp", "adm sdxl ddp", "adm --ttur 2 --steps 2", "dmd", "adm lora"))
def test_micro_batches_lose_what_one_batch_does(arguments, tmp_path, name):
    main, words = arguments(name)
    for folder, split in (("whole", "--batch 4"), ("parts", "--batch 1 --accumulate 4")):
        main([*words, "--out", str(tmp_path / folder), *split.split()])
    compare(tmp_path / "whole", tmp_path / "parts")


def test_compiled_blocks_do_what_they_do_uncompiled(arguments, tmp_path, monkeypatch):
    """Traced as for the card's compiler, then run as they are: building kernels takes minutes."""
    main, words = arguments("dmd")
    traced, compile_module = [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: traced.append(block) or compile_module(block, backend="eager"))
    for folder, options in (("plain", []), ("compiled", ["--compile"])):
        main([*words, "--out", str(tmp_path / folder), *options])
    assert traced and all(block._compiled_call_impl for block in traced)
    compare(tmp_path / "plain", tmp_path / "compiled")


def test_lora_leaves_the_backbone_as_it_was_and_saves_what_it_trains(arguments, tmp_path):
    """A student of adapters alone: the plain network that is saved for it does what backbone and adapter do."""
    main, words = arguments("adm lora")
    kept = {}
    with mock.patch.object(common.Run, "save", lambda run, step, G, *rest: kept.update(run=run, G=G) or SAVE(run, step, G, *rest)):
        main([*words, "--out", str(tmp_path), "--lr", "1e-2", "--head-lr", "1e-2"])
    teacher, G = kept["run"].student.teacher, kept["G"]
    fresh = common.load_teacher(teacher.path, teacher.device)
    ours = {name.replace(".base_layer", ""): weight for name, weight in teacher.denoiser.state_dict().items() if "lora_" not in name}
    assert ours.keys() == fresh.denoiser.state_dict().keys() and all(weight.equal(ours[name]) for name, weight in fresh.denoiser.state_dict().items())
    net, *_ = common.load_student(str(tmp_path), fresh)
    x, t, cond = torch.randn(2, *teacher.latent_shape), torch.tensor([300.0, 900.0]), teacher.encode(["a red circle", "a square"])
    ours, theirs, before = (teacher.call(network, x, t, cond) for network in (G, net, teacher.denoiser))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert (ours - before).abs().max() > 1e-2 and before.equal(fresh.call(fresh.denoiser, x, t, cond))


def test_lora_goes_on_from_lora_alone(arguments, tmp_path):
    main, words = arguments("adm lora")
    for name, options in (("full", ["--lora", "0"]), ("lora", []), ("on", ["--init", str(tmp_path / "lora"), "--lr", "0", "--iterations", "1"])):
        main([*words, "--out", str(tmp_path / name), *options])
    before, after = (helpers.state(tmp_path / name / step)["G"] for name, step in (("lora", f"step_{STEPS:06d}"), ("on", "step_000001")))
    assert any(weight.any() for name, weight in before.items()) and all(weight.equal(after[name]) for name, weight in before.items())
    for options in (["--init", str(tmp_path / "full")], ["--init", str(tmp_path / "lora"), "--lora", "2"]):
        with pytest.raises(common.UserError, match="of the same --lora"):
            main([*words, "--out", str(tmp_path / "refused"), *options])


@pytest.mark.parametrize("name", ("adp sdxl ddp", "adm --ttur 2 --steps 2"))
def test_offloading_changes_where_prompts_are_encoded_and_nothing_else(arguments, tmp_path, name, monkeypatch):
    main, words = arguments(name)
    encoded, encode = [], common.SDXL._encode
    monkeypatch.setattr(common.SDXL, "_encode", lambda teacher, prompts: encoded.append(len(prompts)) or encode(teacher, prompts))
    for folder, options in (("here", []), ("away", ["--offload"])):
        encoded.clear()
        main([*words, "--out", str(tmp_path / folder), *options])
    compare(tmp_path / "here", tmp_path / "away")  # but for rounding: other rows are beside a prompt
    assert len(encoded) <= 4  # a map for the heads, the null prompt, all iterations at once


def test_two_torchruns_are_two_nodes(arguments, tmp_path):
    main, words = arguments("dmd")
    main([*words, "--out", str(tmp_path / "one"), "--batch", "4"])
    script = tmp_path / "run.py"
    script.write_text(f"{STEADY}\nadm.main({[*words, '--out', str(tmp_path / 'two'), '--batch', '2']!r})")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={bench.free_port()}"]
    nodes = [subprocess.Popen([*torchrun, f"--node_rank={node}", str(script)], cwd=helpers.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
             for node in (0, 1)]
    said = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert "dmd_loss" in said[0] and "dmd_loss" not in said[1]  # rank 0 alone shows its progress
    compare(tmp_path / "one", tmp_path / "two")


def test_one_failing_process_ends_all_with_its_own_error(arguments, tmp_path):
    main, words = arguments("dmd")
    script = tmp_path / "failing.py"
    script.write_text(f"""
import os, sys
sys.path.insert(0, {helpers.ROOT!r})
import adm, common
log = common.Run.log

def fail(run, step, metrics):
    log(run, step, metrics)
    if step == 2 and os.environ["RANK"] == "1":
        raise ValueError("the second process is out of luck")

common.Run.log = fail
adm.main({[*words, "--out", str(tmp_path / "run"), "--iterations", "1000"]!r})
""")
    result = helpers.command(str(script), processes=2, timeout=120)
    assert result.returncode == 1 and "ValueError: the second process is out of luck" in result.stderr


@pytest.mark.parametrize("shard, count", (("fsdp", 1), ("zero1", 2)))
def test_a_sharded_run_goes_on_in_any_number_of_processes(two_processes, arguments, tmp_path, shard, count):
    """Two processes, then `count`: as if it had been one from the start."""
    name = f"adm sdxl {shard}"
    main, words = arguments(name)
    shutil.copytree(two_processes / name, tmp_path / "parts")
    words = [*words, "--iterations", str(STEPS + 1)]
    main([*words, "--out", str(tmp_path / "whole"), "--batch", "4"])
    on = [*words, "--out", str(tmp_path / "parts"), "--batch", str(4 // count), "--resume", *(["--shard", shard] if count > 1 else [])]
    script = tmp_path / "on.py"
    script.write_text(f"{STEADY}\nadm.main({on!r})")
    result = helpers.command(str(script), processes=count if count > 1 else None)
    assert result.returncode == 0, result.stderr
    compare(tmp_path / "whole", tmp_path / "parts", step=STEPS + 1)


def compare(*folders, step=STEPS):
    """Two runs' losses of every iteration, their weights at the end, and their gradients, whose averages Adam keeps."""
    for one, two in zip(*map(helpers.metrics, folders), strict=True):
        for name in one.keys() - {"cosine", "D_gap"}:  # which are small differences
            assert two[name] == pytest.approx(one[name], rel=1e-4 if name.startswith("norm") else 1e-5, abs=1e-5), name
    states = [helpers.state(folder / f"step_{step:06d}") for folder in folders]
    for name in states[0]:
        if not name.startswith("opt"):
            torch.testing.assert_close(*(state[name] for state in states), rtol=0, atol=1e-6)
        elif states[0][name]["state"]:
            (one, moved), (two, _) = (helpers.adam(state[name]) for state in states)
            assert one.norm() > 1e-4 and (one - two).norm() < 1e-3 * one.norm(), name
            assert moved > 1e-5, name


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
