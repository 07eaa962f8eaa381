"""Draws images or videos with a student, a teacher, or both; exports a student as a diffusers pipeline.

    python sample.py --student runs/adm-sdxl --prompt "a small red circle" "a blue square" --seeds 0 1 2 3
    python sample.py --teacher cogvideox --prompts prompts.txt --out samples/teacher
    python sample.py --student runs/adm-cogvideox --prompts prompts.txt --side-by-side
    python sample.py --student runs/adm-sdxl --export exported/sdxl

Writes OUT/0000-0.png or .mp4 ... (prompt number, seed) and OUT/grid.png: a row a prompt, or a video's
frames. A sample depends on its prompt's number and its seed alone. Students sample with the steps that they
were trained for, without guidance."""

import support.interrupt  # noqa: F401
import os

import torch
from tqdm import tqdm

import common
from support import arguments
from support.arguments import positive, seed_number
from support.errors import UserError, launch
from support.files import make_folder, write_atomically
from support.media import require_video_writer, save_grid, save_video
from support.prompts import read_prompts
from support.systems import System


def parse_arguments(argv):
    parser = arguments.Parser(__doc__, common.TEACHERS, common.FAMILIES)
    arguments.add_teacher_arguments(parser, required=False)
    arguments.add_sampler_arguments(parser)
    add = parser.group("what is drawn")
    student = "a run folder of adp.py or adm.py, or one of its checkpoints"
    add("--student", student, shown="the teacher draws")
    add("--prompt", "prompts", nargs="+")
    arguments.add_prompts_arguments(parser, "what is drawn")
    seeds = "a sample of every prompt for each seed"
    add("--seeds", seeds, type=seed_number, nargs="+", default=[0], shown=0)
    side_by_side = "the teacher's sample of the same noise on the left of the student's"
    add("--side-by-side", side_by_side, action="store_true")
    fps = "frames a second of a video"
    add("--fps", fps, type=positive, shown="the teacher's: CogVideoX 8")
    add = parser.group("where it goes")
    add("--out", "folder for the samples", default="samples")
    add("--export", "write the student to this folder as a diffusers pipeline, and draw nothing")
    args = parser.parse_args(argv)

    if args.export and (args.prompt or args.prompts or not args.student):
        raise UserError("--export takes a --student and no prompts")
    if not args.export and bool(args.prompt) == bool(args.prompts):
        raise UserError("give prompts: either --prompt TEXT ... or --prompts FILE")
    if args.prompt_column and not args.prompts:
        raise UserError("--prompt-column says where the prompts of --prompts FILE are: give that, too")
    if args.side_by_side and not args.student:
        raise UserError("--side-by-side compares a --student with its teacher")
    if args.export and os.path.exists(args.export):
        raise UserError(f"{args.export} is there already; give another folder")
    if not all(map(str.strip, args.prompt or ())):
        raise UserError("a --prompt is empty")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    prompts = read_prompts(args.prompts, args.prompt_column) if args.prompts else args.prompt
    teacher = common.load_teacher_of_students(args, [args.student] if args.student else [])
    systems = []
    if args.side_by_side or not args.student:
        systems.append(System(teacher, steps=args.steps, guidance=args.guidance))
    if args.student:
        net, student, _ = common.load_student(args.student, teacher)
        systems.append(System(teacher, student, net))
    if args.export:
        export(systems[-1], args.export)
        steps = systems[-1].steps
        print(
            f"{args.export}: DiffusionPipeline.from_pretrained({args.export!r})"
            f"(prompt, num_inference_steps={steps}, guidance_scale=1)"
        )
        return
    if teacher.video:
        require_video_writer()
    teacher.check(prompts)
    make_folder(args.out)
    draw(args, systems, prompts)
    kind = "videos" if teacher.video else "images"
    print(f"{len(prompts) * len(args.seeds)} {kind} in {args.out}")


def draw(args, systems, prompts):
    """Draws every prompt with every seed, systems side by side, and a grid of the first ones."""
    teacher = systems[0].teacher
    most = 8 if teacher.video else 64  # prompts in the grid
    shown = {}
    with tqdm(total=len(prompts) * len(args.seeds), unit="sample") as bar:
        for first in range(0, len(prompts), args.batch):
            numbers = range(first, min(first + args.batch, len(prompts)))
            some = [prompts[i] for i in numbers]
            for seed in args.seeds:
                drawn = [system.images(some, numbers, [seed])[:, 0] for system in systems]
                for i, pixels in zip(numbers, torch.cat(drawn, dim=-1)):
                    save_sample(args, teacher, pixels, os.path.join(args.out, f"{i:04d}-{seed}"))
                    if i < most:
                        shown[i, seed] = pixels
                bar.update(len(numbers))
    pixels = torch.stack([shown[key] for key in sorted(shown)])
    columns = 8 if teacher.video else len(args.seeds)
    save_grid(pixels, os.path.join(args.out, "grid.png"), columns)


def save_sample(args, teacher, pixels, path):
    if teacher.video:
        save_video(pixels, f"{path}.mp4", args.fps or teacher.fps)
    else:
        save_grid(pixels[None], f"{path}.png", padding=0)


def export(system, folder):
    """Writes the student as a complete diffusers pipeline:
    DiffusionPipeline.from_pretrained(folder)(prompt, num_inference_steps=system.steps, guidance_scale=1)
    samples as it does. UserError where diffusers has no such scheduler."""
    pipe = system.teacher.pipe
    parts = dict(pipe.components)
    parts[system.teacher.denoiser_name] = system.net
    parts["scheduler"] = system.student.scheduler()
    switches = {name: value for name, value in pipe.config.items() if isinstance(value, bool)}
    with write_atomically(folder) as temporary:
        type(pipe)(**parts, **switches).save_pretrained(temporary)


if __name__ == "__main__":
    launch(main)
