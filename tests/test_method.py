"""The methods of ADM and ADP: equal to the naive algorithms, and what only they can get wrong."""

import contextlib
import io
import math
import os
import re
from pathlib import Path

import naive
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import adm
import adp
import common
import helpers
from support.parallel import freeze
from support.rng import RowRNG, make_rngs
from support.training import fill_training_arguments, minimise
from teachers.flux import Flux
from teachers.qwen_image import QwenImage
from teachers.stable_diffusion import StableDiffusion
from teachers.wan import Wan
from teachers.z_image import ZImage

ROOT = Path(helpers.ROOT)
CPU = torch.device("cpu")

# ----------------------------------------------------------------------------------------------------------
# Against the naive algorithms
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(tmp_path_factory, prompts_file, pairs_folder, teacher_folder):
    """{family: (folder of a teacher, folder of its pairs)}."""
    places = {"sdxl": (teacher_folder, pairs_folder)}
    families = {family for family, _ in ADM_CASES + ADP_CASES}
    for family in sorted(families - {"sdxl"}):
        folder = tmp_path_factory.mktemp(family)
        teacher = helpers.make_teacher(folder / "teacher", 0, family)
        pairs = str(folder / "pairs")
        words = ["--teacher", teacher, "--prompts", prompts_file, "--out", pairs, *helpers.size(family)]
        helpers.collect(*words, "--count", "8", "--steps", "1")
        places[family] = (teacher, pairs)
    return places


@pytest.fixture(autouse=True)
def short_texts(monkeypatch):
    for pipeline in ("WanPipeline", "FluxPipeline"):  # whose networks see all rows, of which most are empty
        monkeypatch.setattr(common.find_family(pipeline), "text_length", 16)


def make_steady(method):
    """A larger epsilon: with Adam's own the first steps follow a gradient's sign, which rounding can turn."""
    for name in ("opt_G", "opt_f", "opt_heads"):
        optimizer = getattr(method, name, None)
        if optimizer:
            optimizer.param_groups[0]["eps"] = 1e-3
    return method


def assert_equal_networks(one, other, before):
    """They went the same way from the weights `before`: the difference is rounding beside the way."""
    one, other, before = (torch.cat([p.detach().flatten() for p in part]) for part in (one, other, before))
    way = (one - before).norm()
    assert way > 1e-3
    assert (one - other).norm() < 3e-3 * way


def copy_weights(net):
    return [p.detach().clone() for p in net.parameters()]


QUICK = "--batch 2 --head-width 32 --lr 3e-3 --head-lr 3e-2 --no-checkpointing"
ADM_CASES = (
    ("sdxl", "--steps 1"),
    ("sdxl", "--steps 3 --ttur 2 --guidance 3 --dt 0.1 --seed 3"),
    ("sdxl", "--steps 2 --accumulate 2 --warmup 1 --r1 0.5 --r2 0"),
    ("sdxl", "--steps 2 --loss dmd --ttur 2"),
    ("sdxl", "--steps 2 --clip 0.05"),
    ("sdxl", "--steps 2 --project --accumulate 2 --dt 1/8"),
    ("sdxl", "--steps 2 --loss secant --accumulate 2 --ttur 2 --warmup 1 --dt 1/8"),
    ("sdxl", "--steps 2 --loss line --accumulate 2 --dt 1/8 --clip 0.05"),
    ("sdxl", "--steps 2 --loss secant --straight-through --ttur 2 --warmup 1 --dt 1/8"),
    ("sd3", "--steps 2 --loss line --straight-through --dt 1/8"),
    ("cogvideox", "--steps 1 --project --straight-through --dt 1/8"),
    ("sdxl", "--steps 2 --first-time 0.4 --t-range 0.3 0.6"),
    ("sdxl", "--steps 1 --loss dmd --first-time 0.4 --dt 0.2 --t-range 0.02 0.5"),
    ("sd3", "--steps 2 --guidance 5"),
    ("sd3", "--steps 4 --loss dmd --accumulate 2"),
    ("sd3", "--steps 1 --project"),
    ("sd3", "--steps 2 --loss secant --dt 1/8"),
    ("cogvideox", "--steps 2 --dt 1/8"),
    ("cogvideox", "--steps 1 --dt 1/8 --project --ttur 2"),
    ("stable-diffusion", "--steps 2 --guidance 3"),
    ("wan", "--steps 2 --dt 1/8"),
    ("z-image", "--steps 1 --guidance 3"),
    ("qwen-image", "--steps 1"),
    ("flux", "--steps 2 --guidance 6 --student-guidance 2"),
)


