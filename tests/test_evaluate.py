"""The command: its defaults and refusals, its files for any number of processes, its page."""

import argparse
import html.parser
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from forks import SCRIPTS, Command
from PIL import Image

import common
import evaluate
import helpers
from metrics.images import Images
from metrics.oracle import Oracle
from metrics.page import save_page
from metrics.preference import PickScore
from metrics.scorer import Scorer, read_pixels
from metrics.systems import find_images
from support import files
from support.errors import UserError
from support.inputs import fill_from_students
from support.loading import list_networks, place
from support.media import save_grid
from support.offload import InTurn, decode_in_tiles
from support.systems import System
from tiny import shapes, train


def test_an_image_depends_on_its_number_and_seed_alone(teacher):
    system = System(teacher, steps=2, guidance=3.0)
    prompts = ["a red shape", "a small circle", "a square"]
    together = system.images(prompts, range(3), [5])
    alone = torch.cat([system.images([prompt], [i], [5]) for i, prompt in enumerate(prompts)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    assert (system.images(prompts, range(3), [6]) - together).abs().max() > 0.1


def test_with_offload_components_take_turns_on_the_device(teacher_folder, monkeypatch):
    """The same images, and of the conditions no more than a batch's."""
    prompts = ["a red shape", "a small circle"]
    wanted = System(helpers.load_teacher(teacher_folder, helpers.CPU), steps=2, guidance=3.0)
    teacher = common.open_teacher(teacher_folder, helpers.CPU)
    on, seen = set(), []
    for name, module in list_networks(teacher.pipe).items():

        def move(place, name=name, module=module):
            (on.discard if place == "cpu" else on.add)(name)
            seen.append(set(on))
            return module

        monkeypatch.setattr(module, "to", move)
    place(teacher, in_turn=True)
    system = System(teacher, steps=2, guidance=3.0)
    drawn = []
    with system.on_device():
        for prompt in prompts:
            drawn.append(system.images([prompt], [0], [5, 6]))
            assert len(teacher.offload.conditions) == 1
    assert torch.cat(drawn).equal(torch.cat([wanted.images([prompt], [0], [5, 6]) for prompt in prompts]))
    turns = ({"text_encoder", "text_encoder_2"}, {"unet"}, {"vae"})
    assert all(any(some <= turn for turn in turns) for some in seen)
    assert all(turn in seen for turn in turns)
    assert not on


@pytest.mark.parametrize("frames, height, width, tiles", ((49, 480, 720, True), (9, 32, 32, False)))
def test_large_videos_are_decoded_in_tiles(frames, height, width, tiles):
    """Tiny ones would be of another size."""
    vae = AutoencoderKLCogVideoX(block_out_channels=(32,) * 4, norm_num_groups=32)
    teacher = SimpleNamespace(video=True, frames=frames, resolution=[height, width])
    teacher.pipe = SimpleNamespace(vae=vae)
    decode_in_tiles(teacher)
    assert vae.use_tiling == tiles


COMMANDS = {
    "collect_ode": "--count 2 --steps 1",
    "sample": "--prompts prompts.txt --steps 1",
    "evaluate": "--prompts prompts.txt --steps 1 --seeds 1 --batch 2",
}


@pytest.mark.parametrize("script", COMMANDS)
def test_every_command_that_draws_has_offload(script, teacher_folder, prompts_file, tmp_path, monkeypatch):
    """What it writes is the same."""
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(prompts_file, "prompts.txt")
    words = ["--teacher", teacher_folder, "--prompts", "prompts.txt", *COMMANDS[script].split()]
    visits = []
    at_work = InTurn.at_work
    monkeypatch.setattr(InTurn, "at_work", lambda self, net: visits.append(net) or at_work(self, net))
    snapshots = []
    for folder, options in (("before", []), ("after", ["--offload"])):
        SCRIPTS[script].main([*words, "--out", folder, *options])
        snapshot = helpers.take_snapshot(folder)
        snapshots.append({os.path.relpath(path, folder): digest for path, digest in snapshot.items()})
        assert bool(visits) == bool(options)
    kept = [name for name in snapshots[0] if name.endswith((".png", ".safetensors"))]
    assert kept
    assert all(snapshots[0][name] == snapshots[1][name] for name in kept)


class Network:
    """Stands in for one, and knows where it is."""

    place = "cpu"

    def to(self, place):
        self.place = place


def test_of_several_systems_only_the_one_that_draws_is_on_the_device(tmp_path, monkeypatch):
    """A student of Qwen-Image alone takes 41 GB."""
    shown = SimpleNamespace(frames=None, fps=None, resolution=(8, 8), count_passes=lambda scale: 1)
    teacher = SimpleNamespace(device="gpu", denoiser=Network(), offload=None, **vars(shown))
    students = [Network(), Network()]
    systems = [System(teacher, steps=1, guidance=1)]
    systems += [System(teacher, SimpleNamespace(steps=1), net, guidance=1) for net in students]
    networks = [teacher.denoiser, *students]
    seen = []

    def draw(system, prompts, numbers, seeds):
        seen.append([net.place for net in networks])
        return torch.zeros(len(prompts), 1, 3, 8, 8)

    monkeypatch.setattr(System, "images", draw)
    for i, system in enumerate(systems):
        folder = str(tmp_path / str(i))
        images = Images(str(i), folder, [[f"{folder}/0000-0.png"]], {}, system)
        images.prepare_folder()
        assert images.draw(["a square"], range(1), batch=1) > 0
        assert images.draw(["a square"], range(1), batch=1) is None
    assert seen == [["gpu", "cpu", "cpu"], ["cpu", "gpu", "cpu"], ["cpu", "cpu", "gpu"]]
    assert {net.place for net in networks} == {"cpu"}


WRONG = [
    (["--metrics", "beauty"], "no metric 'beauty'"),
    (["--metrics", "lpips", "--seeds", "1"], "--seeds 2"),
    (["--student", "x=/nowhere"], "no checkpoint"),
]


@pytest.mark.parametrize("arguments, sentence", WRONG)
def test_wrong_requests(teacher_folder, tmp_path, arguments, sentence):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red shape\n")
    with pytest.raises(UserError, match=sentence):
        evaluate.main(["--teacher", teacher_folder, "--prompts", str(prompts), *arguments])


def test_the_oracle_refuses_prompts_of_another_world(teacher_folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a lighthouse in a storm\n")
    with pytest.raises(UserError, match="lighthouse"):
        evaluate.main(["--teacher", teacher_folder, "--prompts", str(prompts)])


WANTED = {
    "clip": "open_clip_model.safetensors",
    "pick": "tokenizer.json",
    "hpsv2": "HPS_v2_compressed.pt",
    "mps": "MPS_overall.safetensors",
    "lpips": "alexnet-owt-7be5be79.pth",
    "fid": "weights-inception-2015-12-05-6726825d.pth",
}


@pytest.mark.parametrize("metric", WANTED)
def test_a_missing_weight_is_named(tmp_path, monkeypatch, metric):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    base = tmp_path / "weights" / PickScore.BASE
    base.mkdir(parents=True)
    for file in ("config.json", "preprocessor_config.json"):
        (base / file).write_text("{}")
    Image.new("RGB", (32, 32)).save(tmp_path / "0.png")
    Image.new("RGB", (32, 32)).save(tmp_path / "1.png")
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    arguments = ["--images", f"x={tmp_path}", "--images", f"y={tmp_path}"]
    arguments += ["--prompts", str(tmp_path / "prompts.txt")]
    with pytest.raises(UserError) as error:
        evaluate.main([*arguments, "--metrics", metric, "--weights-dir", str(tmp_path / "weights")])
    message = str(error.value)
    assert WANTED[metric] in message
    assert f"{tmp_path}/weights" in message
    assert "\n" not in message


@pytest.fixture
def prompts_path(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(shapes.split_prompts()[2][:9]) + "\n")
    return str(tmp_path / "prompts.txt")


def make_command(teacher_folder, prompts_path, out):
    teacher = ["--teacher", teacher_folder, "--steps", "1", "--guidance", "1", "--batch", "4"]
    metrics = ["--metrics", "oracle,lpips", "--lpips-net", "random", "--lpips-size", "64", "--workers", "0"]
    return [*teacher, *metrics, "--prompts", prompts_path, "--seeds", "8", "--out", str(out)]


def read_results(folder):
    """What any repetition has to reproduce, {path: bytes}."""
    results = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".jsonl", ".safetensors", ".md") or path.parent.name == "pictures":
            results[str(path.relative_to(folder))] = path.read_bytes()
    return results


@pytest.mark.slow
def test_two_processes_and_an_interruption(teacher_folder, prompts_path, tmp_path, monkeypatch):
    """One process, two processes, and one that is stopped while it draws and again while it scores: the same
    bytes, and nothing twice."""
    evaluate.main(make_command(teacher_folder, prompts_path, tmp_path / "one"))
    expected = read_results(tmp_path / "one")
    assert sum(name.endswith(".png") for name in expected) == 72
    assert sum(name.endswith(".safetensors") for name in expected) == 4
    lines = [json.loads(line) for line in expected["teacher/scores.jsonl"].splitlines()]
    assert len(lines) == 72
    assert lines[-1]["prompt"] == 8
    assert lines[-1]["file"] == "0008-7.png"
    assert {"accuracy", "lpips_random"} <= set(lines[-1])

    words = make_command(teacher_folder, prompts_path, tmp_path / "two")
    two = Command("evaluate", words, ranks=2).run(tmp_path)
    assert not any(two.codes.values()), two.read()
    assert read_results(tmp_path / "two") == expected

    class Stop(BaseException):
        pass

    def count(original, calls, allowed):
        """`original`, which adds its arguments to `calls`, and stops where these are more than allowed."""

        def call(self, *args):
            calls.append(args)
            if len(calls) > allowed:
                raise Stop
            return original(self, *args)

        return call

    words = make_command(teacher_folder, prompts_path, tmp_path / "stopped")
    draw, judge, drawings, scorings = System.images, Oracle.score, [], []
    for allowed_drawings, allowed_scorings in ((5, 9), (99, 1)):
        monkeypatch.setattr(System, "images", count(draw, drawings, allowed_drawings))
        monkeypatch.setattr(Oracle, "score", count(judge, scorings, allowed_scorings))
        with pytest.raises(Stop):
            evaluate.main(words)
    monkeypatch.setattr(Oracle, "score", count(judge, scorings, 99))
    evaluate.main(words)
    assert read_results(tmp_path / "stopped") == expected
    assert len(drawings) == 3 * 8 + 1  # each once, but the ones that were stopped
    assert len(scorings) == 2 + 1

    with pytest.raises(UserError, match=r"its seeds\[0\] is 0, not 1"):
        evaluate.main([*make_command(teacher_folder, prompts_path, tmp_path / "one"), "--seed", "1"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Perfect images of three prompts, and images that show the wrong thing for the last two; 2 of each."""
    place = tmp_path_factory.mktemp("folders")
    prompts = ["a red circle", "a blue square on a white background", "a large green triangle"]
    (place / "prompts.txt").write_text("\n".join(prompts) + "\n")
    centre = np.array([(15.0, 16.0), (17.0, 16.0)])
    for name, colours in (("good", (0, 2, 1)), ("bad", (0, 1, 0))):
        (place / name).mkdir()
        for p, (colour, shape, background) in enumerate(zip(colours, (0, 1, 2), (0, 2, 1))):
            scene = {"size": 1, "colour": colour, "shape": shape, "background": background}
            scene = {attribute: np.array([value] * 2) for attribute, value in scene.items()}
            for k, pixels in enumerate(torch.from_numpy(shapes.render(scene, centre))):
                save_grid(pixels[None], str(place / name / f"{p:04d}-{k}.png"), padding=0)
    shutil.copy(place / "good/0000-0.png", place / "good/grid.png")  # as sample.py leaves one
    systems = ["--images", f"good={place}/good", "--images", f"bad={place}/bad"]
    options = ["--metrics", "oracle", "--out", str(place / "out"), "--side-by-side", "good", "bad"]
    evaluate.main([*systems, "--prompts", str(place / "prompts.txt"), *options])
    return place


def test_folders_of_images(folders):
    good, bad = json.loads((folders / "out/report.json").read_text())["rows"]
    assert good["accuracy"] == 1
    assert good["ci"]["accuracy"] == [1, 1]
    assert good["samples"] == 6
    assert good["steps"] is None
    assert bad["accuracy"] == pytest.approx(1 / 3, abs=1e-4)
    assert bad["ci"]["accuracy"] == [0, 1]
    lines = [json.loads(line) for line in (folders / "out/bad/scores.jsonl").read_text().splitlines()]
    assert [line["accuracy"] for line in lines] == [1, 1, 0, 0, 0, 0]
    assert [(line["prompt"], line["file"]) for line in lines[1:3]] == [(0, "0000-1.png"), (1, "0001-0.png")]
    assert "paper" not in (folders / "out/table.md").read_text()
    plots = ["bars.png", "differences.png", "grid.png", "best-and-worst-good.png", "best-and-worst-bad.png"]
    for name in plots:
        with Image.open(folders / "out" / name) as image:
            assert min(image.size) > 50
            assert len(image.convert("RGB").getcolors(1 << 24)) > 3


def test_variety_is_compared_with_the_references(folders, tmp_path):
    """Whichever system that is."""
    systems = ["--images", f"good={folders}/good", "--images", f"bad={folders}/bad", "--workers", "0"]
    words = ["--prompts", str(folders / "prompts.txt"), "--metrics", "oracle", "--reference", "bad"]
    evaluate.main([*systems, *words, "--json", str(tmp_path / "report.json")])
    good, bad = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert bad["tv"] == bad["tv_uniform"]
    assert good["tv"] != good["tv_uniform"]


def test_a_folder_that_is_no_system_is_what_fid_compares_with(folders, tmp_path, monkeypatch):
    """By a scorer in its place, which gives the reference's mean grey."""

    class MeanGrey(Scorer):
        def __init__(self, args, prompts, video):
            pass

        def prepare(self, image):
            return read_pixels(image)

        def score(self, pixels, prompts):
            return {"grey": pixels.flatten(2).mean(2).flatten().numpy()}

        def result(self, scores, reference):
            return {"fid": float(np.mean([part["grey"].mean() for part in reference]))}

    monkeypatch.setitem(evaluate.SCORERS, "fid", MeanGrey)
    monkeypatch.setattr(evaluate, "check_packages", lambda metric: None)
    (tmp_path / "white").mkdir()
    Image.new("RGB", (32, 32), "white").save(tmp_path / "white/0.png")
    words = ["--images", f"x={folders}/good", "--prompts", str(folders / "prompts.txt"), "--workers", "0"]
    words += ["--metrics", "fid", "--reference", str(tmp_path / "white"), "--out", str(tmp_path / "out")]
    evaluate.main(words)
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["rows"][0]["fid"] == 1
    assert report["reference"] == str(tmp_path / "white")


NOT_FOLDERS = [
    (["--images", "x=/nowhere"], "no folder of images '/nowhere'"),
    (["--images", "x=GOOD", "--images", "x=BAD"], "two systems called 'x'"),
    (["--images", "a/b=GOOD"], "'a/b' cannot be a system's name"),
    (["--images", "x=GOOD", "--reference", "y"], "--reference 'y' is none of the systems x"),
    (["--images", "x=GOOD", "--side-by-side", "x", "y"], "--side-by-side 'y'"),
    (["--images", "x=GOOD", "--metrics", "vbench", "--out", "/tmp"], "VBench_full_info.json"),
    (["--images", "x=GOOD", "--metrics", "vbench", "--out", "/tmp/a b"], "gives '/tmp/a b' to a shell"),
    (["--images", "x=GOOD", "--metrics", "fid"], "give --reference a folder"),
    (
        ["--images", "x=GOOD", "--metrics", "oracle", "--reference", "BAD"],
        "only --metrics fid takes a folder",
    ),
    (["--images", "x=GOOD", "--weights-dir", "/nowhere"], "there is no folder --weights-dir '/nowhere'"),
    (["--images", "x=GOOD", "--metrics", "vbench"], "give --out"),
    (["--images", "x=GOOD", "--images", "y=BAD", "--side-by-side", "x", "y"], "give --out"),
    # before a teacher is read: there is none
    (["--teacher", "none", "--images", "x=/nowhere"], "no folder of images '/nowhere'"),
    (["--teacher", "none", "--metrics", "lpips", "--seeds", "1"], "give --seeds 2 or more"),
    ([], "give a --teacher, a --student, --images"),
]


@pytest.mark.parametrize("arguments, sentence", NOT_FOLDERS)
def test_wrong_folders(folders, arguments, sentence):
    places = {"GOOD": f"{folders}/good", "BAD": f"{folders}/bad"}
    words = [re.sub("GOOD|BAD", lambda match: places[match[0]], word) for word in arguments]
    with pytest.raises(UserError, match=re.escape(sentence)):
        evaluate.main(["--prompts", str(folders / "prompts.txt"), *words])


def test_a_students_variant_is_recalled_with_its_teacher(monkeypatch, tmp_path):
    meta = {"teacher": str(tmp_path), "variant": "fp16", "resolution": [8, 8]}
    monkeypatch.setattr("support.inputs.find_checkpoint", lambda student: (student, meta))
    for teacher, variant in ((None, "fp16"), (f"{tmp_path}/.", "fp16"), ("sdxl", None)):
        args = argparse.Namespace(
            teacher=teacher, variant=None, teacher_lora=None, resolution=None, frames=None
        )
        fill_from_students(args, ["run"])
        assert args.variant == variant, teacher


def test_several_processes_need_a_folder_that_they_share(folders, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: pytest.fail("the work began"))
    with pytest.raises(UserError, match="several processes, .* need a folder for the results: give --out"):
        evaluate.main(["--prompts", str(folders / "prompts.txt"), "--images", f"x={folders}/good"])


def test_students_of_two_sizes_are_drawn_at_a_chosen_one(tmp_path):
    teacher = helpers.load_teacher(helpers.make_teacher(tmp_path / "teacher", 0), torch.device("cpu"))
    students = [helpers.save_checkpoint(tmp_path / "small", teacher)]
    teacher.resolution = [64, 64]
    students.append(helpers.save_checkpoint(tmp_path / "large", teacher))
    args = argparse.Namespace(teacher=None, variant=None, teacher_lora=None, resolution=None, frames=None)
    with pytest.raises(UserError, match="another resolution each .*64, 64.*: choose with --resolution"):
        fill_from_students(args, students)
    args.resolution = (32, 32)
    fill_from_students(args, students)
    assert (args.teacher, args.resolution) == (str(tmp_path / "teacher"), (32, 32))
    args.resolution = None
    fill_from_students(args, students[1:])
    assert args.resolution == [64, 64]


def test_pictures_beside_a_teacher_of_videos(folders, tmp_path):
    teacher = helpers.make_teacher(tmp_path / "teacher", 0, "cogvideox")
    words = ["--teacher", teacher, "--images", f"x={folders}/good", "--prompts", str(folders / "prompts.txt")]
    with pytest.raises(UserError, match="--images are single pictures, and .*teacher makes videos"):
        evaluate.main([*words, *helpers.size("cogvideox"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_wrong_number_of_images(folders):
    (folders / "five.txt").write_text("a red circle\n" * 5)
    with pytest.raises(UserError, match="6 images, which is no multiple of the 5 prompts"):
        evaluate.main(["--prompts", str(folders / "five.txt"), "--images", f"x={folders}/good"])


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_broken_image_is_named(folders, tmp_path, workers):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/0.png").write_bytes((folders / "good/0000-0.png").read_bytes()[:60])
    (tmp_path / "one.txt").write_text("a red circle\n")
    arguments = ["--images", f"{tmp_path}/broken", "--prompts", str(tmp_path / "one.txt")]
    with pytest.raises(UserError, match=r"^the image .*broken/0\.png cannot be read: [^\n]*truncated$"):
        evaluate.main([*arguments, "--metrics", "oracle", "--workers", workers])


class Zero(Scorer):
    """A scorer that needs no weights."""

    def __init__(self, args, prompts, video):
        pass

    def prepare(self, image):
        return torch.zeros(1)

    def score(self, prepared, prompts):
        return {"zero": np.zeros(prepared.shape[0] * prepared.shape[1])}


def test_scores_of_other_weights_are_not_used_again(folders, tmp_path, monkeypatch):
    """A file that was replaced, or was converted wrongly and then rightly: its name stays the same."""
    made = []  # the weight of each score that was computed

    class Weighed(Zero):
        def __init__(self, args, prompts, video):
            self.model = torch.nn.Linear(1, 1, bias=False)
            torch.nn.init.constant_(self.model.weight, float(args.clip_prefix))

        def score(self, prepared, prompts):
            made.append(self.model.weight.item())
            return super().score(prepared, prompts)

    monkeypatch.setitem(evaluate.SCORERS, "clip", Weighed)
    words = ["--images", f"{folders}/good", "--prompts", str(folders / "prompts.txt"), "--workers", "0"]
    for weight in ("1", "1", "2", "1"):
        own = ["--metrics", "clip", "--clip-prefix", weight, "--out", str(tmp_path / "out")]
        evaluate.main([*words, *own])
    assert made == [1, 2]


def test_the_metric_that_fits_is_the_default(teacher_folder, prompts_path, folders, tmp_path, monkeypatch):
    """oracle for the tiny teachers, vbench for VBench's prompts; clip for other teachers and images alone."""
    monkeypatch.setitem(evaluate.SCORERS, "clip", Zero)

    def measure(*arguments):
        evaluate.main([*arguments, "--workers", "0", "--json", str(tmp_path / "report.json")])
        return list(json.loads((tmp_path / "report.json").read_text())["metrics"])

    teacher = ["--teacher", teacher_folder, "--steps", "1", "--guidance", "1", "--seeds", "1"]
    teacher += ["--prompts", prompts_path]
    assert measure(*teacher) == ["oracle"]
    assert measure("--images", f"{folders}/good", "--prompts", str(folders / "prompts.txt")) == ["clip"]
    monkeypatch.setattr(evaluate, "has_closed_vocabulary", lambda tokenizer: False)
    assert measure(*teacher) == ["clip"]

    info = tmp_path / "any.json"
    info.write_text(json.dumps([{"prompt_en": "a red circle", "dimension": ["color"]}]))
    with pytest.raises(UserError, match="the metric vbench is for videos, not for images"):
        evaluate.main(["--images", f"{folders}/good", "--prompts", str(info), "--out", str(tmp_path / "out")])
    info.write_text(json.dumps([{"prompt": line} for line in ("a red circle", "a square", "a triangle")]))
    assert measure("--images", f"{folders}/good", "--prompts", str(info)) == ["clip"]


def test_vbench(tmp_path, monkeypatch, capsys):
    """Names and folders as VBench wants them; its command where it is not there, where it is its scores."""
    teacher = tmp_path / "teacher"
    torch.manual_seed(0)
    train.build_cogvideox().to(dtype=torch.float16).save_pretrained(teacher)
    entries = [
        {"prompt_en": "a red circle moving", "dimension": ["color", "dynamic_degree"]},
        {"prompt_en": "a small square moving", "dimension": ["dynamic_degree"]},
    ]
    info = tmp_path / "VBench_full_info.json"
    info.write_text(json.dumps(entries))
    arguments = ["--teacher", str(teacher), "--steps", "1", "--guidance", "1", "--prompts", str(info)]
    arguments += ["--seeds", "2", "--metrics", "oracle,vbench", "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="the metric clip is for images, not for videos"):
        evaluate.main([*arguments, "--metrics", "clip"])

    monkeypatch.setenv("PATH", str(tmp_path))
    evaluate.main(arguments)
    place = tmp_path / "out/teacher/vbench"
    assert sorted(os.listdir(place / "color")) == ["a red circle moving-0.mp4", "a red circle moving-1.mp4"]
    assert len(os.listdir(place / "dynamic_degree")) == 4
    assert (place / "color/a red circle moving-0.mp4").stat().st_size > 200
    command = f"vbench evaluate --videos_path {place}/color --dimension color"
    assert f"{command} --output_path {place}/results/color" in capsys.readouterr().out

    fake = f"""#!{sys.executable}
import json, sys
dimension, output = sys.argv[5], sys.argv[7]
json.dump({{dimension: [len(dimension) / 100, []]}}, open(output + "/results_2026_eval_results.json", "w"))
"""
    (tmp_path / "vbench").write_text(fake)
    (tmp_path / "vbench").chmod(stat.S_IRWXU)
    evaluate.main(arguments)
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["rows"][0]["vbench"] == {"color": 0.05, "dynamic_degree": 0.14}
    output = capsys.readouterr().out
    assert "| dynamic_degree | 0.1400 |" in output
    assert "CogVideoX-5b ADM (paper, table 3)" in output

    # a dimension that failed is run again, and those that are there are not
    (tmp_path / "vbench").write_text(f"#!{sys.executable}\n")
    (place / "results/color/score.json").unlink()
    with pytest.raises(UserError, match="vbench gave no result: .* color .*: it wrote nothing to"):
        evaluate.main(arguments)
    (tmp_path / "vbench").write_text(fake.replace("/ 100", "/ 10"))
    evaluate.main(arguments)
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["rows"][0]["vbench"] == {"color": 0.5, "dynamic_degree": 0.14}


# The page -------------------------------------------------------------------------------------------------


class Links(html.parser.HTMLParser):
    """Everything that a page would fetch."""

    def __init__(self):
        super().__init__()
        self.links = []

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href")]


def read_pages(text):
    return json.loads(re.search(r"const pages = (\[.*?\]), names", text)[1])


def test_the_page_holds_everything(folders):
    text = (folders / "out/side-by-side.html").read_text()
    links = Links()
    links.feed(text)
    assert links.links == []
    assert "http" not in text
    pages = read_pages(text)
    assert [page["prompt"] for page in pages] == (folders / "prompts.txt").read_text().splitlines()
    assert pages[1]["scores"][0] == ["accuracy", "1.000", "0.000"]
    for page in pages:
        assert page["a"].startswith("data:image/webp;base64,")
        assert page["b"].startswith("data:image/webp;base64,")


def test_a_prompt_cannot_leave_the_script(tmp_path, folders):
    prompts = ["</script><script>alert(1)</script>", "NAMES PAGES \\u003c", "a <b>bold</b> shape"]
    good = find_images("good", str(tmp_path), str(folders / "good"), prompts)
    bad = find_images("bad", str(tmp_path), str(folders / "bad"), prompts)
    save_page(good, bad, {"good": {}, "bad": {}}, prompts, str(tmp_path / "page.html"))
    text = (tmp_path / "page.html").read_text()
    assert text.count("</script>") == 1
    assert [page["prompt"] for page in read_pages(text)] == prompts


def test_the_page_in_a_browser(folders, tmp_path):
    names = (
        "chromium",
        "chromium-browser",
        "google-chrome",
        "google-chrome-stable",
        "chrome",
        "microsoft-edge",
    )
    browser = next(filter(None, map(shutil.which, names)), None)
    if not browser:
        pytest.skip(f"there is no browser that runs headless: none of {', '.join(names)}")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
    for page, prompt in ((0, "a red circle"), (1, "a blue square on a white background")):
        words = [browser, *options, f"file://{folders}/out/side-by-side.html#{page}"]
        shown = subprocess.run(words, capture_output=True, text=True, timeout=60).stdout
        assert f'<h2 id="prompt">{prompt}</h2>' in shown
        assert f"{page + 1} of 3" in shown
        assert "<td>accuracy</td>" in shown
        assert len(re.findall(r'<img id="[ab]" src="data:image/webp;base64,', shown)) == 2


def test_what_a_killed_evaluation_was_writing_is_removed(teacher_folder, prompts_path, tmp_path):
    """In every folder of the results; not what looks like it and is another's."""
    out = tmp_path / "out"
    process = subprocess.Popen(["true"])
    process.wait()
    left = f".writing-{files.HOST}-{process.pid}-grid.png"
    for folder in (out, out / "teacher", out / "teacher/pictures", out / "teacher/scores/x"):
        folder.mkdir(parents=True)
        (folder / left).write_text("half a file")
        (folder / ".writing-mine").write_text("mine")
    index = {"prompts": []}
    images = Images("teacher", str(out / "teacher"), [], index)
    with files.lock_folder(str(out)):
        images.prepare_folder()
    names = [name for _, _, names in os.walk(out) for name in names]
    assert names.count(left) == 0
    assert names.count(".writing-mine") == 4
