"""Exported students: the printed line draws what sample.py draws; what cannot be is refused at once."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler

import common
import evaluate
import sample
from support.checkpoints import describe_files
from support.errors import UserError
from support.export import export, write_line
from support.files import write_json, write_sealed
from support.media import to_image
from support.rows import Rows
from support.schedulers import choose_timesteps, make_flow_scheduler
from support.systems import System
from tiny import train

CPU = torch.device("cpu")
PROMPT = "a red circle"


def save_checkpoint(folder, teacher, parametrisation="teacher", steps=1, **meta):
    """A step folder as training leaves it, of a student with the teacher's own weights -> its path."""
    teacher.denoiser.save_pretrained(os.path.join(folder, "student"))
    os.makedirs(os.path.join(folder, "state"), exist_ok=True)
    meta = {"resolution": teacher.resolution, "frames": teacher.frames, **meta}
    meta |= {"teacher": teacher.path, "fingerprint": teacher.fingerprint, "step": 1, "stage": "adm"}
    arguments = {"student_guidance": 2.0} if teacher.embeds_guidance else {}
    meta |= {"parametrisation": parametrisation, "steps": steps, "arguments": arguments}
    write_sealed(os.path.join(folder, "meta.json"), meta | {"files": describe_files(folder)})
    return str(folder)


# The printed line -----------------------------------------------------------------------------------------

CASES = {  # the exported folder's name: (family, parametrisation, steps, precision, resolution, frames)
    "plain": ("sdxl", "teacher", 1, "fp32", (32, 32), None),
    "with spaces": ("sdxl", "teacher", 38, "fp32", (48, 32), None),  # LCMScheduler's own times are others
    'double "quote"': ("sdxl", "velocity", 1, "bf16", (32, 48), None),
    "it's": ("sdxl", "teacher", 4, "bf16", (32, 32), None),
    "back\\slash\\n": ("sd3", "teacher", 4, "fp32", (24, 32), None),
    "{braces}": ("sd3", "velocity", 4, "bf16", (32, 24), None),
    "new\nline": ("cogvideox", "teacher", 8, "fp32", (32, 24), 17),
    "Zürich": ("cogvideox", "velocity", 1, "fp32", (32, 32), 9),
    "sub/folder.v1": ("cogvideox", "teacher", 4, "bf16", (24, 32), 9),
    "sd": ("stable-diffusion", "teacher", 2, "fp32", (32, 48), None),
    "wan": ("wan", "teacher", 2, "fp32", (32, 48), 5),
    "wan, velocity": ("wan", "velocity", 1, "fp32", (32, 32), 5),
    "z-image": ("z-image", "teacher", 2, "fp32", (48, 32), None),
    "qwen-image": ("qwen-image", "teacher", 2, "fp32", (32, 48), None),
    "flux": ("flux", "teacher", 2, "fp32", (48, 32), None),
}
READER = """
import importlib, json, sys, numpy, safetensors.torch
print_line = "import torch; from diffusers import DiffusionPipeline"
exec(print_line)
torch.set_num_threads(1)
names = ("schedulers.scheduling_lcm", "schedulers.scheduling_flow_match_euler_discrete",
    "pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl", "pipelines.cogvideo.pipeline_cogvideox",
    "pipelines.stable_diffusion_3.pipeline_stable_diffusion_3", "pipelines.wan.pipeline_wan",
    "pipelines.stable_diffusion.pipeline_stable_diffusion", "pipelines.z_image.pipeline_z_image",
    "pipelines.qwenimage.pipeline_qwenimage", "pipelines.flux.pipeline_flux")
for name in names:  # the noise that the student had; the flow scheduler multiplies one more by zero
    module = importlib.import_module(f"diffusers.{name}")
    module.randn_tensor = lambda shape, dtype=None, **_: next(noise, torch.zeros(shape)).to(dtype).view(shape)
prompt = "a red circle"
for i, line in enumerate(json.load(open("lines.json"))):
    tensors = safetensors.torch.load_file(f"{i}.noise")
    noise = iter([tensors[str(k)] for k in range(len(tensors))])
    drawn = eval(line)
    pictures = drawn.frames[0] if "num_frames" in line else drawn.images
    pixels = numpy.stack([numpy.array(picture) for picture in pictures])
    if pixels.dtype != numpy.uint8:  # of Wan they are numbers from 0 to 1
        pixels = (255 * pixels).round()
    numpy.save(f"{i}.npy", pixels)
"""


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """{family: folder of a random pipeline}; SD3 without T5, as many are kept."""
    folders = {}
    for family, description in train.FAMILIES.items():
        torch.manual_seed(0)
        pipe = description["build"]()
        if family == "sd3":
            pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
        folders[family] = str(tmp_path_factory.mktemp("teachers") / family)
        pipe.save_pretrained(folders[family])
    return folders