@pytest.mark.parametrize("family, options", ADM_CASES)
def test_adm_is_algorithm_1(places, prompts_file, family, options):
    words = ["--teacher", places[family][0], "--prompts", prompts_file, "--fake-lr", "3e-3"]
    words += helpers.size(family)
    method = make_steady(helpers.make_method(adm, [*words, *QUICK.split(), *options.split()]))
    reference = naive.NaiveADM(method)
    before_G, before_f = copy_weights(method.G), copy_weights(method.f)
    before_D = copy_weights(method.heads) if method.heads else None
    for step in range(3):
        adm.iterate(method, step, adm.minimise)
        reference.iterate(step)
    assert_equal_networks(method.G.parameters(), reference.G.net.parameters(), before_G)
    assert_equal_networks(method.f.parameters(), reference.f.net.parameters(), before_f)
    if method.heads:
        assert_equal_networks(method.heads.parameters(), reference.D.net.parameters(), before_D)


def test_the_secant_of_two_steps_that_are_the_same_is_none(adm_arguments):
    """Without guidance f's first step is F_phi's: there is no line, and nothing to learn from it."""
    words = ["--loss", "secant", "--steps", "1", "--guidance", "1", "--fake-lr", "0"]
    method = helpers.make_method(adm, [*adm_arguments, *words])
    adm.iterate(method, 0, adm.minimise)
    assert method.log.take()["norm_G"] == 0


def test_maps_of_x_real_are_not_kept(adm_arguments):
    """With --accumulate every micro-batch would have some."""
    method = helpers.make_method(adm, [*adm_arguments, "--steps", "1"])
    [b] = method.draw(0, 0)
    method.generate(b)
    method.generator_loss(b)
    method.discriminator_loss(b)
    assert b.maps_fake
    assert b.maps_real is None


def test_a_dynamic_shift_is_a_schedule_as_any_other(prompts_file):
    """The shapes teacher with its fixed shift of 3, and with the same sigmas as a dynamic shift at its 16
    tokens: ADM's losses are the same."""
    folder = str(ROOT / "assets" / "tiny-sd3")
    words = ["--teacher", folder, "--prompts", prompts_file, "--steps", "2", *QUICK.split()]
    lines = []
    for slope in (None, 0.01, 0.02):
        method = helpers.make_method(adm, words)
        if slope:
            options = {"base_image_seq_len": 6, "max_image_seq_len": 106, "use_dynamic_shifting": True}
            start = math.log(3) - 0.01 * (16 - 6)
            scheduler = FlowMatchEulerDiscreteScheduler(
                base_shift=start, max_shift=start + 100 * slope, **options
            )
            method.teacher._read_schedule(scheduler)
        adm.iterate(method, 0, adm.minimise)
        lines.append({name: value.item() for name, value in method.log.take().items()})
    assert lines[0] == pytest.approx(lines[1], rel=1e-4)
    assert lines[0] != pytest.approx(lines[2], rel=1e-3)


ADP_CASES = (
    ("sdxl", "--warmup 1"),
    ("sdxl", "--warmup 1 --lambda-pixel 0 --time-power 1"),
    ("sdxl", "--warmup 0 --mse 0.7 --accumulate 2 --lambda-latent 0.3 --lambda-pixel 0.7"),
    ("sd3", "--warmup 1 --lambda-pixel 0"),
    ("cogvideox", "--warmup 0 --lambda-pixel 0"),
    ("stable-diffusion", "--warmup 0 --lambda-pixel 0"),
    ("z-image", "--warmup 0 --lambda-pixel 0"),
    ("qwen-image", "--warmup 0 --lambda-pixel 0.5"),
    ("flux", "--warmup 0 --lambda-pixel 0.5 --student-guidance 2"),
)


