"""Draws images or videos with a student, a teacher, or both; exports a student as a pipeline or a LoRA file.

    python sample.py --student runs/adm-sdxl --prompt "a small red circle" "a blue square" --seeds 0 1 2 3
    python sample.py --teacher cogvideox --prompts prompts.txt --out samples/teacher
    python sample.py --student runs/adm-cogvideox --prompts prompts.txt --side-by-side
    python sample.py --student runs/adm-sdxl --export exported/sdxl
    python sample.py --student runs/adm-sdxl --export-lora exported/lora/sdxl.safetensors --rank 64

Writes OUT/0000-0.png or .mp4 ... (prompt number, seed) and OUT/grid.png: a row a prompt, or a video's
frames; and OUT/index.json, which says what made them: a folder holds the samples of one command. A sample
depends on its prompt's number and its seed alone. Students sample with the steps that they were trained for,
without guidance."""

import support.interrupt  # noqa: F401  Ctrl-C while torch loads
import math
import os
import re

import torch
from tqdm import tqdm

import common
from metrics.rows import format_table
from support import arguments
from support.arguments import positive, seed_number
from support.card import PLACE, write_card
from support.checkpoints import find_checkpoint
from support.errors import UserError, launch
from support.escapes import make_printable
from support.export import check_lora_file, export, export_lora, write_line, write_lora_lines
from support.files import make_folder, read_json, remove_leftovers, write_sealed, write_text
from support.folders import check_index
from support.inputs import fill_from_students
from support.media import require_video_writer, save_grid, save_video
from support.outputs import check_folder, check_new
from support.parallel import own_device, world_size
from support.prompts import is_encodable, read_prompts
from support.systems import System


def parse_arguments(argv):
    parser = arguments.Parser(__doc__, common.FAMILIES)
    arguments.add_teacher_arguments(parser, required=False)
    arguments.add_sampler_arguments(parser)
    add = parser.group("what is drawn")
    student = "a run folder of adp.py or adm.py, one of its checkpoints, or its file best"
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
    lora = "write the student to this .safetensors file as a LoRA of its teacher, and draw nothing"
    add("--export-lora", lora, metavar="FILE")
    rank = "rank of the LoRA of a student whose every weight trained"
    add("--rank", rank, type=positive, shown="that of its --lora")
    add("--report", "a report.json of evaluate.py, whose table comes into the model card", metavar="FILE")
    args = parser.parse_args(argv)

    if world_size() > 1:
        raise UserError(
            "sample.py is one process (evaluate.py draws with several): start it without torchrun, or unset "
            "RANK and WORLD_SIZE"
        )
    for seed in args.seeds:
        if args.seeds.count(seed) > 1:
            raise UserError(f"--seeds has {seed} twice")
    args.exporting = args.export is not None or args.export_lora is not None
    if args.exporting and (args.prompt or args.prompts or not args.student):
        raise UserError("--export and --export-lora take a --student and no prompts")
    if args.export is not None and args.export_lora is not None:
        raise UserError("give either --export or --export-lora: they take a command each")
    if args.rank and args.export_lora is None:
        raise UserError("--rank is for --export-lora FILE: give that, too")
    if args.report and not args.exporting:
        raise UserError("--report is for the model card of --export or --export-lora: give one of them, too")
    if args.exporting:
        parser.note_idle(["--out", "--seeds", "--fps", "--batch", "--offload"], "--prompt or --prompts")
        args.offload = True  # the parts are written one by one, and need not be on a GPU together
    if not args.exporting and bool(args.prompt) == bool(args.prompts):
        raise UserError("give prompts: either --prompt TEXT ... or --prompts FILE")
    if args.prompt_column and not args.prompts:
        raise UserError("--prompt-column says where the prompts of --prompts FILE are: give that, too")
    is_teachers = args.steps is not None or args.guidance is not None or args.negative_prompt is not None
    if is_teachers and args.student and not args.side_by_side:
        raise UserError(
            "--steps, --guidance and --negative-prompt are the teacher's, and a student has its own steps: "
            "leave them out, or add --side-by-side"
        )
    if args.side_by_side and not args.student:
        raise UserError("--side-by-side compares a --student with its teacher")
    for prompt in args.prompt or ():
        check_prompt(prompt)
    if args.export_lora is not None:
        check_lora_file(args.export_lora)
        args.export_lora = os.path.abspath(args.export_lora)
    elif args.exporting:
        args.export = os.path.abspath(args.export)  # without a slash at the end
        check_new(args.export)
    else:
        check_folder(args.out)
    return args


