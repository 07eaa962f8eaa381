"""Draws pictures or videos with a student, with a teacher, or with both side by side; exports a student as a diffusers pipeline.

    python sample.py --student runs/adm-sdxl --prompt "a small red circle" "a blue square" --seeds 0 1 2 3
    python sample.py --teacher cogvideox --prompts prompts.txt --out samples/teacher
    python sample.py --student runs/adm-cogvideox --prompts prompts.txt --side-by-side
    python sample.py --student runs/adm-sdxl --export exported/sdxl

Writes OUT/0000-0.png or .mp4 ... (prompt number, seed) and OUT/grid.png: a row a prompt, or a video's frames. A sample depends on its
prompt's number and its seed alone. Students sample with the steps that they were trained for, without guidance.
"""
import os

import torch
from tqdm import tqdm

import common
from common import UserError


class System:
    """A student or a teacher, ready to draw: `pictures` is all that its user sees of the difference."""

    def __init__(self, teacher, student=None, steps=None, guidance=None):
        """teacher: a common.Teacher; student: a checkpoint folder, or None for the teacher's own sampler with these steps and guidance."""
        self.teacher, self.student = teacher, None
        self.steps, self.guidance = steps or teacher.sampler_steps, teacher.guidance if guidance is None else guidance
        if student:
            self.net, self.student, _ = common.load_student(student, teacher)
            self.steps = self.student.steps
        self.nfe = self.steps if student or self.guidance == 1 else 2 * self.steps

    @torch.no_grad()
    def pictures(self, prompts, numbers, seeds):
        """P prompts and their numbers (which choose the noise), K seeds -> pixels [P, K, 3, (F,) H, W] in [-1, 1], on the CPU."""
        cond, pixels = self.teacher.encode(prompts), []
        for seed in seeds:
            rows = common.Rows(numbers, (seed,), self.teacher.device)
            if self.student:
                latents = self.student.sample(self.net, rows, cond)
            else:
                latents = self.teacher.sample(rows.normal(*self.teacher.latent_shape), cond, self.steps, self.guidance)
            pixels.append(self.teacher.decode(latents).clamp(-1, 1).cpu())
        return torch.stack(pixels, dim=1)

    def export(self, folder):
        """Writes the student as a complete diffusers pipeline: DiffusionPipeline.from_pretrained(folder)(prompt, num_inference_steps=
        self.steps, guidance_scale=1) samples as it does. UserError where diffusers has no such scheduler."""
        components = self.teacher.pipe.components | {self.teacher.denoiser_name: self.net, "scheduler": self.student.scheduler()}
        optional = {name: value for name, value in self.teacher.pipe.config.items() if isinstance(value, bool)}
        with common.replacing(folder) as temporary:
            type(self.teacher.pipe)(**components, **optional).save_pretrained(temporary)


def load_teacher(args, students):
    """The teacher of the command line, by default that of the first student, at the resolution and length of that student."""
    if not args.teacher and not students:
        raise UserError("give a --student folder, a --teacher, or both")
    meta = common.find_checkpoint(students[0])[1] if students else {}
    args.teacher = args.teacher or meta["teacher"]
    args.resolution, args.frames = args.resolution or meta.get("resolution"), args.frames or meta.get("frames")
    return common.load_teacher_of(args, common.own_device())


def add_system_arguments(parser):
    common.add_teacher_arguments(parser, required=False)
    parser.add("--steps", f"of the teacher's sampler (default {common.family_default('sampler_steps')})", type=common.steps)
    parser.add("--guidance", f"classifier-free guidance scale of the teacher (default {common.family_default('guidance')})", type=common.non_negative)


def main(argv=None):
    parser = common.Parser(__doc__)
    add_system_arguments(parser)
    parser.add("--student", "a run folder of adp.py or adm.py, or one of its checkpoints (default: the teacher draws)")
    parser.add("--prompt", "prompts", nargs="+")
    parser.add("--prompts", "text file, a prompt a line")
    parser.add("--seeds", "a picture of every prompt for each", type=common.seed, nargs="+", default=[0])
    parser.add("--side-by-side", "the teacher's sample of the same noise on the left of the student's", action="store_true")
    parser.add("--fps", "frames a second of a video (default the teacher's: CogVideoX 8)", type=common.positive)
    parser.add("--out", "folder for the pictures", default="samples")
    parser.add("--export", "write the student to this folder as a diffusers pipeline, and draw nothing")
    args = parser.parse_args(argv)
    if args.export and (args.prompt or args.prompts or not args.student):
        raise UserError("--export takes a --student and no prompts")
    if not args.export and bool(args.prompt) == bool(args.prompts):
        raise UserError("give prompts: either --prompt TEXT ... or --prompts FILE")
    if args.side_by_side and not args.student:
        raise UserError("--side-by-side compares a --student with its teacher")
    if args.export and os.path.exists(args.export):
        raise UserError(f"{args.export} is there already; give another folder")
    if not all(map(str.strip, args.prompt or ())):
        raise UserError("a --prompt is empty")
    prompts = args.prompt or (common.read_prompts(args.prompts) if args.prompts else [])

    teacher = load_teacher(args, [args.student] if args.student else [])
    systems = [System(teacher, args.student, args.steps, args.guidance)]
    if args.export:
        systems[0].export(args.export)
        print(f"{args.export}: DiffusionPipeline.from_pretrained({args.export!r})(prompt, num_inference_steps={systems[0].steps}, guidance_scale=1)")
        return
    if args.side_by_side:
        systems.insert(0, System(teacher, None, args.steps, args.guidance))
    if teacher.video:
        common.needed("imageio_ffmpeg", "imageio-ffmpeg", "writes mp4 files")
    teacher.check(prompts)
    common.make_folder(args.out)
    shown = []
    with tqdm(total=len(prompts) * len(args.seeds), unit="video" if teacher.video else "picture") as bar:
        for first in range(0, len(prompts), args.batch):
            numbers = range(first, min(first + args.batch, len(prompts)))
            for seed in args.seeds:
                drawn = [system.pictures([prompts[i] for i in numbers], numbers, [seed])[:, 0] for system in systems]
                for i, pixels in zip(numbers, torch.cat(drawn, dim=-1)):
                    path = os.path.join(args.out, f"{i:04d}-{seed}")
                    if teacher.video:
                        common.save_video(pixels, f"{path}.mp4", args.fps or teacher.fps)
                    else:
                        common.save_grid(pixels[None], f"{path}.png", padding=0)
                    if i < (8 if teacher.video else 64):
                        shown.append(((i, seed), pixels))
                bar.update(len(numbers))
    shown.sort(key=lambda entry: entry[0])
    common.save_grid(torch.stack([pixels for _, pixels in shown]), os.path.join(args.out, "grid.png"), columns=8 if teacher.video else len(args.seeds))
    print(f"{len(prompts) * len(args.seeds)} {'videos' if teacher.video else 'pictures'} in {args.out}")


if __name__ == "__main__":
    common.launch(main)
