"""Which fields of a teacher's configs are honoured, and which values are refused by name."""

import dataclasses
import inspect
import json
import math
import typing

import torch

from support.errors import UserError

# What becomes of a field; docs/teacher-configs.md has them all, and a test holds the two together.
# A tuple has the values that are known here: all others are refused.
HONOURED = "honoured"  # by this project, or by the class of diffusers that is built from it
SAMPLER = "sampler"  # belongs to the pipeline's own sampler; the teacher's sampler here is another
UNUSED = "unused"  # read by nothing here, nor by the pipeline with the values that are known here
OFF = (False, None)
ABSENT = (None,)

# ----------------------------------------------------------------------------------------------------------
# Schedulers
# ----------------------------------------------------------------------------------------------------------

# Samplers of one variance-preserving schedule, which their betas give. Not among them: schedulers of another
# parametrisation (EDM, flow), of distilled networks (LCM, TCD), of inversion and of inpainting.
DIFFUSION = (
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)
FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
# Of these, a deterministic first-order step is what Teacher.step computes.
SAME_SAMPLER = (
    "CogVideoXDDIMScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
)

DIFFUSION_FIELDS = {
    # the schedule
    "num_train_timesteps": (1000,),
    "beta_start": HONOURED,
    "beta_end": HONOURED,
    "beta_schedule": HONOURED,
    "trained_betas": HONOURED,
    "rescale_betas_zero_snr": HONOURED,
    "snr_shift_scale": HONOURED,
    # what the network says, and is told
    "prediction_type": ("epsilon", "v_prediction"),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", None),
    "timestep_type": ("discrete",),
    "use_flow_sigmas": OFF,
    "flow_shift": UNUSED,
    "use_dynamic_shifting": OFF,
    "time_shift_type": UNUSED,
    "shift_terminal": ABSENT,
    # the sampler's times
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "steps_offset": (0, 1),
    # the sampler
    "clip_sample": OFF,
    "clip_sample_range": UNUSED,
    "thresholding": OFF,
    "dynamic_thresholding_ratio": UNUSED,
    "sample_max_value": UNUSED,
    "set_alpha_to_one": SAMPLER,
    "final_sigmas_type": SAMPLER,
    "interpolation_type": SAMPLER,
    "sigma_min": SAMPLER,
    "sigma_max": SAMPLER,
    "use_karras_sigmas": SAMPLER,
    "use_exponential_sigmas": SAMPLER,
    "use_beta_sigmas": SAMPLER,
    "use_lu_lambdas": SAMPLER,
    "lambda_min_clipped": SAMPLER,
    "algorithm_type": SAMPLER,
    "solver_order": SAMPLER,
    "solver_type": SAMPLER,
    "solver_p": SAMPLER,
    "disable_corrector": SAMPLER,
    "predict_x0": SAMPLER,
    "lower_order_final": SAMPLER,
    "euler_at_final": SAMPLER,
    "predictor_order": SAMPLER,
    "corrector_order": SAMPLER,
    "tau_func": SAMPLER,
    "skip_prk_steps": SAMPLER,
}
# this pipeline turns clipping off itself
SD_SCHEDULER_FIELDS = {**DIFFUSION_FIELDS, "clip_sample": (True, False, None)}
FLOW_FIELDS = {
    "num_train_timesteps": (1000,),
    "shift": HONOURED,
    "invert_sigmas": OFF,
    "use_dynamic_shifting": OFF,
    "base_shift": UNUSED,
    "max_shift": UNUSED,
    "base_image_seq_len": UNUSED,
    "max_image_seq_len": UNUSED,
    "time_shift_type": UNUSED,
    "shift_terminal": SAMPLER,
    "use_karras_sigmas": SAMPLER,
    "use_exponential_sigmas": SAMPLER,
    "use_beta_sigmas": SAMPLER,
    "stochastic_sampling": SAMPLER,
}
DYNAMIC_FLOW_FIELDS = {
    **FLOW_FIELDS,
    "use_dynamic_shifting": HONOURED,
    "base_shift": HONOURED,
    "max_shift": HONOURED,
    "base_image_seq_len": HONOURED,
    "max_image_seq_len": HONOURED,
    "time_shift_type": ("exponential",),
}
# Wan's: UniPC, which has the fields of the first kind but none of its schedule, or the flow scheduler's
WAN_SCHEDULER_FIELDS = {
    **DIFFUSION_FIELDS,
    **FLOW_FIELDS,
    "beta_start": UNUSED,
    "beta_end": UNUSED,
    "beta_schedule": UNUSED,
    "trained_betas": UNUSED,
    "rescale_betas_zero_snr": UNUSED,
    "timestep_spacing": UNUSED,
    "steps_offset": UNUSED,
    "prediction_type": ("flow_prediction",),
    "use_flow_sigmas": (True,),
    "flow_shift": HONOURED,
}

