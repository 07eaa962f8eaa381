"""Builds and trains the tiny teachers: real diffusers pipelines that draw the world of shapes.

    python tiny/train.py --out assets/tiny-sdxl                              # the shipped StableDiffusionXLPipeline, 60 minutes on 2 cores
    python tiny/train.py --family sd3 --out assets/tiny-sd3                  # StableDiffusion3Pipeline, 45 minutes of one core
    python tiny/train.py --family cogvideox --out assets/tiny-cogvideox      # CogVideoXPipeline: videos, 65 minutes of one core
    python tiny/train.py --out random --random                               # a family's pipeline with random weights, in a second (tests)
    python tiny/train.py --part sam --out assets/tiny-sam.pth                # the image encoder of ADP's pixel discriminator, 3 minutes

Nothing here is special to the project: `DiffusionPipeline.from_pretrained("assets/tiny-sdxl")` loads and runs the result.
The denoiser and the text encoders are trained together; the autoencoder before them; each with an exponential moving average.
Everything is drawn from one seed.
"""
import argparse
import functools
import math
import os
import sys
import time

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (AutoencoderKL, AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel, DDIMScheduler,
                       DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline,
                       StableDiffusionXLPipeline, UNet2DConditionModel)
from diffusers.utils import logging
from segment_anything.modeling import ImageEncoderViT
from tokenizers import AddedToken
from tqdm import tqdm
from transformers import (CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel,
                          T5Tokenizer)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from tiny import shapes

TOKENS = 16  # the longest prompt has 10 words
ZEROS = 256  # tokens that StableDiffusion3Pipeline appends to a prompt if there is no T5: its default max_sequence_length


def build_tokenizer(length=TOKENS):
    """A CLIPTokenizer whose words are those of the world of shapes; any other word becomes the unknown token."""
    special = ("<|startoftext|>", "<|endoftext|>", "<|unknown|>")
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(special)}, merges=[], bos_token=special[0],
                              eos_token=special[1], pad_token=special[1], unk_token=special[2], model_max_length=length)
    words = ["a", "on", "background", "shape", *(value for values in shapes.ATTRIBUTES.values() for value in values)]
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=True) for word in words])
    return tokenizer


def build_t5_tokenizer():
    """A T5Tokenizer whose pieces are the words of the world of shapes and videos; any other word becomes the unknown token."""
    words = ["a", "on", "background", "shape", "moving", *(value for values in shapes.VIDEO.values() for value in values)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *(("\u2581" + word, -1.0) for word in words)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TOKENS)


def clip(cls, width, tokenizer, projection=64):
    """A random CLIP text encoder of this class, two layers."""
    return cls(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, projection_dim=projection, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=tokenizer.model_max_length, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))


def t5(width, tokenizer, layers=2):
    """A random T5 encoder."""
    return T5EncoderModel(T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=width // 4, d_ff=2 * width, num_layers=layers, num_heads=4, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", relative_attention_num_buckets=16, relative_attention_max_distance=TOKENS))


def build_vae(**config):
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, sample_size=shapes.SIDE, block_out_channels=(16, 32, 32), norm_num_groups=16,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, scaling_factor=0.5, **config)


def build_sdxl():
    """A StableDiffusionXLPipeline of the size of a thumbnail, weights random: 4x8x8 latents of 32x32 pictures."""
    tokenizer, tokenizer_2 = build_tokenizer(), build_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(64, 64), layers_per_block=1, use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4, cross_attention_dim=32 + 64, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64 + 6 * 8)
    # SDXL's noise schedule, but carried on to a terminal SNR of 2e-4 instead of 5e-3: with 8x8 latents SDXL's own would leave
    # the background's colour readable in the "pure" noise, and samples that start from true noise would prefer grey
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.02, beta_schedule="scaled_linear", clip_sample=False,
                              set_alpha_to_one=True, timestep_spacing="trailing", prediction_type="epsilon")
    return StableDiffusionXLPipeline(
        vae=build_vae(), unet=unet, scheduler=scheduler, tokenizer=tokenizer, tokenizer_2=tokenizer_2,
        text_encoder=clip(CLIPTextModel, 32, tokenizer),
        text_encoder_2=clip(CLIPTextModelWithProjection, 64, tokenizer_2), add_watermarker=False)


