"""Builds and trains the tiny teachers: real diffusers pipelines that draw the world of shapes.

    python tiny/train.py --out assets/tiny-sdxl                          # images; 60 minutes on 2 cores
    python tiny/train.py --family sd3 --out assets/tiny-sd3              # images; 45 minutes of one core
    python tiny/train.py --family cogvideox --out assets/tiny-cogvideox  # videos; 65 minutes of one core
    python tiny/train.py --out random --random                           # random weights, in a second (tests)
    python tiny/train.py --part sam --out assets/tiny-sam.pth            # ADP's image encoder; 3 minutes

The families are a StableDiffusionXLPipeline, a StableDiffusion3Pipeline and a CogVideoXPipeline; the image
encoder is that of ADP's pixel discriminator.

Nothing here is special to the project: `DiffusionPipeline.from_pretrained("assets/tiny-sdxl")` loads and runs
the result. The denoiser and the text encoders are trained together; the autoencoder before them; each with an
exponential moving average. Everything is drawn from one seed. A GPU is used if there is one.
"""

import argparse
import functools
import math
import os
import sys
import time
from itertools import chain

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging
from segment_anything.modeling import ImageEncoderViT
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTextModelWithProjection

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from tiny import families, shapes
from tiny.parts import TOKENS, build_clip, build_t5, build_t5_tokenizer, build_tokenizer, build_vae

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ZEROS = 256  # tokens that StableDiffusion3Pipeline appends to a prompt if there is no T5
PROMPT_DROPOUT = 0.1  # probability of an empty prompt in training, for guidance


# ----------------------------------------------------------------------------------------------------------
# Pipelines, their weights random
# ----------------------------------------------------------------------------------------------------------


def build_sdxl():
    """A StableDiffusionXLPipeline of the size of a thumbnail: 4x8x8 latents of 32x32 images."""
    tokenizer = build_tokenizer()
    tokenizer_2 = build_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 64),
        layers_per_block=1,
        use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=32 + 64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64 + 6 * 8,
    )
    # SDXL's noise schedule, but carried on to a terminal SNR of 2e-4 instead of 5e-3: with 8x8 latents SDXL's
    # own would leave the background's colour readable in the "pure" noise, and samples that start from true
    # noise would prefer grey
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.02,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        prediction_type="epsilon",
    )
    return StableDiffusionXLPipeline(
        vae=build_vae(),
        unet=unet,
        scheduler=scheduler,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        text_encoder=build_clip(CLIPTextModel, 32, tokenizer),
        text_encoder_2=build_clip(CLIPTextModelWithProjection, 64, tokenizer_2),
        add_watermarker=False,
    )


def build_sd3(t5_encoder=False):
    """A StableDiffusion3Pipeline of the size of a thumbnail: 4x8x8 latents of 32x32 images.

    Its T5 says nothing unless `t5_encoder`: its last norm is zero, and so are its tokens, as those of an SD3
    without T5. (Without one diffusers would not load it.)
    """
    tokenizer = build_tokenizer()
    tokenizer_2 = build_tokenizer()
    tokenizer_3 = build_t5_tokenizer()
    if t5_encoder:
        text_encoder_3 = build_t5(128, tokenizer_3)
    else:
        text_encoder_3 = build_t5(128, tokenizer_3, layers=1)
        torch.nn.init.zeros_(text_encoder_3.encoder.final_layer_norm.weight)
        text_encoder_3.requires_grad_(False)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=24,
        num_attention_heads=4,
        joint_attention_dim=128,
        caption_projection_dim=96,
        pooled_projection_dim=2 * 64,
        pos_embed_max_size=4,
    )
    return StableDiffusion3Pipeline(
        vae=build_vae(shift_factor=0.1),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        tokenizer_3=tokenizer_3,
        text_encoder=build_clip(CLIPTextModelWithProjection, 32, tokenizer),
        text_encoder_2=build_clip(CLIPTextModelWithProjection, 64, tokenizer_2),
        text_encoder_3=text_encoder_3,
    )


