"""Writes a student as a diffusers pipeline, and the line of Python that draws with it."""

import os

from support.files import write_atomically
from support.schedulers import choose_timesteps


def export(system, folder):
    """Writes a student (System) as a complete diffusers pipeline to `folder`, which `write_line`'s line opens
    and which samples as the student does. UserError where diffusers has no such scheduler."""
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
    with write_atomically(folder) as temporary:
        pipe.save_pretrained(temporary)


def write_line(system, folder):
    """The line of Python with which plain diffusers draws what the student draws. torch, DiffusionPipeline
    and the prompt are its reader's; every argument whose default would draw something else is there."""
    teacher = system.teacher
    opening = [repr(os.path.abspath(folder)), f"dtype={teacher.dtype}"]
    for name, part in teacher.pipe.components.items():
        if part is None and name not in teacher.pipe._optional_components:
            opening.append(f"{name}=None")  # SD3 without T5: diffusers wants to hear it
    timesteps = choose_timesteps(system.student.scheduler(), system.student.times)
    steps = f"timesteps={timesteps}" if timesteps else f"num_inference_steps={system.steps}"
    settings = teacher.call_settings(system.student.guidance)
    drawing = ["prompt", steps, *(f"{name}={value!r}" for name, value in settings.items())]
    device = "" if teacher.device.type == "cpu" else f'.to("{teacher.device.type}")'
    return f"DiffusionPipeline.from_pretrained({', '.join(opening)}){device}({', '.join(drawing)})"