def build_sd3(t5_encoder=False):
    """A StableDiffusion3Pipeline of the size of a thumbnail, weights random: 4x8x8 latents of 32x32 pictures. Its T5 says nothing unless
    `t5_encoder`: its last norm is zero, and so are its tokens, as those of an SD3 without T5. (Without one diffusers would not load it.)"""
    tokenizer, tokenizer_2 = build_tokenizer(), build_tokenizer()
    tokenizer_3 = build_t5_tokenizer()
    text_encoder_3 = t5(128, tokenizer_3, layers=2 if t5_encoder else 1)
    if not t5_encoder:
        torch.nn.init.zeros_(text_encoder_3.encoder.final_layer_norm.weight)
        text_encoder_3.requires_grad_(False)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=24, num_attention_heads=4,
        joint_attention_dim=128, caption_projection_dim=96, pooled_projection_dim=2 * 64, pos_embed_max_size=4)
    return StableDiffusion3Pipeline(
        vae=build_vae(shift_factor=0.1), transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        tokenizer=tokenizer, tokenizer_2=tokenizer_2, tokenizer_3=tokenizer_3,
        text_encoder=clip(CLIPTextModelWithProjection, 32, tokenizer), text_encoder_2=clip(CLIPTextModelWithProjection, 64, tokenizer_2),
        text_encoder_3=text_encoder_3)


def build_cogvideox(rotary=False):
    """A CogVideoXPipeline of the size of a thumbnail, weights random: 4x3x8x8 latents of 9x32x32 videos; positions and SNR shift
    are as CogVideoX-2b's or, with `rotary`, as CogVideoX-5b's."""
    tokenizer = build_t5_tokenizer()
    vae = AutoencoderKLCogVideoX(
        latent_channels=4, sample_height=shapes.SIDE, sample_width=shapes.SIDE, block_out_channels=(16, 32, 32), norm_num_groups=16,
        down_block_types=("CogVideoXDownBlock3D",) * 3, up_block_types=("CogVideoXUpBlock3D",) * 3, layers_per_block=1, scaling_factor=0.5)
    transformer = CogVideoXTransformer3DModel(
        sample_width=8, sample_height=8, sample_frames=shapes.FRAMES, patch_size=2, in_channels=4, out_channels=4, num_layers=4,
        num_attention_heads=4, attention_head_dim=32, time_embed_dim=128, text_embed_dim=64, max_text_seq_length=TOKENS,
        spatial_interpolation_scale=1.0, use_rotary_positional_embeddings=rotary)
    scheduler = CogVideoXDDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=True, steps_offset=0,
        prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True, snr_shift_scale=1.0 if rotary else 3.0)
    return CogVideoXPipeline(tokenizer=tokenizer, text_encoder=t5(64, tokenizer), vae=vae, transformer=transformer, scheduler=scheduler)


def build_real(name):
    """The pipeline of a known teacher at its real size, weights random, from its configs (assets/configs): denoiser, autoencoder and scheduler
    are whole, the text encoders have the right widths and lengths but few layers and the words of the world of shapes."""
    from tiny.plan import read_configs

    configs = read_configs(name)
    pipeline, denoiser = getattr(diffusers, configs["pipeline"]), "unet" if configs["pipeline"] == "StableDiffusionXLPipeline" else "transformer"
    build = lambda part: getattr(diffusers, configs[part]["_class_name"]).from_config(configs[part])
    parts = {denoiser: build("denoiser"), "vae": build("vae")}
    with torch.device("cpu"):  # its numbers are looked at
        parts["scheduler"] = build("scheduler")
    if pipeline is CogVideoXPipeline:
        tokenizer = build_t5_tokenizer()
        parts |= {"tokenizer": tokenizer, "text_encoder": t5(parts[denoiser].config.text_embed_dim, tokenizer, layers=1)}
    else:
        tokenizer = build_tokenizer(configs["text_length"])
        first = CLIPTextModel if pipeline is StableDiffusionXLPipeline else CLIPTextModelWithProjection
        parts |= {"tokenizer": tokenizer, "text_encoder": clip(first, 768, tokenizer, 768),
                  "tokenizer_2": tokenizer, "text_encoder_2": clip(CLIPTextModelWithProjection, 1280, tokenizer, 1280)}
        if pipeline is StableDiffusion3Pipeline:
            tokenizer_3 = build_t5_tokenizer()
            parts |= {"tokenizer_3": tokenizer_3, "text_encoder_3": t5(parts[denoiser].config.joint_attention_dim, tokenizer_3, layers=1)}
    return pipeline(**parts).to(dtype=torch.bfloat16)