@pytest.mark.parametrize("family, options", ADP_CASES)
def test_adp_is_the_papers(places, sam_file, family, options):
    teacher, pairs = places[family]
    words = ["--teacher", teacher, "--pairs", pairs, "--pixel-backbone", sam_file, *helpers.size(family)]
    method = make_steady(helpers.make_method(adp, [*words, *QUICK.split(), *options.split()]))
    reference = naive.NaiveADP(method)
    before_G, before_D = copy_weights(method.G), copy_weights(method.heads)
    for step in range(3):
        adp.iterate(method, step, adp.minimise)
        reference.iterate(step)
    assert_equal_networks(method.G.parameters(), reference.G.net.parameters(), before_G)
    assert_equal_networks(method.heads.parameters(), reference.D.net.parameters(), before_D)


def test_adm_goes_on_from_adps_velocity(places, prompts_file, pairs_folder, tmp_path):
    """The student of a checkpoint keeps its parametrisation and its weights; f starts from the teacher."""
    teacher = places["sdxl"][0]
    words = ["--teacher", teacher, "--pairs", pairs_folder, "--lambda-pixel", "0", "--out", str(tmp_path)]
    adp.main([*words, *helpers.QUICK, "--warmup", "2"])
    words = ["--teacher", teacher, "--prompts", prompts_file, "--init", str(tmp_path), "--fake-lr", "3e-3"]
    method = make_steady(helpers.make_method(adm, [*words, *QUICK.split()]))
    assert method.student.parametrisation == "velocity"
    of_teacher = method.teacher.denoiser.state_dict()
    assert all(weight.equal(of_teacher[name]) for name, weight in method.f.state_dict().items())
    saved = helpers.read_state(tmp_path / "step_000002")["G"]
    assert all(weight.equal(saved[name]) for name, weight in method.G.state_dict().items())
    reference = naive.NaiveADM(method)
    before = copy_weights(method.G)
    for step in range(2):
        adm.iterate(method, step, adm.minimise)
        reference.iterate(step)
    assert_equal_networks(method.G.parameters(), reference.G.net.parameters(), before)


@pytest.mark.parametrize("options, guidance", (("--guidance 5", 2), ("--student-guidance 4", 4)))
def test_a_student_that_goes_on_is_told_the_same_guidance(places, prompts_file, tmp_path, options, guidance):
    """So are the fake score and the discriminator, and the run says so; one that is given wins."""
    words = ["--teacher", places["flux"][0], *helpers.size("flux"), "--prompts", prompts_file]
    teacher = common.load_teacher_from(helpers.training_arguments("adm", words), CPU)
    student = helpers.save_checkpoint(tmp_path / "student", teacher)  # told 2
    assert helpers.load_student(student, teacher)[1].guidance == 2
    method = helpers.make_method(adm, [*words, "--init", student, *options.split()])
    assert method.student.guidance == guidance
    assert method.teacher.student_guidance == guidance
    assert method.args.student_guidance == guidance


def test_a_student_is_told_the_guidance_that_it_learns_from(places, prompts_file):
    words = ["--teacher", places["flux"][0], *helpers.size("flux"), "--prompts", prompts_file]
    assert helpers.make_method(adm, [*words, "--guidance", "5"]).student.guidance == 5


@pytest.mark.parametrize("stage, options", ((adm, "--warmup 1"), (adp, "--warmup 1 --lambda-pixel 0")))
def test_the_moving_average_is_of_every_student_and_no_other_network(request, stage, options):
    """ADM's student stands still in the warm-up, and so does its average; ADP's learns from the start."""
    words = [*request.getfixturevalue(f"{stage.__name__}_arguments"), *options.split(), "--ema", "0.2"]
    method = helpers.make_method(stage, words)
    expected = copy_weights(method.G)
    decays = [0, 2 / 11, 0.2]  # (1 + n) / (10 + n), at most --ema; the first update's is zero
    for step in range(3):
        stage.iterate(method, step, stage.minimise)
        if stage is adm and step == 0:
            continue
        decay = decays.pop(0)
        for mean, weight in zip(expected, method.G.parameters()):
            mean.lerp_(weight.detach(), 1 - decay)
    with method.ema.use():
        torch.testing.assert_close(copy_weights(method.G), expected)
    assert not all(mean.equal(weight) for mean, weight in zip(expected, method.G.parameters()))


# ----------------------------------------------------------------------------------------------------------
# What is logged
# ----------------------------------------------------------------------------------------------------------