# ----------------------------------------------------------------------------------------------------------
# Networks
# ----------------------------------------------------------------------------------------------------------


def honour(*names):
    return dict.fromkeys(names, HONOURED)


UNET_FIELDS = {
    **honour("sample_size", "in_channels", "out_channels", "center_input_sample", "flip_sin_to_cos"),
    **honour("freq_shift", "down_block_types", "mid_block_type", "up_block_types", "only_cross_attention"),
    **honour("block_out_channels", "layers_per_block", "downsample_padding", "mid_block_scale_factor"),
    **honour("dropout", "act_fn", "norm_num_groups", "norm_eps", "cross_attention_dim"),
    **honour("transformer_layers_per_block", "reverse_transformer_layers_per_block", "attention_head_dim"),
    **honour("num_attention_heads", "dual_cross_attention", "use_linear_projection", "upcast_attention"),
    **honour("addition_time_embed_dim", "projection_class_embeddings_input_dim", "cross_attention_norm"),
    **honour("addition_embed_type_num_heads", "resnet_time_scale_shift", "resnet_skip_time_act"),
    **honour("resnet_out_scale_factor", "time_embedding_type", "time_embedding_dim", "conv_in_kernel"),
    **honour(
        "time_embedding_act_fn", "timestep_post_act", "conv_out_kernel", "mid_block_only_cross_attention"
    ),
    "addition_embed_type": ABSENT,
    "attention_type": ("default",),
    "class_embed_type": ABSENT,
    "class_embeddings_concat": OFF,
    "encoder_hid_dim": ABSENT,
    "encoder_hid_dim_type": ABSENT,
    "num_class_embeds": ABSENT,
    "time_cond_proj_dim": ABSENT,  # the guidance scale as an input, of LCM
}
SDXL_FIELDS = {**UNET_FIELDS, "addition_embed_type": ("text_time",)}
SD3_FIELDS = {
    **honour("sample_size", "patch_size", "in_channels", "out_channels", "num_layers", "attention_head_dim"),
    **honour("num_attention_heads", "joint_attention_dim", "caption_projection_dim", "pooled_projection_dim"),
    **honour("pos_embed_max_size", "dual_attention_layers", "qk_norm"),
}
COGVIDEOX_FIELDS = {
    **honour("num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "flip_sin_to_cos"),
    **honour("freq_shift", "time_embed_dim", "text_embed_dim", "num_layers", "dropout", "attention_bias"),
    **honour("sample_width", "sample_height", "sample_frames", "patch_size", "max_text_seq_length"),
    **honour("activation_fn", "timestep_activation_fn", "norm_elementwise_affine", "norm_eps", "patch_bias"),
    **honour("spatial_interpolation_scale", "temporal_interpolation_scale"),
    **honour("use_rotary_positional_embeddings"),
    "temporal_compression_ratio": (4,),
    "ofs_embed_dim": ABSENT,  # of CogVideoX 1.5, as patches over time are
    "patch_size_t": ABSENT,
    "use_learned_positional_embeddings": OFF,  # of image-to-video
}
WAN_FIELDS = {
    **honour("num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "text_dim"),
    **honour("freq_dim", "ffn_dim", "num_layers", "cross_attn_norm", "qk_norm", "eps", "rope_max_seq_len"),
    "patch_size": ([1, 2, 2],),
    "image_dim": ABSENT,  # of image-to-video, as those below
    "added_kv_proj_dim": ABSENT,
    "pos_embed_seq_len": ABSENT,
}
Z_IMAGE_FIELDS = {
    **honour("in_channels", "dim", "n_layers", "n_refiner_layers", "n_heads", "n_kv_heads", "norm_eps"),
    **honour("qk_norm", "cap_feat_dim", "rope_theta", "t_scale", "axes_dims", "axes_lens"),
    "all_patch_size": ([2],),
    "all_f_patch_size": ([1],),
    "siglip_feat_dim": ABSENT,  # of the variant that edits pictures
}
QWEN_IMAGE_FIELDS = {
    **honour("in_channels", "out_channels", "num_layers", "attention_head_dim", "num_attention_heads"),
    **honour("joint_attention_dim", "axes_dims_rope"),
    "patch_size": (2,),
    "guidance_embeds": OFF,
    "pooled_projection_dim": UNUSED,  # of the hub's file; the class has lost it
    "zero_cond_t": OFF,  # of variants that edit pictures, as those below
    "use_additional_t_cond": OFF,
    "use_layer3d_rope": OFF,
}
FLUX_FIELDS = {
    **honour("in_channels", "out_channels", "num_layers", "num_single_layers", "attention_head_dim"),
    **honour("num_attention_heads", "joint_attention_dim", "pooled_projection_dim", "axes_dims_rope"),
    "patch_size": (1,),
    "guidance_embeds": (True,),  # FLUX.1-schnell, which is distilled already, has none
}
VAE_FIELDS = {
    **honour("down_block_types", "up_block_types", "block_out_channels", "layers_per_block", "act_fn"),
    **honour("latent_channels", "norm_num_groups", "scaling_factor", "use_quant_conv", "use_post_quant_conv"),
    "in_channels": UNUSED,  # nothing is encoded
    "out_channels": (3,),
    "force_upcast": UNUSED,  # from fp16, in which nothing runs here
}
IMAGE_VAE_FIELDS = {
    **VAE_FIELDS,
    "mid_block_add_attention": HONOURED,
    "sample_size": UNUSED,  # of tiles
}
SD_VAE_FIELDS = {
    **IMAGE_VAE_FIELDS,
    "shift_factor": (None, 0),  # the pipeline does not read it, as those below
    "latents_mean": ABSENT,
    "latents_std": ABSENT,
}
SDXL_VAE_FIELDS = {
    **SD_VAE_FIELDS,
    "latents_mean": HONOURED,
    "latents_std": HONOURED,
}
SD3_VAE_FIELDS = {
    **SD_VAE_FIELDS,
    "shift_factor": HONOURED,
}
COGVIDEOX_VAE_FIELDS = {
    **VAE_FIELDS,
    "norm_eps": HONOURED,
    "temporal_compression_ratio": (4,),
    "sample_height": UNUSED,
    "sample_width": UNUSED,
    "invert_scale_latents": OFF,  # of image-to-video, CogVideoX 1.5
    "shift_factor": (None, 0),
    "latents_mean": ABSENT,
    "latents_std": ABSENT,
}
WAN_VAE_FIELDS = {
    **honour("base_dim", "decoder_base_dim", "z_dim", "dim_mult", "num_res_blocks", "attn_scales", "dropout"),
    **honour("temperal_downsample", "is_residual", "patch_size", "out_channels", "scale_factor_spatial"),
    **honour("latents_mean", "latents_std"),
    "in_channels": UNUSED,
    "scale_factor_temporal": (4,),
    "clip_output": OFF,  # of the hub's 2.2; the class does not read it
}
QWEN_IMAGE_VAE_FIELDS = {
    **honour("base_dim", "z_dim", "dim_mult", "num_res_blocks", "attn_scales", "dropout"),
    **honour("temperal_downsample", "latents_mean", "latents_std"),
    "input_channels": (3,),
}

# ----------------------------------------------------------------------------------------------------------
# Pipelines
# ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Part:
    """A component of a pipeline: the classes that it may have, and what becomes of its config's fields."""

    classes: tuple
    fields: dict = dataclasses.field(default_factory=dict)
    packing: int = 1  # numbers of a latent's channel that are one token of a denoiser's input


CLIP = Part(("CLIPTextModel",))
POOLED_CLIP = Part(("CLIPTextModelWithProjection",))
T5 = Part(("T5EncoderModel",))
CLIP_TOKENIZER = Part(("CLIPTokenizer", "CLIPTokenizerFast"))
T5_TOKENIZER = Part(("T5Tokenizer", "T5TokenizerFast"))
QWEN_TOKENIZER = Part(("Qwen2Tokenizer", "Qwen2TokenizerFast"))
DYNAMIC_FLOW = Part(("FlowMatchEulerDiscreteScheduler",), DYNAMIC_FLOW_FIELDS)
PIPELINES = {
    "StableDiffusionXLPipeline": {
        "scheduler": Part(DIFFUSION, DIFFUSION_FIELDS),
        "unet": Part(("UNet2DConditionModel",), SDXL_FIELDS),
        "vae": Part(("AutoencoderKL",), SDXL_VAE_FIELDS),
        "text_encoder": CLIP,
        "text_encoder_2": POOLED_CLIP,
        "tokenizer": CLIP_TOKENIZER,
        "tokenizer_2": CLIP_TOKENIZER,
    },
    "StableDiffusion3Pipeline": {
        "scheduler": Part(FLOW, FLOW_FIELDS),
        "transformer": Part(("SD3Transformer2DModel",), SD3_FIELDS),
        "vae": Part(("AutoencoderKL",), SD3_VAE_FIELDS),
        "text_encoder": POOLED_CLIP,
        "text_encoder_2": POOLED_CLIP,
        "text_encoder_3": T5,
        "tokenizer": CLIP_TOKENIZER,
        "tokenizer_2": CLIP_TOKENIZER,
        "tokenizer_3": T5_TOKENIZER,
    },
    "CogVideoXPipeline": {
        "scheduler": Part(DIFFUSION, DIFFUSION_FIELDS),
        "transformer": Part(("CogVideoXTransformer3DModel",), COGVIDEOX_FIELDS),
        "vae": Part(("AutoencoderKLCogVideoX",), COGVIDEOX_VAE_FIELDS),
        "text_encoder": T5,
        "tokenizer": T5_TOKENIZER,
    },
    "StableDiffusionPipeline": {
        "scheduler": Part(DIFFUSION, SD_SCHEDULER_FIELDS),
        "unet": Part(("UNet2DConditionModel",), UNET_FIELDS),
        "vae": Part(("AutoencoderKL",), SD_VAE_FIELDS),
        "text_encoder": CLIP,
        "tokenizer": CLIP_TOKENIZER,
    },
    "WanPipeline": {
        "scheduler": Part(
            ("UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"), WAN_SCHEDULER_FIELDS
        ),
        "transformer": Part(("WanTransformer3DModel",), WAN_FIELDS),
        "vae": Part(("AutoencoderKLWan",), WAN_VAE_FIELDS),
        "text_encoder": Part(("UMT5EncoderModel",)),
        "tokenizer": T5_TOKENIZER,
    },
    "ZImagePipeline": {
        "scheduler": DYNAMIC_FLOW,
        "transformer": Part(("ZImageTransformer2DModel",), Z_IMAGE_FIELDS),
        "vae": Part(("AutoencoderKL",), SD3_VAE_FIELDS),
        "text_encoder": Part(("Qwen3Model",)),
        "tokenizer": QWEN_TOKENIZER,
    },
    "FluxPipeline": {
        "scheduler": DYNAMIC_FLOW,
        "transformer": Part(("FluxTransformer2DModel",), FLUX_FIELDS, packing=4),
        "vae": Part(("AutoencoderKL",), SD3_VAE_FIELDS),
        "text_encoder": CLIP,
        "text_encoder_2": T5,
        "tokenizer": CLIP_TOKENIZER,
        "tokenizer_2": T5_TOKENIZER,
    },
    "QwenImagePipeline": {
        "scheduler": Part(
            ("FlowMatchEulerDiscreteScheduler",), {**DYNAMIC_FLOW_FIELDS, "shift_terminal": HONOURED}
        ),
        "transformer": Part(("QwenImageTransformer2DModel",), QWEN_IMAGE_FIELDS, packing=4),
        "vae": Part(("AutoencoderKLQwenImage",), QWEN_IMAGE_VAE_FIELDS),
        "text_encoder": Part(("Qwen2_5_VLForConditionalGeneration",)),
        "tokenizer": QWEN_TOKENIZER,
    },
}
# of model_index.json: what has to be null, and what it would be
MUST_BE_NULL = {
    "WanPipeline": {
        "transformer_2": "a second network for low noise, as Wan 2.2 A14B has: one network is supported",
        "boundary_ratio": "the time from which a second network is used: one network is supported",
    }
}
FROM_PICTURES = "which starts from a picture or a video: teachers draw from text alone"
FLUX_2 = "of FLUX.2, which is not supported: its shift depends on the number of steps"
UNSUPPORTED = {  # relatives of the pipelines above
    "WanImageToVideoPipeline": FROM_PICTURES,
    "WanVideoToVideoPipeline": FROM_PICTURES,
    "WanVACEPipeline": FROM_PICTURES,
    "WanAnimatePipeline": FROM_PICTURES,
    "FluxControlPipeline": FROM_PICTURES,
    "FluxFillPipeline": FROM_PICTURES,
    "FluxKontextPipeline": FROM_PICTURES,
    "QwenImageEditPipeline": FROM_PICTURES,
    "QwenImageEditPlusPipeline": FROM_PICTURES,
    "QwenImageLayeredPipeline": FROM_PICTURES,
    "ZImageOmniPipeline": FROM_PICTURES,
    "Flux2Pipeline": FLUX_2,
    "Flux2KleinPipeline": FLUX_2,
}
NOTHING = (None, [None, None])
MAY_BE_ABSENT = ("text_encoder_3", "tokenizer_3")
# of the pipelines' components and switches, without an image
NEVER_CALLED = (
    "image_encoder",
    "feature_extractor",
    "add_watermarker",
    "safety_checker",
    "requires_safety_checker",
)
SWITCHES = {  # of model_index.json
    "StableDiffusionXLPipeline": ("force_zeros_for_empty_prompt",),
    "WanPipeline": ("expand_timesteps",),
}


def choose_classes(name, index):
    """A teacher's model_index.json -> ({component: class, or None where it is absent}, {switch: bool}).

    UserError for a pipeline that is not known here, for a component that it lacks or that is of another
    class, and for what it would not read."""
    pipeline = index.get("_class_name")
    if isinstance(pipeline, str) and pipeline in UNSUPPORTED:
        raise UserError(f"the teacher {name!r} is a {pipeline}, {UNSUPPORTED[pipeline]}")
    if not isinstance(pipeline, str) or pipeline not in PIPELINES:
        raise UserError(f"the teacher {name!r} is a {show(pipeline)}; known are {', '.join(PIPELINES)}")
    parts = PIPELINES[pipeline]
    switches = {}
    null = MUST_BE_NULL.get(pipeline, {})
    for field, why in null.items():
        if index.get(field) not in NOTHING:
            raise refuse(name, "model_index.json", field, index[field], why)
    for field, value in index.items():
        if field in SWITCHES.get(pipeline, ()) and isinstance(value, bool):
            switches[field] = value
        elif field not in {*parts, *null, *NEVER_CALLED} and not field.startswith("_"):
            raise refuse(name, "model_index.json", field, value, f"which a {pipeline} does not take")
    classes = {}
    for part, known in parts.items():
        value = index.get(part)
        if value in NOTHING and part in MAY_BE_ABSENT:
            classes[part] = None
        elif isinstance(value, list) and len(value) == 2 and value[1] in known.classes:
            classes[part] = find_class(value[1])
        else:
            raise refuse(name, "model_index.json", part, value, f"known is {' or '.join(known.classes)}")
    if classes.get("text_encoder_3") and classes["tokenizer_3"] is None:
        why = "but text_encoder_3 wants it: set both to [null, null], or neither"
        raise refuse(name, "model_index.json", "tokenizer_3", index.get("tokenizer_3"), why)
    return classes, switches


def find_class(name):
    """A class of diffusers or transformers."""
    import diffusers
    import transformers

    return getattr(diffusers, name, None) or getattr(transformers, name)


def check_configs(name, pipeline, configs, classes):
    """UserError for what is not computed here as the teacher's own pipeline does.

    configs, classes: {component: config as in its file, its class}, of scheduler, denoiser and VAE."""
    whole = {}
    for part, config in configs.items():
        file = config_file(part)
        known = PIPELINES[pipeline][part]
        kind = config.get("_class_name", classes[part].__name__)
        if kind not in known.classes:
            raise refuse(
                name, file, "_class_name", kind, f"known with {pipeline}: {', '.join(known.classes)}"
            )
        whole[part] = fill_config(classes[part], config)
        check_fields(name, file, config, classes[part], known.fields)
    vae = whole.pop("vae")
    scheduler = whole.pop("scheduler")
    [(part, denoiser)] = whole.items()  # what is left
    for field in ("shift", "flow_shift"):
        if not scheduler.get(field, 1) > 0:
            raise refuse(name, config_file("scheduler"), field, scheduler[field], "it must be above 0")
    check_channels(name, config_file(part), denoiser, vae, PIPELINES[pipeline][part].packing)
    check_scale(name, vae)


def config_file(part):
    return f"{part}/scheduler_config.json" if part == "scheduler" else f"{part}/config.json"


def fill_config(kind, config):
    """A config as in its file -> one with the class's own defaults, too, and without private entries."""
    defaults = {field: parameter.default for field, parameter in list_fields(kind).items()}
    public = {field: value for field, value in config.items() if not field.startswith("_")}
    return defaults | public


def list_fields(kind):
    """{field of the class's config: parameter of its constructor}."""
    parameters = inspect.signature(kind.__init__).parameters
    return {field: p for field, p in parameters.items() if field != "self" and p.kind is not p.VAR_KEYWORD}


def check_fields(name, file, config, kind, fields):
    """UserError for a field of which nothing is known, unless it is off and the class does not read it, for a
    value that is refused, and for one of the wrong type. config: as in its file; what is not there is at the
    class's default."""
    own = list_fields(kind)
    hints = typing.get_type_hints(kind.__init__)
    for field, value in fill_config(kind, config).items():
        rule = fields.get(field)
        if rule is None and field not in own and value in (None, False):
            continue  # what another version of diffusers knows, and is not used
        if rule is None:
            raise refuse(name, file, field, value, "a field of which nothing is known here")
        if isinstance(rule, tuple) and not is_among(value, rule):
            known = " or ".join(show(v) for v in rule)
            default = "" if field in config else f"a {kind.__name__}'s default, "
            raise refuse(name, file, field, value, f"{default}known here is {known}")
        if field in own:
            may_be_null = type(None) in typing.get_args(hints.get(field))
            if not is_like(value, own[field].default, may_be_null):
                raise refuse(name, file, field, value, "which is of the wrong type")
        elif rule == HONOURED and value not in (None, False):
            raise refuse(name, file, field, value, f"which a {kind.__name__} does not read")


def is_among(value, values):
    """As `in`, but True is not 1 here, nor False 0; a tuple is a list."""
    value = list(value) if isinstance(value, tuple) else value
    return any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in values)


def is_like(value, default, may_be_null):
    """Whether a config's value is of the kind of its class's default, or a list (of one for each block)."""
    if value is None:
        return default is None or may_be_null or isinstance(default, bool)
    if default is None:
        return True
    if value == default:  # which may be infinite
        return True
    if isinstance(value, (list, tuple)):
        return not isinstance(default, str)
    if isinstance(default, (bool, str, list, tuple)):
        return isinstance(value, type(default))
    return is_number(value)


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def count_latent_channels(vae):
    """Of a VAE's config: the two names are of different classes."""
    return vae.get("latent_channels", vae.get("z_dim"))


def check_channels(name, file, denoiser, vae, packing):
    """UserError for a denoiser that takes or gives more than the latents."""
    channels = denoiser["in_channels"]
    latents = channels // packing
    if denoiser.get("out_channels") not in (None, channels, latents):
        why = f"not the {show(channels)} of in_channels: an inpainting, editing or learned-variance network"
        raise refuse(name, file, "out_channels", denoiser["out_channels"], why)
    if count_latent_channels(vae) != latents:
        field = "latent_channels" if "latent_channels" in vae else "z_dim"
        why = f"but the denoiser's in_channels are {show(channels)}"
        raise refuse(name, "vae/config.json", field, vae[field], why)


def check_scale(name, vae):
    """UserError for numbers with which latents cannot be scaled."""
    file = "vae/config.json"
    factor = vae.get("scaling_factor", 1)
    if not (is_number(factor) and factor > 0):
        raise refuse(name, file, "scaling_factor", factor, "it must be a number above 0")
    shift = vae.get("shift_factor")
    if not (shift is None or is_number(shift)):
        raise refuse(name, file, "shift_factor", shift, "it must be a number")
    for field, other in (("latents_mean", "latents_std"), ("latents_std", "latents_mean")):
        value = vae.get(field)
        if value is None:
            continue
        if vae[other] is None:
            raise refuse(name, file, field, value, f"but no {other}")
        is_list = isinstance(value, list) and all(map(is_number, value))
        if not is_list or len(value) != count_latent_channels(vae):
            raise refuse(name, file, field, value, "it must be a number for each of the latents' channels")


def read_size(name, sample_size, factor):
    """The denoiser's sample_size, in latents: a side, or height and width -> (height, width) in pixels."""
    size = sample_size if isinstance(sample_size, (list, tuple)) else [sample_size] * 2
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise UserError(
            f"the teacher {name} does not say how large it draws (sample_size: {show(sample_size)}): "
            "give --resolution"
        )
    return size[0] * factor, size[1] * factor


def unscale(latents, vae):
    """Latents [B, C, ...] as the denoiser wants them -> as this VAE does, as the pipeline's call does: by a
    factor and a shift, or by means and deviations of the channels."""
    config = vae.config
    latents = latents / config.get("scaling_factor", 1)
    if config.get("latents_mean") is not None:
        shape = (1, -1, *[1] * (latents.ndim - 2))
        mean = torch.as_tensor(config["latents_mean"]).to(latents).view(shape)
        std = torch.as_tensor(config["latents_std"]).to(latents).view(shape)
        latents = latents * std + mean
    return latents + (config.get("shift_factor") or 0)


def describe_sampler(pipeline, kind, config):
    """What the pipeline's own sampler does that the teacher's sampler here does not, in words; "" if nothing.

    pipeline: its class's name; kind, config: the scheduler's class, and its config as in its file."""
    if kind.__name__ not in SAME_SAMPLER:
        return kind.__name__
    if pipeline in ("WanPipeline", "StableDiffusion3Pipeline"):
        return f"{kind.__name__}'s own levels"  # they shift the lowest twice
    fields = PIPELINES[pipeline]["scheduler"].fields
    words = []
    for field, parameter in list_fields(kind).items():
        value = config.get(field, parameter.default)
        if fields[field] == SAMPLER and value != parameter.default:
            words.append(f"{field}: {show(value)}")
    # diffusers' DDIM steps to t - T/n, which is then not where its next step starts
    if "DDIM" in kind.__name__ and config.get("timestep_spacing") == "linspace":
        words.append('timestep_spacing: "linspace"')
    return ", ".join(words)


def refuse(name, file, field, value, why):
    """The UserError for a value in one of a teacher's files."""
    return UserError(f"the teacher {name} cannot be used: its {file} has {field}: {show(value)}, {why}")


def show(value):
    """A value as it stands in JSON."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 100 else f"{text[:100]}..."
