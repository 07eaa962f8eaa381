"""Builds and trains the tiny teachers: real diffusers pipelines that draw the world of shapes.

    python tiny/train.py --out assets/tiny-sdxl                 # the shipped StableDiffusionXLPipeline, 60 minutes on 2 cores
    python tiny/train.py --out random --random                  # the same pipeline with random weights, in a second (tests)
    python tiny/train.py --part sam --out assets/tiny-sam.pth   # the image encoder of ADP's pixel discriminator, 3 minutes

Nothing here is special to the project: `DiffusionPipeline.from_pretrained("assets/tiny-sdxl")` loads and runs the result.
The U-Net and the text encoders are trained together on noise prediction; the autoencoder before them; each with an
exponential moving average. Everything is drawn from one seed.
"""
import argparse
import functools
import os
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from segment_anything.modeling import ImageEncoderViT
from tokenizers import AddedToken
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the repository's root
from tiny import shapes

TOKENS = 16  # the longest prompt has 8 words


def build_tokenizer():
    """A CLIPTokenizer whose words are those of the world of shapes; any other word becomes the unknown token."""
    special = ("<|startoftext|>", "<|endoftext|>", "<|unknown|>")
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(special)}, merges=[], bos_token=special[0],
                              eos_token=special[1], pad_token=special[1], unk_token=special[2], model_max_length=TOKENS)
    words = ["a", "on", "background", "shape", *(value for values in shapes.ATTRIBUTES.values() for value in values)]
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=True) for word in words])
    return tokenizer


def build_vae():
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, sample_size=shapes.SIDE, block_out_channels=(16, 32, 32), norm_num_groups=16,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, scaling_factor=0.5)


def build_sdxl():
    """A StableDiffusionXLPipeline of the size of a thumbnail, weights random: 4x8x8 latents of 32x32 pictures."""
    def text_encoder(cls, width, tokenizer):
        return cls(CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, projection_dim=64, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=TOKENS, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))

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
        text_encoder=text_encoder(CLIPTextModel, 32, tokenizer),
        text_encoder_2=text_encoder(CLIPTextModelWithProjection, 64, tokenizer_2), add_watermarker=False)


def fit(parameters, loss, steps, lr, betas=(0.9, 0.99), decay=0.999, name=""):
    """Adam with a cosine schedule and 100 steps of warm-up on loss(step) -> scalar; leaves the parameters at their moving average."""
    parameters = list(parameters)
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / 100) * 0.5 * (1 + np.cos(np.pi * i / steps)))
    bar = tqdm(range(steps), desc=name, mininterval=10)
    for step in bar:
        value = loss(step)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        torch._foreach_lerp_(average, parameters, 1 - min(decay, (step + 1) / (step + 10)))
        if step % 100 == 0:
            bar.set_postfix(loss=f"{value.item():.4f}")
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)


def train_vae(vae, steps, seed, batch=48):
    """Mean squared and absolute error with a small KL term; then the latents are whitened by folding their channels' mean
    and covariance into the two 1x1 convolutions at the bottleneck, so that latents * scaling_factor have mean 0 and covariance 1."""
    rng = np.random.default_rng(seed)

    def loss(step):
        pictures = torch.from_numpy(shapes.render(*shapes.draw(rng, batch)))
        posterior = vae.encode(pictures).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        return F.mse_loss(decoded, pictures) + 0.5 * F.l1_loss(decoded, pictures) + 1e-3 * posterior.kl().mean() / pictures[0].numel()

    fit(vae.parameters(), loss, steps, lr=2e-3, name="autoencoder")
    latents = encode(vae, *shapes.draw(rng, 2048)).double().transpose(0, 1).flatten(1)  # [4, n]
    mean, covariance = latents.mean(1), latents.cov()
    root = torch.linalg.cholesky(covariance)
    whiten, colour = torch.linalg.inv(root) / vae.config.scaling_factor, root * vae.config.scaling_factor
    with torch.no_grad():
        moments, back = vae.quant_conv, vae.post_quant_conv
        weight, bias = moments.weight[:4, :, 0, 0].double(), moments.bias[:4].double()
        moments.weight[:4, :, 0, 0], moments.bias[:4] = (whiten @ weight).float(), (whiten @ (bias - mean)).float()
        weight = back.weight[:, :, 0, 0].double()
        back.weight[:, :, 0, 0], back.bias[:] = (weight @ colour).float(), (back.bias.double() + weight @ mean).float()


@torch.no_grad()
def encode(vae, attributes, centre):
    """A scene's latents, unscaled [n, 4, 8, 8]: the posterior's mean."""
    pictures = torch.from_numpy(shapes.render(attributes, centre))
    return torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(256)])


def train_sdxl(pipe, steps, seed, batch=64, scenes=40000, prompt_dropout=0.1, lr=2e-3):
    """Noise prediction at uniform t. An empty prompt is zero embeddings, as SDXL's pipeline makes it."""
    rng = np.random.default_rng(seed + 1)
    attributes, centre = shapes.draw(rng, scenes)
    latents = encode(pipe.vae, attributes, centre) * pipe.vae.config.scaling_factor
    alphas_cumprod = pipe.scheduler.alphas_cumprod
    time_ids = torch.tensor([shapes.SIDE, shapes.SIDE, 0, 0, shapes.SIDE, shapes.SIDE]).expand(batch, 6)

    def loss(step):
        rows = rng.integers(scenes, size=batch)
        prompts = shapes.prompts_of({name: values[rows] for name, values in attributes.items()}, rng)
        embeds, _, pooled, _ = pipe.encode_prompt(prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
        kept = torch.rand(batch) >= prompt_dropout
        t = torch.randint(1000, (batch,))
        noise = torch.randn(batch, *latents.shape[1:])
        abar = alphas_cumprod[t].view(-1, 1, 1, 1)
        x_t = abar.sqrt() * latents[rows] + (1 - abar).sqrt() * noise
        condition = {"text_embeds": pooled * kept[:, None], "time_ids": time_ids}
        eps_hat = pipe.unet(x_t, t, embeds * kept[:, None, None], added_cond_kwargs=condition).sample
        return F.mse_loss(eps_hat, noise)

    modules = (pipe.unet, pipe.text_encoder, pipe.text_encoder_2)
    fit([p for module in modules for p in module.parameters()], loss, steps, lr=lr, name="denoiser")


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
    parser.add_argument("--part", choices=("pipeline", "sam"), default="pipeline", help="what to train")
    parser.add_argument("--random", action="store_true", help="random weights, no training")
    parser.add_argument("--init", help="go on from this pipeline folder: keep its autoencoder, train its denoiser further")
    parser.add_argument("--vae-steps", type=int, default=3500)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--lr", type=float, default=2e-3, help="of the denoiser")
    parser.add_argument("--sam-steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    start = time.time()
    if args.part == "sam":
        torch.save(train_sam(args.sam_steps, args.seed), args.out)
    else:
        pipe = StableDiffusionXLPipeline.from_pretrained(args.init, dtype=torch.float32) if args.init else build_sdxl()
        if not args.init and not args.random:
            train_vae(pipe.vae, args.vae_steps, args.seed)
        if not args.random:
            train_sdxl(pipe, args.steps, args.seed, lr=args.lr)
        for part in (pipe, pipe.unet, pipe.vae):
            part.register_to_config(_name_or_path="")  # no path of this machine
        pipe.to(dtype=torch.float16).save_pretrained(args.out)
    print(f"{args.out}: {(time.time() - start) / 60:.1f} minutes")
