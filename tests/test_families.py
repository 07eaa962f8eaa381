"""The families against diffusers: real configs, samplers, schedules, conditions, exported students."""

import copy
import inspect
import json
import math
import os
import shutil
import sys
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from transformers import T5Tokenizer

import adp
import common
import helpers
import sample
from support import configs
from support.errors import UserError
from support.files import write_sealed
from support.hub import TEACHERS
from support.loading import list_networks
from support.media import save_video
from support.pairs import INDEX
from support.rng import RowRNG
from support.systems import System
from support.training import set_up_for_training
from tiny import families, train
from tools import meta

CPU = torch.device("cpu")
META = torch.device("meta")
PROMPTS = ["a red circle", "a small square"]
KINDS = ("sdxl", "sd3", "cogvideox", *families.FAMILIES)  # one of BUILD for each family
TRANSFORMERS = [kind for kind in families.FAMILIES if kind != "stable-diffusion"]
BUILD = {
    "sdxl": train.build_sdxl,
    "sd3": train.build_sd3,
    "sd3-t5": lambda: train.build_sd3(t5_encoder=True),
    "cogvideox": train.build_cogvideox,
    "cogvideox-rotary": lambda: train.build_cogvideox(rotary=True),
    **{kind: family["build"] for kind, family in families.FAMILIES.items()},
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """{kind: folder of a random pipeline}."""
    root = tmp_path_factory.mktemp("families")
    folders = {}
    for kind, build in BUILD.items():
        torch.manual_seed(0)
        pipe = helpers.make_shallow(build())
        if kind == "sd3":  # without T5, as many real ones are kept
            pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
        folders[kind] = str(root / kind)
        pipe.save_pretrained(folders[kind])
    return folders


@pytest.fixture(scope="session")
def teachers(folders):
    return {kind: load(kind, folder) for kind, folder in folders.items()}


def load(kind, folder, **size):
    """A teacher of this kind, of its small size where its configs say none."""
    small = families.FAMILIES.get(kind, {}).get("size", {})
    return helpers.load_teacher(folder, CPU, **(small | size))


def build_part(config):
    """A component of a pipeline from its config."""
    return getattr(diffusers, config["_class_name"]).from_config(config)


def draw_noise(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def draw(pipe, teacher, x_T, steps, scale, **settings):
    """The diffusers pipeline's own latents for PROMPTS from the noise x_T."""
    pipe.set_progress_bar_config(disable=True)
    settings |= teacher.call_settings(scale)
    noise = teacher.pack(x_T)
    latents = pipe(PROMPTS, latents=noise, num_inference_steps=steps, output_type="latent", **settings)[0]
    return teacher.unpack(latents)


# The real models, without weights -------------------------------------------------------------------------

SD3_TEXT = {"encoder_hidden_states": (333, 4096), "pooled_projections": (2048,)}
UMT5 = {"encoder_hidden_states": (512, 4096)}
QWEN3 = {"encoder_hidden_states": (512, 2560), "length": ()}
QWEN_VL = {"encoder_hidden_states": (512, 3584), "length": ()}
FLUX = {"encoder_hidden_states": (512, 4096), "pooled_projections": (768,)}
SD_MAPS = [(320, 64, 64), (640, 32, 32), (1280, 16, 16), (1280, 8, 8), (1280, 8, 8)]
REAL = {  # name: (family, parameters, latents, condition, maps)
    "sdxl": (
        "SDXL",
        2_567_463_684,
        (4, 128, 128),
        {"encoder_hidden_states": (77, 2048), "text_embeds": (1280,), "time_ids": (6,)},
        [(320, 128, 128), (640, 64, 64), (1280, 32, 32), (1280, 32, 32)],
    ),
    "sd3-medium": ("SD3", 2_028_328_000, (16, 128, 128), SD3_TEXT, [(1536, 64, 64)] * 4),
    "sd3.5-large": ("SD3", 8_056_627_520, (16, 128, 128), SD3_TEXT, [(2432, 64, 64)] * 4),
    "cogvideox-2b": (
        "CogVideoX",
        1_693_783_872,
        (16, 13, 60, 90),
        {"encoder_hidden_states": (226, 4096)},
        [(1920, 13, 30, 45)] * 4,
    ),
    "cogvideox-5b": (
        "CogVideoX",
        5_570_283_072,
        (16, 13, 60, 90),
        {"encoder_hidden_states": (226, 4096)},
        [(3072, 13, 30, 45)] * 4,
    ),
    "wan2.1-1.3b": ("Wan", 1_418_996_800, (16, 21, 60, 104), UMT5, [(1536, 21, 30, 52)] * 4),
    "wan2.1-14b": ("Wan", 14_288_491_584, (16, 21, 60, 104), UMT5, [(5120, 21, 30, 52)] * 4),
    "wan2.2-5b": ("Wan", 4_999_787_712, (48, 31, 44, 80), UMT5, [(3072, 31, 22, 40)] * 4),
    "z-image": ("ZImage", 6_154_908_736, (16, 128, 128), QWEN3, [(3840, 64, 64)] * 4),
    "qwen-image": ("QwenImage", 20_430_401_088, (16, 128, 128), QWEN_VL, [(3072, 64, 64)] * 4),
    "flux.1-dev": ("Flux", 11_901_408_320, (16, 128, 128), FLUX, [(3072, 64, 64)] * 4),
    "sd1.5": ("StableDiffusion", 859_520_964, (4, 64, 64), {"encoder_hidden_states": (77, 768)}, SD_MAPS),
    "sd2.1-base": (
        "StableDiffusion",
        865_910_724,
        (4, 64, 64),
        {"encoder_hidden_states": (77, 1024)},
        SD_MAPS,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_the_real_denoisers(name):
    """Their published sizes, and the shapes at every tap at the default resolution."""
    family, parameters, latents, condition, maps = REAL[name]
    configs = meta.read_configs(name)
    pipe = meta.make_pipeline_on_meta(configs, torch.float32)
    teacher = common.find_family(configs["pipeline"])(pipe, name, META, torch.float32)
    assert type(teacher).__name__ == family
    assert meta.count_parameters(teacher.denoiser) == parameters
    assert teacher.latent_shape == latents
    assert teacher.condition_shapes(configs["text_length"]) == condition
    with META:
        cond = {key: torch.empty(1, *shape) for key, shape in condition.items()}
        found = teacher.features(torch.empty(1, *latents), torch.empty(1), cond)
        assert [tuple(m.shape[1:]) for m in found] == maps
        assert common.Heads(found)(found).shape == (1, len(maps))
    if name == "cogvideox-5b":
        assert [tuple(part.shape) for part in teacher.rotary] == [(17550, 64)] * 2
    if name == "wan2.2-5b":
        assert teacher.fps == 24


PUBLISHED = {  # abar at timesteps 0, 249, 499, 749, 999
    "sdxl": (0.99914998, 0.67543209, 0.27766943, 0.05662345, 0.00466010),
    "cogvideox-2b": (0.99745433, 0.39088974, 0.09596956, 0.01096589, 0),
    "cogvideox-5b": (0.99915000, 0.65418901, 0.24235917, 0.03317148, 0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_schedules_of_the_real_models(name):
    """As published with the configs."""
    teacher = object.__new__(common.Teacher)
    teacher.device = CPU
    teacher.path = name
    teacher._read_schedule(build_part(meta.read_configs(name)["scheduler"]))
    alpha, sigma = teacher.schedule(torch.tensor([1, 250, 500, 750, 1000], dtype=torch.float64))
    abar = torch.tensor(PUBLISHED[name], dtype=torch.float64)
    torch.testing.assert_close(alpha**2, abar, atol=5e-8, rtol=0)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(5, dtype=torch.float64))


def test_schedule_of_sd3_with_its_shift_of_3():
    teacher = object.__new__(common.SD3)
    teacher.patches = (64, 64)
    teacher._read_schedule(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    _, sigma = teacher.schedule(torch.tensor([1000, 500, 250], dtype=torch.float64))
    torch.testing.assert_close(sigma, torch.tensor([1, 0.75, 0.5], dtype=torch.float64))


# Against diffusers' own steps and samplers ----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_agree_with_the_scheduler(teachers, kind):
    """x0_hat, eps_hat and the step, from any raw output, in float64."""
    teacher = teachers[kind]
    scheduler = make_first_order(teacher, 10).scheduler
    x_t = draw_noise(2, *teacher.latent_shape, dtype=torch.float64)
    raw = draw_noise(2, *teacher.latent_shape, dtype=torch.float64, seed=1)
    if teacher.prediction == "flow" and kind != "wan":
        mu = {"mu": math.log(teacher.shift)} if scheduler.config.use_dynamic_shifting else {}
        scheduler.set_timesteps(sigmas=np.linspace(1, 0.1, 10), **mu)
    else:
        scheduler.set_timesteps(10)
    times = teacher.times(10)
    for i in (0, 4, 9):
        t = torch.full((2,), times[i], dtype=torch.float64)
        s = torch.full((2,), times[i + 1], dtype=torch.float64)
        x0_hat, eps_hat = teacher.convert(raw, x_t, t)
        alpha, sigma = teacher.alpha_sigma(t, x_t)
        torch.testing.assert_close(alpha * x0_hat + sigma * eps_hat, x_t, atol=1e-9, rtol=0)
        torch.testing.assert_close(teacher.target(x0_hat, eps_hat, t), raw, atol=1e-9, rtol=0)
        scheduler._step_index = i
        result = scheduler.step(raw, scheduler.timesteps[i], x_t)
        x_s = teacher.step(x0_hat, eps_hat, s)
        torch.testing.assert_close(x_s, result.prev_sample, atol=1e-5, rtol=1e-5)
        if teacher.prediction != "flow":
            torch.testing.assert_close(x0_hat, result.pred_original_sample, atol=1e-5, rtol=1e-5)


def make_first_order(teacher, steps):
    """The teacher's pipeline, with Euler's steps where its own sampler is another."""
    if type(teacher.pipe.scheduler).__name__ != "UniPCMultistepScheduler":
        return teacher.pipe
    _, sigmas = teacher.schedule(torch.tensor(teacher.times(steps)[:-1], dtype=torch.float64))
    scheduler = teacher.flow_scheduler(sigmas.tolist())
    scheduler.register_to_config(stochastic_sampling=False)
    return type(teacher.pipe)(**{**teacher.pipe.components, "scheduler": scheduler})


@pytest.mark.parametrize("kind", BUILD)
def test_many_steps_are_the_pipelines_own(teachers, kind):
    teacher = teachers[kind]
    steps = 5 if kind in families.FAMILIES else 25
    x_T = draw_noise(2, *teacher.latent_shape)
    ours = teacher.sample(x_T, teacher.encode(PROMPTS), steps, 3.0)
    settings = {}
    if kind.startswith("sd3"):
        # diffusers' default for its last steps shifts sigma_min twice; with explicit sigmas it shifts once
        settings["sigmas"] = np.linspace(1, 1 / 25, 25)
    theirs = draw(make_first_order(teacher, steps), teacher, x_T, steps, 3.0, **settings)
    assert (ours - theirs).abs().max() < 2e-5 * ours.std()
    assert ours.std() > 0.1


@pytest.mark.parametrize("kind", families.FAMILIES)
@pytest.mark.parametrize("scale", (1.0, 4.0))
@torch.no_grad()
def test_the_pipelines_own_at_another_size(folders, kind, scale):
    """Latents and pixels, with guidance and without."""
    teacher = load(kind, folders[kind], **families.FAMILIES[kind]["other_size"])
    x_T = draw_noise(2, *teacher.latent_shape)
    ours = teacher.sample(x_T, teacher.encode(PROMPTS), 4, scale)
    theirs = draw(make_first_order(teacher, 4), teacher, x_T, 4, scale)
    assert (ours - theirs).abs().max() < 2e-5 * ours.std()
    if scale == 1:
        settings = teacher.call_settings(scale) | {"num_inference_steps": 2, "output_type": "pt"}
        latents = teacher.sample(x_T, teacher.encode(PROMPTS), 2, scale)
        pixels = make_first_order(teacher, 2)(PROMPTS, latents=teacher.pack(x_T), **settings)[0]
        pixels = pixels.transpose(1, 2) if teacher.video else pixels
        ours = (teacher.decode(latents) / 2 + 0.5).clamp(0, 1)
        assert (ours - pixels).abs().max() < 1e-4
        assert ours.std() > 0.01


def test_wans_times_are_unipcs(teachers):
    teacher = teachers["wan"]
    scheduler = teacher.pipe.scheduler
    scheduler.set_timesteps(50)
    _, sigma = teacher.schedule(torch.tensor(teacher.times(50), dtype=torch.float64))
    torch.testing.assert_close(sigma.float(), scheduler.sigmas, atol=2e-6, rtol=0)
    assert teacher.shift == 3.0


def test_sd3_shifts_its_last_step_once(teachers):
    teacher = teachers["sd3"]
    times = torch.tensor(teacher.times(4), dtype=torch.float64)
    _, sigma = teacher.schedule(times)
    assert sigma.tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])  # twice would end at 0.0089
    assert teacher.timestep(times).tolist() == pytest.approx([1000, 900, 750, 500, 0])


# What differs inside a family is read from configs --------------------------------------------------------


@pytest.mark.parametrize("kind, name", (("cogvideox-rotary", "cogvideox-2b"), ("cogvideox", "CogVideoX-5b")))
def test_rotary_embeddings_come_from_the_config_not_the_name(folders, tmp_path, kind, name):
    """A 5b in a folder that is called 2b uses them, and a 2b in one called 5b does not."""
    shutil.copytree(folders[kind], tmp_path / name)
    teacher = helpers.load_teacher(str(tmp_path / name), CPU)
    assert (teacher.rotary is not None) == (kind == "cogvideox-rotary")
    x_T = draw_noise(2, *teacher.latent_shape)
    ours = teacher.sample(x_T, teacher.encode(PROMPTS), 2, 1.0)
    theirs = draw(teacher.pipe, teacher, x_T, 2, 1.0)
    assert (ours - theirs).abs().max() < 1e-4


def load_changed(folder, copy, file, changes):
    """Copies a pipeline and changes one of its configs -> the copy's teacher."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps(config | changes))
    return helpers.load_teacher(str(copy), CPU)


def test_the_snr_shift_comes_from_the_config(folders, tmp_path):
    before = helpers.load_teacher(folders["cogvideox"], CPU)
    changes = {"snr_shift_scale": 1.0}
    file = "scheduler/scheduler_config.json"
    after = load_changed(folders["cogvideox"], tmp_path / "copy", file, changes)
    scheduler = diffusers.CogVideoXDDIMScheduler.from_config(after.pipe.scheduler.config)
    expected = scheduler.alphas_cumprod.double()
    assert after.alphas_cumprod[1:].equal(expected)
    assert not before.alphas_cumprod[1:].equal(expected)


def test_the_vaes_scale_comes_from_the_config(folders, tmp_path):
    changes = {"scaling_factor": 2.5, "shift_factor": 0.3}
    teacher = load_changed(folders["sd3"], tmp_path / "copy", "vae/config.json", changes)
    latents = draw_noise(1, *teacher.latent_shape)
    expected = teacher.pipe.vae.decode(latents / 2.5 + 0.3).sample
    torch.testing.assert_close(teacher.decode(latents), expected)


@torch.no_grad()
def test_decode_is_the_pipelines_for_images(teachers):
    teacher = teachers["sd3"]
    latents = draw_noise(1, *teacher.latent_shape)
    pixels = teacher.decode(latents)
    config = teacher.pipe.vae.config
    expected = teacher.pipe.vae.decode(latents / config.scaling_factor + config.shift_factor).sample
    assert pixels.shape == (1, 3, 32, 32)
    torch.testing.assert_close(pixels, expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", BUILD)
def test_decoders_run_without_autocast(teachers, kind, monkeypatch):
    """As in the pipelines: with it norms would give back float32, at twice the memory."""
    teacher = teachers[kind]
    vae = copy.deepcopy(teacher.pipe.vae).to(torch.bfloat16)
    seen = []

    def look(decoder, inputs):
        seen.append(torch.is_autocast_enabled("cpu"))

    vae.decoder.register_forward_pre_hook(look)
    monkeypatch.setattr(teacher.pipe, "vae", vae)
    monkeypatch.setattr(teacher, "dtype", torch.bfloat16)
    assert teacher.decode(draw_noise(1, *teacher.latent_shape)).dtype == torch.float32
    assert seen
    assert not any(seen)


@torch.no_grad()
def test_decode_is_the_pipelines_for_videos(teachers):
    teacher = teachers["cogvideox"]
    latents = draw_noise(1, *teacher.latent_shape)
    pixels = teacher.decode(latents)
    assert pixels.shape == (1, 3, 9, 32, 32)
    torch.testing.assert_close(pixels, teacher.pipe.decode_latents(latents.transpose(1, 2)))


@pytest.mark.parametrize(
    "config",
    (
        {"scaling_factor": 2.0, "shift_factor": 0.5},
        {"scaling_factor": 2.0, "shift_factor": None, "latents_mean": None},
        {"latents_mean": [1.0, 2.0], "latents_std": [3.0, 4.0]},
    ),
)
def test_latents_are_scaled_in_three_ways(config):
    vae = SimpleNamespace(config=config)
    mean, std = config.get("latents_mean") or [0, 0], config.get("latents_std") or [1, 1]
    for x in (draw_noise(2, 2, 3, 4), draw_noise(2, 2, 5, 3, 4)):
        found = configs.unscale(x, vae)
        for channel in (0, 1):
            wanted = x[:, channel] / config.get("scaling_factor", 1) * std[channel] + mean[channel]
            wanted = wanted + (config.get("shift_factor") or 0)
            torch.testing.assert_close(found[:, channel], wanted)


def test_unconditional_of_each_family(teachers):
    """SDXL's config asks for zeros (with its time ids), the others encode the empty prompt."""
    null = teachers["sdxl"].null(3)
    assert null["encoder_hidden_states"].abs().max() == 0
    assert null["text_embeds"].abs().max() == 0
    assert null["time_ids"][2].tolist() == [32, 32, 0, 0, 32, 32]
    for kind in ("sd3", "sd3-t5", "cogvideox"):
        empty = teachers[kind].encode([""])
        for name, value in teachers[kind].null(2).items():
            assert value.abs().max() > 0
            assert value[1].equal(empty[name][0])


@torch.no_grad()
def test_sdxls_sizes_and_its_empty_prompt(teacher_folder, tmp_path):
    """Of a picture that is higher than wide, and of a config that does not ask for zeros."""
    folder = shutil.copytree(teacher_folder, tmp_path / "teacher")
    index = json.loads((folder / "model_index.json").read_text())
    index["force_zeros_for_empty_prompt"] = False
    (folder / "model_index.json").write_text(json.dumps(index))
    teacher = helpers.load_teacher(str(folder), torch.device("cpu"), resolution=(48, 32))
    null = teacher.null(1)
    embeds, _, pooled, _ = teacher.pipe.encode_prompt("", do_classifier_free_guidance=False)
    torch.testing.assert_close(null["encoder_hidden_states"], embeds)
    torch.testing.assert_close(null["text_embeds"], pooled)
    dtype = torch.float32
    size = teacher.pipe.text_encoder_2.config.projection_dim
    ids = teacher.pipe._get_add_time_ids((48, 32), (0, 0), (48, 32), dtype, text_encoder_projection_dim=size)
    assert null["time_ids"].tolist() == ids.tolist() == [[48, 32, 0, 0, 48, 32]]


def ask_pipeline(kind, pipe, negative):
    """Its own encode_prompt, asked as its call asks it -> the rows [length, width] of each of PROMPTS and of
    their negative prompt, None for that of the pipeline."""
    if kind == "stable-diffusion":
        return pipe.encode_prompt(PROMPTS, CPU, 1, True, negative)
    if kind == "wan":
        return pipe.encode_prompt(PROMPTS, negative, max_sequence_length=512, device=CPU)
    if kind == "z-image":
        return pipe.encode_prompt(PROMPTS, CPU, True, negative)
    if kind == "flux":  # which has none
        embeds, _, _ = pipe.encode_prompt(PROMPTS, device=CPU)
        return embeds, []
    rows = []
    for prompts in (PROMPTS, negative or [" ", " "]):
        embeds, mask = pipe.encode_prompt(prompts, CPU, max_sequence_length=512)
        mask = torch.ones(embeds.shape[:2]) if mask is None else mask
        rows.append([row[kept.bool()] for row, kept in zip(embeds, mask)])
    return rows


@pytest.mark.parametrize("kind", families.FAMILIES)
@pytest.mark.parametrize("negative", (None, ["a small circle", "a circle"]))
@torch.no_grad()
def test_conditions_are_the_pipelines(teachers, kind, negative):
    """Of prompts, of a negative prompt, and of none."""
    teacher = teachers[kind]
    cond = teacher.encode(PROMPTS)
    null = teacher.encode(negative) if negative else teacher.null(2)
    for ours, theirs in zip((cond, null), ask_pipeline(kind, teacher.pipe, negative)):
        text = ours["encoder_hidden_states"]
        lengths = ours.get("length", [text.shape[1]] * 2)
        for i, rows in enumerate(theirs):
            assert lengths[i] == len(rows)
            torch.testing.assert_close(text[i, : len(rows)], rows)
    if kind == "flux":
        _, pooled, _ = teacher.pipe.encode_prompt(PROMPTS, device=CPU)
        torch.testing.assert_close(cond["pooled_projections"], pooled)


def test_text_lengths(teachers):
    """CLIP's 16 and 256 of T5, which are zeros where it is absent; CogVideoX's as its config says."""
    text = {kind: teacher.encode(["a circle"])["encoder_hidden_states"] for kind, teacher in teachers.items()}
    assert text["sd3"].shape[1] == 16 + 256
    assert text["sd3"][:, 16:].abs().max() == 0
    assert text["sd3-t5"][:, 16:].abs().max() > 0
    assert text["cogvideox"].shape[1] == 16


def test_a_long_prompt_is_cut_as_the_pipeline_does(teacher):
    prompt = "a small red circle on a white background " * 6
    wanted, *_ = teacher.pipe.encode_prompt(prompt, device=teacher.device, do_classifier_free_guidance=False)
    torch.testing.assert_close(teacher.encode([prompt])["encoder_hidden_states"], wanted)


def test_the_position_table_survives_every_load(teachers):
    """CogVideoX-2b's table is not in its file: the student's must be the teacher's."""
    teacher = teachers["cogvideox"]
    table = teacher.denoiser.patch_embed.pos_embedding.float()
    student = teacher.trainable(helpers.TRAINING, "student")
    assert table.abs().max() > 0.5
    assert student.patch_embed.pos_embedding.equal(table)


@pytest.mark.parametrize("kind", ("sd3", "cogvideox-rotary", *TRANSFORMERS))
@pytest.mark.parametrize("checkpointing", (False, True))
def test_one_map_a_tap_and_the_same_gradient_under_checkpointing(folders, kind, checkpointing):
    teacher = load(kind, folders[kind])
    x = draw_noise(1, *teacher.latent_shape)
    gradients = []
    for net_checkpointing in (False, checkpointing):
        if net_checkpointing:
            teacher.denoiser.enable_gradient_checkpointing()
        x = x.detach().requires_grad_()
        maps = teacher.features(x, torch.tensor([600.0]), teacher.null(1))
        assert len(maps) == len(teacher.taps) == (3 if kind == "flux" else 2)  # of so many blocks
        sum(m.square().mean() for m in maps).backward()
        gradients.append(x.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[0].abs().max() > 0


@pytest.mark.parametrize(
    "kind, place, token",  # (frame,) row, column of the latents and of the map: patches of 2
    (
        ("sd3", (6, 1), (3, 0)),
        ("cogvideox", (2, 6, 1), (2, 3, 0)),
        ("wan", (2, 6, 1), (2, 3, 0)),
        ("z-image", (6, 1), (3, 0)),
        ("qwen-image", (6, 1), (3, 0)),
        ("flux", (6, 1), (3, 0)),
    ),
)
@torch.no_grad()
def test_maps_are_the_tokens_in_place(teachers, kind, place, token):
    """A change at one place of the latents changes the first map most at that place: rows, columns and
    frames are in order."""
    teacher = teachers[kind]
    x = torch.zeros(1, *teacher.latent_shape)
    changed = x.clone()
    changed[0][(slice(None), *place)] += 5
    t = torch.tensor([500.0])
    before = teacher.features(x, t, teacher.null(1))[0]
    after = teacher.features(changed, t, teacher.null(1))[0]
    size = (after - before)[0].norm(dim=0)
    assert np.unravel_index(int(size.argmax()), size.shape) == token


def test_the_shipped_teacher_is_an_ordinary_pipeline():
    """Plain diffusers loads it and draws what this project draws; it says nothing of the machine that made
    it."""
    folder = os.path.join(helpers.ROOT, "assets", "tiny-sdxl")
    size = 0
    for place, _, files in os.walk(folder):
        size += sum(os.path.getsize(os.path.join(place, file)) for file in files)
    assert size < 10e6
    assert DiffusionPipeline.load_config(folder).get("_name_or_path", "") == ""
    teacher = helpers.load_teacher(folder, CPU)
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    x_T = draw_noise(2, *teacher.latent_shape)
    ours = teacher.sample(x_T, teacher.encode(PROMPTS), 2, 2.0)
    theirs = draw(pipe, teacher, x_T, 2, 2.0)
    assert (ours - theirs).abs().max() < 1e-4


def test_the_tiny_sd3_has_a_t5_that_says_nothing(tmp_path):
    """Plain diffusers loads it, and gives the tokens that an SD3 without T5 has: zeros."""
    train.build_sd3().save_pretrained(tmp_path)
    DiffusionPipeline.from_pretrained(tmp_path)
    text = helpers.load_teacher(str(tmp_path), CPU).encode(PROMPTS)["encoder_hidden_states"]
    assert text[:, 16:].abs().max() == 0


@torch.no_grad()
def test_a_textual_inversion_of_several_tokens_is_all_of_them(tmp_path):
    """As the pipeline's own encode_prompt reads it."""
    teacher = helpers.load_teacher(helpers.make_teacher(tmp_path, 0), CPU)
    pipe = teacher.pipe
    torch.manual_seed(1)
    parts = ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2))
    for tokenizer, encoder in parts:
        tokenizer.add_tokens(["<cat>", "<cat>_1"])
        encoder.resize_token_embeddings(len(tokenizer))
    prompts = ["a small <cat>", "a circle"]
    ours = teacher.encode(prompts)
    embeds, _, pooled, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
    torch.testing.assert_close(ours["encoder_hidden_states"], embeds)
    torch.testing.assert_close(ours["text_embeds"], pooled)


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_and_steps_of_the_teacher_are_its_pipelines_own(teachers, kind):
    """But for SDXL's steps, which are the paper's."""
    teacher = teachers[kind]
    own = inspect.signature(type(teacher.pipe).__call__).parameters
    settings = teacher.call_settings(teacher.guidance)
    guidance = "true_cfg_scale" if "true_cfg_scale" in settings else "guidance_scale"
    assert settings[guidance] == own[guidance].default
    assert teacher.sampler_steps == (25 if kind == "sdxl" else own["num_inference_steps"].default)


@torch.no_grad()
@pytest.mark.parametrize("kind, steps", [(kind, 8 if kind == "qwen-image" else 4) for kind in KINDS])
def test_networks_in_bf16_are_told_the_times_that_their_pipelines_tell_them(tmp_path, kind, steps):
    """To the last bit, as an exported student is to draw what it draws here; Z-Image's, which stay in
    float32, but for the last ones."""
    folder = helpers.make_teacher(tmp_path, 0, kind)
    size = train.FAMILIES[kind].get("size", {})
    teacher = helpers.load_teacher(folder, CPU, torch.bfloat16, **size)
    student = common.Student(teacher, "teacher", steps)
    told = []

    def note(module, args, kwargs):
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        time = given["t"] if "t" in given else given["timestep"]
        told.append(time.double().flatten()[0].item())  # one number, or one for each row

    teacher.denoiser.register_forward_pre_hook(note, with_kwargs=True)
    rng = RowRNG(range(len(PROMPTS)), ("test", 3), CPU)
    student.sample(teacher.denoiser, rng, teacher.encode(PROMPTS))
    ours, told[:] = list(told), []
    pipe = teacher.pipe
    pipe.scheduler = student.scheduler()
    x_T = draw_noise(len(PROMPTS), *teacher.latent_shape).bfloat16()
    draw(pipe, teacher, x_T, steps, 1.0 if kind != "flux" else teacher.student_guidance)
    assert len(ours) == steps
    assert told[:steps] == pytest.approx(ours, rel=2e-6 if kind == "z-image" else 0, abs=0)


# Students -------------------------------------------------------------------------------------------------


STUDENTS = (("teacher", 1), ("teacher", 3), ("teacher", 4), ("teacher", 8), ("velocity", 1), ("velocity", 4))
EXPORTS = [(kind, *student) for kind in ("sdxl", "sd3", "cogvideox") for student in STUDENTS]
for kind in families.FAMILIES:
    EXPORTS += [(kind, "teacher", 4), (kind, "velocity", 2)]


@pytest.mark.parametrize("kind, parametrisation, steps", EXPORTS)
def test_exported_pipelines_draw_the_students_images(
    teachers, tmp_path, monkeypatch, kind, parametrisation, steps
):
    """Written by sample.py's export, read by plain diffusers, on the same noise."""
    teacher = teachers[kind]
    student = common.Student(teacher, parametrisation, steps)
    system = System(teacher, student, teacher.denoiser)
    folder = str(tmp_path / "exported")
    if parametrisation == "velocity" and steps > 1 and teacher.prediction != "flow":
        with pytest.raises(UserError, match="velocity student"):
            sample.export(system, folder)
        return
    sample.export(system, folder)
    rng = helpers.Recorded(range(2), ("test", 7), CPU)
    ours = student.sample(system.net, rng, teacher.encode(PROMPTS))

    noise = iter([teacher.pack(eps) for eps in rng.given[1:]])
    schedulers = diffusers.schedulers
    for module in (schedulers.scheduling_lcm, schedulers.scheduling_flow_match_euler_discrete):
        # after the last step the flow scheduler draws once more, and multiplies by zero
        monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: next(noise, torch.zeros(shape)))
    absent = {"text_encoder_3": None, "tokenizer_3": None} if kind == "sd3" else {}
    pipe = DiffusionPipeline.from_pretrained(folder, **absent)
    theirs = draw(pipe, teacher, rng.given[0], steps, teacher.student_guidance)
    assert (ours - theirs).abs().max() < 1e-5 * ours.std()
    assert ours.std() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_backward_simulation_is_what_sampling_does(teachers, kind):
    teacher = teachers[kind]
    student = common.Student(teacher, "teacher", 4)
    cond = teacher.encode(PROMPTS)
    seen = []
    x0 = student.x0

    def watch(net, x_t, t, cond):
        seen.append((x_t, t))
        return x0(net, x_t, t, cond)

    student.x0 = watch
    make_rng = lambda: RowRNG(range(2), ("test", 3), CPU)
    student.sample(teacher.denoiser, make_rng(), cond)
    sampled = list(seen)
    assert [float(t[0]) for _, t in sampled] == [1000, 750, 500, 250]
    for k in range(4):
        x = student.simulate(teacher.denoiser, make_rng(), cond, k)
        assert x.equal(sampled[k][0])


@pytest.mark.parametrize("kind", KINDS)
def test_renoising_is_the_teachers_forward_process(teachers, kind):
    """Between two steps, x0_hat = c gets new noise: mean alpha c, standard deviation sigma, for VP and for
    flow."""
    teacher = teachers[kind]
    student = common.Student(teacher, "teacher", 4)
    student.x0 = lambda net, x, t, cond: torch.full_like(x, 3.0)
    x = student.simulate(None, RowRNG(range(64), ("test", 0), CPU), None, 2)
    alpha, sigma = teacher.schedule(torch.tensor([500.0], dtype=torch.float64))
    assert float(x.mean()) == pytest.approx(3 * float(alpha), abs=0.02)
    assert float(x.std()) == pytest.approx(float(sigma), rel=0.02)


# Mistakes -------------------------------------------------------------------------------------------------

IMPOSSIBLE = (
    ("cogvideox", {"frames": 10}, "multiple of 8, plus 1"),
    ("cogvideox", {"frames": 5}, "multiple of 8, plus 1"),
    ("sd3", {"frames": 9}, "for video"),
    ("cogvideox", {"resolution": (36, 32)}, "36x32 is not a multiple of 8"),
    ("sd3", {"resolution": (33, 33)}, "multiple of 8"),
)


@pytest.mark.parametrize("kind, options, sentence", IMPOSSIBLE)
def test_sizes_that_a_teacher_cannot_do(folders, kind, options, sentence):
    with pytest.raises(UserError, match=sentence):
        helpers.load_teacher(folders[kind], CPU, **options)


@torch.no_grad()
def test_other_sizes_than_the_default(folders):
    teacher = helpers.load_teacher(folders["cogvideox-rotary"], CPU, resolution=(32, 48), frames=17)
    assert teacher.latent_shape == (teacher.denoiser.config.in_channels, 5, 8, 12)
    x = torch.randn(1, *teacher.latent_shape)
    raw = teacher.call(teacher.denoiser, x, torch.tensor([500.0]), teacher.null(1))
    assert raw.shape == x.shape
    assert teacher.decode(x).shape == (1, 3, 17, 32, 48)


def test_the_pixel_discriminator_is_for_images(folders, tmp_path):
    write_sealed(tmp_path / "index.json", dict.fromkeys(INDEX))
    words = ["--pairs", str(tmp_path), "--out", str(tmp_path / "run")]
    with pytest.raises(UserError, match="not video: give --lambda-pixel 0"):
        adp.main(["--teacher", folders["cogvideox"], *words])


def test_a_missing_video_package_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(UserError, match="pip install imageio-ffmpeg"):
        save_video(torch.zeros(3, 9, 32, 32), "/nowhere/x.mp4", 8)


def test_a_missing_tokenizer_package_is_one_sentence(folders, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("`tiktoken` is required to read a `tiktoken` file")

    monkeypatch.setattr(T5Tokenizer, "from_pretrained", fail)
    with pytest.raises(UserError, match="pip install sentencepiece protobuf"):
        helpers.load_teacher(folders["cogvideox"], CPU)


@pytest.mark.slow
@pytest.mark.parametrize("name", TEACHERS)
def test_the_real_pipelines_with_random_weights(name):
    """What the benchmark builds: text encoders of the widths that the real denoisers take."""
    with META:
        pipe = train.build_real(name)
    assert common.find_family(type(pipe).__name__)
    assert pipe.vae.dtype == torch.bfloat16
    if name == "sdxl":
        clip = pipe.text_encoder.config.hidden_size
        big_clip = pipe.text_encoder_2.config.hidden_size
        config = pipe.unet.config
        assert clip + big_clip == config.cross_attention_dim
        added = big_clip + 6 * config.addition_time_embed_dim
        assert added == config.projection_class_embeddings_input_dim
    elif "text_encoder_3" in pipe.components:
        pooled = pipe.text_encoder.config.hidden_size + pipe.text_encoder_2.config.hidden_size
        assert pooled == pipe.transformer.config.pooled_projection_dim
        assert pipe.text_encoder_3.config.d_model == pipe.transformer.config.joint_attention_dim
    else:
        last = pipe.components.get("text_encoder_2", pipe.text_encoder)  # of FLUX, T5
        config = getattr(pipe, common.find_family(type(pipe).__name__).denoiser_name).config
        names = ("text_embed_dim", "cross_attention_dim", "text_dim", "cap_feat_dim", "joint_attention_dim")
        width = last.config.get_text_config().hidden_size
        assert width in [config.get(name) for name in names]


@pytest.mark.parametrize("kind", KINDS)
def test_a_students_parts_have_the_precision_of_the_teachers(kind, folders, tmp_path):
    """In bf16 some of Wan's stay in float32, and tables that are computed are not rounded."""
    teacher = load(kind, folders[kind], dtype=torch.bfloat16)
    checkpoint = helpers.save_checkpoint(tmp_path / "run", teacher)
    student, *_ = helpers.load_student(checkpoint, teacher)
    wanted = {name: weight.dtype for name, weight in teacher.denoiser.state_dict().items()}
    assert {name: weight.dtype for name, weight in student.state_dict().items()} == wanted
    assert torch.bfloat16 in wanted.values()
    assert (torch.float32 in wanted.values()) == (kind == "wan")
    x = draw_noise(1, *teacher.latent_shape).float()
    raw = teacher.raw(teacher.denoiser, x, torch.tensor([500.0]), teacher.null(1))
    assert raw.dtype == torch.float32  # what is computed of it is
    trains = teacher.trainable(helpers.TRAINING, "student").state_dict()
    exact = load(kind, folders[kind]).denoiser.state_dict()
    assert all(weight.equal(exact[name]) for name, weight in trains.items())  # nothing is rounded
    tables = {name: table for name, table in student.named_buffers() if name not in wanted}
    assert all(table.dtype != torch.bfloat16 for table in tables.values())
    assert bool(tables) == (kind in ("cogvideox", "wan"))


@pytest.mark.parametrize("options", ["", "offload", "offload pixel"])
def test_a_device_is_given_what_it_keeps(options, folders):
    """--offload leaves the rest where it was read: of some teachers it would not fit beside the denoiser."""
    args = SimpleNamespace(checkpointing=False, shard="ddp", offload="offload" in options)
    args.lambda_pixel = 0.3 if "pixel" in options else 0
    teacher = common.open_teacher(folders["sdxl"], META)
    networks = list_networks(teacher.pipe)
    assert {next(net.parameters()).device.type for net in networks.values()} == {"cpu"}
    set_up_for_training(teacher, args)
    waiting = {name for name, net in networks.items() if next(net.parameters()).device.type == "cpu"}
    encoders = {"text_encoder", "text_encoder_2"}
    assert waiting == {"": set(), "offload": encoders | {"vae"}, "offload pixel": encoders}[options]
