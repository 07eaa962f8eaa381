"""LoRA files: plain diffusers draws with them what the student draws; what cannot be is refused at once."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from test_export import CPU, PROMPT, Recorded
from torch import nn

import adm
import common
import helpers
import sample
from support.checkpoints import LORA_FILE, describe_files, save_network
from support.errors import UserError
from support.export import describe_split
from support.files import write_json, write_sealed
from support.lora import Adapted, find_targets
from support.lora_files import factorise, save_layers, save_lora_beside, split_change

RANK = 3


def save_student(folder, teacher, state, steps, parametrisation="teacher", layers=None):
    """A step folder as training leaves it -> its path. state: of the student; layers: of its adapter."""
    save_network(teacher.denoiser, state, os.path.join(folder, "student"))
    if layers:
        save_lora_beside(common.Student(teacher, parametrisation, steps), layers, folder)
    meta = {"resolution": teacher.resolution, "frames": teacher.frames, "teacher": teacher.path}
    meta |= {"fingerprint": teacher.fingerprint, "step": 1, "stage": "adm", "arguments": {}}
    meta |= {"parametrisation": parametrisation, "steps": steps}
    write_sealed(os.path.join(folder, "meta.json"), meta | {"files": describe_files(folder)})
    return str(folder)


def adapt(teacher):
    """A student that is a random adapter -> (its whole state, its layers), left in the teacher's network."""
    teacher.fingerprint  # noqa: B018  read it while its network is whole
    net = Adapted(teacher.denoiser, "student", RANK)
    torch.manual_seed(1)
    for weight in net.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return net.merge(), net.read_layers()


def change_all(teacher, rank):
    """The state of a student whose linear and conv layers have changed by a matrix of this rank."""
    torch.manual_seed(1)
    state = {}
    for name, weight in teacher.network().state_dict().items():
        change = torch.zeros(weight.flatten(1).shape) if weight.ndim > 1 else None
        if change is not None and "embed" not in name:
            change = torch.randn(len(weight), rank) @ torch.randn(rank, change.shape[1])
            change *= 0.1 * weight.std() / change.std()
            weight = weight + change.view(weight.shape)
        state[name] = weight
    return state


# What plain diffusers draws -------------------------------------------------------------------------------

READER = """
import importlib, json, sys, numpy, safetensors.torch, torch
torch.set_num_threads(1)
names = ("schedulers.scheduling_lcm", "schedulers.scheduling_flow_match_euler_discrete",
    "pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl", "pipelines.cogvideo.pipeline_cogvideox",
    "pipelines.stable_diffusion_3.pipeline_stable_diffusion_3")
for name in names:  # the noise that the student had; the flow scheduler multiplies one more by zero
    module = importlib.import_module(f"diffusers.{name}")
    module.randn_tensor = lambda shape, dtype=None, **_: next(noise, torch.zeros(shape)).to(dtype)
prompt = "a red circle"
for i, lines in enumerate(json.load(open("lines.json"))):
    tensors = safetensors.torch.load_file(f"{i}.noise")
    noise = iter([tensors[str(k)] for k in range(len(tensors))])
    exec("\\n".join(lines[:-1]))
    drawn = eval(lines[-1].replace("(prompt,", "(prompt, output_type='np',"))
    numpy.save(f"{i}.npy", drawn.frames[0] if "num_frames" in lines[-1] else drawn.images)
assert "common" not in sys.modules and "support" not in sys.modules
"""
CASES = {  # family: (steps, parametrisation, how it trained)
    "sdxl": (1, "teacher", "adapter"),
    "sd3": (4, "teacher", "adapter"),
    "cogvideox": (2, "teacher", "adapter"),
    "whole sdxl": (1, "velocity", "whole"),
    "whole sd3": (2, "velocity", "whole"),
}


def draw_student(student, net):
    """The student's own sample -> (pictures [F, H, W, 3] in [0, 1], the noise that it took)."""
    teacher = student.teacher
    rows = Recorded([0], ("test", 7), CPU)
    latents = student.sample(net, rows, teacher.encode([PROMPT]))
    pixels = (teacher.decode(latents)[0] / 2 + 0.5).clamp(0, 1)
    frames = pixels.transpose(0, 1) if teacher.video else pixels[None]
    given = [noise.transpose(1, 2) for noise in rows.given] if teacher.video else rows.given
    return frames.permute(0, 2, 3, 1).numpy(), given


