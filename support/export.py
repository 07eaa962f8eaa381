"""Writes a student as a diffusers pipeline or a LoRA file, and the lines of Python that draw with it."""

import os
import re
import shutil

from support.card import PLACE
from support.checkpoints import LORA_FILE
from support.errors import UserError
from support.files import make_folder, remove_leftovers, short_name, write_atomically, write_text
from support.hub import is_hub_id
from support.loading import describe_teacher
from support.lora_files import check_pipeline, save_layers, split_change
from support.outputs import check_file
from support.schedulers import choose_timesteps
from support.teacher_lora import list_lora_parts


def export(system, folder, card=""):
    """Writes a student (System) as a complete diffusers pipeline to `folder`, which `write_line`'s line opens
    and which samples as the student does. card: the text of README.md. UserError where diffusers has no such
    scheduler."""
    from diffusers import StableDiffusionXLPipeline

    source = system.teacher.pipe
    parts = dict(source.components)
    parts[system.teacher.denoiser_name] = system.net
    parts["scheduler"] = system.student.scheduler()
    switches = {name: value for name, value in source.config.items() if isinstance(value, bool)}
    pipe = type(source)(**parts, **switches)
    if isinstance(pipe, StableDiffusionXLPipeline):
        # else it marks its pictures wherever the package invisible-watermark is installed
        pipe.register_to_config(add_watermarker=False)
    remove_leftovers(*os.path.split(folder))
    with write_atomically(folder) as temporary:
        pipe.save_pretrained(temporary)
        write_text(os.path.join(temporary, "README.md"), card)


def check_lora_file(path):
    """UserError where a LoRA file and what is beside it cannot be written, or would go over something."""
    if not path.endswith(".safetensors"):
        raise UserError(f"--export-lora {path}: give the file a name that ends in .safetensors")
    check_file(path)
    for name in (os.path.basename(path), "scheduler", "README.md"):
        found = os.path.join(os.path.dirname(path), name)
        if os.path.lexists(found):
            raise UserError(f"{found} is there already; give --export-lora a file in another folder")


def export_lora(student, checkpoint, path, rank, load_networks):
    """Writes the student (common.Student) of a checkpoint's folder as a LoRA file to `path`, and to
    scheduler/ beside it its scheduler -> in words, how near it is.

    Of a --lora run it is the adapter, else the change of the weights, of this rank. load_networks() -> the
    student's network and the teacher's, float32. UserError for what cannot be, before they are read."""
    check_pipeline(student.teacher)
    scheduler = student.scheduler()
    folder = os.path.dirname(path)
    remove_leftovers(*os.path.split(path))
    adapter = os.path.join(checkpoint, LORA_FILE)
    if os.path.exists(adapter):
        if rank:
            raise UserError(
                "--rank is for students whose every weight trained: this one's adapter has its own"
            )
        make_folder(folder)
        with write_atomically(path) as temporary:
            shutil.copyfile(adapter, temporary)
        said = "the student's adapter, exactly"
    else:
        if not rank:
            raise UserError("every weight of this student trained: give the LoRA's --rank, as 64")
        layers, left_out, error = split_change(*load_networks(), rank, student.teacher.device)
        make_folder(folder)
        with write_atomically(path) as temporary:
            save_layers(student.teacher, layers, folder, os.path.basename(temporary))
        said = describe_split(rank, left_out, error)
    with write_atomically(os.path.join(folder, "scheduler")) as temporary:
        scheduler.save_pretrained(temporary)
    return said


def describe_split(rank, left_out, error):
    """What a LoRA of a whole student is, in words. left_out: names of parameters without an adapter."""
    text = f"the rank-{rank} part of what training changed; relative error {error:.3g}"
    if left_out:
        kinds = sorted({re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in left_out})
        more = f", and {len(kinds) - 6} more kinds" if len(kinds) > 6 else ""
        text += f"; {len(left_out)} norms, biases and the like are left out ({', '.join(kinds[:6])}{more})"
    return text


# ----------------------------------------------------------------------------------------------------------
# Lines of Python
# ----------------------------------------------------------------------------------------------------------


def write_line(system, place):
    """The line of Python with which plain diffusers draws what the student draws, of an export at `place`, an
    absolute path or a hub id. torch, DiffusionPipeline and the prompt are its reader's; every argument whose
    default would draw something else is there."""
    return f"{write_opening(system.teacher, place)}({write_call(system.student)})"


def write_lora_lines(student, path, is_card=False):
    """The same for a LoRA file: lines of Python, of which the last draws. is_card: for a model card, without
    the paths of this machine."""
    from diffusers import StableDiffusionXLPipeline

    teacher = student.teacher
    place, name = os.path.split(path)
    base = describe_teacher(teacher.path)
    lora = teacher.lora and os.path.abspath(teacher.lora)
    if is_card:
        place = PLACE
        base = base if is_hub_id(base) else short_name(base)
        lora = lora and short_name(lora)
    more = ["add_watermarker=False"] if isinstance(teacher.pipe, StableDiffusionXLPipeline) else []
    if "safety_checker" in teacher.pipe.components:
        more.append("safety_checker=None")  # the teacher has none
    if teacher.variant:
        more.append(f"variant={teacher.variant!r}")
    scheduler = type(student.scheduler()).__name__
    lines = [
        f"import torch; from diffusers import DiffusionPipeline, {scheduler}",
        f"pipe = {write_opening(teacher, base, more)}",
    ]
    if lora:
        parts = list_lora_parts(teacher.pipe)  # FLUX's pipeline by itself fuses the transformer's alone
        lines += [
            f"pipe.load_lora_weights({lora!r})",
            f"pipe.fuse_lora(components={parts!r})",
            "pipe.unload_lora_weights()",
        ]
    return [
        *lines,
        f"pipe.load_lora_weights({place!r}, weight_name={name!r})",
        f'pipe.scheduler = {scheduler}.from_pretrained({place!r}, subfolder="scheduler")',
        f"pipe({write_call(student)})",
    ]


def write_opening(teacher, path, more=()):
    """Python that opens the pipeline of the teacher's kind at `path`. more: arguments."""
    opening = [repr(path), f"dtype={teacher.dtype}"]
    for name, part in teacher.pipe.components.items():
        if part is None and name not in teacher.pipe._optional_components:
            opening.append(f"{name}=None")  # SD3 without T5: diffusers wants to hear it
    device = "" if teacher.device.type == "cpu" else f'.to("{teacher.device.type}")'
    return f"DiffusionPipeline.from_pretrained({', '.join([*opening, *more])}){device}"


def write_call(student):
    """The arguments with which a pipeline draws as the student does."""
    timesteps = choose_timesteps(student.scheduler(), student.times)
    steps = f"timesteps={timesteps}" if timesteps else f"num_inference_steps={student.steps}"
    settings = student.teacher.call_settings(student.guidance)
    drawing = ["prompt", steps, *(f"{name}={value!r}" for name, value in settings.items())]
    return ", ".join(drawing)