def fit(parameters, loss, steps, lr, matrices=(), betas=(0.9, 0.99), decay=0.999, name=""):
    """Adam with a cosine schedule and 100 steps of warm-up on loss(step) -> scalar; leaves the parameters at their moving average. Those of the
    parameters that are in `matrices` learn by Muon, ten times as fast: it takes half of Adam's steps for a transformer."""
    parameters, matrices = list(parameters), list(matrices)
    average = [p.detach().clone() for p in parameters]
    others = [p for p in parameters if not any(p is matrix for matrix in matrices)]
    optimizers = [torch.optim.AdamW(others, lr=lr, betas=betas, weight_decay=1e-3)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=10 * lr, weight_decay=1e-3))
    rate = lambda i: min(1, (i + 1) / 100) * 0.5 * (1 + np.cos(np.pi * i / max(steps, 1)))
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    bar = tqdm(range(steps), desc=name, mininterval=10)
    for step in bar:
        value = loss(step)
        for parameter in parameters:
            parameter.grad = None
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for stepped in (*optimizers, *schedules):
            stepped.step()
        torch._foreach_lerp_(average, parameters, 1 - min(decay, (step + 1) / (step + 10)))
        if step % 100 == 0:
            bar.set_postfix(loss=f"{value.item():.4f}")
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)


def scenes_of(attributes, centre):
    """Scenes -> what an autoencoder encodes: pictures [n, 3, 32, 32] or, where there is a motion, videos [n, 3, 9, 32, 32]."""
    return torch.from_numpy((shapes.render_video if "motion" in attributes else shapes.render)(attributes, centre))


def train_vae(vae, world, steps, seed, whole=True):
    """Mean squared and absolute error with a small KL term; then the latents are whitened, so that latents * scaling_factor have
    mean 0 and covariance 1. The decoder of videos goes on alone, since its padded convolution undoes a mean but for the border, for
    half as many steps; or, unless `whole`, for all of them."""
    rng = np.random.default_rng(seed)
    video = "motion" in world
    batch, lr = (8, 6e-4) if video else (48, 2e-3)

    def loss(step):
        originals = scenes_of(*shapes.draw(rng, batch, world))
        with torch.autocast("cpu", torch.bfloat16, enabled=video):
            posterior = vae.encode(originals).latent_dist
            decoded = vae.decode(posterior.sample()).sample.float()
        error = F.mse_loss(decoded, originals) + 0.5 * F.l1_loss(decoded, originals)
        return error + 1e-3 * posterior.kl().mean() / originals[0].numel()

    if whole:
        fit(vae.parameters(), loss, steps, lr=lr, name="autoencoder")
        latents = encode(vae, *shapes.draw(rng, 2048, world)).transpose(0, 1).flatten(1)
        if not video:
            return whiten(latents, vae.config.scaling_factor, vae.quant_conv, [vae.post_quant_conv])
        reading = [module for name, module in vae.decoder.named_modules() if name == "conv_in.conv" or name.endswith(("conv_y.conv", "conv_b.conv"))]
        whiten(latents, vae.config.scaling_factor, vae.encoder.conv_out.conv, reading)
        steps = steps // 2
    fit(vae.decoder.parameters(), loss, steps, lr=lr, name="decoder")


@torch.no_grad()
def whiten(latents, scaling_factor, writing, reading):
    """Folds the mean and covariance of `latents` [channels, n] into the convolution whose first channels are the latents and, undone, into
    those that read them."""
    channels = len(latents)
    mean, root = latents.double().mean(1), torch.linalg.cholesky(latents.double().cov())
    forth, back = torch.linalg.inv(root) / scaling_factor, root * scaling_factor
    writing.weight[:channels] = torch.tensordot(forth, writing.weight[:channels].double(), 1).float()
    writing.bias[:channels] = (forth @ (writing.bias[:channels].double() - mean)).float()
    for conv in reading:
        weight = conv.weight.double()
        conv.bias += (weight.flatten(2).sum(2) @ mean).float()
        conv.weight.copy_(torch.einsum("oi...,ij->oj...", weight, back).float())


