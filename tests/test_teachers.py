"""Odd teachers: each computes what its own pipeline does, or is refused in one sentence that says why."""

import shutil

import diffusers
import pytest
import torch
from odd_teachers import ODD, RIGHT

import common
import helpers
from support import configs
from support.errors import UserError

CPU = torch.device("cpu")
PROMPT = ["a small red circle"]


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """{family: folder of a tiny pipeline}."""
    root = tmp_path_factory.mktemp("plain")
    return {family: helpers.make_teacher(root / family, 0, family) for family in ("sdxl", "sd3", "cogvideox")}


@pytest.mark.parametrize("odd", ODD, ids=[odd.name for odd in ODD])
def test_odd_teachers(plain, tmp_path, odd):
    folder = str(tmp_path / "teacher")
    shutil.copytree(plain[odd.family], folder)
    odd.change(folder)
    if odd.expected == RIGHT:
        check_against_its_pipeline(common.load_teacher(folder, CPU), folder)
        return
    with pytest.raises(UserError) as caught:
        common.load_teacher(folder, CPU)
    said = str(caught.value)
    assert odd.expected in said
    assert "\n" not in said


@torch.no_grad()
def check_against_its_pipeline(teacher, folder):
    """Forward process, and pixels where the pipeline's sampler is the teacher's."""
    absent = {}
    if teacher.pipe.components.get("text_encoder_3", "") is None:
        absent = {"text_encoder_3": None, "tokenizer_3": None}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, **absent)
    pipe.set_progress_bar_config(disable=True)
    check_schedule(teacher, pipe.scheduler)
    if configs.describe_sampler(type(pipe.scheduler), pipe.scheduler.config):
        return
    steps = 4
    options = {"num_inference_steps": steps, "guidance_scale": 2.0, "output_type": "pt"}
    if teacher.prediction == "flow":
        options["sigmas"] = torch.linspace(1, 1 / steps, steps).numpy()
    noise = torch.randn(1, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    height, width = teacher.resolution
    options |= {"height": height, "width": width, "latents": noise}
    if teacher.video:
        length = teacher.denoiser.config.max_text_seq_length
        options |= {"latents": noise.transpose(1, 2), "max_sequence_length": length}
    theirs = pipe(PROMPT, **options)[0]
    theirs = theirs.transpose(1, 2) if teacher.video else theirs
    latents = teacher.sample(noise, teacher.encode(PROMPT), steps, 2.0)
    ours = (teacher.decode(latents) / 2 + 0.5).clamp(0, 1)
    # EulerDiscreteScheduler begins at sigma_T x_T, not at x_T, and does not round its times
    tolerance = 0.05 if type(pipe.scheduler).__name__ == "EulerDiscreteScheduler" else 0.005
    assert (ours - theirs).abs().max() < tolerance * ours.std()


def check_schedule(teacher, scheduler):
    """abar or sigma at all timesteps, in float32 as diffusers has them."""
    t = torch.arange(1, 1001, dtype=torch.float64)
    alpha, sigma = teacher.schedule(t)
    if teacher.prediction == "flow":
        shift = scheduler.config.shift
        u = t / 1000
        torch.testing.assert_close(sigma, shift * u / (1 + (shift - 1) * u))
        sigmas = scheduler.sigmas.double().flip(0)
        torch.testing.assert_close(sigma, sigmas[-1000:], atol=1e-6, rtol=0)
        return
    assert teacher.prediction == scheduler.config.prediction_type
    torch.testing.assert_close(alpha**2, scheduler.alphas_cumprod.double(), atol=1e-7, rtol=0)