def test_plain_diffusers_draws_the_students_pictures(tmp_path, capsys):
    """The printed lines, run as they are in one process that has no part of this project, to 1e-4."""
    lines, expected = [], []
    for i, (name, (steps, parametrisation, kind)) in enumerate(CASES.items()):
        family = name.split()[-1]
        folder = helpers.make_teacher(tmp_path / name.replace(" ", "-"), 0, family)
        size = (32, 48) if family == "sdxl" else (24, 32)
        frames = 9 if family == "cogvideox" else None
        teacher = common.load_teacher(folder, CPU, resolution=size, frames=frames)
        state, layers = (change_all(teacher, 2), None) if kind == "whole" else adapt(teacher)
        checkpoint = save_student(tmp_path / f"run{i}", teacher, state, steps, parametrisation, layers)
        file = str(tmp_path / f"lora{i}" / f"{family}.safetensors")
        rank = ["--rank", "2"] if kind == "whole" else []
        sample.main(["--student", checkpoint, "--export-lora", file, *rank])
        printed = capsys.readouterr().out.splitlines()
        assert ("exactly" in printed[0]) == (kind == "adapter")
        card = ModelCard.load(tmp_path / f"lora{i}" / "README.md")
        assert card.data.base_model_relation == "adapter"
        assert printed[0].split(": ")[-1].rstrip(".") in card.text
        lines.append(printed[2:])
        net, student, _ = common.load_student(checkpoint, teacher)
        pictures, noise = draw_student(student, net)
        plain, _ = draw_student(student, teacher.denoiser)  # its adapter, if it has one, is off
        assert np.abs(pictures - plain).max() > 0.05, name
        expected.append(pictures)
        save_file({str(k): n.contiguous() for k, n in enumerate(noise)}, tmp_path / f"{i}.noise")

    write_json(tmp_path / "lines.json", lines)
    command = [sys.executable, "-c", READER]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    for i, name in enumerate(CASES):
        theirs = np.load(tmp_path / f"{i}.npy")
        assert theirs.shape == expected[i].shape, name
        assert np.abs(theirs - expected[i]).max() < 1e-4, name


# The low-rank part of a whole student ----------------------------------------------------------------------


@pytest.mark.parametrize("shape", ((80, 120), (120, 80), (3, 120)))
def test_factors_are_as_near_as_any_of_their_rank(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape) * torch.linspace(1, 0.1, shape[1])
    down, up = factorise(matrix, 5)
    assert down.shape == (5, shape[1])
    assert up.shape == (shape[0], 5)
    best = torch.linalg.svdvals(matrix)[5:].norm()
    assert (matrix - up @ down).norm() <= 1.01 * best + 1e-5


def test_what_a_lora_leaves_out_is_named_and_measured():
    """The error is of all weights together; layers of every kind come back, and what has no such form does
    not."""
    torch.manual_seed(0)

    def make():
        grouped = nn.Conv2d(4, 8, 3, groups=2)
        net = nn.Sequential(nn.Linear(6, 5), nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), grouped)
        net.table = nn.Parameter(torch.randn(3))  # as Wan's scale_shift_table, of no layer
        return net

    teacher, student = make(), make()
    for name in ("3.bias", "2.weight"):
        dict(student.named_parameters())[name].data = dict(teacher.named_parameters())[name].data.clone()
    layers, left_out, error = split_change(student, teacher, 2, CPU)
    assert left_out == ["table", "0.bias", "1.bias", "3.weight"]
    assert set(layers) == {f"{k}.lora_{part}.weight" for k in (0, 1) for part in "AB"}
    assert layers["1.lora_A.weight"].shape == (2, 3, 3, 3)
    assert layers["1.lora_B.weight"].shape == (8, 2, 1, 1)
    after = {name: weight.detach().clone() for name, weight in teacher.named_parameters()}
    for k in (0, 1):
        down, up = layers[f"{k}.lora_A.weight"], layers[f"{k}.lora_B.weight"]
        after[f"{k}.weight"] += (up.flatten(1) @ down.flatten(1)).view(after[f"{k}.weight"].shape)
    missing = sum((weight - after[name]).square().sum() for name, weight in student.named_parameters())
    before = dict(teacher.named_parameters())
    whole = sum((weight - before[name]).square().sum() for name, weight in student.named_parameters())
    assert error == pytest.approx((missing / whole).sqrt().item(), rel=1e-4)
    text = describe_split(2, left_out, error)
    assert f"relative error {error:.3g}" in text
    assert "4 norms, biases and the like are left out (0.bias, 1.bias, 3.weight, table)" in text


