"""Odd teachers: each computes what its own pipeline does, or is refused in one sentence that says why."""

import json
import logging
import os
import pickle
import re
import shutil

import diffusers
import huggingface_hub
import pytest
import torch
import transformers
from odd_teachers import ODD, RIGHT, SCHEDULER, Code, edit, set_scheduler, take_out
from safetensors.torch import load_file, save_file

import adm
import common
import helpers
import sample
from metrics import weights
from support import configs, hub
from support.checkpoints import compute_fingerprint, list_settings
from support.errors import UserError
from support.hub import TEACHERS
from tools import meta

CPU = torch.device("cpu")
PROMPT = ["a small red circle"]
FAMILIES = ("sdxl", "sd3", "cogvideox", "stable-diffusion", "wan", "flux")  # of ODD


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """{family: folder of a tiny pipeline}."""
    root = tmp_path_factory.mktemp("plain")
    return {family: helpers.make_teacher(root / family, 0, family) for family in FAMILIES}


@pytest.mark.parametrize("odd", ODD, ids=[odd.name for odd in ODD])
def test_odd_teachers(plain, tmp_path, odd):
    folder = str(tmp_path / "teacher")
    shutil.copytree(plain[odd.family], folder)
    odd.change(folder)
    if odd.expected == RIGHT:
        check_against_its_pipeline(helpers.load_teacher(folder, CPU), folder)
        return
    with pytest.raises(UserError) as caught:
        helpers.load_teacher(folder, CPU)
    said = str(caught.value)
    assert odd.expected in said
    assert "\n" not in said


@torch.no_grad()
def check_against_its_pipeline(teacher, folder):
    """Forward process, and pixels where the pipeline's sampler is the teacher's."""
    with open(os.path.join(folder, "model_index.json")) as file:
        kind = getattr(diffusers, json.load(file)["scheduler"][1])
    scheduler = kind.from_pretrained(folder, subfolder="scheduler")
    check_schedule(teacher, scheduler)
    other = configs.describe_sampler(type(teacher.pipe).__name__, kind, scheduler.config)
    if other and "own levels" not in other:  # which are given below
        return
    absent = {}
    if teacher.pipe.components.get("text_encoder_3", "") is None:
        absent = {"text_encoder_3": None, "tokenizer_3": None}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, **absent)
    pipe.set_progress_bar_config(disable=True)
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


@pytest.mark.parametrize("name", configs.DIFFUSION)
def test_schedulers_that_are_only_other_samplers(name):
    """All read the same schedule off the same betas."""
    betas = {"beta_start": 0.001, "beta_end": 0.015, "beta_schedule": "scaled_linear"}
    shift = {"snr_shift_scale": 1.0} if name.startswith("CogVideoX") else {}
    scheduler = configs.find_class(name)(**betas, **shift)
    expected = diffusers.DDIMScheduler(**betas).alphas_cumprod
    torch.testing.assert_close(scheduler.alphas_cumprod.float(), expected, atol=1e-6, rtol=0)


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


# The table ------------------------------------------------------------------------------------------------

DENOISERS = ("unet", "transformer")


def read_documented_fields():
    """docs/teacher-configs.md -> {(pipeline, component): {field: what becomes of it}}."""
    with open(os.path.join(helpers.ROOT, "docs", "teacher-configs.md")) as file:
        sections = re.split(r"^## ", file.read(), flags=re.MULTILINE)
    found = {}
    for section in sections:
        heading, *lines = section.splitlines()
        part, _, pipelines = heading.partition(" of ")
        rules = {}
        for line in lines:
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            for field in re.findall(r"`(\w+)`", cells[0]) if line.startswith("|") else ():
                rules[field] = cells[1]
        for pipeline in re.findall(r"\w+Pipeline", pipelines):
            names = DENOISERS if part == "Denoiser" else (part.lower(),)
            name = next(name for name in names if name in configs.PIPELINES[pipeline])
            found[pipeline, name] = found.get((pipeline, name), {}) | rules
    return found