def build_cogvideox(rotary=False):
    """A CogVideoXPipeline of the size of a thumbnail: 4x3x8x8 latents of 9x32x32 videos.

    Positions and SNR shift are as CogVideoX-2b's or, with `rotary`, as CogVideoX-5b's.
    """
    tokenizer = build_t5_tokenizer()
    vae = AutoencoderKLCogVideoX(
        latent_channels=4,
        sample_height=shapes.SIDE,
        sample_width=shapes.SIDE,
        block_out_channels=(16, 32, 32),
        norm_num_groups=16,
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        layers_per_block=1,
        scaling_factor=0.5,
    )
    transformer = CogVideoXTransformer3DModel(
        sample_width=8,
        sample_height=8,
        sample_frames=shapes.FRAMES,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        num_attention_heads=4,
        attention_head_dim=32,
        time_embed_dim=128,
        text_embed_dim=64,
        max_text_seq_length=TOKENS,
        spatial_interpolation_scale=1.0,
        use_rotary_positional_embeddings=rotary,
    )
    scheduler = CogVideoXDDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=0,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        snr_shift_scale=1.0 if rotary else 3.0,
    )
    return CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=build_t5(64, tokenizer),
        vae=vae,
        transformer=transformer,
        scheduler=scheduler,
    )


def build_sdxl_text(config, length):
    """SDXL's text encoders and tokenizers, of the real widths."""
    tokenizer = build_tokenizer(length)
    return {
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "text_encoder": build_clip(CLIPTextModel, 768, tokenizer, 768),
        "text_encoder_2": build_clip(CLIPTextModelWithProjection, 1280, tokenizer, 1280),
    }


def build_sd3_text(config, length):
    """SD3's."""
    parts = build_sdxl_text(config, length)
    tokenizer = build_t5_tokenizer()
    return {
        **parts,
        "text_encoder": build_clip(CLIPTextModelWithProjection, 768, parts["tokenizer"], 768),
        "tokenizer_3": tokenizer,
        "text_encoder_3": build_t5(config.joint_attention_dim, tokenizer, layers=1),
    }


def build_cogvideox_text(config, length):
    """CogVideoX's."""
    tokenizer = build_t5_tokenizer()
    return {"tokenizer": tokenizer, "text_encoder": build_t5(config.text_embed_dim, tokenizer, layers=1)}


TEXT = {  # pipeline: its text encoders and tokenizers, of the widths that its denoiser's config wants
    "StableDiffusionXLPipeline": build_sdxl_text,
    "StableDiffusion3Pipeline": build_sd3_text,
    "CogVideoXPipeline": build_cogvideox_text,
    **families.TEXT,
}


def build_real(name):
    """The pipeline of a known teacher at its real size, from its configs (assets/configs), in bfloat16.

    Denoiser, autoencoder and scheduler are whole, the text encoders have the right widths and lengths but few
    layers and the words of the world of shapes.
    """
    from common import find_family
    from support.loading import assemble
    from tools.meta import read_configs

    configs = read_configs(name)
    denoiser = build_from(configs["denoiser"])
    parts = TEXT[configs["pipeline"]](denoiser.config, configs["text_length"])
    parts["vae"] = build_from(configs["vae"])
    parts[find_family(configs["pipeline"]).denoiser_name] = denoiser
    with torch.device("cpu"):  # its numbers are looked at
        parts["scheduler"] = build_from(configs["scheduler"])
    pipeline = getattr(diffusers, configs["pipeline"])
    return assemble(pipeline, parts, configs.get("switches", {})).to(dtype=torch.bfloat16)


def build_from(config):
    """The part of a pipeline that a diffusers config describes, weights random.

    Made in bfloat16: 20 B parameters in float32 would fill a card.
    """
    torch.set_default_dtype(torch.bfloat16)
    try:
        return getattr(diffusers, config["_class_name"]).from_config(config)
    finally:
        torch.set_default_dtype(torch.float32)


# ----------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------


