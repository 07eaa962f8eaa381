"""--plan: the published sizes, what fits, and the memory of a run that really happens."""

import os
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import adm
import adp
import common
import helpers
from support.errors import UserError
from support.lora import Adapted
from support.prompts import PROMPTS
from support.sam import make_sam_encoder_on_meta
from tools.meta import GPUAutocast, count_parameters
from tools.plan import (
    add_up,
    count_activations,
    count_adapter,
    count_checkpoint,
    count_states,
    describe_fit,
    describe_time,
    list_smaller_options,
    measure_activations,
    print_plan,
)
from tools.storages import Storages
from tools.trace import Networks, Trace, change

# GB of student, fake score and bf16 teacher on each of 8 GPUs: --shard ddp, zero1, fsdp
SIZES = {
    "sdxl": (87.3, 51.3, 10.9),
    "sd3-medium": (69.0, 40.6, 8.6),
    "sd3.5-large": (273.9, 161.1, 34.2),
    "cogvideox-2b": (57.6, 33.9, 7.2),
    "cogvideox-5b": (189.4, 111.4, 23.7),
    "wan2.1-1.3b": (48.2, 28.4, 6.0),
    "wan2.1-14b": (485.8, 285.8, 60.7),
    "wan2.2-5b": (170.0, 100.0, 21.2),
    "z-image": (209.3, 123.1, 26.2),
    "qwen-image": (694.6, 408.6, 86.8),
    "flux.1-dev": (404.6, 238.0, 50.6),
    "sd1.5": (29.2, 17.2, 3.7),
    "sd2.1-base": (29.4, 17.3, 3.7),
}
FP32 = ["--precision", "fp32"]
MOTION = os.path.join(os.path.dirname(PROMPTS), "motion_train.txt")


def parse(stage, *words):
    """The arguments of a command line of a stage (the module adm or adp)."""
    return helpers.training_arguments(stage.__name__, [*map(str, words)])


def make_networks(stage, args):
    kind = adm.ADM if stage is adm else adp.ADP
    return Networks(args, kind, stage.iterate)


def add_up_states(rows):
    """The bytes of student, fake score and teacher."""
    names = ("student", "fake score", "teacher")
    return sum(sum(row) for part, row in rows.items() if part.startswith(names))


@pytest.mark.parametrize("name", SIZES)
def test_states_of_the_known_teachers(name):
    args = parse(adm, "--teacher", name, "--loss", "dmd")
    networks = make_networks(adm, args)
    denoiser = networks.teacher.denoiser
    tables = sum(b.numel() for b in denoiser.buffers())  # of positions: published numbers leave them out
    for shard, published in zip(("ddp", "zero1", "fsdp"), SIZES[name]):
        rows = count_states(change(args, shard=shard), networks, 8)
        states = add_up_states(rows) - (4 + 4 + 2) * tables
        assert states / 1e9 == pytest.approx(published, rel=0.05), shard
    lora = count_states(change(args, lora=64), networks, 8)
    assert add_up_states(lora) < 5 * count_parameters(denoiser)


def test_adapters_and_heads_share_their_optimisers_states_alone():
    """With --shard fsdp, too: they are not spread by block."""
    args = parse(adm, "--teacher", "sd3-medium", "--lora", 64, "--ema", 0.9)
    networks = make_networks(adm, args)
    adapter = 4 * count_adapter(args, networks.teacher)
    heads = 4 * count_parameters(networks.heads)
    for shard, ranks in (("ddp", 1), ("zero1", 8), ("fsdp", 8)):
        rows = count_states(change(args, shard=shard), networks, 8)
        assert rows["student, rank-64 adapters"] == (adapter, adapter, 2 * adapter / ranks)
        assert rows["EMA of the student"] == (adapter, 0, 0)
        assert rows["discriminator heads"] == (heads, heads, 2 * heads / ranks)


@pytest.fixture(scope="module")
def sd3_medium():
    """SD3-Medium with activations of 2 GB a row -> (arguments, networks, bytes of all)."""
    args = parse(adm, "--teacher", "sd3-medium", "--plan", 8)
    networks = make_networks(adm, args)
    networks.trace = lambda args: Trace(2e9 * args.batch, 0, 0, None)
    total = add_up(count_states(args, networks, 8) | count_activations(args, networks))
    return args, networks, total


