"""Results of other settings are never taken for these: the indexes of folders, and damaged scores."""

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import common
import evaluate
import helpers
import sample
from metrics.images import Images, wait_for_scores
from metrics.scorer import Scorer
from metrics.scores import read_scores, save_scores
from metrics.systems import find_images, plan_images
from support import folders
from support.checkpoints import describe_files
from support.errors import UserError
from support.files import read_sealed, write_sealed
from support.folders import describe_difference
from support.pairs import find_problem
from support.systems import System

PROMPTS = ["a red circle", "a small square"]

DIFFERENCES = (
    ({"a": 1, "b": [1, 2]}, {"b": [1, 2], "a": 1}, ""),
    ({"a": (1, 2)}, {"a": [1, 2]}, ""),
    ({"steps": 4}, {"steps": 25}, "its steps is 4, not 25"),
    ({"prompts": ["a", "b"]}, {"prompts": ["a", "c"]}, "its prompts[1] is 'b', not 'c'"),
    ({"prompts": ["a"]}, {"prompts": ["a", "c"]}, "its prompts[1] is absent, not 'c'"),
    ({"prompts": ["a", "c"]}, {"prompts": ["a"]}, "its prompts[1] is 'c', not absent"),
    ({}, {"precision": "fp32"}, "its precision is absent, not 'fp32'"),
    ({"systems": [{"steps": 1}]}, {"systems": [{"steps": 2}]}, "its systems[0] steps is 1, not 2"),
    ({"a": 1, "b": [1, 2]}, {"a": 2, "b": [3, 4]}, "its a is 1, not 2, its b[0] is 1, not 3"),
    ({"a": None}, {"a": "\x1b[31m"}, "its a is None, not '\\x1b[31m'"),
    (["no", "index"], {"a": 1}, "its a is absent, not 1"),
)


@pytest.mark.parametrize("old, new, words", DIFFERENCES)
def test_a_difference_is_named_with_both_values(old, new, words):
    assert describe_difference(old, new) == words


# sample.py ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, teacher_folder):
    """sample.py's arguments and the folder that they filled."""
    folder = tmp_path_factory.mktemp("drawn") / "samples"
    words = ["--teacher", teacher_folder, "--steps", "1", "--guidance", "1"]
    words += ["--prompt", *PROMPTS, "--seeds", "0", "1"]
    sample.main([*words, "--out", str(folder)])
    return words, folder


OTHERS = (
    (["--prompt", PROMPTS[0]], "its prompts[1] is 'a small square', not absent"),
    (["--prompt", *reversed(PROMPTS)], "its prompts[0] is 'a red circle', not 'a small square'"),
    (["--seeds", "0"], "its seeds[1] is 1, not absent"),
    (["--steps", "2"], "its systems[0] steps is 1, not 2"),
    (["--guidance", "3"], "its systems[0] guidance is 1.0, not 3.0"),
    (["--precision", "bf16"], "its systems[0] precision is 'fp32', not 'bf16'"),
    (["--resolution", "40x32"], "its systems[0] resolution[0] is 32, not 40"),
)


@pytest.mark.parametrize("words, sentence", OTHERS)
def test_a_folder_has_the_samples_of_one_command(drawn, words, sentence):
    first, folder = drawn
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(UserError) as error:
        sample.main([*first, *words, "--out", str(folder)])
    assert f"{folder} holds results of other settings: {sentence}" in str(error.value)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_the_same_command_goes_on(drawn):
    words, folder = drawn
    pixels = (folder / "0001-1.png").read_bytes()
    (folder / "0001-1.png").unlink()
    sample.main([*words, "--out", str(folder)])
    assert (folder / "0001-1.png").read_bytes() == pixels


@pytest.mark.parametrize("text", (None, "", "{", "[]"))
def test_samples_of_which_nothing_is_known_are_refused(drawn, tmp_path, text):
    words, folder = drawn
    shutil.copytree(folder, tmp_path / "samples")
    index = tmp_path / "samples/index.json"
    index.unlink() if text is None else index.write_text(text)
    with pytest.raises(UserError, match=r"its index\.json is missing or damaged"):
        sample.main([*words, "--out", str(tmp_path / "samples")])


