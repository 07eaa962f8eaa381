"""The three families against diffusers: configs of the real models, samplers, schedules, conditions, exported students."""
import json
import os
import shutil
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline, DiffusionPipeline

import adp
import common
import helpers
import sample
from tiny import train

CPU, META = torch.device("cpu"), torch.device("meta")
CONFIGS = os.path.join(helpers.ROOT, "assets", "configs")
PROMPTS = ["a red circle", "a small square"]
KINDS = ("sdxl", "sd3", "sd3-t5", "cogvideox", "cogvideox-rotary")


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """{kind: folder of a random pipeline}."""
    root = tmp_path_factory.mktemp("families")
    build = {"sdxl": train.build_sdxl, "sd3": train.build_sd3, "sd3-t5": lambda: train.build_sd3(t5_encoder=True),
             "cogvideox": train.build_cogvideox, "cogvideox-rotary": lambda: train.build_cogvideox(rotary=True)}
    for kind in KINDS:
        torch.manual_seed(0)
        pipe = build[kind]()
        if kind == "sd3":  # without T5, as many real ones are kept
            pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
        pipe.save_pretrained(root / kind)
    return {kind: str(root / kind) for kind in KINDS}


@pytest.fixture(scope="session")
def teachers(folders):
    return {kind: common.load_teacher(folder, CPU) for kind, folder in folders.items()}


def draw(pipe, teacher, x_T, **settings):
    """The diffusers pipeline's own latents for PROMPTS from the noise x_T, in this project's order of axes."""
    pipe.set_progress_bar_config(disable=True)
    if teacher.video:
        settings["max_sequence_length"] = teacher.denoiser.config.max_text_seq_length
    axes = lambda x: x.transpose(1, 2) if teacher.video else x
    return axes(pipe(PROMPTS, latents=axes(x_T), output_type="latent", **settings)[0])


# The real models, without weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, family, parameters, latents, conditions, maps", [
    ("sdxl", common.SDXL, 2_567_463_684, (4, 128, 128), {"encoder_hidden_states": (77, 2048), "text_embeds": (1280,), "time_ids": (6,)},
     [(320, 128, 128), (640, 64, 64), (1280, 32, 32), (1280, 32, 32)]),
    ("sd3-medium", common.SD3, 2_028_328_000, (16, 128, 128), {"encoder_hidden_states": (333, 4096), "pooled_projections": (2048,)}, [(1536, 64, 64)] * 4),
    ("sd3.5-large", common.SD3, 8_056_627_520, (16, 128, 128), {"encoder_hidden_states": (333, 4096), "pooled_projections": (2048,)}, [(2432, 64, 64)] * 4),
    ("cogvideox-2b", common.CogVideoX, 1_693_783_872, (16, 13, 60, 90), {"encoder_hidden_states": (226, 4096)}, [(1920, 13, 30, 45)] * 4),
    ("cogvideox-5b", common.CogVideoX, 5_570_283_072, (16, 13, 60, 90), {"encoder_hidden_states": (226, 4096)}, [(3072, 13, 30, 45)] * 4),
])
def test_the_real_denoisers(name, family, parameters, latents, conditions, maps):
    """Their published sizes, and the shapes at every tap at the default resolution."""
    with open(os.path.join(CONFIGS, f"{name}.json")) as file:
        configs = json.load(file)
    with META:
        net = getattr(diffusers, configs["denoiser"]["_class_name"]).from_config(configs["denoiser"])
    assert sum(p.numel() for p in net.parameters()) == parameters
    scheduler = getattr(diffusers, configs["scheduler"]["_class_name"]).from_config(configs["scheduler"])
    pipe = SimpleNamespace(components={}, scheduler=scheduler, unet=net, transformer=net, vae_scale_factor=8, vae_scale_factor_spatial=8,
                           vae_scale_factor_temporal=4, vae=SimpleNamespace(enable_slicing=lambda: None))
    pipe._prepare_rotary_positional_embeddings = lambda *args: CogVideoXPipeline._prepare_rotary_positional_embeddings(pipe, *args)
    teacher = family(pipe, name, META, torch.float32)
    assert teacher.latent_shape == latents
    with META:
        cond = {key: torch.empty(1, *shape) for key, shape in conditions.items()}
        found = teacher.features(torch.empty(1, *latents), torch.empty(1), cond)
        assert [tuple(m.shape[1:]) for m in found] == maps
        assert common.Heads(found)(found).shape == (1, 4)
    if name == "cogvideox-5b":
        assert [tuple(part.shape) for part in teacher.rotary] == [(17550, 64)] * 2


