"""--offload: modules that wait on the CPU between their uses, and conditions that are remembered."""

import contextlib
import math

import torch

LARGE = 2**22  # pixels of a video, all frames together; whole, one of CogVideoX takes 23 GB to decode
TOGETHER = 4  # prompts that are encoded in one pass; of 64 Z-Image's encoder would keep 13 GB of activations


class Offload:
    """Components of a pipeline that wait on the CPU: text encoders, whose conditions are kept for the next
    iterations, and the VAE."""

    def __init__(self, pipe, names, encode, device):
        """names: of the components; encode: n prompts -> condition {name: [n, ...]}, on the device."""
        modules = {name: getattr(pipe, name) for name in names}
        self.modules = {name: module.to("cpu") for name, module in modules.items() if module is not None}
        self.encoders = [name for name in self.modules if name != "vae"]
        self.encode = encode
        self.device = device
        self.conditions = {}  # {prompt: its condition, on the CPU}

    def at_work(self, net):
        """Inside, this denoiser is on the device, where it stays when it trains or is trained with."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def resident(self, *names):
        """Inside, these components are on the device."""
        moved = [self.modules[name] for name in names if name in self.modules]
        for module in moved:
            module.to(self.device)
        try:
            yield
        finally:
            for module in moved:
                module.to("cpu")

    def encode_ahead(self, prompts):
        """Encodes all that the next iterations need and forgets the rest: the encoders come to the device
        once."""
        self.conditions = {}
        self.remember(prompts)

    def look_up(self, prompts):
        """n prompts -> condition, on the device."""
        self.remember(prompts)
        rows = [self.conditions[prompt] for prompt in prompts]
        together = {}
        for name in rows[0]:
            together[name] = torch.stack([row[name] for row in rows]).to(self.device)
        return together

    def remember(self, prompts):
        """Encodes those that are not known yet, and forgets none."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.conditions]
        if not new:
            return
        with self.resident(*self.encoders):
            for first in range(0, len(new), TOGETHER):
                part = new[first : first + TOGETHER]
                cond = {name: value.cpu() for name, value in self.encode(part).items()}
                for i, prompt in enumerate(part):
                    self.conditions[prompt] = {name: value[i] for name, value in cond.items()}


class InTurn(Offload):
    """The same of a teacher that only draws: its denoiser, or a student's, waits, too, so that the device has
    one component at a time, and conditions are kept for one batch."""

    @contextlib.contextmanager
    def at_work(self, net):
        net.to(self.device)
        try:
            yield
        finally:
            net.to("cpu")

    def look_up(self, prompts):
        self.conditions = {}
        return super().look_up(prompts)


def at_work(teacher, net):
    """Inside, a network of the teacher's kind is on its device: with --offload for that time alone."""
    return teacher.offload.at_work(net) if teacher.offload else contextlib.nullcontext()


def decode_in_tiles(teacher):
    """From here on large videos are decoded piece by piece."""
    if teacher.video and teacher.frames * math.prod(teacher.resolution) > LARGE:
        teacher.pipe.vae.enable_tiling()