def shipped_vae():
    """The shipped SDXL teacher's autoencoder."""
    return AutoencoderKL.from_pretrained(os.path.join(ROOT, "assets", "tiny-sdxl"), subfolder="vae")


@torch.no_grad()
def borrow(vae):
    """Makes `vae` the shipped autoencoder, its latents moved so that (latents - shift_factor) * scaling_factor are white."""
    vae.load_state_dict(shipped_vae().state_dict())
    vae.post_quant_conv.bias -= vae.post_quant_conv.weight.sum((1, 2, 3)) * vae.config.shift_factor
    vae.quant_conv.bias[:4] += vae.config.shift_factor


@torch.no_grad()
def inflate(vae):
    """Starts an autoencoder of videos as the shipped one of pictures, frame by frame: a kernel becomes the last of three in time.

    The quantising convolutions join their neighbours, attention is left out, norms that look at the latents start blind to them."""
    old = shipped_vae().state_dict()
    quant, post = old["quant_conv.weight"][..., 0, 0], old["post_quant_conv.weight"][..., 0, 0]
    old["encoder.conv_out.bias"] = quant @ old["encoder.conv_out.bias"] + old["quant_conv.bias"]
    old["encoder.conv_out.weight"] = torch.tensordot(quant, old["encoder.conv_out.weight"], 1)
    old["decoder.conv_in.bias"] += old["decoder.conv_in.weight"].sum((2, 3)) @ old["post_quant_conv.bias"]
    old["decoder.conv_in.weight"] = torch.einsum("oi...,ij->oj...", old["decoder.conv_in.weight"], post)
    for name, new in vae.named_parameters():
        if "conv_y" in name or "conv_b" in name:
            new.fill_(name.endswith("conv_y.conv.bias"))
            continue
        source = old[name if name in old else name.replace(".conv.", ".").replace("norm_layer.", "").replace("norm_out", "conv_norm_out")]
        if new.ndim == 5:
            source = F.pad(source[:, :, None], (0, 0, 0, 0, new.shape[2] - 1, 0))
        if "encoder.conv_out" in name:  # means of the latents, then their log-variances
            new[len(new) // 2 :] = -6 if new.ndim == 1 else 0
            source = source[: len(source) // 2]
        new[tuple(slice(size) for size in source.shape)] = source


@torch.no_grad()
def encode(vae, attributes, centre):
    """A scene's latents, unscaled [n, 4, 8, 8] or [n, 4, 3, 8, 8]: the posterior's mean."""
    parts = [slice(i, i + 256) for i in range(0, len(centre), 256)]
    return torch.cat([vae.encode(scenes_of({name: v[part] for name, v in attributes.items()}, centre[part])).latent_dist.mean for part in parts])


class CountLastToken:
    """SD3's joint attention in which the last token of the text stands for `count` equal ones.

    Equal tokens of the text stay equal from block to block, since the text has no positions: one whose score is log(count) higher
    weighs as much as all, and the picture's tokens come out the same, for a fraction of the time."""

    def __init__(self, count):
        self.bias = math.log(count)

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None):
        projections = ((attn.to_q, attn.add_q_proj), (attn.to_k, attn.add_k_proj), (attn.to_v, attn.add_v_proj))
        joint = [torch.cat([image(hidden_states), text(encoder_hidden_states)], 1) for image, text in projections]
        query, key, value = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in joint)
        bias = query.new_zeros(query.shape[2], key.shape[2])
        bias[:, -1] = self.bias
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2).flatten(2)
        image, text = out.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], 1)
        return attn.to_out[0](image), text if attn.context_pre_only else attn.to_add_out(text)


def diffuse(scheduler, x_0, noise, power=1.0):
    """Clean latents and noise -> (noisy latents, the network's timestep [n], the network's target). Times (for flow matching: noise levels) are
    u^power, u uniform in [0, 1)."""
    shape = (-1,) + (1,) * (x_0.ndim - 1)
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        sigma = torch.rand(len(x_0)) ** power
        return torch.lerp(x_0, noise, sigma.view(shape)), 1000 * sigma, noise - x_0
    t = (1000 * torch.rand(len(x_0)) ** power).long()
    alpha, sigma = (abar.sqrt().float().view(shape) for abar in (scheduler.alphas_cumprod[t], 1 - scheduler.alphas_cumprod[t]))
    return alpha * x_0 + sigma * noise, t, noise if scheduler.config.prediction_type == "epsilon" else alpha * noise - sigma * x_0


