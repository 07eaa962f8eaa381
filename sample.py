"""Draws pictures with a student, or with a teacher for comparison.

    python sample.py --student runs/adm-sdxl --prompt "a small red circle" "a blue square" --seeds 0 1 2 3
    python sample.py --teacher sdxl --steps 25 --guidance 5 --prompts prompts.txt --out samples/teacher

Writes OUT/0000-0.png ... (prompt number, seed) and OUT/grid.png, a row a prompt. A picture depends on its prompt's number and its
seed alone. Students sample with the steps that they were trained for, without guidance.
"""
import os

import torch
from tqdm import tqdm

import common
from common import UserError


class System:
    """A student or a teacher, ready to draw: `pictures` is all that its user sees of the difference."""

    def __init__(self, teacher, student=None, steps=25, guidance=5.0):
        """teacher: a common.Teacher; student: a checkpoint folder, or None for the teacher's own sampler with these steps and guidance."""
        self.teacher, self.student, self.guidance = teacher, None, guidance
        if student:
            self.net, self.student, _ = common.load_student(student, teacher, teacher.device)
        self.steps = self.student.steps if student else steps
        self.nfe = self.steps if student or guidance == 1 else 2 * self.steps

    @torch.no_grad()
    def pictures(self, prompts, numbers, seed):
        """n prompts and their numbers (which choose the noise) -> pixels [n, 3, H, W] in [-1, 1], on the CPU."""
        rows = common.Rows(numbers, (seed,), self.teacher.device)
        cond = self.teacher.encode(prompts)
        if self.student:
            latents = self.student.sample(self.net, rows, cond)
        else:
            latents = self.teacher.sample(rows.normal(*self.teacher.latent_shape), cond, self.steps, self.guidance)
        return self.teacher.decode(latents).clamp(-1, 1).cpu()


def load_teacher(args, students):
    """The teacher of the command line, by default that of the first student, at the resolution of the students."""
    if not args.teacher and not students:
        raise UserError("give a --student folder, a --teacher, or both")
    meta = common.find_checkpoint(students[0])[1] if students else {}
    device = common.own_device()
    return common.load_teacher(args.teacher or meta["teacher"], device, common.dtype_of(args.precision, device), meta.get("resolution"))


def add_system_arguments(parser):
    parser.add("--teacher", "sdxl, a pipeline folder, or a hub id (default the student's own)")
    parser.add("--steps", "of the teacher's sampler", type=common.positive, default=25)
    parser.add("--guidance", "classifier-free guidance scale of the teacher", type=common.non_negative, default=5.0)
    parser.add("--precision", "of the networks (default bf16 on a GPU)", choices=("fp32", "bf16"))
    parser.add("--batch", "pictures at a time", type=common.positive, default=16)


def main(argv=None):
    parser = common.Parser(__doc__)
    add_system_arguments(parser)
    parser.add("--student", "a run folder of adp.py or adm.py, or one of its checkpoints (default: the teacher draws)")
    parser.add("--prompt", "prompts", nargs="+")
    parser.add("--prompts", "text file, a prompt a line")
    parser.add("--seeds", "a picture of every prompt for each", type=common.whole, nargs="+", default=[0])
    parser.add("--out", "folder for the pictures", default="samples")
    args = parser.parse_args(argv)
    if bool(args.prompt) == bool(args.prompts):
        raise UserError("give prompts: either --prompt TEXT ... or --prompts FILE")
    prompts = args.prompt or common.read_prompts(args.prompts)

    system = System(load_teacher(args, [args.student] if args.student else []), args.student, args.steps, args.guidance)
    system.teacher.check(prompts)
    common.make_folder(args.out)
    grid = {}
    work = [(seed, range(i, min(i + args.batch, len(prompts)))) for i in range(0, len(prompts), args.batch) for seed in args.seeds]
    for seed, numbers in tqdm(work, unit="batch"):
        for i, picture in zip(numbers, system.pictures([prompts[i] for i in numbers], numbers, seed)):
            common.save_grid(picture[None], os.path.join(args.out, f"{i:04d}-{seed}.png"), padding=0)
            if i < 64:
                grid[i, seed] = picture
    common.save_grid(torch.stack([grid[key] for key in sorted(grid)]), os.path.join(args.out, "grid.png"), columns=len(args.seeds))
    print(f"{len(prompts) * len(args.seeds)} pictures in {args.out}")


if __name__ == "__main__":
    common.launch(main)
