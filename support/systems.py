"""A student or a teacher, ready to draw, with no difference to its user."""

import torch

from support.rows import Rows


class System:
    """A student, or a teacher's own sampler: `images` is all that its user sees of the difference."""

    def __init__(self, teacher, student=None, net=None, steps=None, guidance=None):
        """A student (common.Student) and its network, or neither for the teacher with these steps and
        guidance."""
        self.teacher = teacher
        self.student = student
        self.net = net
        self.guidance = teacher.guidance if guidance is None else guidance
        self.steps = student.steps if student else steps or teacher.sampler_steps
        self.nfe = self.steps if student or self.guidance == 1 else 2 * self.steps

    @torch.no_grad()
    def images(self, prompts, numbers, seeds):
        """P prompts and their numbers (which choose the noise), K seeds -> pixels [P, K, 3, (F,) H, W] in
        [-1, 1], on the CPU."""
        cond = self.teacher.encode(prompts)
        pixels = []
        for seed in seeds:
            rows = Rows(numbers, ("sample", seed), self.teacher.device)
            if self.student:
                latents = self.student.sample(self.net, rows, cond)
            else:
                x_T = rows.normal(*self.teacher.latent_shape)
                latents = self.teacher.sample(x_T, cond, self.steps, self.guidance)
            pixels.append(self.teacher.decode(latents).clamp(-1, 1).cpu())
        return torch.stack(pixels, dim=1)