def test_schedules_of_the_real_models():
    """abar at timesteps 0, 249, 499, 749, 999 as published with the configs; SD3's sigma with its shift of 3."""
    published = {"sdxl": (0.99914998, 0.67543209, 0.27766943, 0.05662345, 0.00466010),
                 "cogvideox-2b": (0.99745433, 0.39088974, 0.09596956, 0.01096589, 0), "cogvideox-5b": (0.99915000, 0.65418901, 0.24235917, 0.03317148, 0)}
    t = torch.tensor([1, 250, 500, 750, 1000], dtype=torch.float64)
    for name, abar in published.items():
        with open(os.path.join(CONFIGS, f"{name}.json")) as file:
            config = json.load(file)["scheduler"]
        teacher = object.__new__(common.Teacher)
        teacher.device, teacher.path = CPU, name
        teacher._read_schedule(getattr(diffusers, config["_class_name"]).from_config(config))
        alpha, sigma = teacher.schedule(t)
        torch.testing.assert_close(alpha**2, torch.tensor(abar, dtype=torch.float64), atol=5e-8, rtol=0)
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(5, dtype=torch.float64))
    sd3 = object.__new__(common.SD3)
    sd3._read_schedule(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    torch.testing.assert_close(sd3.schedule(torch.tensor([1000, 500, 250], dtype=torch.float64))[1], torch.tensor([1, 0.75, 0.5], dtype=torch.float64))


# Against diffusers' own steps and samplers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ("sdxl", "sd3", "cogvideox"))
def test_predictions_agree_with_the_scheduler(teachers, kind):
    """x0_hat, eps_hat and the step, from any raw output, in float64."""
    teacher, scheduler = teachers[kind], teachers[kind].pipe.scheduler
    generator = torch.Generator().manual_seed(0)
    x_t, raw = torch.randn(2, *teacher.latent_shape, dtype=torch.float64, generator=generator), torch.randn(2, *teacher.latent_shape, dtype=torch.float64, generator=generator)
    at = lambda t: torch.full((2,), t, dtype=torch.float64)
    if kind == "sd3":
        scheduler.set_timesteps(sigmas=np.linspace(1, 0.1, 10))
    else:
        scheduler.set_timesteps(10)
    for i in (0, 4, 9):
        t, s = teacher.times(10)[i : i + 2]
        x0_hat, eps_hat = teacher.convert(raw, x_t, at(t))
        alpha, sigma = teacher.alpha_sigma(at(t), x_t)
        torch.testing.assert_close(alpha * x0_hat + sigma * eps_hat, x_t, atol=1e-9, rtol=0)
        torch.testing.assert_close(teacher.target(x0_hat, eps_hat, at(t)), raw, atol=1e-9, rtol=0)
        scheduler._step_index = i
        result = scheduler.step(raw, scheduler.timesteps[i], x_t)
        torch.testing.assert_close(teacher.step(x0_hat, eps_hat, at(s)), result.prev_sample, atol=1e-5, rtol=1e-5)
        if kind != "sd3":
            torch.testing.assert_close(x0_hat, result.pred_original_sample, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_25_steps_are_the_pipelines_own(teachers, kind):
    teacher = teachers[kind]
    x_T = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    ours = teacher.sample(x_T, teacher.encode(PROMPTS), 25, 3.0)
    # SD3: diffusers' default for its last steps shifts sigma_min twice; with explicit sigmas it shifts once
    settings = {"sigmas": np.linspace(1, 1 / 25, 25)} if kind.startswith("sd3") else {}
    theirs = draw(teacher.pipe, teacher, x_T, num_inference_steps=25, guidance_scale=3.0, **settings)
    assert (ours - theirs).abs().max() < 1e-5 * ours.std() and ours.std() > 0.1


def test_sd3_shifts_its_last_step_once(teachers):
    teacher = teachers["sd3"]
    sigma = [float(teacher.schedule(torch.tensor(t, dtype=torch.float64))[1]) for t in teacher.times(4)]
    assert sigma == pytest.approx([1, 0.9, 0.75, 0.5, 0])  # twice would end at 0.0089
    assert [float(teacher.timestep(torch.tensor(t))) for t in teacher.times(4)] == pytest.approx([1000, 900, 750, 500, 0])


# What differs inside a family is read from configs -------------------------------------------------------------------------


def test_rotary_embeddings_come_from_the_config_not_the_name(folders, tmp_path):
    """A 5b in a folder that is called 2b uses them, and a 2b in one called 5b does not."""
    for kind, name in (("cogvideox-rotary", "cogvideox-2b"), ("cogvideox", "CogVideoX-5b")):
        shutil.copytree(folders[kind], tmp_path / name)
        teacher = common.load_teacher(str(tmp_path / name), CPU)
        assert (teacher.rotary is not None) == (kind == "cogvideox-rotary")
        x_T = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
        theirs = draw(teacher.pipe, teacher, x_T, num_inference_steps=2, guidance_scale=1.0)
        assert (teacher.sample(x_T, teacher.encode(PROMPTS), 2, 1.0) - theirs).abs().max() < 1e-4


def test_snr_shift_and_autoencoder_scale_come_from_the_config(folders, tmp_path):
    for folder, file, changes in (("cogvideox", "scheduler/scheduler_config.json", {"snr_shift_scale": 1.0}),
                                  ("sd3", "vae/config.json", {"scaling_factor": 2.5, "shift_factor": 0.3})):
        copy = shutil.copytree(folders[folder], tmp_path / folder)
        path = copy / file
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | changes))
        before, after = common.load_teacher(folders[folder], CPU), common.load_teacher(str(copy), CPU)
        if folder == "cogvideox":
            expected = diffusers.CogVideoXDDIMScheduler.from_config(after.pipe.scheduler.config).alphas_cumprod.double()
            assert after.alphas_cumprod[1:].equal(expected) and not before.alphas_cumprod[1:].equal(expected)
        else:
            latents = torch.randn(1, *after.latent_shape, generator=torch.Generator().manual_seed(0))
            torch.testing.assert_close(after.decode(latents), after.pipe.vae.decode(latents / 2.5 + 0.3).sample)