def test_a_folder_has_the_videos_of_one_speed(tmp_path):
    system = SimpleNamespace(teacher=SimpleNamespace(fps=8), describe=dict)
    args = SimpleNamespace(out=str(tmp_path), seeds=[0], fps=None)
    sample.prepare_folder(args, [system], PROMPTS)
    args.fps = 4
    with pytest.raises(UserError, match="its fps is 8, not 4"):
        sample.prepare_folder(args, [system], PROMPTS)


def test_the_teachers_sample_is_on_the_left_of_its_students(teacher, tmp_path):
    student = helpers.save_checkpoint(tmp_path / "student", teacher)
    teachers = ["--teacher", teacher.path, "--steps", "2", "--guidance", "3"]
    for name, words in (("alone", teachers), ("both", [*teachers, "--student", student, "--side-by-side"])):
        sample.main([*words, "--prompt", PROMPTS[0], "--out", str(tmp_path / name)])
    alone, both = (np.array(Image.open(tmp_path / name / "0000-0.png")) for name in ("alone", "both"))
    assert both.shape == (32, 64, 3)
    assert (both[:, :32] == alone).all()
    assert (both[:, 32:] != alone).any()


# evaluate.py --images -------------------------------------------------------------------------------------


def find(folder, prompts=PROMPTS):
    return find_images("x", str(folder / "out"), str(folder), prompts)


def test_images_with_their_index_are_taken(drawn, capsys):
    _, folder = drawn
    images = find(folder)
    assert [[os.path.basename(path) for path in row] for row in images.files] == [
        ["0000-0.png", "0000-1.png"],
        ["0001-0.png", "0001-1.png"],
    ]
    assert capsys.readouterr().err == ""


def test_images_of_other_prompts_are_refused(drawn):
    _, folder = drawn
    with pytest.raises(UserError, match=r"its prompts\[0\] is 'a red circle', not 'a small square'"):
        find(folder, PROMPTS[::-1])
    with pytest.raises(UserError, match=r"its prompts\[2\] is absent, not 'x'"):
        find(folder, [*PROMPTS, "x"])


def lose_one(folder):
    (folder / "0001-0.png").unlink()


def lose_a_seed(folder):
    for name in ("0000-1.png", "0001-1.png"):
        (folder / name).unlink()


def add_two(folder):
    for name in ("0000-7.png", "0001-7.png"):
        shutil.copy(folder / "0000-0.png", folder / name)


def put_side_by_side(folder):
    index = read_sealed(folder / "index.json")
    write_sealed(folder / "index.json", index | {"systems": index["systems"] * 2})


def damage(folder):
    os.truncate(folder / "index.json", 20)


def make_video(folder):
    write_sealed(folder / "index.json", read_sealed(folder / "index.json") | {"frames": 9})


CHANGES = (
    (lose_one, "are not all there: 0001-0 is missing"),
    (lose_a_seed, "are not all there: 0000-1 is missing"),
    (add_two, "0000-7 in .* is none of the images"),
    (put_side_by_side, "show two systems side by side"),
    (damage, "index.json, which says what the images are of, is damaged"),
    (make_video, "a video's frames below one another"),
)


@pytest.mark.parametrize("change, sentence", CHANGES)
def test_images_that_are_not_what_their_index_says_are_refused(drawn, tmp_path, change, sentence):
    shutil.copytree(drawn[1], tmp_path / "images")
    change(tmp_path / "images")
    with pytest.raises(UserError, match=sentence):
        find(tmp_path / "images")


def test_images_without_an_index_are_taken_with_a_note(drawn, tmp_path, capsys):
    shutil.copytree(drawn[1], tmp_path / "images")
    (tmp_path / "images/index.json").unlink()
    assert len(find(tmp_path / "images").files) == 2
    assert "no index.json says of which prompts they are" in capsys.readouterr().err


def test_pictures_of_evaluate_have_their_index_above(drawn, tmp_path):
    shutil.copytree(drawn[1], tmp_path / "pictures")
    shutil.move(tmp_path / "pictures/index.json", tmp_path / "index.json")
    find(tmp_path / "pictures")
    with pytest.raises(UserError, match="other prompts"):
        find(tmp_path / "pictures", PROMPTS[::-1])