@pytest.mark.parametrize(
    "gpu_gb, says",
    [
        (100, "fits 100 GB"),
        (85, "does not fit 85 GB; with --batch 1 --accumulate 4 it does"),
        (80, "does not fit 80 GB; with --shard zero1 it does"),
        (50, "does not fit 50 GB; with --shard fsdp it does"),
        (5, "does not fit 5 GB, nor with any two of"),
    ],
)
def test_what_fits_and_what_would(sd3_medium, gpu_gb, says):
    args, networks, total = sd3_medium
    assert describe_fit(change(args, gpu_gb=gpu_gb), networks, total).startswith(says)


def test_what_is_printed(capsys, teacher_folder):
    assert adm.main(["--teacher", teacher_folder, "--plan", "--keep", "2"]) is None
    out = capsys.readouterr().out
    assert "8 GPUs" in out
    assert "text encoders" in out
    assert "--keep 2 has 3 of them" in out
    assert "an iteration makes 5 full and 4 partial forward passes" in out
    assert "fits 80 GB" in out
    assert " s at 200 TFLOP/s, and for --iterations 10000 " in out


def test_hours_are_of_all_iterations_and_gpu_hours_of_all_gpus():
    args = SimpleNamespace(iterations=1000, plan=8)
    networks = SimpleNamespace(count_flops=lambda args: 720e12)
    expected = "720 TFLOP an iteration: 3.6 s at 200 TFLOP/s, and for --iterations 1000 1 hours, 8 GPU hours"
    assert describe_time(args, networks) == expected


def test_operations_are_those_that_torch_counts(teacher_folder):
    """In real passes, of each micro-batch, of each update, and of the steps that lead to t'."""

    def count(*words):
        args = parse(adm, "--teacher", teacher_folder, "--no-checkpointing", *words)
        return make_networks(adm, args).count_flops(args)

    one = count("--steps", 1, "--batch", 1)
    assert count("--steps", 1, "--batch", 2) == pytest.approx(2 * one, rel=0.05)  # but for the heads
    assert count("--steps", 1, "--batch", 1, "--accumulate", 3) > 3 * one  # line 1 comes twice
    update = count("--steps", 1, "--batch", 1, "--ttur", 2) - one
    assert 0.3 * one < update < 0.9 * one  # of f and D alone
    assert count("--steps", 1, "--batch", 1, "--ttur", 4) == one + 3 * update
    more = count("--steps", 4, "--batch", 1) - one
    assert count("--steps", 8, "--batch", 1) - one == pytest.approx(7 / 3 * more)

    real = common.open_teacher(teacher_folder, torch.device("cpu"))
    cond = real.encode(["a red circle"])
    with FlopCounterMode(display=False) as counter:
        real.call(real.denoiser, torch.zeros(1, *real.latent_shape), torch.zeros(1), cond)
    assert more == pytest.approx(1.5 * counter.get_total_flops(), rel=0.02)


def test_the_baseline_has_no_heads(capsys, teacher_folder):
    adm.main(["--teacher", teacher_folder, "--plan", "--loss", "dmd"])
    out = capsys.readouterr().out
    assert "heads" not in out
    assert "an iteration makes 5 full and 0 partial forward passes; backward passes: f 1, G 1\n" in out


def test_steps_are_those_of_the_start(teacher, teacher_folder, tmp_path):
    start = helpers.save_checkpoint(tmp_path / "start", teacher, steps=3)
    words = ["--teacher", teacher_folder, "--init", start]
    assert make_networks(adm, parse(adm, *words)).steps == 3
    assert make_networks(adm, parse(adm, *words, "--steps", 2)).steps == 2
    nowhere = ["--teacher", teacher_folder, "--init", tmp_path / "to-come"]
    assert make_networks(adm, parse(adm, *nowhere)).steps == common.SDXL.student_steps