def test_the_documented_table_is_the_codes():
    documented = read_documented_fields()
    for pipeline, parts in configs.PIPELINES.items():
        for name, part in parts.items():
            if not part.fields:
                continue
            rules = documented.pop((pipeline, name))
            assert rules.keys() == part.fields.keys()
            for field, rule in part.fields.items():
                words = rule if isinstance(rule, str) else ", ".join(map(configs.show, rule))
                assert re.match(rf"{re.escape(words)}(\W|$)", rules[field]), (pipeline, name, field)
    assert not documented


def test_every_field_of_the_installed_diffusers_has_its_place():
    """A field that a new diffusers brings is noticed here; until then it is refused."""
    for parts in configs.PIPELINES.values():
        for part in parts.values():
            for name in part.classes if part.fields else ():
                fields = configs.list_fields(configs.find_class(name))
                assert not fields.keys() - part.fields.keys(), name


@pytest.mark.parametrize("name", TEACHERS)
def test_the_known_teachers_are_taken(name):
    """Their real configs, nulls and fields of other schedulers included."""
    known = meta.read_configs(name)
    pipeline = known["pipeline"]
    parts = {"scheduler": "scheduler", common.find_family(pipeline).denoiser_name: "denoiser", "vae": "vae"}
    real = {part: known[key] for part, key in parts.items()}
    classes = {part: configs.find_class(config["_class_name"]) for part, config in real.items()}
    configs.check_configs(name, pipeline, real, classes)


def test_a_plan_refuses_the_same_configs(plain, tmp_path):
    names = ("sdxl: NoSuchScheduler", "beta_schedule of another library", "custom code", "index: a list")
    names += ("scheduler: a list", "epsilon, cosine betas", "sdxl: unet null", "inpainting's channels")
    for odd in ODD:
        if odd.name in names:
            folder = str(shutil.copytree(plain["sdxl"], tmp_path / str(len(os.listdir(tmp_path)))))
            odd.change(folder)
            args = helpers.training_arguments("adm", ["--teacher", folder])
            with pytest.raises(UserError, match=re.escape(odd.expected)):
                meta.make_teacher_on_meta(args, meta.read_configs(folder))


def test_a_config_without_its_class_is_of_the_pipelines_class(plain, tmp_path):
    folder = str(shutil.copytree(plain["sdxl"], tmp_path / "teacher"))
    for file in ("scheduler/scheduler_config.json", "unet/config.json", "vae/config.json"):
        take_out(file, "_class_name")(folder)
    args = helpers.training_arguments("adm", ["--teacher", folder])
    planned = meta.make_teacher_on_meta(args, meta.read_configs(folder))
    assert type(planned.denoiser) is type(helpers.load_teacher(folder, CPU).denoiser)


# Where a teacher is kept ----------------------------------------------------------------------------------


def test_without_network_a_hub_id_is_refused_at_once(monkeypatch):
    """The hub is asked once, and its client's five attempts for each file are not made."""
    asked = []

    class Session:
        def head(self, *args, **options):
            asked.append(args)
            raise ConnectionError

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    hub.is_offline.cache_clear()
    try:
        for name in ("sdxl", "nobody/nothing"):
            with pytest.raises(
                UserError, match="no folder here, nor in the hub's cache, and the hub cannot be"
            ):
                helpers.load_teacher(name, CPU)
        with pytest.raises(UserError, match="'dinov2' could not|dinov2-base' could not .* cannot be reached"):
            common.PixelBackbone("dinov2", CPU, torch.float32)
        with pytest.raises(UserError, match="put it into DIR/nobody/nothing/"):
            weights.find_repository(None, "nobody/nothing", "a.safetensors")
    finally:
        hub.is_offline.cache_clear()
    assert len(asked) == 1


