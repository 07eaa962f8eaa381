"""--plan: the published sizes, what fits, and the memory of a run that really happens."""
import argparse
import os
from unittest import mock

import pytest
import torch

import adm
import adp
import common
import helpers
from tiny import plan

SIZES = {"sdxl": (87.3, 51.3, 10.9), "sd3-medium": (69.0, 40.6, 8.6), "sd3.5-large": (273.9, 161.1, 34.2), "cogvideox-2b": (57.6, 33.9, 7.2),
         "cogvideox-5b": (189.4, 111.4, 23.7)}  # student, fake score and bf16 teacher on each of 8 GPUs: --shard ddp, zero1, fsdp
NAMES = ("student", "fake score", "teacher")


def arguments(main, *words):
    """What a script's command line comes to."""
    with mock.patch.object(plan, "print_plan", lambda args: args):
        return main([*words, *([] if "--plan" in words else ["--plan"])])


def planned(args):
    """(parts, rows, their sum in bytes)."""
    configs = plan.read_configs(args.teacher)
    args.batch = args.batch or common.FAMILIES[configs["pipeline"]].batch
    parts = plan.memory_parts(args, configs)
    rows = plan.memory_rows(args, parts, args.plan)
    return parts, rows, sum(map(sum, rows.values()))


@pytest.mark.parametrize("name", SIZES)
def test_states_of_the_five_teachers(name):
    args = arguments(adm.main, "--teacher", name)
    args.batch = 1
    with mock.patch.object(plan, "trace", lambda *_: (0, 0)):  # no activations
        parts, *_ = planned(args)
        tables = sum(b.numel() for b in parts.teacher.denoiser.buffers())  # of positions, which the published numbers leave out
        for shard, published in zip(("ddp", "zero1", "fsdp"), SIZES[name]):
            rows = plan.memory_rows(argparse.Namespace(**{**vars(args), "shard": shard}), parts, 8)
            states = sum(sum(row) for part, row in rows.items() if part.startswith(NAMES)) - (4 + 4 + 2) * tables
            assert states / 1e9 == pytest.approx(published, rel=0.05), shard
        lora = plan.memory_rows(argparse.Namespace(**{**vars(args), "lora": 64}), parts, 8)
        assert sum(sum(row) for part, row in lora.items() if part.startswith(NAMES)) < 5 * sum(p.numel() for p in parts.teacher.denoiser.parameters())


@pytest.mark.parametrize("options, says", [
    ("--gpu-gb 100", "fits 100 GB"), ("--gpu-gb 85", "does not fit 85 GB; with --batch 1 --accumulate 4 it does"),
    ("--gpu-gb 80", "does not fit 80 GB; with --shard zero1 it does"), ("--gpu-gb 50", "does not fit 50 GB; with --shard fsdp it does"),
    ("--gpu-gb 5", "does not fit 5 GB, nor with any two of")])
def test_what_fits_and_what_would(capsys, options, says):
    """SD3-Medium with a trace of 2 GB a row."""
    with mock.patch.object(plan, "trace", lambda args, *_: (2e9 * args.batch, 0)):
        assert adm.main(["--teacher", "sd3-medium", "--plan", *options.split()]) is None
    out = capsys.readouterr().out
    assert says in out and "8 GPUs" in out and "text encoders" in out


def test_unknown_teachers(tmp_path):
    for name in ("someone/else", str(tmp_path)):
        with pytest.raises(common.UserError):
            adm.main(["--teacher", name, "--plan"])


def test_nothing_of_attention_is_as_large_as_all_pairs():
    q = torch.empty(1, 24, 16384, 64, device="meta", requires_grad=True)
    with plan.Storages() as storages, plan.GPUAutocast(torch.bfloat16):
        torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
    assert storages.peak < 20 * q.nbytes < 24 * 16384**2


def test_real_activations_of_a_full_size_teacher():
    """They grow with the batch, and without checkpointing."""
    args = arguments(adm.main, "--teacher", "sd3-medium", "--shard", "fsdp")
    args.batch = 2
    parts, rows, _ = planned(args)
    four, whole = (argparse.Namespace(**{**vars(args), **change}) for change in ({"batch": 4}, {"checkpointing": False}))
    two = parts.activations(args)
    assert 2e9 < two < 4e9 and 1.5 * two < parts.activations(four) < 2.1 * two
    assert plan.memory_parts(whole, plan.read_configs(args.teacher)).activations(whole) > 5 * two


# A run that really happens -------------------------------------------------------------------------------------------------


def measured_peak(main, words):
    """The most bytes of tensors alive in the second iteration of a script, on the CPU."""
    def log(run, step, metrics):
        peaks.append(storages.peak)
        storages.peak = storages.live

    peaks = []
    with mock.patch.object(common.Run, "log", log), mock.patch.object(common.Run, "save", lambda *_: None), plan.Storages() as storages:
        main(words)
    return peaks[1]


@pytest.mark.parametrize("kind", ("sdxl", "sd3", "cogvideox"))
@pytest.mark.parametrize("options", ("", "--no-checkpointing"))
def test_the_plan_is_what_a_tiny_run_takes(tmp_path, prompts_file, kind, options):
    folder = helpers.random_teacher(tmp_path / "teacher", 0, kind)
    prompts = prompts_file if kind != "cogvideox" else os.path.join(os.path.dirname(common.PROMPTS), "motion_train.txt")
    words = ["--teacher", folder, "--precision", "fp32", "--batch", "16", "--head-width", "64", "--prompts", prompts, *options.split()]
    found = measured_peak(adm.main, [*words, "--out", str(tmp_path / "run"), "--iterations", "2"])
    *_, total = planned(arguments(adm.main, *words, "--plan", "1"))
    assert total == pytest.approx(found, rel=0.15)


def test_the_plan_is_what_a_tiny_run_of_adp_takes(tmp_path, adp_arguments):
    words = [*adp_arguments, "--precision", "fp32", "--batch", "16"]
    found = measured_peak(adp.main, [*words, "--out", str(tmp_path / "run"), "--warmup", "0"])
    *_, total = planned(arguments(adp.main, *words, "--plan", "1"))
    assert total == pytest.approx(found, rel=0.15)


def test_the_plan_is_what_a_tiny_checkpoint_takes(tmp_path, adm_arguments):
    words = [*adm_arguments, "--ema", "0.5", "--iterations", "1"]
    adm.main([*words, "--out", str(tmp_path / "run")])
    found = sum(path.stat().st_size for path in (tmp_path / "run/step_000001").rglob("*") if path.is_file())
    args = arguments(adm.main, *words)
    assert plan.checkpoint_bytes(args, planned(args)[0]) == pytest.approx(found, rel=0.05)