def check_prompt(prompt):
    """UserError where there is no text in it, or what is no text."""
    if not prompt.strip():
        raise UserError("a --prompt is empty")
    if not is_encodable(prompt):
        raise UserError(f"the --prompt {prompt!r} is not UTF-8 text")


def main(argv=None):
    args = parse_arguments(argv)
    prompts = read_prompts(args.prompts, args.prompt_column) if args.prompts else args.prompt
    table = read_table(args.report) if args.report else None
    if args.student:
        # found once, as a run that goes on may have another one soon
        args.student, _ = find_checkpoint(args.student)
    students = [args.student] if args.student else []
    fill_from_students(args, students)
    if not args.exporting:
        check_media(args)
    teacher = common.load_teacher_from(args, own_device())
    if args.exporting:
        write = export_student if args.export_lora is None else export_student_lora
        write(args, teacher, table)
        return
    teacher.check(prompts)
    systems = []
    if args.side_by_side or not args.student:
        systems.append(System(teacher, steps=args.steps, guidance=args.guidance))
    if args.student:
        folder, student, _ = common.open_student(args.student, teacher)
        systems.append(load_system(args, folder, student))
    prepare_folder(args, systems, prompts)
    draw(args, systems, prompts)
    kind = "videos" if teacher.video else "images"
    print(f"{len(prompts) * len(args.seeds)} {kind} in {make_printable(args.out)}")


def check_media(args):
    """UserError where videos cannot be written, and for --fps of pictures; without reading weights."""
    if common.read_family(args.teacher).video:
        require_video_writer()
    elif args.fps:
        raise UserError(f"--fps is for videos, and the teacher {args.teacher} draws pictures")


def load_system(args, folder, student):
    """The student of a checkpoint's folder, ready to draw. The teacher's network makes way for it, unless
    that draws, too."""
    teacher = student.teacher
    if not args.side_by_side:
        teacher.denoiser.to("cpu")
    return System(teacher, student, common.load_student(folder, teacher), checkpoint=folder)


def export_student(args, teacher, table):
    """Writes the student to --export, and says how to draw with it. table: of --report, for its card."""
    folder, student, meta = common.open_student(args.student, teacher)
    student.scheduler()  # where there is none the network need not be made
    system = load_system(args, folder, student)
    imports = "import torch; from diffusers import DiffusionPipeline"
    lines = [imports, f"images = {write_line(system, PLACE)}[0]"]
    export(system, args.export, write_card(student, meta, os.path.basename(args.export), lines, table))
    print(f"{make_printable(args.export)}: a diffusers pipeline. It draws this student's samples with")
    print(imports)
    print(write_line(system, args.export))


def export_student_lora(args, teacher, table):
    """The same for a LoRA file, --export-lora."""
    _, student, meta = common.open_student(args.student, teacher)

    def load_networks():
        return teacher.network(args.student), teacher.network()

    said = export_lora(student, args.student, args.export_lora, args.rank, load_networks)
    folder, name = os.path.split(args.export_lora)
    lines = write_lora_lines(student, args.export_lora, is_card=True)
    card = write_card(student, meta, name.removesuffix(".safetensors"), lines, table, lora=said)
    write_text(os.path.join(folder, "README.md"), card)
    print(f"{make_printable(args.export_lora)}: a LoRA file, with scheduler/ beside it: {said}.")
    print("It draws this student's samples with")
    print("\n".join(write_lora_lines(student, args.export_lora)))


def read_table(path):
    """The Markdown table of a report.json of evaluate.py. UserError for any other file."""
    report = read_json(path)
    try:
        return format_table(report["rows"], report["paper"])
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise UserError(f"--report {path} is no report.json of evaluate.py") from error


def prepare_folder(args, systems, prompts):
    """Makes --out, with an index of what will be in it. UserError where it holds anything else."""
    index = {
        "prompts": prompts,
        "seeds": args.seeds,
        "fps": args.fps or systems[0].teacher.fps,
        "systems": [system.describe() for system in systems],
    }
    names = os.listdir(args.out) if os.path.isdir(args.out) else []
    samples = [name for name in names if re.fullmatch(r"\d{4,}-\d+\.(png|mp4)|grid\.png", name)]
    check_index(args.out, index, bool(samples))
    make_folder(args.out)
    remove_leftovers(args.out)
    write_sealed(os.path.join(args.out, "index.json"), index)


def draw(args, systems, prompts):
    """Draws every prompt with every seed, systems side by side, and a grid of the first ones."""
    teacher = systems[0].teacher
    samples = 8 if teacher.video else 64  # in the grid
    most = math.ceil(samples / len(args.seeds))  # prompts in the grid
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


if __name__ == "__main__":
    launch(main)