def test_a_teacher_in_the_hubs_cache_is_found_without_network(plain, tmp_path, monkeypatch):
    cache = tmp_path / "models--owner--name"
    shutil.copytree(plain["sdxl"], cache / "snapshots" / "0123456789")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123456789")
    for module in (huggingface_hub.constants, huggingface_hub.file_download.constants):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("diffusers.utils.constants.HF_MODULES_CACHE", str(tmp_path))
    teacher = helpers.load_teacher("owner/name", CPU)
    assert teacher.folder.startswith(str(tmp_path))
    assert teacher.network().conv_in.weight.dtype == torch.float32


def rename_weights(folder, *parts):
    """Gives the weights of these components the variant fp16."""
    for part in parts:
        for name in os.listdir(os.path.join(folder, part)):
            if name.endswith(".safetensors"):
                stem = name.removesuffix(".safetensors")
                path = os.path.join(folder, part, name)
                os.rename(path, os.path.join(folder, part, f"{stem}.fp16.safetensors"))


def test_a_run_remembers_its_teachers_variant(plain, tmp_path, monkeypatch):
    """A teacher of fp16 files, one component without: trained on, found again from another folder by its
    student's meta.json, and exported."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(plain["sdxl"], "teacher")
    rename_weights("teacher", "unet", "text_encoder", "text_encoder_2")
    (tmp_path / "prompts.txt").write_text("a small red circle\n")
    source = ["--teacher", "teacher", "--prompts", "prompts.txt"]
    words = [*source, "--out", "run", *helpers.QUICK, "--iterations", "1"]
    with pytest.raises(UserError, match="only those of --variant fp16"):
        adm.main(words)
    with pytest.raises(UserError, match="no weights of --variant bf16"):
        adm.main([*words, "--variant", "bf16"])
    adm.main([*words, "--variant", "fp16"])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    sample.main(["--student", "../run", "--export", "exported"])
    exported = diffusers.DiffusionPipeline.from_pretrained("exported")
    student = diffusers.UNet2DConditionModel.from_pretrained("../run/step_000001/student")
    assert exported.unet.conv_in.weight.equal(student.conv_in.weight)


def test_a_variant_may_be_of_bin_files(plain, tmp_path):
    folder = str(shutil.copytree(plain["sdxl"], tmp_path / "teacher"))
    weights = os.path.join(folder, "unet", "diffusion_pytorch_model.safetensors")
    state = load_file(weights)
    torch.save(state, weights.replace(".safetensors", ".fp16.bin"))
    os.remove(weights)
    with pytest.raises(UserError, match="only those of --variant fp16"):
        helpers.load_teacher(folder, CPU)
    net = helpers.load_teacher(folder, CPU, variant="fp16").network()
    assert all(weight.equal(state[name].float()) for name, weight in net.state_dict().items())


@pytest.mark.parametrize("name", ["mine.safetensors", "mine.gguf", "models/mine.gguf"])
def test_a_single_file_is_no_teacher(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"there is no teacher '{name}'"):  # and the hub is not asked
        helpers.load_teacher(name, CPU)
    os.makedirs("models")
    (tmp_path / name).write_bytes(b"weights")
    with pytest.raises(UserError, match=f"--teacher {name} is a single file: make a folder"):
        helpers.load_teacher(name, CPU)


def test_libraries_are_quiet_while_a_teacher_is_read(plain, tmp_path, capfd):
    """What they would say of a file that is not there, or has a weight too many, is in our own sentence."""
    folder = str(shutil.copytree(plain["sdxl"], tmp_path / "teacher"))
    path = os.path.join(folder, "text_encoder", "model.safetensors")
    save_file(load_file(path) | {"lm_head.weight": torch.ones(2, 2)}, path, {"format": "pt"})
    helpers.load_teacher(folder, CPU)
    assert capfd.readouterr() == ("", "")
    os.remove(path)
    with pytest.raises(UserError, match="no file named"):
        helpers.load_teacher(folder, CPU)
    assert capfd.readouterr() == ("", "")


def test_pairs_name_their_teacher_by_an_absolute_path(plain, tmp_path, monkeypatch):
    """So that they are found from elsewhere; the same pairs from a moved teacher are the same pairs."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(plain["sdxl"], "teacher")
    (tmp_path / "prompts.txt").write_text("a small red circle\n")
    words = ["--prompts", "prompts.txt", "--out", "pairs", "--count", "1", "--steps", "1"]
    helpers.collect("--teacher", "teacher", *words)
    os.rename("teacher", "moved")
    helpers.collect("--teacher", "moved", *words)
    with open("pairs/index.json") as file:
        assert json.load(file)["teacher"] == str(tmp_path / "moved")