def fit(parameters, compute_loss, steps, lr, matrices=(), decay=0.999, name=""):
    """Adam with a cosine schedule and 100 steps of warm-up; leaves the parameters at their moving average.

    compute_loss() -> scalar of a new batch. Those of the parameters that are in `matrices` learn by Muon, ten
    times as fast: it takes half of Adam's steps for a transformer.
    """
    parameters = list(parameters)
    average = [parameter.detach().clone() for parameter in parameters]
    matrices = list(matrices)
    ids = {id(matrix) for matrix in matrices}
    others = [parameter for parameter in parameters if id(parameter) not in ids]
    optimizers = [torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=1e-3)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=10 * lr, weight_decay=1e-3))

    def scale_lr(step):
        warm_up = min(1, (step + 1) / 100)
        return warm_up * 0.5 * (1 + np.cos(np.pi * step / max(steps, 1)))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, scale_lr) for optimizer in optimizers]
    bar = tqdm(range(steps), desc=name, mininterval=10)
    for step in bar:
        loss = compute_loss()
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        for schedule in schedules:
            schedule.step()
        kept = min(decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(average, parameters, 1 - kept)
        if step % 100 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)


# ----------------------------------------------------------------------------------------------------------
# Autoencoders
# ----------------------------------------------------------------------------------------------------------


def render_scenes(attributes, centre):
    """Scenes -> images [n, 3, 32, 32] or, where there is a motion, videos [n, 3, 9, 32, 32]."""
    render = shapes.render_video if "motion" in attributes else shapes.render
    return torch.from_numpy(render(attributes, centre))


def train_vae(vae, world, steps, seed, whole=True):
    """Trains an autoencoder by squared and absolute error and a small KL term, then whitens its latents.

    The decoder of videos goes on alone for half as many steps, since its padded convolution undoes a mean but
    for the border. Unless `whole`, the decoder alone is trained, for all the steps.
    """
    rng = np.random.default_rng(seed)
    is_video = "motion" in world
    batch = 8 if is_video else 48
    lr = 6e-4 if is_video else 2e-3

    def compute_loss():
        attributes, centre = shapes.draw(rng, batch, world)
        originals = render_scenes(attributes, centre).to(vae.device)
        with torch.autocast(vae.device.type, torch.bfloat16, enabled=is_video):
            posterior = vae.encode(originals).latent_dist
            decoded = vae.decode(posterior.sample()).sample.float()
        error = F.mse_loss(decoded, originals) + 0.5 * F.l1_loss(decoded, originals)
        return error + 1e-3 * posterior.kl().mean() / originals[0].numel()

    if whole:
        fit(vae.parameters(), compute_loss, steps, lr, name="autoencoder")
        attributes, centre = shapes.draw(rng, 2048, world)
        whiten_vae(vae, encode(vae, attributes, centre))
        steps = steps // 2
    if is_video or not whole:
        fit(vae.decoder.parameters(), compute_loss, steps, lr, name="decoder")


def whiten_vae(vae, latents):
    """Folds the mean and covariance of its latents [n, channels, ...] into an autoencoder's convolutions."""
    if isinstance(vae, AutoencoderKL):
        writing, reading = vae.quant_conv, [vae.post_quant_conv]
    else:
        writing, reading = vae.encoder.conv_out.conv, []
        for name, module in vae.decoder.named_modules():
            if name == "conv_in.conv" or name.endswith(("conv_y.conv", "conv_b.conv")):
                reading.append(module)
    latents = latents.transpose(0, 1).flatten(1)
    whiten(latents, vae.config.scaling_factor, writing, reading)