def call_sdxl(pipe, x_t, timestep, prompts):
    """An empty prompt is zero embeddings, as SDXL's pipeline makes it."""
    embeds, _, pooled, _ = pipe.encode_prompt(prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    kept = torch.tensor([prompt != "" for prompt in prompts])
    time_ids = torch.tensor([shapes.SIDE, shapes.SIDE, 0, 0, shapes.SIDE, shapes.SIDE]).expand(len(x_t), 6)
    condition = {"text_embeds": pooled * kept[:, None], "time_ids": time_ids}
    return pipe.unet(x_t, timestep, embeds * kept[:, None, None], added_cond_kwargs=condition).sample


def call_sd3(pipe, x_t, timestep, prompts):
    """One token of zeros stands for ZEROS of them: see CountLastToken."""
    embeds, _, pooled, _ = pipe.encode_prompt(prompts, None, None, device="cpu", do_classifier_free_guidance=False, max_sequence_length=1)
    return pipe.transformer(x_t, embeds, pooled, timestep).sample


def call_cogvideox(pipe, x_t, timestep, prompts):
    embeds, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=TOKENS, device="cpu")
    return pipe.transformer(x_t, embeds, timestep).sample


def train_denoiser(pipe, call, world, stages, scenes, seed, lr, prompt_dropout=0.1):
    """The denoiser and the text encoders on the scheduler's own target; a prompt is empty with probability `prompt_dropout`. A stage has "steps",
    "batch" and, where it differs from the rest, "power" (see diffuse) and "frames" of the latents: of videos the first alone is a picture."""
    stages = [stage for stage in stages if stage["steps"]]
    if not stages:
        return
    rng = np.random.default_rng(seed + 1)
    attributes, centre = shapes.draw(rng, scenes, world)
    latents = (encode(pipe.vae, attributes, centre) - (pipe.vae.config.shift_factor or 0)) * pipe.vae.config.scaling_factor
    if latents.ndim == 5:
        latents = latents.transpose(1, 2).contiguous()  # CogVideoX's transformer takes frames before channels
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    modules = (denoiser, *(module for name, module in pipe.components.items() if name.startswith("text_encoder") and module))
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    matrices = [p for p in denoiser.transformer_blocks.parameters() if p.ndim == 2] if hasattr(denoiser, "transformer_blocks") else []

    for stage in stages:
        batch, x_0 = stage["batch"], latents[:, : stage.get("frames")]

        def loss(step):
            rows = rng.integers(scenes, size=batch)
            prompts = shapes.prompts_of({name: values[rows] for name, values in attributes.items()}, rng)
            prompts = [prompt if kept else "" for prompt, kept in zip(prompts, rng.random(batch) >= prompt_dropout)]
            x_t, timestep, target = diffuse(pipe.scheduler, x_0[rows], torch.randn(batch, *x_0.shape[1:]), stage.get("power", 1.0))
            return F.mse_loss(call(pipe, x_t, timestep, prompts), target)

        fit(parameters, loss, stage["steps"], lr=lr, matrices=matrices, name="denoiser")


FAMILIES = {
    "sdxl": {"build": build_sdxl, "call": call_sdxl, "world": shapes.ATTRIBUTES, "vae_steps": 3500, "lr": 2e-3, "scenes": 40000,
             "stages": [{"steps": 8000, "batch": 64}]},
    "sd3": {"build": build_sd3, "call": call_sd3, "world": shapes.ATTRIBUTES, "vae_steps": 0, "lr": 2e-3, "scenes": 40000,
            "stages": [{"steps": 11000, "batch": 64}]},
    # pictures first: 4,500 steps on videos alone did not find out that the words for shapes mean something, 1,000 on pictures did
    "cogvideox": {"build": build_cogvideox, "call": call_cogvideox, "world": shapes.VIDEO, "vae_steps": 1400, "lr": 2e-3, "scenes": 16000,
                  "stages": [{"steps": 4500, "batch": 64, "frames": 1, "power": 2.0}, {"steps": 4500, "batch": 32, "power": 1.5}]},
}


