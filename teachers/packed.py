"""What FLUX.1 and Qwen-Image share: 2x2 squares of latents packed into tokens, and a dynamic shift.

Outside of `call`, latents are maps [B, C, H, W] as those of any other family.
"""

import torch.nn.functional as F

from common import FlowTeacher
from support.schedulers import make_shifted_scheduler


class PackedTeacher(FlowTeacher):
    """A token [4C] has the numbers of a square in the order (channel, row, column)."""

    packing = 2

    def _geometry(self):
        return self.pipe.vae_scale_factor, self.packing, self.pipe.default_sample_size

    def pack(self, x):
        """Latents [B, C, H, W] -> tokens [B, H/2 W/2, 4C]."""
        return F.pixel_unshuffle(x, self.packing).flatten(2).transpose(1, 2)

    def unpack(self, x):
        return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, self.patches), self.packing)

    def flow_scheduler(self, sigmas):
        return make_shifted_scheduler(sigmas)