def test_all_updates_of_an_iteration_are_logged(adm_arguments):
    """With --ttur 3 a line of metrics has the means of the three updates, not the last one's."""
    method = helpers.make_method(adm, [*adm_arguments, "--ttur", "3"])
    losses = []

    def minimise(loss_of, batch, net, optimizer, clip):
        losses.append((loss_of.__name__, loss_of(batch[0]).item()))
        return torch.zeros(())

    adm.iterate(method, 0, minimise)
    means = method.log.take()
    for name, method_name in (("loss_f", "fake_score_loss"), ("loss_D", "discriminator_loss")):
        values = [value for loss, value in losses if loss == method_name]
        assert len(set(values)) == 3
        assert means[name].item() == pytest.approx(sum(values) / 3)
    assert method.log.take() == {}


def test_the_baseline_asks_the_teacher_in_the_students_updates_alone(adm_arguments, monkeypatch):
    """Without D nothing else wants the two scores, so that --ttur costs the baseline f's updates, no more."""
    method = helpers.make_method(adm, [*adm_arguments, "--loss", "dmd", "--ttur", "3"])
    asked = []
    guided = method.teacher.guided
    monkeypatch.setattr(method.teacher, "guided", lambda *args: asked.append(1) or guided(*args))
    adm.iterate(method, 0, minimise)
    assert len(asked) == 1


def test_cosine_is_of_ds_gradient_with_the_way_to_x_real(adm_arguments):
    method = helpers.make_method(adm, [*adm_arguments, "--dt", "0.25"])
    (b,) = method.draw(0, 0)
    method.generate(b)
    with freeze(method.f, method.heads):
        method.generator_loss(b).backward()
    x = b.x_fake.clone().requires_grad_()
    maps = method.teacher.features(x, b.s, b.cond)
    method.heads(maps).mean().backward()
    gradient = x.grad.flatten(1)
    toward = (b.x_real - b.x_fake).flatten(1)
    expected = torch.nn.functional.cosine_similarity(gradient, toward).mean()
    direction = toward / toward.norm(dim=1, keepdim=True)
    along = (gradient * direction).sum(1, keepdim=True) * direction
    across = (gradient - along).square().sum(1) / gradient.square().sum(1)
    assert along.norm() > 1e-2 * gradient.norm()  # else a wrong share would be the right one
    means = method.log.take()
    assert means["cosine"].item() == pytest.approx(expected.item(), abs=1e-5)
    assert means["across"].item() == pytest.approx(across.mean().item(), abs=1e-5)


def let_heads_say(method, real, fake):
    """From here on the method's discriminator gives these logits to every real and every fake sample."""
    n = len(method.heads.heads)
    method.heads_train = lambda *groups: (torch.full((2, n), real), torch.full((2, n), fake))


def test_what_is_logged_of_adms_discriminator(adm_arguments):
    method = helpers.make_method(adm, [*adm_arguments, "--r1", "0", "--r2", "0"])
    (b,) = method.draw(0, 0)
    with torch.no_grad():
        method.generate(b)
        method.generator_loss(b)
    let_heads_say(method, real=0.5, fake=-0.25)
    method.discriminator_loss(b)
    means = method.log.take()
    assert {name: means[name].item() for name in ("D_gap", "D_abs", "loss_D")} == {
        "D_gap": 0.75,
        "D_abs": 0.375,
        "loss_D": 1.25,
    }


def test_what_is_logged_of_adps_discriminator(adp_arguments):
    method = helpers.make_method(adp, adp_arguments)
    (b,) = method.draw(0)
    with torch.no_grad():
        method.generator_loss(b)
    let_heads_say(method, real=0.5, fake=-0.25)
    method.discriminator_loss(b)
    means = method.log.take()
    assert means["D_real"].item() == pytest.approx(0.5)
    assert means["D_fake"].item() == pytest.approx(-0.25)
    assert means["loss_D"].item() == pytest.approx(1.25)


def test_heads_have_no_weight_that_the_hinge_says_nothing_of(adm_arguments):
    """While |D| < 1 a constant added to D changes no loss: no weight of the heads may be such a constant."""
    method = helpers.make_method(adm, [*adm_arguments, "--r1", "0", "--r2", "0", "--dt", "0.25"])
    (b,) = method.draw(0, 0)
    with torch.no_grad():
        method.generate(b)
        method.generator_loss(b)
    method.discriminator_loss(b).backward()
    for name, p in method.heads.named_parameters():
        assert p.grad.abs().max() > 0, name


