"""Exports of students: the printed line, the scheduler's times; what cannot be is refused at once."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler

import adm
import common
import evaluate
import helpers
import sample
from support import loading
from support.errors import UserError
from support.export import export, write_line
from support.files import HOST
from support.schedulers import choose_timesteps, make_flow_scheduler
from support.systems import System


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


def test_an_export_removes_what_a_killed_one_left(teacher, tmp_path):
    """Gigabytes, in a folder that ls does not show."""
    nobody = 2**22 + 1  # above the highest number of a process
    (tmp_path / f".writing-{HOST}-{nobody}-x").mkdir()
    export(System(teacher, common.Student(teacher, "teacher", 1), teacher.denoiser), str(tmp_path / "x"))
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


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
    run = helpers.save_checkpoint(tmp_path / "run", teacher, parametrisation, steps)
    monkeypatch.setattr(common, "load_student", None)
    with pytest.raises(UserError, match=sentence):
        sample.main(["--student", run, "--export", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_an_export_needs_no_room_for_all_parts_at_once(teacher, tmp_path, monkeypatch):
    run = helpers.save_checkpoint(tmp_path / "run", teacher, "teacher", 1)
    place, asked = loading.place, []

    def watch(teacher, in_turn):
        asked.append(in_turn)
        return place(teacher, in_turn)

    monkeypatch.setattr(loading, "place", watch)
    sample.main(["--student", run, "--export", str(tmp_path / "new")])
    assert asked == [True]


@pytest.mark.parametrize("steps, is_told", ((2, True), (1, False)))
def test_what_diffusers_cannot_do_is_said_before_it_is_trained(
    teacher, teacher_folder, prompts_file, tmp_path, capsys, steps, is_told
):
    start = helpers.save_checkpoint(tmp_path / "start", teacher, "velocity", 1)
    words = f"--teacher {teacher_folder} --prompts {prompts_file} --loss dmd --init {start} --steps {steps}"
    adm.main([*helpers.QUICK, *words.split(), "--out", str(tmp_path / "run")])
    assert ("will draw this student, and not export it" in capsys.readouterr().err) == is_told


# Folders --------------------------------------------------------------------------------------------------

PATHS = (
    ("empty", "is there already"),
    ("empty/", "is there already"),
    ("empty/../empty//", "is there already"),
    ("file", "is there already"),
    ("file/", "is there already"),
    ("link", "is there already"),  # to nowhere
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
    monkeypatch.setattr(common, "load_teacher_from", None)
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


def test_an_exported_pipeline_has_its_teachers_switches(tmp_path):
    """SDXL's class would have zeros for an empty prompt."""
    folder = helpers.make_teacher(tmp_path / "teacher", 0)
    path = tmp_path / "teacher/model_index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {"force_zeros_for_empty_prompt": False}))
    teacher = helpers.load_teacher(folder, torch.device("cpu"))
    run = helpers.save_checkpoint(tmp_path / "step_000001", teacher)
    sample.main(["--student", run, "--export", str(tmp_path / "exported")])
    exported = json.loads((tmp_path / "exported/model_index.json").read_text())
    assert exported["force_zeros_for_empty_prompt"] is False
