"""Z-Image: a transformer on one sequence of image and text tokens, a language model for text, flow matching.

| what | convention |
|---|---|
| time | the network is told 1 - sigma, and says x_0 - eps: both are turned round in `call` |
| shift | 6, fixed (Z-Image-Turbo, which is distilled already: 3) |
| guidance | the pipeline counts from 0: its guidance_scale 5 is 6 here, null + 6 (cond - null) |
| text | the last hidden state but one of Qwen3, after its chat template; as many rows as tokens, stored as |
| | 512 and their number |
| tokens | the image's first, then text, each padded to a multiple of 32 |
| latents | (z - shift_factor) scaling_factor, as SD3's |
"""

import torch

from common import FlowTeacher, T
from support.schedulers import make_shifted_scheduler
from support.tensors import pad_rows, split_rows


class ZImage(FlowTeacher):
    """The family; see above."""

    student_steps = 8  # as Z-Image-Turbo
    sampler_steps = 50
    guidance = 6.0
    adm_guidance = 6.0
    text_length = 512  # the default of the pipeline's call

    def __init__(self, pipe, *args):
        super().__init__(pipe, *args)
        self.taps = self.block_taps(self.denoiser.layers)

    def _geometry(self):
        factor = self.pipe.vae_scale_factor
        return factor, 2, 1024 // factor

    @torch.no_grad()
    def _encode(self, prompts):
        rows, _ = self.pipe.encode_prompt(list(prompts), self.device, do_classifier_free_guidance=False)
        text, lengths = pad_rows(rows, self.text_length)
        return {"encoder_hidden_states": text.to(self.dtype), "length": lengths}

    def condition_shapes(self, length):
        return {"encoder_hidden_states": (self.text_length, self.denoiser.config.cap_feat_dim), "length": ()}

    def call(self, net, x, timestep, cond):
        """The raw output of `net`, float32: x [B, C, H, W], the network's timestep [B]."""
        text = split_rows(cond["encoder_hidden_states"], cond["length"])
        images = list(x.to(self.dtype).unsqueeze(2))  # of one frame
        with self.autocast():
            raw = net(images, 1 - timestep.float() / T, text, return_dict=False)[0]
        return -torch.stack(raw).squeeze(2).float()

    def call_settings(self, scale):
        return super().call_settings(scale) | {"guidance_scale": scale - 1}

    def flow_scheduler(self, sigmas):
        return make_shifted_scheduler(sigmas)