def test_one_process_shares_nothing(capsys, teacher_folder):
    """python adm.py --shard fsdp changes nothing, and so the plan of it does not either."""
    said = []
    for shard in ("ddp", "zero1", "fsdp"):
        adm.main(["--teacher", teacher_folder, "--plan", "1", "--gpu-gb", "0.001", "--shard", shard])
        said.append(capsys.readouterr())
    assert said[0].out == said[1].out == said[2].out
    assert "--shard" not in said[0].out.partition("does not fit")[2]
    assert "one process has nobody to share with" in said[2].err


def test_nodes_that_share_each_for_itself(sd3_medium):
    """--shard hsdp: more cards than a node's make no difference."""
    args, networks, _ = sd3_medium
    hsdp = change(args, shard="hsdp")
    fsdp = change(args, shard="fsdp")
    states = add_up_states(count_states(hsdp, networks, 32))
    assert states == add_up_states(count_states(fsdp, networks, 8))
    assert states > add_up_states(count_states(fsdp, networks, 32))


def test_the_change_that_helps_is_one_that_is_taken(sd3_medium):
    args, networks, _ = sd3_medium
    for plan, has_nodes in ((8, False), (12, False), (16, True)):
        options = [text for text, _ in list_smaller_options(change(args, plan=plan))]
        assert ("--shard hsdp" in options) == has_nodes
    small = change(args, plan=16, gpu_gb=9)
    assert "--shard hsdp --lora" not in describe_fit(small, networks, 1e12)