class Recorded(Rows):
    """Rows that remember what noise they gave."""

    given = ()

    def normal(self, *shape):
        noise = super().normal(*shape)
        self.given = [*self.given, noise]
        return noise


def draw_student(system):
    """The student's own sample -> (8-bit pictures [F, H, W, 3], the noise that it took)."""
    teacher = system.teacher
    rows = Recorded([0], ("test", 7), CPU)
    latents = system.student.sample(system.net, rows, teacher.encode([PROMPT]))
    pixels = teacher.decode(latents)[0].clamp(-1, 1)
    frames = pixels.unbind(1) if teacher.video else [pixels]
    given = [teacher.pack(noise) for noise in rows.given]
    if teacher.packing > 1:
        given[0] = rows.given[0]  # the pipeline packs it itself
    return np.stack([np.array(to_image(frame)) for frame in frames]), given


def test_the_printed_lines_draw_the_students_pictures(teachers, tmp_path, capsys, monkeypatch):
    """Run as they are printed, all in one fresh process, elsewhere: exact in fp32, close in bf16."""
    from safetensors.torch import save_file

    def watch(system, folder, card):
        systems.append(system)
        export(system, folder, card)

    systems, lines, expected = [], [], []
    monkeypatch.setattr(sample, "export", watch)
    for i, (name, case) in enumerate(CASES.items()):
        family, parametrisation, steps, precision, resolution, frames = case
        teacher = common.load_teacher(teachers[family], CPU, torch.float32, resolution, frames)
        run = save_checkpoint(tmp_path / f"run{i}", teacher, parametrisation, steps)
        folder = str(tmp_path / "exported" / name)
        sample.main(["--student", run, "--export", f"{folder}/", "--precision", precision])
        printed = capsys.readouterr().out.splitlines()
        assert printed[-2] == "import torch; from diffusers import DiffusionPipeline"
        lines.append(printed[-1])
        pictures, noise = draw_student(systems[-1])
        expected.append(pictures)
        save_file({str(k): n.contiguous() for k, n in enumerate(noise)}, tmp_path / f"{i}.noise")

    write_json(tmp_path / "lines.json", lines)
    command = [sys.executable, "-c", READER]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    for i, (name, case) in enumerate(CASES.items()):
        theirs = np.load(tmp_path / f"{i}.npy").astype(int)
        assert theirs.shape == expected[i].shape, name
        difference = np.abs(theirs - expected[i])
        assert difference.max() <= (1 if case[3] == "fp32" else 16), name
        assert difference.mean() < 2, name
        assert expected[i].std() > 5, name


def test_an_export_marks_no_picture(teacher, tmp_path, monkeypatch):
    """Where invisible-watermark is installed SDXL's pipeline would change the picture."""
    from diffusers.pipelines.stable_diffusion_xl import pipeline_stable_diffusion_xl

    class Watermark:
        pass

    monkeypatch.setattr(pipeline_stable_diffusion_xl, "is_invisible_watermark_available", lambda: True)
    monkeypatch.setattr(
        pipeline_stable_diffusion_xl, "StableDiffusionXLWatermarker", Watermark, raising=False
    )
    export(System(teacher, common.Student(teacher, "teacher", 1), teacher.denoiser), str(tmp_path / "x"))
    assert DiffusionPipeline.from_pretrained(str(tmp_path / "x")).watermark is None


def test_the_line_of_a_gpu_draws_on_it(teacher, monkeypatch):
    monkeypatch.setattr(teacher, "device", torch.device("cuda", 1))
    monkeypatch.setattr(teacher, "dtype", torch.bfloat16)
    student = common.Student(teacher, "velocity", 1)
    line = write_line(System(teacher, student, teacher.denoiser), "/a")
    assert ', dtype=torch.bfloat16).to("cuda")(prompt,' in line