@torch.no_grad()
def whiten(latents, scaling_factor, writing, reading):
    """Makes latents * scaling_factor white, with mean 0 and covariance 1; latents [channels, n].

    Their mean and covariance are folded into the convolution `writing`, whose first channels are the latents,
    and, undone, into those in `reading`, whose inputs are the latents.
    """
    channels = len(latents)
    latents = latents.double()
    mean = latents.mean(1)
    root = torch.linalg.cholesky(latents.cov())
    forth = torch.linalg.inv(root) / scaling_factor
    back = root * scaling_factor

    weight = writing.weight[:channels].double()
    bias = writing.bias[:channels].double()
    writing.weight[:channels] = torch.tensordot(forth, weight, 1).float()
    writing.bias[:channels] = (forth @ (bias - mean)).float()
    for conv in reading:
        weight = conv.weight.double()
        conv.bias += (weight.flatten(2).sum(2) @ mean).float()
        conv.weight.copy_(torch.einsum("oi...,ij->oj...", weight, back).float())


def load_shipped_vae():
    """The shipped SDXL teacher's autoencoder."""
    return AutoencoderKL.from_pretrained(os.path.join(ROOT, "assets", "tiny-sdxl"), subfolder="vae")


@torch.no_grad()
def borrow(vae):
    """Makes `vae` the shipped autoencoder, moved: (latents - shift_factor) * scaling_factor is white."""
    vae.load_state_dict(load_shipped_vae().state_dict())
    shift = vae.config.shift_factor
    vae.post_quant_conv.bias -= vae.post_quant_conv.weight.sum((1, 2, 3)) * shift
    vae.quant_conv.bias[:4] += shift


@torch.no_grad()
def inflate(vae):
    """Starts an autoencoder of videos as the shipped one of images, frame by frame.

    A kernel becomes the last of three in time. The quantising convolutions join their neighbours, attention
    is left out, norms that look at the latents start blind to them.
    """
    old = load_shipped_vae().state_dict()
    quant = old["quant_conv.weight"][..., 0, 0]
    old["encoder.conv_out.bias"] = quant @ old["encoder.conv_out.bias"] + old["quant_conv.bias"]
    old["encoder.conv_out.weight"] = torch.tensordot(quant, old["encoder.conv_out.weight"], 1)
    post = old["post_quant_conv.weight"][..., 0, 0]
    first = old["decoder.conv_in.weight"]
    old["decoder.conv_in.bias"] += first.sum((2, 3)) @ old["post_quant_conv.bias"]
    old["decoder.conv_in.weight"] = torch.einsum("oi...,ij->oj...", first, post)

    for name, new in vae.named_parameters():
        if "conv_y" in name or "conv_b" in name:
            new.fill_(name.endswith("conv_y.conv.bias"))
            continue
        if name not in old:
            name = name.replace(".conv.", ".").replace("norm_layer.", "").replace("norm_out", "conv_norm_out")
        source = old[name]
        if new.ndim == 5:
            earlier = new.shape[2] - 1
            source = F.pad(source[:, :, None], (0, 0, 0, 0, earlier, 0))
        if "encoder.conv_out" in name:  # means of the latents, then their log-variances
            half = len(source) // 2
            source = source[:half]
            new[len(new) // 2 :] = -6 if new.ndim == 1 else 0
        corner = tuple(slice(size) for size in source.shape)
        new[corner] = source


@torch.no_grad()
def encode(vae, attributes, centre):
    """Scenes -> their latents, unscaled [n, 4, 8, 8] or [n, 4, 3, 8, 8]: the posterior's mean."""
    latents = []
    for start in range(0, len(centre), 256):
        part = slice(start, start + 256)
        some = {name: values[part] for name, values in attributes.items()}
        pixels = render_scenes(some, centre[part]).to(vae.device)
        latents.append(vae.encode(pixels).latent_dist.mean)
    return torch.cat(latents)


# ----------------------------------------------------------------------------------------------------------
# Denoisers
# ----------------------------------------------------------------------------------------------------------


class CountLastToken:
    """SD3's joint attention in which the last token of the text stands for `count` equal ones.

    Equal tokens of the text stay equal from block to block, since the text has no positions: one whose score
    is log(count) higher weighs as much as all, and the image's tokens come out the same, in less time.
    """

    def __init__(self, count):
        self.bias = math.log(count)

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None):
        def join(project_image, project_text):
            image = project_image(hidden_states)
            text = project_text(encoder_hidden_states)
            joint = torch.cat([image, text], 1)
            return joint.unflatten(2, (attn.heads, -1)).transpose(1, 2)

        query = join(attn.to_q, attn.add_q_proj)
        key = join(attn.to_k, attn.add_k_proj)
        value = join(attn.to_v, attn.add_v_proj)
        bias = query.new_zeros(query.shape[2], key.shape[2])
        bias[:, -1] = self.bias
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        out = out.transpose(1, 2).flatten(2)
        image, text = out.tensor_split([hidden_states.shape[1]], 1)
        image = attn.to_out[0](image)
        return image, text if attn.context_pre_only else attn.to_add_out(text)


