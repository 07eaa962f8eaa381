"""Qwen-Image: a transformer on text and image tokens, a language model for text, flow matching.

| what | convention |
|---|---|
| time | the network is told sigma, in its activations' precision |
| shift | e^mu, mu linear in the number of tokens: 2.0007 at 1024x1024. The sampler's levels are then |
| | stretched to end at shift_terminal (0.02): no function of u alone, so for the sampler's times only |
| guidance | null + scale (cond - null), of which each token gets the norm of cond's: the real score in ADM, |
| | as in the pipeline |
| null | " ": the pipeline has no guidance unless it is given a negative prompt |
| text | the last hidden state of Qwen2.5-VL, the 34 tokens of a template cut off; as many rows as tokens, |
| | at most 512, stored as 512 and their number |
| latents | (z - mean) / std of each channel, of an autoencoder of videos: a picture is one frame |
"""

import torch

from common import T
from support.tensors import cut_rows, pad_rows, split_rows
from teachers.packed import PackedTeacher


class QwenImage(PackedTeacher):
    """The family; see above."""

    student_steps = 4
    sampler_steps = 50
    guidance = 4.0
    adm_guidance = 4.0
    null_prompt = " "
    text_length = 512  # the default of the pipeline's call

    def __init__(self, pipe, *args):
        super().__init__(pipe, *args)
        blocks = self.denoiser.transformer_blocks
        self.taps = self.block_taps(blocks, 1)  # (text, image)
        # nothing reads the last block's text
        parts = ("attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "txt_mlp")
        self.unused = [f"transformer_blocks.{len(blocks) - 1}.{part}." for part in parts]

    def times(self, steps):
        times = super().times(steps)
        end = self.pipe.scheduler.config.shift_terminal
        if not end or steps == 1:
            return times
        alpha, _ = self.schedule(torch.tensor(times[:-1], dtype=torch.float64))
        sigma = 1 - alpha * (1 - end) / alpha[-1]
        u = sigma / (self.shift - (self.shift - 1) * sigma)
        return [*(T * u).tolist(), 0.0]

    def combine(self, raw, raw_null, scale):
        guided = self.pack(super().combine(raw, raw_null, scale))
        wanted = self.pack(raw).norm(dim=-1, keepdim=True)
        return self.unpack(guided * (wanted / guided.norm(dim=-1, keepdim=True)))

    @torch.no_grad()
    def _encode(self, prompts):
        embeds, mask = self.pipe.encode_prompt(
            list(prompts), self.device, max_sequence_length=self.text_length
        )
        rows = embeds if mask is None else split_rows(embeds, mask.sum(1))
        text, lengths = pad_rows(rows, self.text_length)
        return {"encoder_hidden_states": text.to(self.dtype), "length": lengths}

    def condition_shapes(self, length):
        text = (self.text_length, self.denoiser.config.joint_attention_dim)
        return {"encoder_hidden_states": text, "length": ()}

    def call(self, net, x, timestep, cond):
        """The raw output of `net`, float32: x [B, C, H, W], the network's timestep [B]."""
        text, mask = cut_rows(cond["encoder_hidden_states"], cond["length"])
        shapes = [[(1, *self.patches)]] * len(x)
        tokens = self.pack(x.to(self.dtype))
        t = timestep.to(self.dtype) / T  # rounded twice in bf16, as its pipeline does
        with self.autocast():
            raw = net(tokens, text, mask, t, shapes, return_dict=False)[0]
        return self.unpack(raw).float()

    def _decode(self, latents):
        # as vae.decode of one frame, which then clamps to [-1, 1] and so ends gradients there
        vae = self.pipe.vae
        pixels = vae.decoder(vae.post_quant_conv(latents.to(self.dtype).unsqueeze(2)))
        return pixels.squeeze(2).float()

    def call_settings(self, scale):
        height, width = self.resolution
        own = {"true_cfg_scale": scale, "height": height, "width": width}
        return own if scale <= 1 else own | {"negative_prompt": self.null_prompt}