# Times ----------------------------------------------------------------------------------------------------


def test_every_number_of_steps_has_its_times_from_lcm(teacher):
    """What the pipeline passes on, `timesteps` or a number of steps, gives the student's own times."""
    scheduler = LCMScheduler.from_config(common.Student(teacher, "teacher", 1).scheduler().config)
    told = []
    for steps in range(1, 1000):
        student = common.Student(teacher, "teacher", steps)
        timesteps = choose_timesteps(scheduler, student.times)
        if timesteps:
            told.append(steps)
            scheduler.set_timesteps(timesteps=timesteps)
        else:
            scheduler.set_timesteps(steps)
        wanted = teacher.timestep(torch.tensor(student.times))
        assert scheduler.timesteps.tolist() == wanted.tolist()
    assert {38, 76, 122} < set(told)
    assert len(told) < 100


@pytest.mark.parametrize("shift", (1.0, 3.0))
def test_every_number_of_steps_has_its_noise_levels_from_flow(shift):
    for steps in range(1, 1001):
        u = 1 - torch.arange(steps, dtype=torch.float64) / steps
        sigmas = shift * u / (1 + (shift - 1) * u)
        scheduler = make_flow_scheduler(sigmas.tolist())
        mu = {"mu": scheduler.config.base_shift} if scheduler.config.use_dynamic_shifting else {}
        scheduler.set_timesteps(steps, **mu)
        torch.testing.assert_close(scheduler.sigmas[:-1], sigmas.float(), atol=1e-7, rtol=0)


IMPOSSIBLE = (
    ("teacher", 1000, "a student of 1000 steps cannot be exported"),
    ("velocity", 2, "no diffusers scheduler samples as a velocity student of several steps"),
)


@pytest.mark.parametrize("parametrisation, steps, sentence", IMPOSSIBLE)
def test_what_diffusers_cannot_do_is_refused_before_the_weights_load(
    teacher, tmp_path, monkeypatch, parametrisation, steps, sentence
):
    run = save_checkpoint(tmp_path / "run", teacher, parametrisation, steps)
    monkeypatch.setattr(common, "load_student", None)
    with pytest.raises(UserError, match=sentence):
        sample.main(["--student", run, "--export", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


# Folders --------------------------------------------------------------------------------------------------

PATHS = (
    ("empty", "is there already"),
    ("empty/", "is there already"),
    ("empty/../empty//", "is there already"),
    ("file", "is there already"),
    ("file/", "is there already"),
    ("link", "is there already"),  # to nowhere
    ("", "is there already"),  # the working directory
    (".", "is there already"),
    ("file/new", "file is no folder"),
    ("file/new/newer/", "file is no folder"),
    ("x" * 250, "File name too long"),  # with what write_atomically adds
    ("new/" + "x" * 300, "File name too long"),
    ("/proc/new", "cannot be written"),
    ("bytes\udcff", "cannot be written"),
)


@pytest.mark.parametrize("path, sentence", PATHS)
def test_folders_that_cannot_be_written_are_refused_before_anything_loads(
    tmp_path, monkeypatch, path, sentence
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "load_teacher_of_students", None)
    before = list(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=sentence):
        sample.main(["--student", "run", "--export", path])
    assert list(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("path", ("file", "file/new", "x" * 300, "/proc/new"))
@pytest.mark.parametrize("words", ("--out {}", "--out o --json {}/x", "--out o --grid {}/x.png"))
def test_so_are_folders_for_results(tmp_path, monkeypatch, path, words):
    for name in ("file", "prompts.txt"):
        (tmp_path / name).write_text("x")
    monkeypatch.chdir(tmp_path)
    words = [word.format(path) for word in words.split()]
    with pytest.raises(UserError, match="cannot be"):
        evaluate.main(["--student", "run", "--prompts", "prompts.txt", *words])
    if len(words) == 2:
        with pytest.raises(UserError, match="cannot be"):
            sample.parse_arguments(["--student", "run", "--prompt", "x", *words])
    assert len(list(tmp_path.iterdir())) == 2