# evaluate.py's own folders --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory, teacher):
    """A step folder of a student with the teacher's weights."""
    folder = tmp_path_factory.mktemp("run") / "step_000001"
    teacher.denoiser.save_pretrained(folder / "student")
    write_meta(folder)
    return folder


def write_meta(folder):
    """What is read of a step folder's meta.json."""
    write_sealed(folder / "meta.json", {"files": describe_files(folder)})


def plan(teacher, out, prompts=PROMPTS, seeds=(0, 1), **settings):
    return plan_images("x", str(out), System(teacher, **settings), prompts, seeds)


def fill(images):
    images.prepare_folder()
    with open(images.files[0][0], "w") as file:
        file.write("a picture")


def test_every_setting_that_changes_pictures_is_compared(teacher, teacher_folder, run, tmp_path):
    student = common.Student(teacher, "teacher", 1)
    velocity = common.Student(teacher, "velocity", 1)
    device = torch.device("cpu")
    bf16 = helpers.load_teacher(teacher_folder, device, torch.bfloat16)
    larger = helpers.load_teacher(teacher_folder, device, resolution=(40, 32))
    moved = shutil.copytree(run, tmp_path / "step_000002")
    changed = shutil.copytree(run, tmp_path / "changed")
    path = changed / "student/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    name = sorted(weights)[-1]
    weights[name].view(-1)[-1] += 1e-6  # what no fingerprint of a few weights in half precision would see
    save_file(weights, path)
    write_meta(changed)

    own = {"student": student, "checkpoint": run}
    first = plan(teacher, tmp_path, **own)
    fill(first)
    plan(teacher, tmp_path, **own).check()
    others = (
        ({"prompts": PROMPTS[:1]}, "prompts[1]"),
        ({"seeds": (1, 2)}, "seeds[0] is 0, not 1"),
        ({"teacher": bf16}, "precision is 'fp32', not 'bf16'"),
        ({"teacher": larger}, "resolution[0] is 32, not 40"),
        ({"student": common.Student(teacher, "teacher", 2)}, "steps is 1, not 2"),
        ({"student": velocity}, "parametrisation is 'teacher', not 'velocity'"),
        ({"checkpoint": moved}, f"student is '{os.path.realpath(run)}', not '{moved}'"),
    )
    for settings, words in others:
        with pytest.raises(UserError) as error:
            plan(**{"teacher": teacher, "out": tmp_path, **own, **settings}).check()
        assert words in str(error.value), words

    before = System(teacher, **own).describe()["weights"]
    after = System(teacher, student, checkpoint=changed).describe()["weights"]
    assert before == System(teacher, student, checkpoint=moved).describe()["weights"]
    assert before != after


def test_a_teachers_settings_are_compared(teacher, tmp_path):
    fill(plan(teacher, tmp_path, steps=2, guidance=3.0))
    for settings, words in (
        ({"steps": 3, "guidance": 3.0}, "its steps is 2, not 3"),
        ({"steps": 2, "guidance": 1.0}, "its guidance is 3.0, not 1.0"),
    ):
        with pytest.raises(UserError) as error:
            plan(teacher, tmp_path, **settings).check()
        assert words in str(error.value)


@pytest.mark.parametrize("part", ("pictures", "scores"))
@pytest.mark.parametrize("text", (None, "", "{}", "null"))
def test_results_of_which_nothing_is_known_are_refused(tmp_path, part, text):
    images = Images("x", str(tmp_path / "x"), [["0.png"]], {"prompts": PROMPTS})
    images.check()
    (tmp_path / "x" / part).mkdir(parents=True)
    images.check()
    (tmp_path / "x" / part / "0").write_text("a result")
    if text is not None:
        (tmp_path / "x/index.json").write_text(text)
    with pytest.raises(UserError, match=r"index\.json is missing or damaged|its prompts is absent"):
        images.check()


# Scores ---------------------------------------------------------------------------------------------------


def test_scores_come_back_as_they_were(tmp_path):
    """Of any layout in memory: safetensors writes what lies there."""
    columns = {"a": np.arange(6.0).reshape(2, 3).T, "b": np.arange(8)[::2], "c": np.array([True, False])}
    save_scores(columns, str(tmp_path / "x.safetensors"))
    for name, column in read_scores(tmp_path / "x.safetensors").items():
        np.testing.assert_array_equal(column, columns[name])