def test_decode_is_the_pipelines(teachers):
    for kind in ("sd3", "cogvideox"):
        teacher = teachers[kind]
        latents = torch.randn(1, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            pixels = teacher.decode(latents)
            if teacher.video:
                theirs = teacher.pipe.decode_latents(latents.transpose(1, 2))
            else:
                config = teacher.pipe.vae.config
                theirs = teacher.pipe.vae.decode(latents / config.scaling_factor + config.shift_factor).sample
        assert pixels.shape == ((1, 3, 9, 32, 32) if teacher.video else (1, 3, 32, 32))
        torch.testing.assert_close(pixels, theirs)


def test_unconditional_of_each_family(teachers):
    """SDXL's config asks for zeros (with its time ids), the others encode the empty prompt."""
    null = teachers["sdxl"].null(3)
    assert null["encoder_hidden_states"].abs().max() == 0 and null["text_embeds"].abs().max() == 0 and null["time_ids"][2].tolist() == [32, 32, 0, 0, 32, 32]
    for kind in ("sd3", "sd3-t5", "cogvideox"):
        for name, value in teachers[kind].null(2).items():
            assert value.abs().max() > 0 and value[1].equal(teachers[kind].encode([""])[name][0])


def test_text_lengths(teachers):
    """CLIP's 16 and 256 of T5, which are zeros where it is absent; CogVideoX's as its config says."""
    assert teachers["sd3"].encode(["a circle"])["encoder_hidden_states"].shape[1] == 16 + 256
    assert teachers["sd3"].encode(["a circle"])["encoder_hidden_states"][:, 16:].abs().max() == 0
    assert teachers["sd3-t5"].encode(["a circle"])["encoder_hidden_states"][:, 16:].abs().max() > 0
    assert teachers["cogvideox"].encode(["a circle moving"])["encoder_hidden_states"].shape[1] == 16


def test_the_position_table_survives_every_load(folders, teachers):
    """CogVideoX-2b's table is not in its file: the student's must be the teacher's."""
    teacher = teachers["cogvideox"]
    table = teacher.denoiser.patch_embed.pos_embedding.float()
    assert table.abs().max() > 0.5 and teacher.trainable(helpers.TRAINING, "student").patch_embed.pos_embedding.equal(table)


@pytest.mark.parametrize("kind", ("sd3", "cogvideox-rotary"))
@pytest.mark.parametrize("checkpointing", (False, True))
def test_one_map_a_tap_and_the_same_gradient_under_checkpointing(folders, kind, checkpointing):
    teacher = common.load_teacher(folders[kind], CPU)
    x = torch.randn(1, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    maps, gradients = [], []
    for net_checkpointing in (False, checkpointing):
        if net_checkpointing:
            teacher.denoiser.enable_gradient_checkpointing()
        x = x.detach().requires_grad_()
        maps.append(teacher.features(x, torch.tensor([600.0]), teacher.null(1)))
        sum(m.square().mean() for m in maps[-1]).backward()
        gradients.append(x.grad.clone())
    assert len(maps[0]) == len(maps[1]) == 4
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[0].abs().max() > 0


def test_maps_are_the_tokens_in_place(teachers):
    """A change at one place of the latents changes the first map most at that place: rows, columns and frames are in order."""
    for kind, place in (("sd3", (slice(None), 6, 1)), ("cogvideox", (slice(None), 2, 6, 1))):
        teacher = teachers[kind]
        x = torch.zeros(1, *teacher.latent_shape)
        changed = x.clone()
        changed[0][place] += 5
        with torch.no_grad():
            difference = [teacher.features(v, torch.tensor([500.0]), teacher.null(1))[0] for v in (x, changed)]
        size = (difference[1] - difference[0])[0].norm(dim=0)
        expected = (3, 0) if kind == "sd3" else (2, 3, 0)  # patches of 2
        assert np.unravel_index(int(size.argmax()), size.shape) == expected


def test_the_shipped_teacher_is_an_ordinary_pipeline():
    """Plain diffusers loads it and draws what this project draws; it says nothing of the machine that made it."""
    folder = os.path.join(helpers.ROOT, "assets", "tiny-sdxl")
    assert sum(os.path.getsize(os.path.join(place, file)) for place, _, files in os.walk(folder) for file in files) < 10e6
    assert DiffusionPipeline.load_config(folder).get("_name_or_path", "") == ""
    teacher, pipe = common.load_teacher(folder, CPU), DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    x_T = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    theirs = draw(pipe, teacher, x_T, num_inference_steps=2, guidance_scale=2.0)
    assert (teacher.sample(x_T, teacher.encode(PROMPTS), 2, 2.0) - theirs).abs().max() < 1e-4


def test_the_tiny_sd3_has_a_t5_that_says_nothing(tmp_path):
    """Plain diffusers loads it, and gives the tokens that an SD3 without T5 has: zeros."""
    train.build_sd3().save_pretrained(tmp_path)
    DiffusionPipeline.from_pretrained(tmp_path)
    assert common.load_teacher(str(tmp_path), CPU).encode(PROMPTS)["encoder_hidden_states"][:, 16:].abs().max() == 0


# Students ------------------------------------------------------------------------------------------------------------------


class Recorded(common.Rows):
    """Rows that remember what noise they gave."""

    def __init__(self, *args):
        super().__init__(*args)
        self.given = []

    def normal(self, *shape):
        self.given.append(super().normal(*shape))
        return self.given[-1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parametrisation, steps", [("teacher", 1), ("teacher", 3), ("teacher", 4), ("teacher", 8), ("velocity", 1), ("velocity", 4)])
def test_exported_pipelines_draw_the_students_pictures(teachers, tmp_path, monkeypatch, kind, parametrisation, steps):
    """Written by sample.py's export, read by plain diffusers, on the same noise."""
    teacher = teachers[kind]
    system = object.__new__(sample.System)
    system.teacher, system.student, system.steps = teacher, common.Student(teacher, parametrisation, steps), steps
    system.net = teacher.denoiser
    if parametrisation == "velocity" and steps > 1 and not kind.startswith("sd3"):
        with pytest.raises(common.UserError, match="velocity student"):
            system.export(str(tmp_path / "exported"))
        return
    system.export(str(tmp_path / "exported"))
    rows = Recorded(range(2), (7,), CPU)
    ours = system.student.sample(system.net, rows, teacher.encode(PROMPTS))

    noise = iter([eps.transpose(1, 2) if teacher.video else eps for eps in rows.given[1:]])
    for module in (diffusers.schedulers.scheduling_lcm, diffusers.schedulers.scheduling_flow_match_euler_discrete):
        # after the last step the flow scheduler draws once more, and multiplies by zero
        monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: next(noise, torch.zeros(shape)))
    pipe = DiffusionPipeline.from_pretrained(str(tmp_path / "exported"), **({"text_encoder_3": None, "tokenizer_3": None} if kind == "sd3" else {}))
    theirs = draw(pipe, teacher, rows.given[0], num_inference_steps=steps, guidance_scale=1.0)
    assert (ours - theirs).abs().max() < 1e-5 * ours.std() and ours.std() > 0.1


@pytest.mark.parametrize("kind", ("sdxl", "sd3", "cogvideox"))
def test_backward_simulation_is_what_sampling_does(teachers, kind):
    teacher = teachers[kind]
    student, cond = common.Student(teacher, "teacher", 4), teacher.encode(PROMPTS)
    seen = []
    x0 = student.x0
    student.x0 = lambda net, x_t, t, cond: seen.append((x_t, t)) or x0(net, x_t, t, cond)
    student.sample(teacher.denoiser, common.Rows(range(2), (3,), CPU), cond)
    sampled = list(seen)
    assert [float(t[0]) for _, t in sampled] == [1000, 750, 500, 250]
    for k in range(4):
        x = student.simulate(teacher.denoiser, common.Rows(range(2), (3,), CPU), cond, k)
        assert x.equal(sampled[k][0])


def test_renoising_is_the_teachers_forward_process(teachers):
    """Between two steps, x0_hat = c gets new noise: mean alpha c, standard deviation sigma, for VP and for flow."""
    for kind in ("cogvideox", "sd3"):
        teacher = teachers[kind]
        student = common.Student(teacher, "teacher", 4)
        student.x0 = lambda net, x, t, cond: torch.full_like(x, 3.0)
        x = student.simulate(None, common.Rows(range(64), (0,), CPU), None, 2)
        alpha, sigma = (float(v) for v in teacher.schedule(torch.tensor([500.0], dtype=torch.float64)))
        assert float(x.mean()) == pytest.approx(3 * alpha, abs=0.02) and float(x.std()) == pytest.approx(sigma, rel=0.02)


# Mistakes ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, options, sentence", [
    ("cogvideox", {"frames": 10}, "multiple of 8, plus 1"), ("cogvideox", {"frames": 5}, "multiple of 8, plus 1"), ("sd3", {"frames": 9}, "for video"),
    ("cogvideox", {"resolution": (36, 32)}, "36x32 is not a multiple of 8"), ("sd3", {"resolution": (33, 33)}, "multiple of 8")])