# Sizes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", ((48, 48), (48, 32), (32, 48)))
def test_a_resolution_beyond_sd3s_positions(plain, height, width):
    with pytest.raises(UserError, match=f"--resolution {height}x{width} is too large: .* 32 pixels a side"):
        helpers.load_teacher(plain["sd3"], CPU, resolution=(height, width))


def test_steps_beyond_the_schedule(plain, tmp_path):
    folder = shutil.copytree(plain["sdxl"], tmp_path / "teacher")
    edit(SCHEDULER, timestep_spacing="leading", steps_offset=1)(folder)
    teacher = helpers.load_teacher(str(folder), CPU)
    assert teacher.times(500)[0] == 1000
    with pytest.raises(UserError, match="first of 1000 steps beyond its schedule"):
        teacher.times(1000)


def test_a_unet_without_a_middle_is_tapped_at_its_down_blocks(plain, tmp_path):
    torch.manual_seed(0)
    net = helpers.load_teacher(plain["sdxl"], CPU).denoiser
    folder = str(shutil.copytree(plain["sdxl"], tmp_path / "teacher"))
    type(net).from_config(net.config, mid_block_type=None).save_pretrained(os.path.join(folder, "unet"))
    teacher = helpers.load_teacher(folder, CPU)
    maps = teacher.features(torch.zeros(1, *teacher.latent_shape), torch.ones(1), teacher.null(1))
    assert len(maps) == len(teacher.denoiser.down_blocks)


def test_another_sampler_of_the_pipeline_is_noted(plain, tmp_path, capsys):
    cases = (
        (set_scheduler("PNDMScheduler"), "samples with PNDMScheduler"),
        (
            set_scheduler("EulerDiscreteScheduler", use_karras_sigmas=True),
            "samples with use_karras_sigmas: true",
        ),
        (set_scheduler("EulerDiscreteScheduler"), ""),
    )
    for number, (change, words) in enumerate(cases):
        folder = str(shutil.copytree(plain["sdxl"], tmp_path / str(number)))
        change(folder)
        helpers.load_teacher(folder, CPU)
        said = capsys.readouterr().err
        assert words in said if words else "note:" not in said
    helpers.load_teacher(plain["sd3"], CPU)
    assert "samples with FlowMatchEulerDiscreteScheduler's own levels" in capsys.readouterr().err


# Pixel backbones ------------------------------------------------------------------------------------------