def test_damaged_scores_are_noticed(tmp_path):
    """Any byte of the values, an end that is cut off, an empty file, one of another writer."""
    path = tmp_path / "x.safetensors"
    assert read_scores(path) is None
    save_scores({"clip": np.linspace(0, 1, 5)}, str(path))
    whole = path.read_bytes()
    for i in range(len(whole) - 40, len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        assert read_scores(path) is None, i
    for length in (0, 7, 60, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert read_scores(path) is None, length
    save_file({"clip": torch.zeros(5)}, path)
    assert read_scores(path) is None
    path.write_bytes(whole)
    assert read_scores(path)["clip"].tolist() == [0, 0.25, 0.5, 0.75, 1]


class Counting(Scorer):
    """A scorer that counts its calls."""

    description = "counts"
    calls = 0

    def prepare(self, image):
        return torch.zeros(1)

    def score(self, prepared, prompts):
        self.calls += 1
        return {"number": np.full(prepared.shape[:2], 7.0).flatten()}


def test_each_picture_is_scored_with_its_own_prompt(tmp_path, monkeypatch):
    """In the second chunk, too."""
    seen = []

    class Grey(Scorer):
        description = "greys"

        def prepare(self, image):
            return torch.tensor([image.getpixel((0, 0))[0]])

        def score(self, prepared, prompts):
            seen.append((prompts, prepared.flatten().tolist()))
            return {"grey": np.zeros(len(prompts))}

    for p in range(3):
        Image.new("RGB", (4, 4), (p, p, p)).save(tmp_path / f"{p}.png")
    monkeypatch.setattr("metrics.images.CHUNK", 2)
    files = [[str(tmp_path / f"{p}.png")] for p in range(3)]
    Images("x", str(tmp_path / "x"), files, {}).score("grey", Grey(), ["a", "b", "c"], 0)
    assert seen == [(["a", "b"], [0, 1]), (["c"], [2])]


def test_damaged_scores_are_made_again(drawn, tmp_path):
    images = find_images("x", str(tmp_path), str(drawn[1]), PROMPTS)
    images.prepare_folder()
    scorer = Counting()
    paths = images.score("number", scorer, PROMPTS, 0)
    images.score("number", scorer, PROMPTS, 0)
    assert scorer.calls == 1
    with open(paths[0], "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    images.score("number", scorer, PROMPTS, 0)
    assert scorer.calls == 2
    assert wait_for_scores(paths)[0]["number"].tolist() == [7.0] * 4
    scorer.description = "counts otherwise"
    assert images.score("number", scorer, PROMPTS, 0) != paths
    assert scorer.calls == 3
    assert json.loads((tmp_path / "x/index.json").read_text())["prompts"] == PROMPTS


def test_an_index_that_another_rank_writes_meanwhile_is_no_damaged_one(tmp_path, monkeypatch):
    def write_later(path):
        with open(path, "w") as file:
            file.write("{}")

    monkeypatch.setattr(folders, "read_sealed", write_later)
    folders.check_index(str(tmp_path), {"steps": 1}, has_results=False)
    assert os.listdir(tmp_path) == ["index.json"]


def test_no_rank_has_results_before_the_index(tmp_path, monkeypatch):
    """Or the main one, which checks the folder a moment later, would not know what they are of."""
    folder = tmp_path / "x"
    images = Images("x", str(folder), [["0.png"]], {"prompts": PROMPTS})
    waits = []

    def wait(seconds):
        waits.append(seconds)
        monkeypatch.setenv("RANK", "0")
        images.check()
        images.prepare_folder()

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("time.sleep", wait)
    images.prepare_folder()
    assert len(waits) == 1
    assert (folder / "index.json").exists()


def test_a_rank_that_found_another_checkpoint_than_the_main_one_stops(tmp_path, monkeypatch):
    """Of a run that goes on, both look for the newest; their pictures must not lie in one folder."""
    main, other = (Images("x", str(tmp_path), [["0.png"]], {"weights": weights}) for weights in ("a", "b"))
    other.check()  # there is no index yet
    main.prepare_folder()
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match="its weights is 'a', not 'b'"):
        other.prepare_folder()


@pytest.mark.parametrize("side_by_side, moves", ((False, ["cpu"]), (True, [])))
def test_a_teacher_that_draws_nothing_makes_way_for_the_student(
    teacher, tmp_path, monkeypatch, side_by_side, moves
):
    folder = helpers.save_checkpoint(tmp_path / "student", teacher)
    moved = []
    monkeypatch.setattr(teacher.denoiser, "to", moved.append)
    student = common.Student(teacher, "teacher", 1)
    sample.load_system(SimpleNamespace(side_by_side=side_by_side), folder, student)
    assert moved == moves


# Which noise, which samples -------------------------------------------------------------------------------


def test_pictures_that_were_made_anew_are_scored_anew(tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "in/0.png")

    def find():
        return find_images("x", str(tmp_path / "out"), str(tmp_path / "in"), ["a"])

    find().prepare_folder()
    find().check()
    os.utime(tmp_path / "in/0.png", (1, 1))
    with pytest.raises(UserError, match="files"):
        find().check()


def test_a_table_is_drawn_from_its_first_seed_on():
    drawn = []
    images = SimpleNamespace(draw=lambda prompts, seeds, batch: drawn.append(list(seeds)), files=[])
    evaluate.draw(SimpleNamespace(seed=5, seeds=2, batch=1), ["a"], {"x": images})
    assert drawn == [[5, 6]]


def test_a_file_has_its_own_prompt_noise_and_systems(monkeypatch):
    """In the second batch, too; and the grid has all of them in order, a row a prompt."""
    saved, grids = {}, []

    def mix(prompt, i, seed):
        return 100 * ord(prompt) + 10 * i + seed

    def make_system(number):
        def images(prompts, numbers, seeds):
            (seed,) = seeds
            values = [1000 * number + mix(prompt, i, seed) for prompt, i in zip(prompts, numbers)]
            return torch.tensor(values).view(len(prompts), 1, 1, 1, 1)

        return SimpleNamespace(teacher=SimpleNamespace(video=False), images=images)

    def note(args, teacher, pixels, path):
        saved[path] = pixels.flatten().tolist()

    monkeypatch.setattr(sample, "save_sample", note)
    monkeypatch.setattr(sample, "save_grid", lambda pixels, path, columns: grids.append((pixels, columns)))
    prompts = ["a", "b", "c"]
    sample.draw(SimpleNamespace(batch=2, seeds=[0, 7], out=""), [make_system(1), make_system(2)], prompts)
    expected = {}
    for i, prompt in enumerate(prompts):
        for seed in (0, 7):
            own = mix(prompt, i, seed)
            expected[f"{i:04d}-{seed}"] = [1000 + own, 2000 + own]
    assert saved == expected
    ((grid, columns),) = grids
    assert grid.flatten(1).tolist() == list(expected.values())
    assert columns == 2


@pytest.mark.parametrize("given, wanted", ((None, 8), (24, 24)))
def test_a_video_has_the_frames_a_second_that_are_asked_for(monkeypatch, given, wanted):
    saved = []
    monkeypatch.setattr(sample, "save_video", lambda pixels, path, fps: saved.append(fps))
    teacher = SimpleNamespace(video=True, fps=8)
    sample.save_sample(SimpleNamespace(fps=given), teacher, torch.zeros(3, 1, 4, 4), "x")
    assert saved == [wanted]


def test_a_shard_of_other_pairs_is_not_taken(pairs_folder, tmp_path):
    shutil.copytree(pairs_folder, tmp_path / "pairs")
    shards = sorted(path.name for path in (tmp_path / "pairs").glob("*.safetensors"))
    path = str(tmp_path / "pairs" / shards[0])
    with safe_open(path, "pt") as file:
        identity, checksum = file.metadata()["checksums"].split()
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    assert find_problem(path, identity) is None
    assert find_problem(path, "another") == "not of these pairs"
    tensors["x_0"][0, 0, 0, 0] += 1
    save_file(tensors, path, metadata={"checksums": f"{identity} {checksum}"})
    assert find_problem(path, identity, thorough=False) is None
    assert find_problem(path, identity) == "damaged"
