"""The held-out score is evaluate.py's, and the checkpoint with the best one is kept and found again."""

import json
import os
import shutil
import signal
import sys

import pytest
from safetensors.torch import load_file

import adm
import adp
import evaluate
import helpers
import sample
from metrics import held_out
from metrics.scorer import Scorer, read_pixels
from metrics.scorers import SCORERS
from support import run as runs
from support.arguments import EVAL_METRICS
from support.checkpoints import find_checkpoint, follow
from support.errors import UserError
from support.files import remove
from support.systems import System
from tiny import shapes

STUDENT = "student/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def few_prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("held-out") / "prompts.txt"
    path.write_text("\n".join(shapes.split_prompts()[1][:5]) + "\n")
    return str(path)


@pytest.fixture
def train(adm_arguments, few_prompts, monkeypatch):
    """A function: a run's folder, further words, and the scores that its student gets one after the other ->
    it has trained, with a checkpoint only of the end and of better students."""

    def run(folder, words, scores=None):
        words = f"--loss dmd --eval-every 1 --save-every 99 --eval-prompts {few_prompts} {words}"
        with monkeypatch.context() as patch:
            helpers.make_runs_comparable(patch.setattr)
            if scores:
                given = iter(scores)
                patch.setattr(
                    held_out.HeldOut, "measure", lambda self, method: {"accuracy": next(given), "valid": 1.0}
                )
            adm.main([*adm_arguments, "--out", str(folder), *words.split()])

    return run


def list_steps(run):
    return sorted(name for name in os.listdir(run) if name.startswith("step_"))


def read_held_out(run):
    lines = [line for line in helpers.read_metrics(run) if "held_out_accuracy" in line]
    return {line["step"]: line for line in lines}


# ----------------------------------------------------------------------------------------------------------
# The score
# ----------------------------------------------------------------------------------------------------------


def test_it_is_what_evaluate_says_of_the_checkpoint_and_changes_nothing(
    adm_arguments, few_prompts, tmp_path, monkeypatch
):
    """Of the moving average, which is what is saved; and the run is the one without it, bit for bit."""
    helpers.make_runs_comparable(monkeypatch.setattr)
    run, plain = tmp_path / "run", tmp_path / "plain"
    arguments = [*adm_arguments, "--loss", "dmd", "--steps", "2", "--ema", "0.9", "--lr", "1e-2"]
    adm.main([*arguments, "--out", str(plain)])
    scoring = ["--eval-every", "2", "--eval-prompts", few_prompts, "--eval-seeds", "3"]
    adm.main([*arguments, "--out", str(run), *scoring])
    lines = helpers.read_metrics(run)
    scored = lines.pop()
    assert lines == helpers.read_metrics(plain)
    weights = [load_file(folder / "step_000002" / STUDENT) for folder in (run, plain)]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])

    words = f"--prompts {few_prompts} --seeds 3 --workers 0 --json {tmp_path / 'report.json'}"
    evaluate.main(["--student", str(run / "best"), *words.split()])
    (row,) = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert scored.pop("step") == 2
    columns = ("accuracy", "valid", "tv", "squared_distance", "coverage", "position_std", "pairwise_distance")
    for name in columns:
        assert scored.pop(f"held_out_{name}") == pytest.approx(row[name], abs=1e-5), name
    for name in ("size", "colour", "shape", "background"):
        assert scored.pop(f"held_out_tv_{name}") == pytest.approx(row["tv_uniform_of"][name], abs=1e-5), name
    assert not scored