def test_the_penalty_does_not_depend_on_the_size_of_the_latents(adm_arguments):
    """Of a D whose gradient is x_real - x_fake over its square, D_gap is 1 and the penalty alike at any N."""
    method = helpers.make_method(adm, [*adm_arguments, "--dt", "0.25", "--r-noise", "0.01"])
    values = []
    for side in (8, 32):
        x = torch.zeros(256, 4, side, side)
        difference = torch.full((4, side, side), 0.1)
        gradient = difference / difference.square().sum()
        method.teacher = type("Flat", (), {"features": staticmethod(lambda x, s, cond: [x])})()
        method.heads_train = lambda maps, g=gradient: (maps[0] * g).sum((1, 2, 3))[:, None]
        b = adm.MicroBatch(RowRNG(range(256), ("test", 0), CPU), None, 0)
        values.append(method.penalty(x, method.heads_train([x]), b, 1.0).item())
    assert values[0] == pytest.approx(values[1], rel=0.3)
    assert values[0] == pytest.approx(0.25 / 0.01, rel=0.3)  # dt N |g|^2 = dt N / (N 0.1^2)


# ----------------------------------------------------------------------------------------------------------
# Random numbers
# ----------------------------------------------------------------------------------------------------------


def test_no_two_streams_of_a_seed_are_correlated(teacher, adm_arguments):
    """Noise of pairs, samples, previews and training, row by row, at small shifts against one another."""
    args = helpers.training_arguments("adm", [*adm_arguments, "--seed", "3"])
    streams = {}
    for use in ("pairs", "sample", "preview"):
        for row in (0, 1):
            streams[use, row] = RowRNG([row], (use, 3), CPU)
    for step in (0, 1):
        for update in (0, 1):
            streams["adm", step, update] = make_rngs(args, CPU, "adm", step, update)[0]
        streams["adp", step] = make_rngs(args, CPU, "adp", step)[0]
    n = 4096
    noise = []
    for rng in streams.values():
        numbers = rng.normal(n)[0]
        noise.append((numbers - numbers.mean()) / numbers.std())
    for i, one in enumerate(noise):
        for other in noise[:i]:
            for shift in range(-4, 5):
                correlation = (one * other.roll(shift)).mean().item()
                assert abs(correlation) < 6 / n**0.5


def test_students_are_not_judged_on_the_noise_of_the_pairs(teacher, prompts_file, pairs_folder):
    """Pair i and sample i of the same seed begin from other noise, whatever was drawn before it."""
    from support.pairs import Pairs

    for i in range(4):
        x_T, _ = Pairs(pairs_folder).batch([i])
        sample = RowRNG([i], ("sample", 0), CPU).normal(*teacher.latent_shape)
        a, b = x_T.flatten(), sample.flatten()
        for shift in range(-3, 4):
            assert abs(torch.corrcoef(torch.stack([a, b.roll(shift)]))[0, 1]) < 0.4


# ----------------------------------------------------------------------------------------------------------
# Defaults, and what is said of them
# ----------------------------------------------------------------------------------------------------------


def test_learning_rates_have_defaults_for_the_stage_and_for_lora():
    whole = helpers.training_arguments("adm", ["--teacher", "sdxl"])
    lora = helpers.training_arguments("adm", ["--teacher", "sdxl", "--lora", "64"])
    given = helpers.training_arguments("adm", ["--teacher", "sdxl", "--lora", "64", "--lr", "0"])
    assert (whole.lr, whole.fake_lr, whole.head_lr) == (5e-7, 2.5e-6, 5e-6)
    assert (lora.lr, lora.fake_lr) == (5e-5, 2.5e-4)
    assert given.lr == 0
    pairs = helpers.training_arguments("adp", ["--teacher", "sdxl"])
    assert (pairs.lr, pairs.warmup_lr, pairs.head_lr) == (1e-5, 1e-5, 1e-4)