def test_smaller_batches_keep_the_global_batch():
    args = parse(adm, "--teacher", "sd3-medium", "--plan", 8, "--batch", 6, "--accumulate", 2)
    batches = [values for text, values in list_smaller_options(args) if text.startswith("--batch")]
    assert batches == [{"batch": batch, "accumulate": 12 // batch} for batch in (3, 2, 1)]


@pytest.mark.parametrize("options", ((), ("--lora-targets", "to_q", "ff.net.2")))
def test_the_plan_counts_an_adapters_parameters(teacher_folder, options):
    args = parse(adm, "--teacher", teacher_folder, "--lora", 3, *options)
    net = Adapted(helpers.load_teacher(teacher_folder, helpers.CPU).denoiser, "student", 3, args.lora_targets)
    assert count_adapter(args, make_networks(adm, args).teacher) == count_parameters(net)


def test_unknown_teachers(tmp_path):
    for name in ("someone/else", str(tmp_path)):
        with pytest.raises(UserError):
            adm.main(["--teacher", name, "--plan"])


@pytest.mark.parametrize("name, published", [("sam_vit_b", 89.7), ("sam_vit_l", 308.3), ("sam_vit_h", 637.0)])
def test_sizes_of_sams_encoders(name, published):
    """In millions of parameters."""
    assert count_parameters(make_sam_encoder_on_meta(name)) / 1e6 == pytest.approx(published, rel=0.001)


def test_nothing_of_attention_is_as_large_as_all_pairs():
    q = torch.empty(1, 24, 16384, 64, device="meta", requires_grad=True)
    with Storages() as storages, GPUAutocast(torch.bfloat16):
        torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
    assert storages.peak < 20 * q.nbytes < 24 * 16384**2


@pytest.mark.slow
def test_real_activations_of_a_full_size_teacher():
    """They grow with the batch, and without checkpointing."""
    args = parse(adm, "--teacher", "sd3-medium", "--plan", 8, "--shard", "fsdp", "--batch", 2)
    networks = make_networks(adm, args)
    two = measure_activations(args, networks)
    assert 2e9 < two < 4e9
    four = measure_activations(change(args, batch=4), networks)
    assert 1.5 * two < four < 2.1 * two
    whole = change(args, checkpointing=False)
    assert measure_activations(whole, make_networks(adm, whole)) > 5 * two


# ----------------------------------------------------------------------------------------------------------
# A run that really happens
# ----------------------------------------------------------------------------------------------------------


def run_really(stage, *words, iterations=2):
    """Iterations on the CPU -> (bytes of tensors at the peak of the second, bytes after each)."""
    peaks = []
    alive = []
    with Storages("cpu") as storages:
        method = helpers.make_method(stage, [*map(str, words), "--warmup", "0"])
        for step in range(iterations):
            storages.peak = storages.live
            stage.iterate(method, step, stage.minimise)
            method.log.take()
            peaks.append(storages.peak)
            alive.append(storages.live)
    return peaks[1], alive


def plan_total(stage, *words):
    """The bytes that --plan says one process takes."""
    args = parse(stage, *words)
    networks = make_networks(stage, args)
    return add_up(count_states(args, networks, 1) | count_activations(args, networks))


@pytest.mark.parametrize(
    "kind, options", (("sdxl", ""), ("sd3", ""), ("cogvideox", ""), ("sdxl", "--no-checkpointing"))
)
def test_the_plan_is_what_a_tiny_run_takes(tmp_path, prompts_file, kind, options):
    folder = helpers.make_teacher(tmp_path / "teacher", 0, kind)
    prompts = MOTION if kind == "cogvideox" else prompts_file
    words = ["--teacher", folder, *FP32, "--batch", 8, "--head-width", 64, "--prompts", prompts]
    words += options.split()
    found, _ = run_really(adm, *words)
    assert plan_total(adm, *words) == pytest.approx(found, rel=0.15)


def test_the_plan_is_what_three_micro_batches_take(adm_arguments):
    """Of which the plan runs two."""
    words = [*adm_arguments, *FP32, "--batch", 8, "--accumulate", 3]
    found, _ = run_really(adm, *words)
    assert plan_total(adm, *words) == pytest.approx(found, rel=0.15)


def test_the_plan_is_what_a_tiny_run_of_adp_takes(adp_arguments):
    words = [*adp_arguments, *FP32, "--batch", 16]
    found, _ = run_really(adp, *words)
    assert plan_total(adp, *words) == pytest.approx(found, rel=0.15)


def test_an_iteration_of_adm_leaves_nothing_behind(adm_arguments):
    options = ["--ttur", 2, "--accumulate", 2, "--batch", 1, "--no-checkpointing"]
    _, alive = run_really(adm, *adm_arguments, *options, iterations=3)
    assert alive[1] == alive[2]  # the first has made the optimisers' states


def test_an_iteration_of_adp_leaves_nothing_behind(adp_arguments):
    _, alive = run_really(adp, *adp_arguments, iterations=3)
    assert alive[1] == alive[2]


def test_the_plan_is_what_a_tiny_checkpoint_takes(tmp_path, adm_arguments):
    words = [*adm_arguments, "--ema", "0.5", "--iterations", "1"]
    adm.main([*words, "--out", str(tmp_path / "run")])
    files = [path for path in (tmp_path / "run/step_000001").rglob("*") if path.is_file()]
    found = sum(path.stat().st_size for path in files)
    args = parse(adm, *words)
    assert count_checkpoint(args, make_networks(adm, args)) == pytest.approx(found, rel=0.05)


# ----------------------------------------------------------------------------------------------------------
# A method that changes
# ----------------------------------------------------------------------------------------------------------


class OnePassMore(adm.ADM):
    def generator_loss(self, b):
        loss = super().generator_loss(b)
        with torch.no_grad():
            self.teacher.predict(self.teacher.denoiser, b.x_fake, b.s, b.cond)
        return loss


def test_a_change_of_the_method_changes_the_plan(capsys, teacher_folder):
    args = parse(adm, "--teacher", teacher_folder, "--plan", 8)
    print_plan(args, OnePassMore, adm.iterate)
    assert "an iteration makes 6 full and 4 partial forward passes" in capsys.readouterr().out


def test_a_moving_average_is_as_large_as_the_student(teacher_folder):
    args = helpers.training_arguments("adm", ["--teacher", teacher_folder, "--ema", "0.9"])
    networks = Networks(args, adm.ADM, adm.iterate)
    states = count_states(args, networks, 1)
    assert states["EMA of the student"] == (4 * count_parameters(networks.teacher.denoiser), 0, 0)


def test_of_several_processes_one_prints_the_plan(adm_arguments, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    adm.main([*adm_arguments, "--plan"])
    assert capsys.readouterr().out == ""