# Other readers ---------------------------------------------------------------------------------------------


def test_kohyas_form_of_an_sdxl_file_is_the_same_lora(tmp_path):
    """docs/students.md converts it so for ComfyUI, which knows the layers of a U-Net by these names."""
    from diffusers.utils import convert_state_dict_to_kohya

    teacher = common.load_teacher(helpers.make_teacher(tmp_path / "teacher", 0), CPU)
    targets = list(find_targets(teacher.denoiser))
    state, layers = adapt(teacher)
    save_layers(teacher, layers, str(tmp_path))
    converted = convert_state_dict_to_kohya(load_file(tmp_path / LORA_FILE))
    assert {key.split(".")[0] for key in converted} == {f"lora_unet_{n.replace('.', '_')}" for n in targets}
    assert all(value == RANK for key, value in converted.items() if key.endswith(".alpha"))
    pipe = common.load_teacher(str(tmp_path / "teacher"), CPU).pipe
    pipe.load_lora_weights(converted)
    pipe.fuse_lora(components=["unet"])
    pipe.unload_lora_weights()
    for name, weight in pipe.unet.state_dict().items():
        torch.testing.assert_close(weight, state[name], rtol=1e-4, atol=1e-5)


# Refused ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    """(folder of a student that is an adapter, that of one whose every weight trained)."""
    root = tmp_path_factory.mktemp("students")
    teacher = common.load_teacher(helpers.make_teacher(root / "teacher", 0), CPU)
    state, layers = adapt(teacher)
    return [
        save_student(root / name, teacher, state, 1, layers=x) for name, x in (("a", layers), ("w", None))
    ]


MISTAKES = (
    ("--student {0} --export-lora x.safetensors --rank 4", "this one's adapter has its own"),
    ("--student {1} --export-lora x.safetensors", "give the LoRA's --rank"),
    ("--student {0} --export-lora x.bin", "ends in .safetensors"),
    ("--student {0} --export-lora there/x.safetensors", "there/scheduler is there already"),
    ("--student {0} --export-lora x.safetensors --export y", "either --export or --export-lora"),
    ("--student {0} --export-lora x.safetensors --prompt x", "take a --student and no prompts"),
    ("--student {0} --prompt x --rank 4", "--rank is for --export-lora"),
    ("--export-lora x.safetensors", "take a --student and no prompts"),
)


