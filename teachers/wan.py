"""Wan 2.1 and Wan 2.2 TI2V-5B, text to video: a transformer with cross-attention to text, flow matching.

| what | convention |
|---|---|
| latents | [B, C, F, H, W]; (z - mean) / std of each channel; 4 frames of pixels are one of latents |
| sizes | 480x832x81, 16 frames a second; with expand_timesteps (5B, 16 pixels a latent) 704x1280x121, 24 |
| time | 1000 sigma; 5B's pipeline repeats it for every token, which without a picture says the same |
| shift | the scheduler's flow_shift: 3 (Wan 2.1 at 480p), 5 (720p, and 5B) |
| text | UMT5, padded to 512; rows after the prompt are zeros that the network sees, so that the length is |
| | part of the condition; encode_prompt's own default is another |
| sampler | the pipeline's own is UniPC of second order, the teacher's here Euler's at the same times; UniPC |
| | tells the network whole numbers, the teacher what they were before |
| null | the empty prompt |

Refused by support/configs.py: two transformers (Wan 2.2 A14B), image to video.
"""

import torch

from common import FlowTeacher, T
from support.schedulers import make_fixed_scheduler


class Wan(FlowTeacher):
    """The family; see above."""

    student_steps = 8
    sampler_steps = 50
    guidance = 5.0
    adm_guidance = 5.0
    batch = 1
    video = True
    fps = 16
    text_length = 512  # the default of the pipeline's call

    def __init__(self, pipe, path, device, dtype, resolution=None, frames=None):
        super().__init__(pipe, path, device, dtype, resolution)
        own_frames = 81
        if pipe.config.expand_timesteps:
            own_frames = 121
            self.fps = 24
        self._set_frames(frames or own_frames, pipe.vae_scale_factor_temporal)
        self.taps = self.block_taps(self.denoiser.blocks)
        pipe.vae.enable_slicing()

    def _geometry(self):
        factor = self.pipe.vae_scale_factor_spatial
        size = (704, 1280) if self.pipe.config.expand_timesteps else (480, 832)
        return factor, self.denoiser.config.patch_size[1], [side // factor for side in size]

    def times(self, steps):
        # of steps + 1 equally spaced from T to 1, as UniPC has them, the last is left out
        return [*(T - i * (T - 1) / steps for i in range(steps)), 0.0]

    @torch.no_grad()
    def _encode(self, prompts):
        embeds, _ = self.pipe.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_length,
            device=self.device,
        )
        return {"encoder_hidden_states": embeds.to(self.dtype)}

    def condition_shapes(self, length):
        return {"encoder_hidden_states": (self.text_length, self.denoiser.config.text_dim)}

    def call(self, net, x, timestep, cond):
        """The raw output of `net`, float32: x [B, C, F, H, W], the network's timestep [B]."""
        with self.autocast():
            return net(x.to(self.dtype), timestep.float(), **cond, return_dict=False)[0].float()

    def call_settings(self, scale):
        own = {"num_frames": self.frames, "max_sequence_length": self.text_length}
        return super().call_settings(scale) | own

    def flow_scheduler(self, sigmas):
        return make_fixed_scheduler(sigmas)
