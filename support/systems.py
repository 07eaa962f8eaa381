"""A student or a teacher, ready to draw, with no difference to its user."""

import contextlib
import os

import torch

from support.checkpoints import PARTS
from support.files import compute_checksum_of_json, read_sealed
from support.offload import at_work
from support.rng import RowRNG


class System:
    """A student, or a teacher's own sampler: `images` is all that its user sees of the difference."""

    def __init__(self, teacher, student=None, net=None, steps=None, guidance=None, checkpoint=None):
        """A student (common.Student), its network and the step folder that they come from, or none of them
        for the teacher with these steps and guidance."""
        self.teacher = teacher
        self.student = student
        self.net = net if student else teacher.denoiser
        self.checkpoint = checkpoint
        self.guidance = teacher.guidance if guidance is None else guidance
        self.steps = student.steps if student else steps or teacher.sampler_steps
        self.nfe = self.steps if student else self.steps * teacher.count_passes(self.guidance)

    @torch.no_grad()
    def images(self, prompts, numbers, seeds):
        """P prompts and their numbers (which choose the noise), K seeds -> pixels [P, K, 3, (F,) H, W] in
        [-1, 1], on the CPU."""
        cond = self.teacher.encode(prompts)
        rngs = [RowRNG(numbers, ("sample", seed), self.teacher.device) for seed in seeds]
        with at_work(self.teacher, self.net):
            latents = [self.sample(rng, cond) for rng in rngs]
        pixels = [self.teacher.decode(x).clamp(-1, 1).cpu() for x in latents]
        return torch.stack(pixels, dim=1)

    def sample(self, rng, cond):
        """Noise and condition of B prompts -> latents [B, ...]."""
        if self.student:
            return self.student.sample(self.net, rng, cond)
        x_T = rng.normal(*self.teacher.latent_shape)
        return self.teacher.sample(x_T, cond, self.steps, self.guidance)

    @contextlib.contextmanager
    def on_device(self):
        """Inside, its network is on the teacher's device, and then on the CPU: systems that draw one after
        the other take the memory of one. With --offload it comes for each batch."""
        if not self.teacher.offload:
            self.net.to(self.teacher.device)
        try:
            yield
        finally:
            self.net.to("cpu")

    def describe(self):
        """All that its pictures depend on beside prompts and seeds, {name: value}, for a folder's index."""
        index = {
            "teacher": self.teacher.fingerprint,
            "resolution": list(self.teacher.resolution),
            "frames": self.teacher.frames,
            "precision": "fp32" if self.teacher.dtype == torch.float32 else "bf16",
            "steps": self.steps,
        }
        if self.teacher.video and self.teacher.pipe.vae.use_tiling:
            index["tiles"] = True
        if not self.student:
            return index | {"guidance": self.guidance, "negative_prompt": self.teacher.null_prompt}
        meta = read_sealed(os.path.join(self.checkpoint, "meta.json"))
        files = meta["files"]
        checksums = {name: files[name] for name in files if name.startswith(PARTS["student"])}
        student = {
            "student": os.path.realpath(self.checkpoint),
            "parametrisation": self.student.parametrisation,
            "weights": compute_checksum_of_json(checksums),
        }
        if self.teacher.embeds_guidance:
            student["guidance"] = self.student.guidance
        return index | student