@pytest.mark.parametrize("words, sentence", MISTAKES)
def test_mistakes_are_refused_before_anything_is_written(students, tmp_path, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there" / "scheduler").mkdir(parents=True)
    monkeypatch.setattr(common.Teacher, "network", None)
    with pytest.raises(UserError, match=sentence):
        sample.main(words.format(*students).split())
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["scheduler", "there"]


def test_a_damaged_adapter_is_no_export(students, tmp_path):
    checkpoint = str(tmp_path / "copy")
    shutil.copytree(students[0], checkpoint)
    with open(os.path.join(checkpoint, LORA_FILE), "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    with pytest.raises(UserError, match="is damaged"):
        sample.main(["--student", checkpoint, "--export-lora", str(tmp_path / "x.safetensors")])


def test_a_pipeline_that_reads_no_lora_gets_none(students, tmp_path, monkeypatch):
    monkeypatch.setattr(StableDiffusionXLPipeline, "_lora_loadable_modules", [])
    with pytest.raises(UserError, match="StableDiffusionXLPipeline reads no LoRA files"):
        sample.main(["--student", students[0], "--export-lora", str(tmp_path / "x.safetensors")])


def test_a_student_of_another_teacher_gets_no_file(students, tmp_path):
    other = helpers.make_teacher(tmp_path / "other", 1)
    words = ["--student", students[1], "--export-lora", str(tmp_path / "x.safetensors"), "--rank", "2"]
    with pytest.raises(UserError, match="was distilled from"):
        sample.main([*words, "--teacher", other])


def test_targets_are_the_layers_whose_names_end_so(teacher):
    every = find_targets(teacher.denoiser)
    chosen = find_targets(teacher.denoiser, ["attn1.to_q", "to_v"])
    assert set(chosen) == {name for name in every if name.endswith(("attn1.to_q", ".to_v"))}
    assert 0 < len(chosen) < len(every)
    with pytest.raises(UserError, match="--lora-targets o_q is the end of none of .*attn1.to_q"):
        find_targets(teacher.denoiser, ["to_v", "o_q"])


# Another teacher: a fine-tune, a LoRA in the weights ------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """(folder of an SDXL teacher, a LoRA file of its U-Net and first text encoder, their merged weights)."""
    root = tmp_path_factory.mktemp("tuned")
    folder = helpers.make_teacher(root / "teacher", 0)
    pipe = common.load_teacher(folder, CPU).pipe
    torch.manual_seed(2)
    layers, merged = {}, {}
    for part in ("unet", "text_encoder"):
        net = getattr(pipe, part)
        merged[part] = {name: weight.clone() for name, weight in net.state_dict().items()}
        layers[part] = {}
        ending = "to_q" if part == "unet" else "q_proj"
        for name in [name for name, _ in net.named_modules() if name.endswith(ending)]:
            weight = merged[part][f"{name}.weight"]
            down, up = torch.randn(2, weight.shape[1]), 0.1 * torch.randn(len(weight), 2)
            layers[part] |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
            merged[part][f"{name}.weight"] = weight + 0.5 * up @ down  # alpha is half the rank
    config = {"r": 2, "lora_alpha": 1, "target_modules": ["to_q"]}
    text_config = {"r": 2, "lora_alpha": 1, "target_modules": ["q_proj"]}
    type(pipe).save_lora_weights(
        root,
        unet_lora_layers=layers["unet"],
        text_encoder_lora_layers=layers["text_encoder"],
        unet_lora_adapter_metadata=config,
        text_encoder_lora_adapter_metadata=text_config,
    )
    return folder, str(root / LORA_FILE), merged


def load(*words):
    args = helpers.training_arguments("adm", [*words])
    return common.load_teacher_from(args, CPU)


def test_a_lora_is_merged_into_every_network_that_it_is_of(tuned):
    folder, file, merged = tuned
    teacher = load("--teacher", folder, "--teacher-lora", file)
    for part, state in merged.items():
        loaded = getattr(teacher.pipe, part).state_dict()
        assert loaded.keys() == state.keys()
        for name, weight in state.items():
            torch.testing.assert_close(loaded[name], weight, msg=f"{part} {name}")
    weights = teacher.network().state_dict()  # what a student trains from, once more of the files
    for name, weight in merged["unet"].items():
        torch.testing.assert_close(weights[name], weight)
    for name, weight in merged["text_encoder"].items():  # which are not merged twice
        torch.testing.assert_close(teacher.pipe.text_encoder.state_dict()[name], weight)
    assert not any(p.requires_grad for p in teacher.pipe.text_encoder.parameters())
    plain = load("--teacher", folder)
    assert not teacher.null(1)["encoder_hidden_states"].any()
    prompts = ["a red circle"]
    assert not teacher.encode(prompts)["encoder_hidden_states"].equal(
        plain.encode(prompts)["encoder_hidden_states"]
    )


def test_a_student_starts_from_a_fine_tune(tuned, tmp_path):
    """A folder that its own pipeline wrote is a teacher like any other."""
    plain = load("--teacher", tuned[0])
    before = plain.fingerprint
    weights = plain.denoiser.state_dict()
    last = "mid_block.attentions.0.transformer_blocks.0.attn1.to_v.weight"
    weights = weights | {last: 1.01 * weights[last]}  # in one layer alone
    plain.denoiser.load_state_dict(weights)
    plain.pipe.save_pretrained(tmp_path)
    teacher = load("--teacher", str(tmp_path))
    assert teacher.fingerprint != before
    assert all(weight.equal(weights[name]) for name, weight in teacher.network().state_dict().items())


def test_a_teachers_lora_is_part_of_its_fingerprint(tuned, tmp_path):
    """By what is in the file, whatever its name and whatever the precision."""
    folder, file, _ = tuned
    copy = str(tmp_path / "copy.safetensors")
    shutil.copyfile(file, copy)
    words = ["--teacher", folder, "--teacher-lora"]
    own = load(*words, file).fingerprint
    assert own == load(*words, copy, "--precision", "bf16").fingerprint
    tensors = load_file(file)
    tensors["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"] *= 1.001
    save_file(tensors, copy)
    assert own != load(*words, copy).fingerprint
    assert own != load("--teacher", folder).fingerprint


def test_a_student_of_a_tuned_teacher_needs_it(tuned, prompts_file, tmp_path, capsys, monkeypatch):
    """Trained with --lora, resumed, drawn and written as a LoRA file without naming the teacher again."""
    helpers.make_runs_comparable(monkeypatch.setattr)
    folder, file, merged = tuned
    run = str(tmp_path / "run")
    words = ["--teacher", folder, "--prompts", prompts_file, "--lora", "2", "--out", run, *helpers.QUICK]
    adm.main([*words, "--teacher-lora", file, "--iterations", "1"])
    with pytest.raises(UserError, match="its fingerprint is"):
        adm.main([*words, "--resume"])
    adm.main([*words, "--teacher-lora", file, "--resume"])
    draw = ["--prompt", PROMPT, "--out", str(tmp_path / "drawn"), "--student", run]
    sample.main(draw)
    with pytest.raises(UserError, match=f"was distilled from {folder} with {file}, not from {folder}$"):
        sample.main([*draw, "--teacher", folder])
    capsys.readouterr()
    sample.main(["--student", run, "--export-lora", str(tmp_path / "student.safetensors")])
    lines = capsys.readouterr().out.splitlines()
    assert f"pipe.load_lora_weights({file!r})" in lines
    assert "pipe.fuse_lora()" in lines
    sample.main(["--student", run, "--export", str(tmp_path / "whole")])
    exported = DiffusionPipeline.from_pretrained(tmp_path / "whole").text_encoder.state_dict()
    for name, weight in merged["text_encoder"].items():
        torch.testing.assert_close(exported[name], weight)


MISFITS = (
    ("missing.safetensors", "there is no file"),
    ("text.safetensors", "is no .safetensors file"),
    ("weights.safetensors", "is no LoRA"),
    ("nan.safetensors", "is damaged: unet"),
    ("other.safetensors", "does not fit the teacher"),
    ("sd3.safetensors", "does not fit the teacher: 2 of its 2 factors find no layer"),
    ("more.safetensors", "does not fit the teacher: 2 of its"),
)


@pytest.mark.parametrize("name, sentence", MISFITS)
def test_files_that_are_no_lora_of_the_teacher_are_refused(tuned, tmp_path, monkeypatch, name, sentence):
    folder, file, _ = tuned
    monkeypatch.chdir(tmp_path)
    tensors = load_file(file)
    first = next(key for key in tensors if key.startswith("unet"))
    other = {key: weight[:, :-1] for key, weight in tensors.items()}
    down, up = torch.ones(2, 2), torch.ones(2, 2)
    pair = {"transformer.x.lora_A.weight": down, "transformer.x.lora_B.weight": up}
    more = {"unet.nowhere.lora_A.weight": down, "unet.nowhere.lora_B.weight": up}
    files = {
        "weights.safetensors": {"conv.weight": torch.ones(3, 3)},
        "nan.safetensors": tensors | {first: tensors[first] * float("nan")},
        "other.safetensors": other,
        "sd3.safetensors": pair,
        "more.safetensors": tensors | more,
    }
    (tmp_path / "text.safetensors").write_text("no tensors")
    if name in files:
        save_file({key: weight.contiguous() for key, weight in files[name].items()}, name)
    with pytest.raises(UserError, match=sentence) as caught:
        load("--teacher", folder, "--teacher-lora", name)
    assert "\n" not in str(caught.value)
