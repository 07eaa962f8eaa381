"""FLUX.1-dev: a transformer on text and image tokens, CLIP and T5, flow matching; guidance is an input.

| what | convention |
|---|---|
| time | the network is told sigma, in its activations' precision |
| shift | e^mu, mu linear in the number of tokens: 3.1582 at 1024x1024 |
| guidance | no second pass: the network is told the scale, for which it was distilled. The teacher's is |
| | --guidance, that of student, fake score and discriminator --student-guidance |
| text | T5's last hidden state, padded to 512 and all of it attended to; CLIP's pooled output |
| tokens | text and image apart in the first blocks, together in the single ones, which give both back |
| latents | (z - shift_factor) scaling_factor, as SD3's |

FLUX.1-schnell, which has no guidance and is distilled already, is refused by its guidance_embeds.
"""

import torch

from common import T
from teachers.packed import PackedTeacher


class Flux(PackedTeacher):
    """The family; see above.

    paper silent: embedded guidance: the real score is one pass that is told the scale w, the fake score is
    told the student's own."""

    student_steps = 4
    sampler_steps = 28
    guidance = 3.5
    adm_guidance = 3.5
    embeds_guidance = True
    student_guidance = 3.5
    text_length = 512  # the default of the pipeline's call

    def __init__(self, pipe, *args):
        super().__init__(pipe, *args)
        net = self.denoiser
        self.taps = self.block_taps([*net.transformer_blocks, *net.single_transformer_blocks], 1)
        rows, columns = (torch.arange(side, device=self.device) for side in self.patches)
        places = torch.cartesian_prod(torch.zeros_like(rows[:1]), rows, columns)
        self.places = places.float()  # (0, row, column) of each token

    def guided(self, x_t, t, cond, scale):
        """(x0_hat, eps_hat) of the teacher that is told this scale: always one pass."""
        return self.predict(self.denoiser, x_t, t, self.tell_guidance(cond, scale))

    def count_passes(self, scale):
        return 1

    def tell_guidance(self, cond, scale):
        text = cond["encoder_hidden_states"]
        return {**cond, "guidance": torch.full((len(text),), float(scale), device=text.device)}

    @torch.no_grad()
    def _encode(self, prompts):
        embeds, pooled, _ = self.pipe.encode_prompt(
            list(prompts), None, device=self.device, max_sequence_length=self.text_length
        )
        return {
            "encoder_hidden_states": embeds.to(self.dtype),
            "pooled_projections": pooled.to(self.dtype),
        }

    def condition_shapes(self, length):
        config = self.denoiser.config
        text = (self.text_length, config.joint_attention_dim)
        return {"encoder_hidden_states": text, "pooled_projections": (config.pooled_projection_dim,)}

    def call_settings(self, scale):
        return super().call_settings(scale) | {"max_sequence_length": self.text_length}

    def call(self, net, x, timestep, cond):
        """The raw output of `net`, float32: x [B, C, H, W], the network's timestep [B]."""
        if "guidance" not in cond:
            cond = self.tell_guidance(cond, self.student_guidance)
        tokens = self.pack(x.to(self.dtype))
        places = {"img_ids": self.places, "txt_ids": self.places.new_zeros(self.text_length, 3)}
        t = timestep.to(self.dtype) / T  # rounded twice in bf16, as its pipeline does
        with self.autocast():
            raw = net(tokens, **cond, timestep=t, **places, return_dict=False)[0]
        return self.unpack(raw).float()
