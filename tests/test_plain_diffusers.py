"""Exported students and LoRA files: plain diffusers in another process draws what the student draws."""

import contextlib
import io

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

import helpers
import sample
from tiny import train

pytestmark = pytest.mark.slow
RANK = 3
IMPORTS = "import torch; from diffusers import DiffusionPipeline"
# the exported folder's name: (family, parametrisation, steps, precision, resolution, frames), and the first
# time of a student that does not begin at T
EXPORTS = {
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
    "sd from 0.4 T": ("stable-diffusion", "teacher", 1, "fp32", (32, 32), None, 0.4),
    "wan": ("wan", "teacher", 2, "fp32", (32, 48), 5),
    "wan, velocity": ("wan", "velocity", 1, "fp32", (32, 32), 5),
    "z-image": ("z-image", "teacher", 2, "fp32", (48, 32), None),
    "qwen-image": ("qwen-image", "teacher", 2, "fp32", (32, 48), None),
    "flux": ("flux", "teacher", 2, "fp32", (48, 32), None),
}
LORAS = {  # name: (family, parametrisation, steps, what trained, resolution, frames)
    "lora of sdxl": ("sdxl", "teacher", 1, "adapter", (32, 48), None),
    "lora of sd3": ("sd3", "teacher", 4, "adapter", (24, 32), None),
    "lora of cogvideox": ("cogvideox", "teacher", 2, "adapter", (24, 32), 9),
    "lora of sd": ("stable-diffusion", "teacher", 2, "adapter", (32, 32), None),
    "lora of wan": ("wan", "teacher", 2, "adapter", (32, 48), 5),
    "lora of z-image": ("z-image", "teacher", 2, "adapter", (32, 32), None),
    "lora of qwen-image": ("qwen-image", "teacher", 2, "adapter", (32, 32), None),
    "lora of flux": ("flux", "teacher", 2, "adapter", (32, 32), None),
    "split off sdxl": ("sdxl", "velocity", 1, "all", (32, 48), None),
    "split off sd3": ("sd3", "velocity", 2, "all", (24, 32), None),
}


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


def run_sample(*words):
    """sample.py in this process -> the lines that it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        sample.main(words)
    return out.getvalue().splitlines()


def export(teachers, folder, name):
    """A case of EXPORTS -> (the lines that draw with it, its student, the student's network)."""
    family, parametrisation, steps, precision, resolution, frames, *first = EXPORTS[name]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    teacher = helpers.load_teacher(teachers[family], helpers.CPU, dtype, resolution, frames)
    checkpoint = helpers.save_checkpoint(folder / "run", teacher, parametrisation, steps, None, None, *first)
    place = str(folder / "exported" / name)
    printed = run_sample("--student", checkpoint, "--export", f"{place}/", "--precision", precision)
    assert printed[-2] == IMPORTS
    net, student, _ = helpers.load_student(checkpoint, teacher)
    return printed[-2:], student, net


def export_lora(teachers, folder, name):
    """The same of LORAS."""
    family, parametrisation, steps, trained, resolution, frames = LORAS[name]
    teacher = helpers.load_teacher(teachers[family], helpers.CPU, torch.float32, resolution, frames)
    if trained == "adapter":
        rank = []
        state, layers = helpers.adapt(teacher, RANK)
    else:
        rank = ["--rank", "2"]
        state, layers = change_all(teacher, 2), None
    checkpoint = helpers.save_checkpoint(folder / "run", teacher, parametrisation, steps, state, layers)
    file = folder / "lora" / f"{family}.safetensors"
    printed = run_sample("--student", checkpoint, "--export-lora", str(file), *rank)
    assert ("exactly" in printed[0]) == (trained == "adapter")
    card = ModelCard.load(file.parent / "README.md")
    assert card.data.base_model_relation == "adapter"
    assert printed[0].split(": ")[-1].rstrip(".") in card.text
    net, student, _ = helpers.load_student(checkpoint, teacher)
    pictures, _ = helpers.draw_student(student, net)
    plain, _ = helpers.draw_student(student, teacher.denoiser)  # its adapter, if it has one, is off
    visible = 0.01 if family == "qwen-image" else 0.05  # of Qwen's random autoencoder all pictures are alike
    assert np.abs(pictures - plain).max() > visible, name
    return printed[2:], student, net


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


@pytest.fixture(scope="module")
def drawn(teachers, tmp_path_factory):
    """{case: (plain diffusers' pictures, the student's)}, [F, H, W, 3] in [0, 1]: the printed lines of all
    cases, run as they are in one fresh process, elsewhere."""
    root = tmp_path_factory.mktemp("drawn")
    programs, noises, expected = [], [], []
    names = [*EXPORTS, *LORAS]
    for i, name in enumerate(names):
        make = export if name in EXPORTS else export_lora
        program, student, net = make(teachers, root / f"case{i}", name)
        pictures, noise = helpers.draw_student(student, net)
        programs.append(program)
        noises.append(noise)
        expected.append(pictures)
    theirs = helpers.draw_elsewhere(root, programs, noises)
    return dict(zip(names, zip(theirs, expected)))


@pytest.mark.parametrize("name", (*EXPORTS, *LORAS))
def test_the_printed_lines_draw_the_students_pictures(drawn, name):
    """Exact in fp32, close in bf16."""
    theirs, expected = drawn[name]
    assert theirs.shape == expected.shape
    difference = np.abs(theirs - expected)
    if name in EXPORTS and EXPORTS[name][3] == "bf16":
        assert difference.max() < 16 / 255
        assert difference.mean() < 2 / 255
    else:
        assert difference.max() < 1e-4
    assert expected.std() > 0.02
