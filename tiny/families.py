"""Tiny pipelines of the families beyond the paper's, of the real classes, their weights random."""

from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel

from tiny.parts import TOKENS, build_clip, build_tokenizer, build_vae


def build_stable_diffusion():
    """A StableDiffusionPipeline of the size of a thumbnail: 4x8x8 latents of 32x32 images."""
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=32,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
        timestep_spacing="trailing",
    )
    return StableDiffusionPipeline(
        vae=build_vae(),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **build_stable_diffusion_text(32),
    )


def build_stable_diffusion_text(width, length=TOKENS):
    """Its text encoder with its tokenizer: {component: it}."""
    tokenizer = build_tokenizer(length)
    return {"tokenizer": tokenizer, "text_encoder": build_clip(CLIPTextModel, width, tokenizer, width)}


FAMILIES = {"stable-diffusion": {"build": build_stable_diffusion}}
TEXT = {  # pipeline: its text encoders and tokenizers, of the widths that its denoiser's config wants
    "StableDiffusionPipeline": lambda config, length: build_stable_diffusion_text(
        config.cross_attention_dim, length
    ),
}
