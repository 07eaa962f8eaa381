"""--negative-prompt: the null condition is the pipeline's own, and results say which it was."""

import pytest
import torch

import adm
import collect_ode
import common
import helpers
import sample
from support.checkpoints import find_checkpoint
from support.errors import UserError
from support.files import read_sealed

CPU = torch.device("cpu")
TEXT = "a small red circle"


@pytest.mark.parametrize("family", ("sdxl", "sd3", "cogvideox"))
@pytest.mark.parametrize("text", (None, "", TEXT))
def test_the_null_condition_is_the_pipelines(tmp_path, family, text):
    """What its own encode_prompt makes of negative_prompt=TEXT, of an empty one, and of none."""
    folder = helpers.make_teacher(tmp_path, 0, family)
    words = ["--teacher", folder, *(["--negative-prompt", text] if text is not None else [])]
    teacher = common.load_teacher_from(helpers.training_arguments("adm", words), CPU)
    options = {"do_classifier_free_guidance": True, "device": CPU}
    if teacher.video:
        length = teacher.denoiser.config.max_text_seq_length
        own = teacher.pipe.encode_prompt("a square", text, max_sequence_length=length, **options)
    elif family == "sd3":
        own = teacher.pipe.encode_prompt("a square", None, None, negative_prompt=text, **options)
    else:
        own = teacher.pipe.encode_prompt("a square", negative_prompt=text, **options)
    null = teacher.null(1)
    torch.testing.assert_close(null["encoder_hidden_states"], own[1])
    for name in ("text_embeds", "pooled_projections"):
        if name in null:
            torch.testing.assert_close(null[name], own[3])
    assert teacher.null_prompt == (type(teacher).null_prompt if text is None else text)


def test_results_say_what_their_negative_prompt_was(
    teacher_folder, prompts_file, adm_arguments, tmp_path, monkeypatch, capsys
):
    helpers.make_runs_comparable(monkeypatch.setattr)
    negative = ["--negative-prompt", TEXT]

    pairs = ["--teacher", teacher_folder, "--prompts", prompts_file, "--out", str(tmp_path / "pairs")]
    pairs += ["--count", "2", "--steps", "1"]
    collect_ode.main([*pairs, *negative])
    assert read_sealed(tmp_path / "pairs" / "index.json")["negative_prompt"] == TEXT
    with pytest.raises(UserError, match=f"its negative_prompt is '{TEXT}', not None"):
        collect_ode.main(pairs)

    run = [*adm_arguments, "--out", str(tmp_path / "run")]
    adm.main([*run, *negative, "--iterations", "1"])
    assert find_checkpoint(str(tmp_path / "run"))[1]["negative_prompt"] == TEXT
    capsys.readouterr()
    adm.main([*run, "--resume"])
    assert f"--negative-prompt was {TEXT}, and is None from here on" in capsys.readouterr().err

    draw = [
        "--teacher",
        teacher_folder,
        "--prompt",
        "a square",
        "--steps",
        "1",
        "--out",
        str(tmp_path / "out"),
    ]
    sample.main([*draw, *negative])
    first = (tmp_path / "out" / "0000-0.png").read_bytes()
    with pytest.raises(UserError, match="negative_prompt"):
        sample.main(draw)
    sample.main([*draw[:-1], str(tmp_path / "other")])
    assert (tmp_path / "other" / "0000-0.png").read_bytes() != first


@pytest.mark.parametrize("guidance, is_idle", (("1", True), ("1.5", False)))
def test_without_guidance_it_says_nothing(teacher_folder, capsys, guidance, is_idle):
    words = ["--teacher", teacher_folder, "--negative-prompt", TEXT, "--guidance", guidance]
    common.load_teacher_from(helpers.training_arguments("adm", words), CPU)
    assert ("of no effect without a --guidance above 1" in capsys.readouterr().err) == is_idle


def test_a_teacher_without_a_second_pass_takes_none(tmp_path):
    folder = helpers.make_teacher(tmp_path, 0, "flux")
    args = helpers.training_arguments("adm", ["--teacher", folder, "--negative-prompt", TEXT])
    with pytest.raises(UserError, match="--negative-prompt is for teachers that are guided by a second pass"):
        common.load_teacher_from(args, CPU)


def test_a_negative_prompt_that_the_tokenizer_cannot_express_is_refused(teacher_folder, tmp_path):
    words = ["--teacher", teacher_folder, "--prompt", "a square", "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="blurry"):
        sample.main([*words, "--negative-prompt", "blurry hands"])
    with pytest.raises(SystemExit):
        sample.main([*words, "--negative-prompt", "\udcff"])