def diffuse(scheduler, x_0, noise, power=1.0):
    """Clean latents and noise -> (noisy latents, the network's timestep [n], the network's target).

    Times (for flow matching: noise levels) are u^power, u uniform in [0, 1).
    """
    time = torch.rand(len(x_0), device=x_0.device) ** power
    shape = (-1,) + (1,) * (x_0.ndim - 1)
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        x_t = torch.lerp(x_0, noise, time.view(shape))
        return x_t, 1000 * time, noise - x_0
    timestep = (1000 * time).long()
    abar = scheduler.alphas_cumprod.to(x_0.device)[timestep].view(shape)
    alpha = abar.sqrt().float()
    sigma = (1 - abar).sqrt().float()
    x_t = alpha * x_0 + sigma * noise
    if scheduler.config.prediction_type == "epsilon":
        return x_t, timestep, noise
    return x_t, timestep, alpha * noise - sigma * x_0


def call_sdxl(pipe, x_t, timestep, prompts):
    """An empty prompt is zero embeddings, as SDXL's pipeline makes it."""
    embeds, _, pooled, _ = pipe.encode_prompt(
        prompts, device=x_t.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    kept = torch.tensor([prompt != "" for prompt in prompts], device=x_t.device)
    size, crop = (shapes.SIDE, shapes.SIDE), (0, 0)
    time_ids = torch.tensor([*size, *crop, *size], device=x_t.device)
    condition = {"text_embeds": pooled * kept[:, None], "time_ids": time_ids.expand(len(x_t), 6)}
    embeds = embeds * kept[:, None, None]
    return pipe.unet(x_t, timestep, embeds, added_cond_kwargs=condition).sample


def call_sd3(pipe, x_t, timestep, prompts):
    """One token of zeros stands for ZEROS of them: see CountLastToken."""
    embeds, _, pooled, _ = pipe.encode_prompt(
        prompts, None, None, device=x_t.device, do_classifier_free_guidance=False, max_sequence_length=1
    )
    return pipe.transformer(x_t, embeds, pooled, timestep).sample


def call_cogvideox(pipe, x_t, timestep, prompts):
    """Noisy latents with frames before channels [n, 3, 4, 8, 8]."""
    embeds, _ = pipe.encode_prompt(
        prompts, do_classifier_free_guidance=False, max_sequence_length=TOKENS, device=x_t.device
    )
    return pipe.transformer(x_t, embeds, timestep).sample


# A stage of a denoiser's training has "steps", "batch" and, where it differs from the rest, "power" (see
# diffuse) and "frames" of the latents: of videos the first alone is an image.
FAMILIES = {
    "sdxl": {
        "build": build_sdxl,
        "call": call_sdxl,
        "world": shapes.ATTRIBUTES,
        "vae_steps": 3500,
        "lr": 2e-3,
        "scenes": 40000,
        "stages": [{"steps": 8000, "batch": 64}],
    },
    "sd3": {
        "build": build_sd3,
        "call": call_sd3,
        "world": shapes.ATTRIBUTES,
        "vae_steps": 0,
        "lr": 2e-3,
        "scenes": 40000,
        "stages": [{"steps": 11000, "batch": 64}],
    },
    "cogvideox": {
        "build": build_cogvideox,
        "call": call_cogvideox,
        "world": shapes.VIDEO,
        "vae_steps": 1400,
        "lr": 2e-3,
        "scenes": 16000,
        # images first: 4,500 steps on videos alone did not find out that the words for shapes mean something,
        # 1,000 on images did
        "stages": [
            {"steps": 4500, "batch": 64, "frames": 1, "power": 2.0},
            {"steps": 4500, "batch": 32, "power": 1.5},
        ],
    },
    **families.FAMILIES,  # random alone
}


def train_denoiser(pipe, family, seed):
    """Trains the denoiser and the text encoders on the scheduler's own target, in the family's stages."""
    stages = [stage for stage in family["stages"] if stage["steps"]]
    if not stages:
        return
    rng = np.random.default_rng(seed + 1)
    attributes, centre = shapes.draw(rng, family["scenes"], family["world"])
    config = pipe.vae.config
    latents = encode(pipe.vae, attributes, centre) - (config.shift_factor or 0)
    latents = latents * config.scaling_factor
    if latents.ndim == 5:
        latents = latents.transpose(1, 2).contiguous()  # CogVideoX's transformer takes frames before channels

    def compute_loss(batch, frames=None, power=1.0):
        rows = rng.integers(len(latents), size=batch)
        some = {name: values[rows] for name, values in attributes.items()}
        prompts = shapes.draw_prompts(some, rng)
        emptied = rng.random(batch) < PROMPT_DROPOUT
        prompts = ["" if empty else prompt for empty, prompt in zip(emptied, prompts)]
        x_0 = latents[:, :frames][rows]
        noise = torch.randn(x_0.shape, device=x_0.device)
        x_t, timestep, target = diffuse(pipe.scheduler, x_0, noise, power)
        output = family["call"](pipe, x_t, timestep, prompts)
        return F.mse_loss(output, target)

    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    modules = [denoiser]
    for name, module in pipe.components.items():
        if name.startswith("text_encoder") and module:
            modules.append(module)
    parameters = chain(*(module.parameters() for module in modules))
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    matrices = []
    if hasattr(denoiser, "transformer_blocks"):
        blocks = denoiser.transformer_blocks
        matrices = [parameter for parameter in blocks.parameters() if parameter.ndim == 2]
    for stage in stages:
        options = {name: value for name, value in stage.items() if name != "steps"}
        compute_stage_loss = functools.partial(compute_loss, **options)
        fit(parameters, compute_stage_loss, stage["steps"], family["lr"], matrices, name="denoiser")


# ----------------------------------------------------------------------------------------------------------
# SAM's image encoder
# ----------------------------------------------------------------------------------------------------------


def train_sam(steps, seed):
    """Trains SAM's image encoder at the size of a thumbnail to segment the shape.

    Returns a checkpoint of the official layout.
    """
    encoder = ImageEncoderViT(
        img_size=shapes.SIDE,
        patch_size=4,
        embed_dim=64,
        depth=4,
        num_heads=2,
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=4,
        global_attn_indexes=(1, 3),
        out_chans=32,
    )
    mask_head = torch.nn.Sequential(torch.nn.Conv2d(32, 16, 1), torch.nn.PixelShuffle(4))
    encoder.to(DEVICE)
    mask_head.to(DEVICE)
    mean = torch.tensor((0.485, 0.456, 0.406), device=DEVICE).view(1, 3, 1, 1)
    std = torch.tensor((0.229, 0.224, 0.225), device=DEVICE).view(1, 3, 1, 1)
    rng = np.random.default_rng(seed + 2)

    def compute_loss():
        attributes, centre = shapes.draw(rng, 64)
        images = render_scenes(attributes, centre).to(DEVICE)
        masks = shapes.render_masks(attributes["shape"], attributes["size"], centre)
        normalised = ((images + 1) / 2 - mean) / std
        logits = mask_head(encoder(normalised))[:, 0]
        masks = torch.from_numpy(masks).float().to(DEVICE)
        return F.binary_cross_entropy_with_logits(logits, masks)

    parameters = [*encoder.parameters(), *mask_head.parameters()]
    fit(parameters, compute_loss, steps, lr=1e-3, decay=0.99, name="image encoder")
    weights = encoder.state_dict()
    return {f"image_encoder.{name}": weight.half().cpu() for name, weight in weights.items()}


# ----------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------


def read_arguments(argv):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--out", required=True)
    add("--family", choices=FAMILIES, default="sdxl")
    add("--part", choices=("pipeline", "sam"), default="pipeline", help="what to train")
    add("--random", action="store_true", help="random weights, no training")
    add("--t5", action="store_true", help="sd3, random: with its third text encoder")
    add("--rotary", action="store_true", help="cogvideox, random: positions as CogVideoX-5b's")
    add("--init", help="go on from this pipeline folder: keep its autoencoder, train its denoiser further")
    add(
        "--vae-steps",
        type=int,
        help="of the autoencoder; with --init, of its decoder alone (default none)",
    )
    add("--steps", type=int, help="of the denoiser: of its last stage, without the others")
    add("--lr", type=float, help="of the denoiser")
    add("--sam-steps", type=int, default=1000)
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.init and not os.path.isfile(os.path.join(args.init, "model_index.json")):
        parser.error(f"there is no pipeline folder {args.init!r} to go on from")
    if args.family in families.FAMILIES and not args.random:
        parser.error(f"--family {args.family} is for --random: nothing is trained of it")
    if (args.t5 or args.rotary) and not args.random:
        parser.error("--t5 and --rotary are for --random: nothing is trained with them")
    return args


def choose_family(args):
    """The entry of FAMILIES that --family names, with what other options change in it."""
    family = dict(FAMILIES[args.family])
    if args.vae_steps is not None:
        family["vae_steps"] = args.vae_steps
    if args.lr is not None:
        family["lr"] = args.lr
    if args.init or args.steps is not None:
        family["stages"] = family["stages"][-1:]
    if args.steps is not None:
        family["stages"] = [family["stages"][0] | {"steps": args.steps}]
    return family


def start_pipeline(args, family):
    """The pipeline whose denoiser is to be trained: that of --init or a new one, its autoencoder trained."""
    if args.init:
        pipe = DiffusionPipeline.from_pretrained(args.init, dtype=torch.float32).to(DEVICE)
        if args.vae_steps:
            train_vae(pipe.vae, family["world"], args.vae_steps, args.seed, whole=False)
        return pipe

    switches = {}
    if args.family == "sd3":
        switches["t5_encoder"] = args.t5
    if args.family == "cogvideox":
        switches["rotary"] = args.rotary
    pipe = family["build"](**switches)
    if args.random:
        return pipe
    pipe.to(DEVICE)
    if args.family == "sd3":
        borrow(pipe.vae)
        return pipe
    if args.family == "cogvideox":
        inflate(pipe.vae)
    train_vae(pipe.vae, family["world"], family["vae_steps"], args.seed)
    pipe.save_pretrained(args.out)  # for --init, should the rest be interrupted
    return pipe


def make_pipeline(args):
    """The pipeline that the arguments ask for, saved in half precision."""
    family = choose_family(args)
    pipe = start_pipeline(args, family)
    if not args.random:
        logging.set_verbosity_error()  # of prompts cut to one token of T5's
        if args.family == "sd3":
            pipe.transformer.set_attn_processor(CountLastToken(ZEROS))
        train_denoiser(pipe, family, args.seed)
    for part in (pipe, *pipe.components.values()):
        if hasattr(part, "register_to_config"):
            part.register_to_config(_name_or_path="")  # no path of this machine
    pipe.to(dtype=torch.float16).save_pretrained(args.out)


def main(argv=None):
    args = read_arguments(argv)
    torch.manual_seed(args.seed)
    start = time.time()
    if args.part == "sam":
        torch.save(train_sam(args.sam_steps, args.seed), args.out)
    else:
        make_pipeline(args)
    minutes = (time.time() - start) / 60
    print(f"{args.out}: {minutes:.1f} minutes")


if __name__ == "__main__":
    main()
