"""Model cards: the hub reads their metadata, and they say of a student what its run says, and no paths."""

import ast
import json
import os
from types import SimpleNamespace

import diffusers
import pytest
from huggingface_hub import ModelCard

import common
import helpers
import sample
from support.card import LICENCES, describe_sampling, write_card
from support.errors import UserError
from support.hub import TEACHERS

SD3 = TEACHERS["sd3-medium"]
ROW = {"system": "student", "steps": 1, "nfe": 1, "prompts": 2, "samples": 4, "ci": {}, "accuracy": 0.5}


def make_meta(**more):
    words = ["--teacher", "sdxl", "--prompts", "/secret/prompts.txt", "--init", "/secret/adp", "--lr", "3e-6"]
    words += ["--batch", "3", "--accumulate", "2", "--negative-prompt", "a | b"]
    arguments = vars(helpers.training_arguments("adm", words))
    return {"stage": "adm", "step": 700, "processes": 4, "arguments": arguments, **more}


def read(text):
    """The text of a card -> (its metadata, {setting: value} of its table)."""
    card = ModelCard(text)
    cells = [line.split(" | ") for line in card.text.splitlines() if line.startswith("| ")]
    return card.data.to_dict(), {row[0][2:]: row[-1][:-2] for row in cells}


def test_an_export_carries_a_card(teacher, tmp_path):
    """Where the hub looks for it, with lines that are Python."""
    (tmp_path / "report.json").write_text(json.dumps({"rows": [ROW], "paper": []}))
    run = helpers.save_checkpoint(tmp_path / "run", teacher)
    sample.main(
        ["--student", run, "--export", str(tmp_path / "mine"), "--report", str(tmp_path / "report.json")]
    )
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    data = card.data.to_dict()
    assert data["library_name"] == "diffusers"
    assert data["pipeline_tag"] == "text-to-image"
    assert data["base_model_relation"] == "finetune"
    assert "base_model" not in data  # a folder is no model of the hub
    assert "https://arxiv.org/abs/2507.18569" in card.text
    assert "| student | 1 | 1 | 0.500 |" in card.text
    assert str(tmp_path) not in card.text
    code = card.text.split("```python\n")[1].split("```")[0]
    ast.parse(code)
    assert "'OWNER/NAME'" in code
    assert "(prompt, num_inference_steps=1, guidance_scale=1, height=32, width=32)" in code


def test_a_card_says_what_the_run_says(teacher):
    student = common.Student(teacher, "teacher", 4)
    of = {"metric": "clip", "seeds": 4}
    meta = make_meta(held_out={"score": 0.31234, "of": of})
    data, settings = read(write_card(student, meta, "x", ["draw()"], lora="exactly"))
    assert data["base_model_relation"] == "adapter"
    assert "lora" in data["tags"]
    expected = {"stage": "adm", "iterations": "700", "steps": "4", "global batch": "24", "lr": "3e-06"}
    expected |= {
        "loss": "adm",
        "started from": "adp",
        "negative_prompt": "a \\| b",
        "ema": "0.0",
        "seed": "0",
    }
    for name, value in expected.items():
        assert settings[name].endswith(value), name
    text = write_card(student, meta, "x", ["draw()"])
    assert "clip 0.3123" in text
    assert "in 4 steps" in text
    assert "/secret" not in text


@pytest.mark.parametrize(
    "steps, prediction, is_told", ((4, "flow", True), (1, "flow", False), (4, "epsilon", False))
)
def test_a_card_says_what_fixes_the_later_noise(steps, prediction, is_told):
    """The pipelines of flow models pass no generator on to their schedulers."""
    student = SimpleNamespace(steps=steps, teacher=SimpleNamespace(prediction=prediction))
    text = describe_sampling(student)
    assert ("torch.manual_seed" in text) == is_told
    assert f"diffusers {diffusers.__version__}" in text


def test_the_licence_is_the_teachers(teacher, tmp_path, monkeypatch):
    """From our list, from the teacher's own card, or not known."""
    student = common.Student(teacher, "teacher", 1)

    def write(path):
        monkeypatch.setattr(teacher, "path", path)
        text = write_card(student, make_meta(), "x", ["draw()"])
        return text, ModelCard(text).data

    text, data = write(SD3)
    assert (data.base_model, data.license, data.license_name) == (SD3, "other", "stabilityai-ai-community")
    assert data.license_link.startswith(f"https://huggingface.co/{SD3}/")
    assert "inherits their licence, stabilityai-ai-community" in text
    assert set(LICENCES) == set(TEACHERS.values())

    (tmp_path / "README.md").write_text("---\nlicense: mit\nbase_model: someone/base\n---\ntext")
    text, data = write(str(tmp_path))
    assert (data.base_model, data.license) == ("someone/base", "mit")
    (tmp_path / "README.md").write_text("no metadata")
    text, data = write(str(tmp_path))
    assert data.license is None
    assert "whatever it is" in text


@pytest.mark.parametrize("text", (None, "{}", "[]", '{"rows": []}', '{"rows": [1], "paper": []}', "no json"))
def test_what_is_no_report_is_refused(tmp_path, monkeypatch, text):
    monkeypatch.setattr(common, "load_teacher_from", None)
    path = str(tmp_path / "report.json")
    if text:
        with open(path, "w") as file:
            file.write(text)
    with pytest.raises(UserError, match="is no report.json of evaluate.py"):
        sample.main(["--student", "x", "--export", str(tmp_path / "new"), "--report", path])
    assert not os.path.exists(tmp_path / "new")