def test_sizes_that_a_teacher_cannot_do(folders, kind, options, sentence):
    with pytest.raises(common.UserError, match=sentence):
        common.load_teacher(folders[kind], CPU, **options)


def test_other_sizes_than_the_default(folders):
    teacher = common.load_teacher(folders["cogvideox-rotary"], CPU, resolution=(32, 48), frames=17)
    assert teacher.latent_shape == (teacher.denoiser.config.in_channels, 5, 8, 12)
    with torch.no_grad():
        x = torch.randn(1, *teacher.latent_shape)
        assert teacher.call(teacher.denoiser, x, torch.tensor([500.0]), teacher.null(1)).shape == x.shape and teacher.decode(x).shape == (1, 3, 17, 32, 48)


def test_the_pixel_discriminator_is_for_pictures(folders, tmp_path):
    with pytest.raises(common.UserError, match="not video: give --lambda-pixel 0"):
        adp.main(["--teacher", folders["cogvideox"], "--pairs", str(tmp_path), "--out", str(tmp_path / "run")])


def test_a_missing_package_is_one_sentence(folders, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "imageio_ffmpeg", None)
    with pytest.raises(common.UserError, match="pip install imageio-ffmpeg"):
        common.save_video(torch.zeros(3, 9, 32, 32), "/nowhere/x.mp4", 8)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *_, **__: (_ for _ in ()).throw(ValueError("`tiktoken` is required to read a `tiktoken` file")))
    with pytest.raises(common.UserError, match="pip install sentencepiece protobuf"):
        common.load_teacher(folders["cogvideox"], CPU)


@pytest.mark.parametrize("name", common.TEACHERS)
def test_the_real_pipelines_with_random_weights(name):
    """What the benchmark builds: text encoders of the widths that the real denoisers take."""
    with META:
        pipe = train.build_real(name)
    parts = pipe.components
    widths = [parts[part].config.hidden_size for part in ("text_encoder", "text_encoder_2") if part in parts and name.startswith("sd")]
    if name == "sdxl":
        config = pipe.unet.config
        assert (sum(widths), widths[1] + 6 * config.addition_time_embed_dim) == (config.cross_attention_dim, config.projection_class_embeddings_input_dim)
    elif name.startswith("sd3"):
        assert (parts["text_encoder_3"].config.d_model, sum(widths)) == (pipe.transformer.config.joint_attention_dim, pipe.transformer.config.pooled_projection_dim)
    else:
        assert parts["text_encoder"].config.d_model == pipe.transformer.config.text_embed_dim
    assert type(pipe).__name__ in common.FAMILIES and pipe.vae.dtype == torch.bfloat16