BOTH_STAGES = {
    "head_width": 256,  # paper
    "iterations": 10000,
    "betas": (0.9, 0.999),
    "weight_decay": 0.01,
    "clip": 10,
    "decay": 0,
    "ema": 0,
    "accumulate": 1,
    "lora": 0,
    "shard": "ddp",
    "checkpointing": True,
    "seed": 0,
}
DEFAULTS = {
    "adm": {
        "loss": "adm",
        "ttur": 1,  # paper
        "dt": 1 / 64,
        "t_range": (1 / 64, 1),
        "r1": 0.004,
        "r2": 0.004,
        "r_noise": 0.1,
        "warmup": 0,
        "project": False,
        "straight_through": False,
    },
    "adp": {
        "lambda_latent": 0.85,  # paper
        "lambda_pixel": 0.15,  # paper
        "time_power": 3,  # paper
        "pixel_backbone": "sam_vit_b",
        "mse": 0,
    },
}


@pytest.mark.parametrize("stage", DEFAULTS)
def test_defaults_are_the_papers_and_those_of_the_docs(stage):
    """The paper's are marked so; the others are choices of ours, of docs/paper-gaps.md or of plain AdamW."""
    args = vars(helpers.training_arguments(stage, ["--teacher", "sdxl"]))
    wanted = BOTH_STAGES | DEFAULTS[stage]
    assert {name: args[name] for name in wanted} == wanted


WARM_UPS = (
    ("sdxl", "", 500, [2e-3, 2e-3]),
    ("sd3", "", 0, [1e-3, 1e-3]),  # flow is a velocity from the start
    ("sdxl", "--warmup 1", 1, [2e-3, 1e-3]),
)


@pytest.mark.parametrize("family, options, warmup, rates", WARM_UPS)
def test_adps_warm_up_has_a_rate_of_its_own(places, tmp_path, monkeypatch, family, options, warmup, rates):
    seen = []

    def iterate(method, step, minimise):
        seen.append((method.args.warmup, method.opt_G.param_groups[0]["lr"]))
        method.log(mse=torch.zeros(()))

    helpers.make_runs_comparable(monkeypatch.setattr)
    monkeypatch.setattr(adp, "iterate", iterate)
    teacher, pairs = places[family]
    words = f"--out {tmp_path} --lambda-pixel 0 --lr 1e-3 --warmup-lr 2e-3 --iterations 2 {options}"
    adp.main(["--teacher", teacher, "--pairs", pairs, *words.split()])
    assert seen == [(warmup, rate) for rate in rates]


ADM_GUIDANCE = [
    (common.SDXL, 8),
    (common.SD3, 7),
    (common.CogVideoX, 6),
    (Flux, 3.5),
    (QwenImage, 4),
    (StableDiffusion, 7.5),
    (Wan, 5),
    (ZImage, 6),
]


@pytest.mark.parametrize("family, guidance", ADM_GUIDANCE)
def test_adms_guidance_is_the_familys_for_adm(family, guidance):
    args = helpers.training_arguments("adm", ["--teacher", "sdxl"])
    fill_training_arguments(args, family)
    assert args.guidance == guidance


def test_help_shows_every_default_and_no_path_of_this_machine():
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        helpers.training_arguments("adm", ["--help"])
    text = " ".join(out.getvalue().split())
    assert os.path.dirname(helpers.ROOT) not in text
    for title in ("method:", "optimisation:", "memory:", "run:", "teacher:"):
        assert title in text
    for option, default in (("--dt", "1/64"), ("--warmup", "0"), ("--ema", "0.0"), ("--lora", "0")):
        assert re.search(rf"{option} [A-Z_]+ [^(]*\(default {default}\)", text), option


def test_every_choice_of_ours_is_in_the_docs_and_in_the_code():
    """`paper silent: NAME:` in the code and the first column in docs/paper-gaps.md are the same names."""
    in_code = set()
    folders = (ROOT, ROOT / "support", ROOT / "metrics", ROOT / "teachers")
    for path in (path for folder in folders for path in folder.glob("*.py")):
        in_code.update(re.findall(r"paper silent: ([^:\n]+):", path.read_text()))
        assert path.read_text().count("paper silent") == len(
            re.findall(r"paper silent: [^:\n]+:", path.read_text())
        )
    table = (ROOT / "docs/paper-gaps.md").read_text().split("## ")[0]
    in_docs = set(re.findall(r"^\| `([^`]+)` \|", table, flags=re.MULTILINE))
    assert in_code == in_docs