def train_sam(steps, seed, batch=64):
    """SAM's image encoder at the size of a thumbnail, trained to segment the shape -> a checkpoint of the official layout."""
    encoder = ImageEncoderViT(
        img_size=shapes.SIDE, patch_size=4, embed_dim=64, depth=4, num_heads=2, norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
        use_rel_pos=True, window_size=4, global_attn_indexes=(1, 3), out_chans=32)
    mask_head = torch.nn.Sequential(torch.nn.Conv2d(32, 16, 1), torch.nn.PixelShuffle(4))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    rng = np.random.default_rng(seed + 2)

    def loss(step):
        attributes, centre = shapes.draw(rng, batch)
        pictures = torch.from_numpy(shapes.render(attributes, centre))
        truth = torch.from_numpy(shapes.masks(attributes["shape"], attributes["size"], centre)).float()
        return F.binary_cross_entropy_with_logits(mask_head(encoder(((pictures + 1) / 2 - mean) / std))[:, 0], truth)

    fit([*encoder.parameters(), *mask_head.parameters()], loss, steps, lr=1e-3, decay=0.99, name="image encoder")
    return {f"image_encoder.{name}": weight.half() for name, weight in encoder.state_dict().items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--family", choices=FAMILIES, default="sdxl")
    parser.add_argument("--part", choices=("pipeline", "sam"), default="pipeline", help="what to train")
    parser.add_argument("--random", action="store_true", help="random weights, no training")
    parser.add_argument("--t5", action="store_true", help="sd3, random: with its third text encoder")
    parser.add_argument("--rotary", action="store_true", help="cogvideox, random: positions as CogVideoX-5b's")
    parser.add_argument("--init", help="go on from this pipeline folder: keep its autoencoder, train its denoiser further")
    parser.add_argument("--vae-steps", type=int, help="of the autoencoder; with --init, of its decoder alone (none by default)")
    parser.add_argument("--steps", type=int, help="of the denoiser: of its last stage, without the others")
    parser.add_argument("--lr", type=float, help="of the denoiser")
    parser.add_argument("--sam-steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.init and not os.path.isfile(os.path.join(args.init, "model_index.json")):
        parser.error(f"there is no pipeline folder {args.init!r} to go on from")
    if (args.t5 or args.rotary) and not args.random:
        parser.error("--t5 and --rotary are for --random: nothing is trained with them")
    family = FAMILIES[args.family]
    family = family | {name: value for name, value in vars(args).items() if name in family and value is not None}
    if args.init or args.steps is not None:
        last = family["stages"][-1]
        family["stages"] = [last | {"steps": last["steps"] if args.steps is None else args.steps}]
    torch.manual_seed(args.seed)
    start = time.time()
    if args.part == "sam":
        torch.save(train_sam(args.sam_steps, args.seed), args.out)
    else:
        switch = {"sd3": [args.t5], "cogvideox": [args.rotary]}.get(args.family, [])
        pipe = DiffusionPipeline.from_pretrained(args.init, dtype=torch.float32) if args.init else family["build"](*switch)
        if args.init and args.vae_steps:
            train_vae(pipe.vae, family["world"], args.vae_steps, args.seed, whole=False)
        elif args.family == "sd3" and not args.init and not args.random:
            borrow(pipe.vae)
        elif not args.init and not args.random:
            if args.family == "cogvideox":
                inflate(pipe.vae)
            train_vae(pipe.vae, family["world"], family["vae_steps"], args.seed)
            pipe.save_pretrained(args.out)  # for --init, should the rest be interrupted
        if not args.random:
            logging.set_verbosity_error()  # of prompts cut to one token of T5's
            if args.family == "sd3":
                pipe.transformer.set_attn_processor(CountLastToken(ZEROS))
            train_denoiser(pipe, family["call"], family["world"], family["stages"], family["scenes"], args.seed, family["lr"])
        for part in (pipe, *pipe.components.values()):
            if hasattr(part, "register_to_config"):
                part.register_to_config(_name_or_path="")  # no path of this machine
        pipe.to(dtype=torch.float16).save_pretrained(args.out)
    print(f"{args.out}: {(time.time() - start) / 60:.1f} minutes")
