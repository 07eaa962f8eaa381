"""Stable Diffusion 1.5 and 2.1-base: SDXL's U-Net and noise schedule with one text encoder, and no more.

| what | convention |
|---|---|
| prediction | noise (2.1 at 768 pixels: v); timesteps 0 to 999 of one variance-preserving schedule |
| text | CLIP's last hidden state after its final norm; 2.1's encoder has left out its last layer already |
| null | the empty prompt |
| latents | times the VAE's scaling_factor |
| sampler | the pipeline's own is PNDM, the teacher's here DDIM along the same schedule |
| left out | the safety checker: it is neither loaded nor exported |
"""

import torch

from common import SDXL, Teacher


class StableDiffusion(SDXL):
    """The family; see above."""

    student_steps = 4
    sampler_steps = 50
    guidance = 7.5
    adm_guidance = 7.5
    batch = 8
    _null = Teacher._null
    null_prompt = Teacher.null_prompt

    @torch.no_grad()
    def _encode(self, prompts):
        embeds, _ = self.pipe.encode_prompt(list(prompts), self.device, 1, False)
        return {"encoder_hidden_states": embeds.to(self.dtype)}

    def condition_shapes(self, length):
        return {"encoder_hidden_states": (length, self.denoiser.config.cross_attention_dim)}

    def call(self, net, x, timestep, cond):
        """The raw output of `net`, float32: x [B, C, H, W], the network's timestep [B]."""
        with self.autocast():
            return net(x.to(self.dtype), timestep.float(), **cond, return_dict=False)[0].float()
