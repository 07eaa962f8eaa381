"""Tiny pipelines of the families beyond the paper's, of the real classes, their weights random."""

from diffusers import (
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    CLIPTextModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    UMT5Config,
    UMT5EncoderModel,
)

from tiny.parts import TOKENS, build_clip, build_t5, build_t5_tokenizer, build_tokenizer, build_vae


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


def build_wan():
    """A WanPipeline: 4x3x8x6 latents of 9x64x48 videos."""
    transformer = WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        text_dim=64,
        freq_dim=64,
        ffn_dim=256,
        num_layers=4,
        rope_max_seq_len=64,
    )
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, -0.4],
        latents_std=[0.5, 1.0, 1.5, 2.0],
    )
    return WanPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        **build_wan_text(64),
    )


def build_wan_text(width):
    """Its text encoder with its tokenizer."""
    tokenizer = build_t5_tokenizer()
    config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=16,
        d_ff=64,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )
    return {"tokenizer": tokenizer, "text_encoder": UMT5EncoderModel(config)}


def build_z_image():
    """A ZImagePipeline: 4x8x8 latents of 32x32 images."""
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=96,
        n_layers=4,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=32,
        axes_dims=[8, 12, 12],
        axes_lens=[1024, 32, 32],
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):  # zeros in the class
        nn.init.normal_(token)
    return ZImagePipeline(
        transformer=transformer,
        vae=build_vae(shift_factor=0.1),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        **build_z_image_text(32),
    )


def build_qwen_tokenizer():
    """A Qwen2Tokenizer with a token a byte."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    symbols = [*special, *sorted(ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer(
        vocab={symbol: number for number, symbol in enumerate(symbols)},
        merges=[],
        eos_token="<|im_end|>",
        additional_special_tokens=special[1:],
        padding_side="right",
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
        "{% endfor %}<|im_start|>assistant\n"
    )
    return tokenizer


def size_qwen(width, tokenizer):
    """The settings of a language model of two layers."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def build_z_image_text(width):
    """Its text encoder with its tokenizer."""
    tokenizer = build_qwen_tokenizer()
    config = Qwen3Config(**size_qwen(width, tokenizer), head_dim=16)
    return {"tokenizer": tokenizer, "text_encoder": Qwen3Model(config)}


def build_qwen_image():
    """A QwenImagePipeline: 4x8x8 latents of 32x32 images."""
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=3,
        joint_attention_dim=32,
        axes_dims_rope=(8, 12, 12),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, -0.4],
        latents_std=[0.5, 1.0, 1.5, 2.0],
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=4,
        max_image_seq_len=64,
        shift_terminal=0.02,
    )
    return QwenImagePipeline(
        transformer=transformer, vae=vae, scheduler=scheduler, **build_qwen_image_text(32)
    )


def build_qwen_image_text(width):
    """Its text encoder with its tokenizer."""
    tokenizer = build_qwen_tokenizer()
    half = width // 4  # of a head's size, two heads
    text = size_qwen(width, tokenizer)
    text["rope_scaling"] = {"type": "mrope", "mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 1,
        "out_hidden_size": width,
        "fullatt_block_indexes": [0],
    }
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=3, video_token_id=4, tie_word_embeddings=False
    )
    return {"tokenizer": tokenizer, "text_encoder": Qwen2_5_VLForConditionalGeneration(config)}


def build_flux():
    """A FluxPipeline: 4x8x8 latents of 32x32 images."""
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=3,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64
    )
    return FluxPipeline(
        transformer=transformer,
        vae=build_vae(shift_factor=0.1),
        scheduler=scheduler,
        **build_flux_text(32, 64),
    )


def build_flux_text(pooled_width, width, length=TOKENS):
    """Its text encoders with their tokenizers."""
    tokenizer = build_t5_tokenizer()
    return {
        **build_stable_diffusion_text(pooled_width, length),
        "tokenizer_2": tokenizer,
        "text_encoder_2": build_t5(width, tokenizer, layers=1),
    }


FAMILIES = {  # "size": of its samples, where its configs do not say it; "other_size": another
    "stable-diffusion": {
        "build": build_stable_diffusion,
        "other_size": {"resolution": (48, 32)},
    },
    "wan": {
        "build": build_wan,
        "size": {"resolution": (64, 48), "frames": 9},
        "other_size": {"resolution": (32, 64), "frames": 5},
    },
    "z-image": {
        "build": build_z_image,
        "size": {"resolution": (32, 32)},
        "other_size": {"resolution": (48, 32)},
    },
    "flux": {
        "build": build_flux,
        "size": {"resolution": (32, 32)},
        "other_size": {"resolution": (48, 32)},
    },
    "qwen-image": {
        "build": build_qwen_image,
        "size": {"resolution": (32, 32)},
        "other_size": {"resolution": (48, 32)},
    },
}
TEXT = {  # pipeline: its text encoders and tokenizers, of the widths that its denoiser's config wants
    "StableDiffusionPipeline": lambda config, length: build_stable_diffusion_text(
        config.cross_attention_dim, length
    ),
    "WanPipeline": lambda config, length: build_wan_text(config.text_dim),
    "ZImagePipeline": lambda config, length: build_z_image_text(config.cap_feat_dim),
    "FluxPipeline": lambda config, length: build_flux_text(
        config.pooled_projection_dim, config.joint_attention_dim, length
    ),
    "QwenImagePipeline": lambda config, length: build_qwen_image_text(config.joint_attention_dim),
}