def test_videos_are_scored_frame_by_frame(tmp_path):
    teacher = helpers.make_teacher(tmp_path / "teacher", 0, "cogvideox")
    prompts = ["a red circle moving left", "a small square moving", "a triangle moving up"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    words = f"--teacher {teacher} --prompts {tmp_path}/prompts.txt --loss dmd --steps 1 --batch 2"
    words += f" --eval-every 1 --eval-prompts {tmp_path}/prompts.txt --eval-seeds 2"
    method = helpers.make_method(adm, words.split())
    scoring = held_out.HeldOut(method.args, method.teacher)
    values = scoring.measure(method)

    system = System(method.teacher, method.student, method.G)
    pixels = system.images(prompts, range(3), range(2)).flatten(0, 1)
    eight_bits = ((pixels + 1) * 127.5).round() / 127.5 - 1
    read = shapes.VideoOracle().read(eight_bits.numpy())
    x, y = read["x"].reshape(3, 2), read["y"].reshape(3, 2)
    spread = (((x.var(1, ddof=1) + y.var(1, ddof=1)) / 2) ** 0.5).mean()
    assert spread > 0.1
    assert values["position_std"] == pytest.approx(spread, rel=1e-3)
    assert next(iter(values)) == "accuracy"
    assert "tv_motion" in values


class Brightness(Scorer):
    """A scorer whose result is a mean over the images, as CLIP's."""

    def __init__(self, args, prompts, video):
        pass

    def prepare(self, image):
        return read_pixels(image).mean()

    def score(self, prepared, prompts):
        return {"brightness": prepared.flatten().numpy()}


def test_any_scorer_can_judge(adm_arguments, few_prompts, monkeypatch):
    monkeypatch.setitem(SCORERS, "clip", Brightness)
    words = f"--loss dmd --eval-every 1 --eval-metric clip --eval-prompts {few_prompts} --eval-seeds 2"
    method = helpers.make_method(adm, [*adm_arguments, *words.split()])
    scoring = held_out.HeldOut(method.args, method.teacher)
    system = System(method.teacher, method.student, method.G)
    pixels = system.images(scoring.prompts, range(5), range(2))
    assert scoring.measure(method) == {"brightness": pytest.approx(pixels.mean().item(), abs=2e-3)}


@pytest.mark.parametrize("ranks", (1, 2, 3, 8))
@pytest.mark.parametrize("count", (1, 5, 6))
def test_all_ranks_draw_alike_and_leave_nothing_out(monkeypatch, ranks, count):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    shares = []
    for rank in range(ranks):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(held_out.choose_share(count))
    assert len({len(share) for share in shares}) == 1
    assert {number for share in shares for number in share} == set(range(count))
    assert len(shares[0]) < count / ranks + 1


def test_every_metric_on_offer_is_one_of_evaluates():
    assert set(SCORERS) - set(EVAL_METRICS) == {"fid"}
    assert set(EVAL_METRICS) < set(SCORERS)


# ----------------------------------------------------------------------------------------------------------
# The best checkpoint
# ----------------------------------------------------------------------------------------------------------


def test_the_best_is_kept_and_found(train, tmp_path):
    """The first of two that are equal; a worse one does not move it, nor does --keep remove it."""
    run = tmp_path / "run"
    train(run, "--iterations 6 --keep 1", [0.25, 0.5, 0.375, float("nan"), 0.5, 0.25])
    assert list_steps(run) == ["step_000002", "step_000006"]
    assert [line["held_out_accuracy"] for line in read_held_out(run).values()][:3] == [0.25, 0.5, 0.375]
    assert (run / "best").read_text() == "step_000002\n"
    assert (run / "latest").read_text() == "step_000006\n"
    folder, meta = find_checkpoint(str(run / "best"), "student")
    assert (folder, meta["step"]) == (str(run / "step_000002"), 2)
    assert find_checkpoint(str(run))[1]["step"] == 6

    train(run, "--iterations 8 --keep 1 --resume", [0.4375, 0.75])
    assert (run / "best").read_text() == "step_000008\n"
    assert list_steps(run) == ["step_000008"]
    words = f"--student {run}/best --prompt circle --out {tmp_path}/drawn"
    sample.main(words.split())
    index = json.loads((tmp_path / "drawn/index.json").read_text())
    assert index["systems"][0]["student"] == str(run / "step_000008")


@pytest.fixture(scope="module")
def scored(tmp_path_factory, adm_arguments, few_prompts):
    """A run with checkpoints of three scores, the best one in the middle."""
    run = tmp_path_factory.mktemp("scored") / "run"
    given = iter([0.25, 0.5, 0.375])
    words = f"--loss dmd --iterations 3 --save-every 1 --eval-every 1 --eval-prompts {few_prompts}"
    with pytest.MonkeyPatch.context() as patch:
        helpers.make_runs_comparable(patch.setattr)
        patch.setattr(held_out.HeldOut, "measure", lambda self, method: {"accuracy": next(given)})
        adm.main([*adm_arguments, "--out", str(run), *words.split()])
    assert (run / "best").read_text() == "step_000002\n"
    return run


def name_nothing(run):
    remove(run / "best")


def name_the_one_before(run):
    (run / "best").write_text("step_000001\n")


def damage_the_best(run):
    with open(run / "step_000002" / STUDENT, "r+b") as file:
        file.write(b"\0" * 99)


KILLED = {  # what is left on the disk, and which is the best of it
    "before best was there": (name_nothing, "step_000002"),
    "before best was moved": (name_the_one_before, "step_000002"),
    "and the best was damaged": (damage_the_best, "step_000003"),
}


@pytest.mark.parametrize("name", KILLED)
def test_a_resumed_run_finds_the_best_again(scored, train, tmp_path, capfd, name):
    leave, best = KILLED[name]
    run = shutil.copytree(scored, tmp_path / "run")
    leave(run)
    train(run, "--iterations 4 --resume", [0.3125])
    assert (run / "best").read_text() == f"{best}\n"
    is_said = "step_000002, the best one, is passed over" in capfd.readouterr().err
    assert is_said == (leave is damage_the_best)


def test_the_last_student_is_scored_whatever_its_number(train, tmp_path):
    train(tmp_path / "run", "--iterations 3 --eval-every 2", [0.5, 0.75])
    assert list(read_held_out(tmp_path / "run")) == [2, 3]


def test_the_best_is_that_of_all_ranks(train, tmp_path, monkeypatch):
    """One that saw other checkpoints, on a slow disk, would save alone."""

    def average(values):
        return {name: 0.5 if name == "best" else float(value) for name, value in values.items()}

    monkeypatch.setattr(runs, "average", average)
    train(tmp_path / "run", "--iterations 2", [0.5, 0.75])
    assert list_steps(tmp_path / "run") == ["step_000002"]
    assert not (tmp_path / "run/best").exists()


def test_scores_of_other_prompts_do_not_count(scored, train, tmp_path, prompts_file, capfd):
    """Nor is the best by them removed before there is another one."""
    run = shutil.copytree(scored, tmp_path / "run")
    words = f"--resume --keep 1 --eval-prompts {prompts_file}"
    train(run, f"{words} --iterations 4 --eval-every 0")
    assert list_steps(run) == ["step_000002", "step_000004"]
    assert "--eval-prompts: of no effect without --eval-every" in capfd.readouterr().err
    train(run, f"{words} --iterations 5", [0.125])
    assert "the held-out score of" in capfd.readouterr().err
    assert (run / "best").read_text() == "step_000005\n"
    assert list_steps(run) == ["step_000005"]


def test_a_run_that_was_killed_after_its_first_score_starts_anew(train, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "held_out_accuracy": 0.5, "held_out_seconds": 1.0}\n')
    train(run, "--iterations 1 --resume", [0.25])
    assert read_held_out(run)[1]["held_out_accuracy"] == 0.25
    assert (run / "best").read_text() == "step_000001\n"


def test_a_file_that_names_no_checkpoint_is_not_followed(tmp_path):
    for text in ("", "step_1/../../other\n", "../step_000001\n", "x" * 100):
        (tmp_path / "best").write_text(text)
        assert follow(str(tmp_path / "best")) == str(tmp_path / "best")
        with pytest.raises(UserError, match="there is no checkpoint"):
            find_checkpoint(str(tmp_path / "best"))


# ----------------------------------------------------------------------------------------------------------
# Mistakes
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", (adm, adp))
def test_scoring_without_prompts_or_by_another_metric_is_refused(request, few_prompts, capfd, stage):
    arguments = request.getfixturevalue(f"{stage.__name__}_arguments")
    for words in ("", f"--eval-prompts {few_prompts} --eval-metric fid"):
        with pytest.raises(SystemExit) as end:
            stage.main([*arguments, "--eval-every", "1", *words.split()])
        assert end.value.code == 2
    said = capfd.readouterr().err
    assert "give --eval-prompts FILE" in said
    assert "argument --eval-metric: invalid choice: 'fid'" in said


def test_what_cannot_be_scored_is_refused_before_training(adm_arguments, few_prompts, tmp_path, monkeypatch):
    other = tmp_path / "other.txt"
    other.write_text("a photo of a pink dog\n")
    monkeypatch.setattr(adm.ADM, "__init__", None)  # nor is a student or a fake score read
    monkeypatch.setitem(sys.modules, "open_clip", None)
    before = helpers.take_snapshot(tmp_path)
    for words, sentence in (
        (f"--eval-prompts {tmp_path}/nowhere.txt", "nowhere.txt cannot be read"),
        (f"--eval-prompts {other}", "does not know: photo, of, pink, dog"),
        (f"--eval-prompts {few_prompts} --resolution 16", "the metric oracle is for the tiny teachers"),
        (f"--eval-prompts {few_prompts} --eval-metric lpips --eval-seeds 1", "in training --eval-seeds"),
        (f"--eval-prompts {few_prompts} --eval-metric clip", "pip install open_clip_torch"),
    ):
        with pytest.raises(UserError, match=sentence):
            adm.main([*adm_arguments, "--out", str(tmp_path / "run"), "--eval-every", "1", *words.split()])
    assert helpers.take_snapshot(tmp_path) == before


def test_a_signal_while_the_student_is_scored_ends_the_run_at_that_iteration(train, tmp_path, monkeypatch):
    """Of a student that is no better than the one before, for which there would be no checkpoint."""
    scores = [0.5, 0.25]

    def measure(self, method):
        score = scores.pop(0)
        if not scores:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"accuracy": score}

    monkeypatch.setattr(held_out.HeldOut, "measure", measure)
    train(tmp_path / "run", "--iterations 4")
    assert list_steps(tmp_path / "run") == ["step_000001", "step_000002"]
    assert list(read_held_out(tmp_path / "run")) == [1, 2]


def test_a_checkpoint_has_a_score_of_its_own_iteration_alone(train, tmp_path):
    run = tmp_path / "run"
    train(run, "--iterations 4 --eval-every 2 --save-every 1 --keep 9", [0.25, 0.5])
    scores = {}
    for step in range(1, 5):
        meta = find_checkpoint(str(run / f"step_{step:06d}"))[1]
        scores[step] = meta.get("held_out", {}).get("score")
    assert scores == {1: None, 2: 0.25, 3: None, 4: 0.5}


def test_the_best_is_none_that_a_resumed_run_makes_again(train, tmp_path):
    """It begins before the last one, which is damaged and has the highest score; and of equal scores the
    first is the best."""
    run = tmp_path / "run"
    train(run, "--iterations 4 --save-every 1 --keep 9", [0.25, 0.25, 0.125, 0.5])
    [state] = (run / "step_000004/state").glob("G.*")
    os.truncate(state, 100)
    train(run, "--iterations 5 --save-every 1 --keep 9 --resume", [0.125, 0.125])
    assert (run / "best").read_text() == "step_000001\n"