def test_pixel_backbones_of_another_kind(tmp_path, sam_file):
    vit = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    transformers.ViTModel(vit).save_pretrained(tmp_path / "vit")
    dino = transformers.Dinov2Config(hidden_size=8, num_hidden_layers=4, num_attention_heads=2)
    transformers.Dinov2Model(dino).save_pretrained(tmp_path / "dino")
    shutil.copytree(tmp_path / "dino", tmp_path / "truncated")
    os.truncate(tmp_path / "truncated" / "model.safetensors", 3000)
    shutil.copytree(tmp_path / "dino", tmp_path / "layers")
    edit("config.json", num_hidden_layers=5)(tmp_path / "layers")
    os.mkdir(tmp_path / "empty")
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    state = torch.load(sam_file, weights_only=True)
    state["image_encoder.pos_embed"][0, 0, 0, 0] = torch.nan
    torch.save(state, tmp_path / "nan.pth")
    (tmp_path / "code.pth").write_bytes(pickle.dumps(Code()))
    common.PixelBackbone(str(tmp_path / "dino"), CPU, torch.float32)
    for name, words in (
        ("vit", "is a vit; known are SAM and DINOv2"),
        ("truncated", "cannot be loaded"),
        ("layers", "is missing"),
        ("empty", "could not be loaded"),
        ("other.safetensors", "is not a SAM checkpoint"),
        ("nan.pth", "not finite"),
        ("code.pth", "is not a SAM checkpoint"),
        ("nowhere.pth", "there is no SAM checkpoint"),
    ):
        with pytest.raises(UserError, match=words):
            common.PixelBackbone(str(tmp_path / name), CPU, torch.float32)
    with pytest.raises(UserError, match="there is no SAM checkpoint at 'weights/sam.pth'"):
        common.PixelBackbone("weights/sam.pth", CPU, torch.float32)


class Older:
    """A part of a pipeline, as this version of diffusers has it."""

    def __init__(self, shift=1.0, blocks=(1, 2)):
        self.config = {"shift": shift, "blocks": list(blocks), "_class_name": "Older"}


class Newer:
    """The same of a version that knows a field more."""

    def __init__(self, shift=1.0, blocks=(1, 2), novelty=True):
        self.config = {"shift": shift, "blocks": list(blocks), "novelty": novelty, "_class_name": "Newer"}


def test_a_fingerprint_outlives_a_new_field_of_diffusers():
    assert list_settings(Older(3.0)) == list_settings(Newer(3.0)) == {"shift": 3.0}
    assert list_settings(Newer(3.0, novelty=False)) == {"shift": 3.0, "novelty": False}
    assert list_settings(Older(3.0, (1, 3))) == {"shift": 3.0, "blocks": [1, 3]}


def test_a_fingerprint_is_of_the_schedule_too(teacher):
    config = teacher.pipe.scheduler.config
    other = diffusers.DDIMScheduler.from_config(config, prediction_type="v_prediction")
    assert compute_fingerprint(teacher.denoiser, other) != teacher.fingerprint


MACHINES_ERRORS = (
    torch.AcceleratorError("HIP error: no kernel image is available for execution on the device"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    torch.distributed.DistBackendError("NCCL error: unhandled system error"),
    torch.OutOfMemoryError("CUDA out of memory"),
)


@pytest.mark.parametrize("error", MACHINES_ERRORS, ids=[type(error).__name__ for error in MACHINES_ERRORS])
def test_a_broken_machine_is_no_fault_of_the_teachers(teacher_folder, monkeypatch, error):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(common.find_family("StableDiffusionXLPipeline"), "call", fail)
    with pytest.raises(type(error), match=re.escape(str(error))):
        helpers.load_teacher(teacher_folder, helpers.CPU)


@pytest.mark.parametrize("family", ("sd3", "cogvideox", "flux"))
def test_prompts_that_are_too_long_flood_no_log(tmp_path, monkeypatch, family):
    """Their pipelines would tell of each, on every rank."""
    words = ["--teacher", helpers.make_teacher(tmp_path, 0, family), *helpers.size(family)]
    teacher = common.load_teacher_from(helpers.training_arguments("adm", words), helpers.CPU)
    told = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", told.append)
    monkeypatch.setattr(logging.getLogger("diffusers"), "handlers", [handler])
    teacher.encode(["a small red circle " * 200])
    assert not told


def test_a_teacher_is_tried_out_before_it_trains(teacher_folder, monkeypatch):
    def try_out(teacher):
        raise UserError("its parts do not fit together")

    monkeypatch.setattr(common.loading, "try_out", try_out)
    args = helpers.training_arguments("adm", ["--teacher", teacher_folder])
    with pytest.raises(UserError, match="do not fit together"):
        common.load_training_teacher(args, helpers.CPU)
