"""Wrong input: one sentence that says what is wrong, exit code 2, no traceback, and everything on the disk as it was."""
import os
import re
import shutil

import pytest

import adm
import adp
import collect_ode
import common
import helpers
import sample

MAIN = {"collect_ode.py": collect_ode.main, "adp.py": adp.main, "adm.py": adm.main, "sample.py": sample.main}


@pytest.fixture(scope="module")
def place(tmp_path_factory, teacher_folder, prompts_file, pairs_folder):
    """A folder with two teachers, pairs, runs and prompt files, some of them damaged."""
    place = tmp_path_factory.mktemp("place")
    shutil.copytree(teacher_folder, place / "teacher")
    teacher, other = str(place / "teacher"), helpers.random_teacher(place / "other", seed=1)
    shutil.copy(prompts_file, place / "prompts.txt")
    shutil.copytree(pairs_folder, place / "pairs")
    shutil.copytree(pairs_folder, place / "pairs-damaged")
    os.truncate(place / "pairs-damaged/00001.safetensors", 2000)
    shutil.copytree(pairs_folder, place / "pairs-incomplete")
    os.remove(place / "pairs-incomplete/00002.safetensors")
    helpers.collect("--teacher", other, "--prompts", prompts_file, "--out", str(place / "pairs-other"), "--count", "2", "--steps", "1")
    adp.main(["--teacher", teacher, "--pairs", str(place / "pairs"), "--out", str(place / "run"), *helpers.QUICK, "--iterations", "1", "--lambda-pixel", "0"])
    shutil.copytree(place / "run", place / "run-half")
    shutil.rmtree(place / "run-half/step_000001/state")
    (place / "empty.txt").write_text("\n \n")
    (place / "binary.txt").write_bytes(bytes(range(256)) * 4)
    (place / "zeros.txt").write_bytes(bytes(100))
    (place / "unknown.txt").write_text("a small red circle\na small pink hexagon\n")
    (place / "text.pth").write_text("not a checkpoint\n")
    (place / "pairs-bare").mkdir()
    (place / "pairs-bare/index.json").write_text('{"count": 1}')
    (place / "not-a-teacher").mkdir()
    (place / "half-a-teacher").mkdir()
    shutil.copy(place / "teacher/model_index.json", place / "half-a-teacher")
    return place


TEACHER, PROMPTS, OUT = "--teacher {0}/teacher", "--prompts {0}/prompts.txt", "--out {0}/new"
ADP = f"adp.py {TEACHER} {OUT} --lambda-pixel 0"
ADM = f"adm.py {TEACHER} {OUT}"
CASES = (
    (f"adm.py --teacher {{0}}/nowhere {PROMPTS} {OUT}", "there is no teacher '{0}/nowhere'"),
    (f"adm.py --teacher {{0}}/not-a-teacher {PROMPTS} {OUT}", "the teacher '{0}/not-a-teacher' could not be loaded"),
    (f"adm.py --teacher nobody/nothing {PROMPTS} {OUT}", "the teacher 'nobody/nothing' could not be loaded"),
    (f"collect_ode.py --teacher {{0}}/nowhere {PROMPTS} {OUT}", "there is no teacher '{0}/nowhere'"),
    (f"{ADP} --pairs {{0}}/pairs-other", "the pairs in {0}/pairs-other come from the teacher {0}/other, not from {0}/teacher"),
    (f"{ADP} --pairs {{0}}/pairs-damaged", "the shard {0}/pairs-damaged/00001.safetensors is missing or damaged"),
    (f"{ADP} --pairs {{0}}/pairs-incomplete", "the shard {0}/pairs-incomplete/00002.safetensors is missing or damaged"),
    (f"{ADP} --pairs {{0}}/nowhere", "there are no ODE pairs in '{0}/nowhere'"),
    (f"adp.py {TEACHER} {OUT} --pairs {{0}}/pairs --pixel-backbone {{0}}/nowhere.pth", "there is no SAM checkpoint at '{0}/nowhere.pth'"),
    (f"adp.py {TEACHER} {OUT} --pairs {{0}}/pairs --pixel-backbone {{0}}/text.pth", "'{0}/text.pth' is not a SAM checkpoint"),
    (f"collect_ode.py {TEACHER} {PROMPTS} --out {{0}}/pairs --steps 3", "{0}/pairs holds pairs made with other settings"),
    (f"collect_ode.py {TEACHER} {OUT} --prompts {{0}}/empty.txt", "the prompt file {0}/empty.txt has no prompts"),
    (f"{ADM} --prompts {{0}}/empty.txt", "the prompt file {0}/empty.txt has no prompts"),
    (f"{ADM} --prompts {{0}}/binary.txt", "the prompt file {0}/binary.txt is not UTF-8 text"),
    (f"{ADM} --prompts {{0}}/zeros.txt", "the prompt file {0}/zeros.txt is not text"),
    (f"{ADM} --prompts {{0}}/nowhere.txt", "the prompt file {0}/nowhere.txt cannot be read"),
    (f"{ADM} --prompts {{0}}/teacher", "the prompt file {0}/teacher cannot be read"),
    (f"{ADM} --prompts {{0}}/unknown.txt", "'a small pink hexagon' has words that this teacher's tokenizer does not know: pink, hexagon"),
    (f"collect_ode.py {TEACHER} {OUT} --prompts {{0}}/unknown.txt", "does not know: pink, hexagon"),
    (f"{ADM} {PROMPTS} --init {{0}}/nowhere", "there is no checkpoint '{0}/nowhere'"),
    (f"{ADM} {PROMPTS} --init {{0}}/run-half", "is not a complete checkpoint"),
    (f"adm.py --teacher {{0}}/other {OUT} {PROMPTS} --init {{0}}/run", "was distilled from {0}/teacher, not from {0}/other"),
    (f"adp.py {TEACHER} --out {{0}}/run --pairs {{0}}/pairs --lambda-pixel 0", "{0}/run holds a run already"),
    (f"adp.py {TEACHER} --out {{0}}/run-half --pairs {{0}}/pairs --lambda-pixel 0 --resume", "is not a complete checkpoint"),
    (f"adm.py {TEACHER} --out {{0}}/run {PROMPTS} --resume", "{0}/run/step_000001 cannot be resumed: its stage is adp, not adm"),
    (f"{ADM} {PROMPTS} --resolution 33", "--resolution 33x33 is not a multiple of 8"),
    (f"{ADM} {PROMPTS} --steps 0", "argument --steps: must be from 1 to 1000, not 0"),
    (f"{ADM} {PROMPTS} --seed 99999999999999999999", "argument --seed: must be from 0 to 2^63 - 1"),
    (f"collect_ode.py {TEACHER} {PROMPTS} {OUT} --steps 1001", "argument --steps: must be from 1 to 1000, not 1001"),
    (f"{ADP} --pairs {{0}}/pairs-bare", "there are no ODE pairs in '{0}/pairs-bare'"),
    (f"{ADM} --plan --teacher {{0}}/half-a-teacher", "{0}/half-a-teacher is not a complete pipeline folder: unet/config.json is missing"),
    (f"adp.py {TEACHER} --plan --pixel-backbone {{0}}/nowhere.pth", "there is no SAM checkpoint at '{0}/nowhere.pth'"),
    ("adp.py --teacher cogvideox --plan", "the pixel discriminator sees single pictures, not video"),
    (f"sample.py --student {{0}}/nowhere --prompt circle {OUT}", "there is no checkpoint '{0}/nowhere'"),
    (f"sample.py --student {{0}}/run {OUT}", "give prompts: either --prompt TEXT ... or --prompts FILE"),
    (f"sample.py {TEACHER} --prompt= {OUT}", "a --prompt is empty"),
    (f"sample.py {TEACHER} --prompt circle --side-by-side {OUT}", "--side-by-side compares a --student with its teacher"),
    (f"sample.py --student {{0}}/run --export {{0}}/pairs", "{0}/pairs is there already"),
    (f"{ADM} {PROMPTS} --batch 0", "argument --batch: must be at least 1, not 0"),
    (f"{ADP} --pairs {{0}}/pairs --batch -1", "argument --batch: must be at least 1, not -1"),
    (f"collect_ode.py {TEACHER} {PROMPTS} {OUT} --count 0", "argument --count: must be at least 1, not 0"),
    (f"{ADM} {PROMPTS} --lr -1", "argument --lr: must be at least 0"),
    (f"{ADM} {PROMPTS} --lr nan", "argument --lr: must be at least 0"),
    (f"{ADM} {PROMPTS} --dt 0", "--dt: must be between 0 and 1, not 0"),
    (f"{ADM} {PROMPTS} --resolution 32x", "argument --resolution: must be a number of pixels or HEIGHTxWIDTH, not 32x"),
    (f"{ADM} {PROMPTS} --frames 9", "--frames is for video teachers"),
    (f"adm.py {OUT}", "the following arguments are required: --teacher"))


def check(code, errors, script, sentence):
    assert code == 2
    assert "Traceback" not in errors
    said = [line for line in errors.splitlines() if line.startswith(f"{script}: ")]
    assert len(said) == 1 and sentence in said[0], errors


@pytest.mark.parametrize("words, sentence", CASES, ids=[re.sub(r"\{0\}/", "", words) for words, _ in CASES])
def test_wrong_input(place, monkeypatch, capfd, words, sentence):
    script, *arguments = words.format(place).split()
    before = helpers.snapshot(place)
    monkeypatch.setattr("sys.argv", [script, *arguments])
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit:
        common.launch(MAIN[script])
    check(exit.value.code, capfd.readouterr().err, script, sentence.format(place))
    assert helpers.snapshot(place) == before


@pytest.mark.parametrize("words, sentence", (CASES[0], CASES[11], CASES[26]), ids=("no such teacher", "empty prompt file", "no steps"))
def test_wrong_input_to_the_real_command(place, words, sentence):
    script, *arguments = words.format(place).split()
    before = helpers.snapshot(place)
    result = helpers.command(script, *arguments)
    check(result.returncode, result.stderr, script, sentence.format(place))
    assert result.stdout == "" and helpers.snapshot(place) == before


def test_wrong_input_to_two_processes(place):
    """They end, and one of them speaks."""
    words, sentence = next(case for case in CASES if "pairs-other" in case[0])
    before = helpers.snapshot(place)
    result = helpers.command(*words.format(place).split(), processes=2)
    assert result.returncode != 0 and result.stderr.count(sentence.format(place)) == 1
    assert "adp.py: " in result.stderr and "UserError" not in result.stderr
    assert helpers.snapshot(place) == before
