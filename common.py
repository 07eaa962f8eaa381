"""What the stages share: teachers behind one interface, students, discriminators, losses, and the few helpers for processes,
checkpoints and logs. Nothing here knows of a stage.

Conventions: time t is a float in [0, T], T = 1000, from data (0) to noise (T); tensors of times have one entry a row. Latents are
[B, C, H, W], or [B, C, F, H, W] for video, scaled as the denoiser wants them; pixels are [B, 3, H, W] or [B, 3, F, H, W] in [-1, 1].
A condition is a dictionary of tensors, each with one row a prompt. Schedules are computed in float64, networks run in `teacher.dtype`,
everything between them in float32.
"""
import argparse
import contextlib
import datetime
import functools
import hashlib
import importlib.util
import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
import time
import types

import filelock
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map
from tqdm import tqdm

T = 1000.0


class UserError(Exception):
    """A mistake of the person who typed the command: one sentence that says what is wrong and what to type instead."""


def first_line(error):
    """The first line of an error's message, or its kind where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


# ---------------------------------------------------------------------------------------------------------------------------
# Teachers
# ---------------------------------------------------------------------------------------------------------------------------

TEACHERS = {
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd3-medium": "stabilityai/stable-diffusion-3-medium-diffusers",
    "sd3.5-large": "stabilityai/stable-diffusion-3.5-large",
    "cogvideox": "THUDM/CogVideoX-2b",
    "cogvideox-2b": "THUDM/CogVideoX-2b",
    "cogvideox-5b": "THUDM/CogVideoX-5b",
}


class Teacher:
    """A frozen diffusers pipeline: the real score estimator F_phi, and the backbone of every latent discriminator.

    A family adds `_encode`, `call` and its geometry; the mathematics below serves them all. What differs between two models of a family
    is read from their configs, never from their names."""

    denoiser_name: str  # the pipeline's component
    student_steps: int  # paper: of its students
    sampler_steps: int  # of the teacher itself, for pairs and comparisons
    guidance: float  # of the same: the pipeline's default
    adm_guidance: float  # of the real score in ADM
    batch: int  # rows at a time in a process
    video, frames, fps = False, None, None

    def __init__(self, pipe, path, device, dtype, resolution=None, frames=None):
        """resolution (height, width) in pixels, frames of a video: default the teacher's own. UserError for what it cannot do."""
        self.pipe, self.path, self.device, self.dtype = pipe, path, device, dtype
        self.denoiser = getattr(pipe, self.denoiser_name)
        self.offloaded, self.ahead = set(), None  # modules that wait on the CPU; {prompt: its condition there}
        for module in pipe.components.values():
            if isinstance(module, nn.Module):
                module.to(device).requires_grad_(False).eval()
        self._read_schedule(pipe.scheduler)
        factor, patch, default = self._geometry()
        self.resolution = list(resolution or default)
        if any(side % (factor * patch) for side in self.resolution):
            raise UserError(f"--resolution {'x'.join(map(str, self.resolution))} is not a multiple of {factor * patch}, as the teacher {path} needs")
        if frames and not self.video:
            raise UserError(f"--frames is for video teachers; {path} draws pictures")
        height, width = (side // factor for side in self.resolution)
        self.latent_shape = (self.denoiser.config.in_channels, height, width)
        self.patches = (height // patch, width // patch)  # the map of a transformer's tokens

    def _read_schedule(self, scheduler):
        """The variance-preserving schedule of SDXL and CogVideoX; abar at t = 0, 1, ..., T: clean data first, then the training
        schedule, so that timestep n of the network is t = n + 1."""
        self.prediction = scheduler.config.prediction_type
        self.alphas_cumprod = torch.cat([torch.ones(1, dtype=torch.float64), scheduler.alphas_cumprod.double().cpu()]).to(self.device)
        if self.prediction not in ("epsilon", "v_prediction"):
            raise UserError(f"the teacher {self.path} predicts {self.prediction!r}; only epsilon and v_prediction are known here")
        if self.prediction == "epsilon" and scheduler.alphas_cumprod[-1] == 0:
            raise UserError(f"the teacher {self.path} predicts noise at zero terminal SNR, where noise says nothing of the picture")

    # The forward process, x_t = alpha_t x_0 + sigma_t eps ------------------------------------------------------------------

    def schedule(self, t):
        """alpha_t, sigma_t for float64 times t [B]. abar is interpolated linearly between the integer times; alpha_0 = 1 and
        sigma_0 = 0 exactly."""
        below = t.floor().long().clamp(max=int(T) - 1)
        abar = torch.lerp(self.alphas_cumprod[below], self.alphas_cumprod[below + 1], t - below)
        return abar.sqrt(), (1 - abar).sqrt()

    def alpha_sigma(self, t, x):
        """alpha_t, sigma_t for times t [B] (any float), in x's dtype and shaped to broadcast over x [B, ...]."""
        t = torch.as_tensor(t, dtype=torch.float64, device=x.device).expand(len(x)).clamp(0, T)
        return [value.to(x.dtype).view(-1, *[1] * (x.ndim - 1)) for value in self.schedule(t)]

    def timestep(self, t):
        """Time t [B] -> the network's own timestep input [B]."""
        return (t - 1).clamp(min=0)

    def diffuse(self, x_0, eps, t):
        """x_t = alpha_t x_0 + sigma_t eps."""
        alpha, sigma = self.alpha_sigma(t, x_0)
        return alpha * x_0 + sigma * eps

    # Predictions -----------------------------------------------------------------------------------------------------------

    def target(self, x_0, eps, t):
        """What the raw output is trained to be."""
        if self.prediction == "flow":
            return eps - x_0
        alpha, sigma = self.alpha_sigma(t, x_0)
        return eps if self.prediction == "epsilon" else alpha * eps - sigma * x_0

    def convert(self, raw, x_t, t):
        """Raw output -> (x0_hat, eps_hat). Exact at both ends: v and flow need no division, and alpha_T > 0 where noise is predicted."""
        alpha, sigma = self.alpha_sigma(t, x_t)
        if self.prediction == "epsilon":
            return (x_t - sigma * raw) / alpha, raw
        if self.prediction == "flow":
            return x_t - sigma * raw, x_t + alpha * raw
        return alpha * x_t - sigma * raw, sigma * x_t + alpha * raw

    def predict(self, net, x_t, t, cond):
        """(x0_hat, eps_hat) of `net`, a network with this teacher's parametrisation; x_t [B, ...], t [B]."""
        return self.convert(self.call(net, x_t, self.timestep(t), cond), x_t, t)

    def guided(self, x_t, t, cond, scale):
        """(x0_hat, eps_hat) of the teacher with classifier-free guidance: null + scale (cond - null). One pass at scale 1, else two."""
        if scale == 1:
            return self.predict(self.denoiser, x_t, t, cond)
        both = concatenate(cond, self.null(len(x_t)))
        raw, raw_null = self.call(self.denoiser, x_t.repeat(2, *[1] * (x_t.ndim - 1)), self.timestep(t.repeat(2)), both).chunk(2)
        return self.convert(raw_null + scale * (raw - raw_null), x_t, t)

    def step(self, x0_hat, eps_hat, s):
        """The probability-flow ODE's step to time s [B], which is DDIM's, and Euler's for flow: x_s = alpha_s x0_hat + sigma_s eps_hat."""
        return self.diffuse(x0_hat, eps_hat, s)

    def times(self, steps):
        """The teacher's own times for a sampler of so many steps: its scheduler's spacing, then 0."""
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler.from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(steps)
        return [*(scheduler.timesteps.double() + 1).tolist(), 0.0]

    def student_times(self, steps):
        """The times of a student of so many steps. paper silent: equidistant from T downwards, as DMD2's (999, 749, 499, 249 for four
        steps); whole numbers, since the network knows no others."""
        return [T - i * int(T) // steps for i in range(steps)]

    @torch.no_grad()
    def sample(self, x_T, cond, steps, scale):
        """Noise x_T [B, ...] -> x_0 by `steps` deterministic steps with guidance."""
        x, times = x_T, x_T.new_tensor(self.times(steps), dtype=torch.float64)
        for t, s in zip(times[:-1], times[1:]):
            x = self.step(*self.guided(x, t.expand(len(x)), cond, scale), s.expand(len(x)))
        return x

    # Text ------------------------------------------------------------------------------------------------------------------

    def encode(self, prompts):
        """n prompts -> condition."""
        if self.ahead is None:
            return self._encode(prompts)
        self._look_up([prompt for prompt in dict.fromkeys(prompts) if prompt not in self.ahead])
        return {name: torch.stack([self.ahead[prompt][name] for prompt in prompts]).to(self.device) for name in self.ahead[prompts[0]]}

    def encode_ahead(self, prompts):
        """With --offload: encodes all that the next iterations need, so that the encoders come to the device but once."""
        self.ahead = {}
        self._look_up(list(dict.fromkeys(prompts)))

    def _look_up(self, prompts):
        with self.resident(*self.offloaded - {self.pipe.vae}) if prompts else contextlib.nullcontext():
            for first in range(0, len(prompts), 64):
                part = prompts[first : first + 64]
                cond = {name: value.cpu() for name, value in self._encode(part).items()}
                self.ahead |= {prompt: {name: value[i] for name, value in cond.items()} for i, prompt in enumerate(part)}

    def offload(self, autoencoder):
        """Keeps the text encoders on the CPU but for the moments of their use, and the autoencoder if told so."""
        self.offloaded = {module for name, module in self.pipe.components.items() if name.startswith("text_encoder") and module is not None}
        self.offloaded |= {self.pipe.vae} if autoencoder else set()
        self.ahead = {}
        for module in self.offloaded:
            module.to("cpu")

    @contextlib.contextmanager
    def resident(self, *modules):
        """Inside, these modules are on the device, offloaded or not."""
        moved = self.offloaded.intersection(modules)
        for module in moved:
            module.to(self.device)
        try:
            yield
        finally:
            for module in moved:
                module.to("cpu")

    def check(self, prompts):
        """UserError for a prompt with a word that the tokenizer cannot express: one of a closed vocabulary, as the tiny teachers'."""
        tokenizer = self.pipe.tokenizer
        if len(tokenizer) > 1000:
            return
        for prompt in dict.fromkeys(prompts):
            unknown = [word for word in prompt.split() if tokenizer.unk_token_id in tokenizer(word).input_ids]
            if unknown:
                raise UserError(f"the prompt {prompt!r} has words that this teacher's tokenizer does not know: {', '.join(unknown)}; give it other prompts")

    def null(self, n):
        """The unconditional condition, n rows: the empty prompt."""
        if not hasattr(self, "_null"):
            self._null = self.encode([""])
        return {name: value.expand(n, *value.shape[1:]) for name, value in self._null.items()}

    # Networks --------------------------------------------------------------------------------------------------------------

    def autocast(self):
        return contextlib.nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)

    def network(self, folder, subfolder):
        """A network of the denoiser's class from its files, float32. UserError where they are damaged."""
        try:
            # again, since diffusers leaves CogVideoX's table of positions in float64
            return type(self.denoiser).from_pretrained(folder, subfolder=subfolder, dtype=torch.float32).float()
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"the weights in {folder}/{subfolder} cannot be loaded: {first_line(error)}") from error

    def trainable(self, args, adapter, folder=None):
        """A network of the denoiser's architecture whose float32 weights train: the denoiser's own, or those of the student in the checkpoint
        `folder`. With --lora it is the frozen denoiser with an adapter of this name, zero or that of the checkpoint."""
        if args.lora:
            if args.compile:
                raise UserError("--compile is for networks that train whole; --lora has none")
            net = Adapted(self.denoiser, adapter, args.lora)
            if folder:
                try:
                    net.load_state_dict(read_tensors(os.path.join(folder, "state", "G.pt")))
                except (RuntimeError, OSError, ValueError) as error:
                    raise UserError(f"--lora {args.lora} starts from the teacher, or from a student of the same --lora; {folder} is none") from error
            return net
        net = self.network(folder, "student") if folder else self.network(self.path, self.denoiser_name)
        net.requires_grad_(True).train()
        if args.checkpointing:
            net.enable_gradient_checkpointing()
        net = sharded(net, args, self.dtype).to(self.device)
        if args.compile:
            torch._dynamo.config.recompile_limit = 64  # blocks of a class share their code, and SDXL's are of many shapes
            for block in blocks_of(net):
                block.compile()
        return net

    def features(self, x_t, t, cond):
        """x_t [B, ...] at times t [B] -> the maps [B, C_i, (F,) H_i, W_i] of the frozen denoiser at `self.taps`. The pass ends at the
        deepest tap. Gradients flow to x_t."""
        return tapped(self.taps, lambda: self.call(self.denoiser, x_t, self.timestep(t), cond))

    def block_taps(self, output):
        """Four evenly spaced blocks of a transformer; of a block's outputs, number `output` is the picture's or the video's tokens."""
        blocks = self.denoiser.transformer_blocks
        chosen = [blocks[len(blocks) * i // 4 - 1] for i in (1, 2, 3, 4)]
        return [(block, lambda out: out[output].transpose(1, 2).unflatten(2, self.patches)) for block in chosen]

    def decode(self, latents):
        """Latents -> pixels, about [-1, 1], not clamped; gradients flow. A megapixel at a time: 16 of SDXL's pictures would take 43 GB."""
        config, rows = self.pipe.vae.config, max(1, 2**20 // math.prod(self.resolution))

        def decode(latents):
            with self.autocast():
                return self.pipe.vae.decode(latents.to(self.dtype), return_dict=False)[0].float()

        with self.resident(self.pipe.vae):
            parts = (latents / config.scaling_factor + (config.get("shift_factor") or 0)).split(rows)
            if torch.is_grad_enabled() and len(parts) > 1:
                return torch.cat([torch.utils.checkpoint.checkpoint(decode, part, use_reentrant=False) for part in parts])
            return torch.cat([decode(part) for part in parts])

    # Export ----------------------------------------------------------------------------------------------------------------

    def student_scheduler(self, steps):
        """A diffusers scheduler with which this teacher's pipeline samples as a student of the teacher's parametrisation does: to x0_hat,
        and with new noise to the next time."""
        from diffusers import LCMScheduler

        abar = self.alphas_cumprod.cpu()
        return LCMScheduler(trained_betas=(1 - abar[1:] / abar[:-1]).tolist(), prediction_type=self.prediction, clip_sample=False,
                            original_inference_steps=int(T), timestep_scaling=1e6)  # with this the step is x0_hat exactly, not nearly

    @functools.cached_property
    def fingerprint(self):
        """Tells this teacher from any other, whatever the precision it was loaded in: its configuration and a few of its weights."""
        configs = [{k: v for k, v in dict(c).items() if not k.startswith("_")} for c in (self.denoiser.config, self.pipe.scheduler.config)]
        digest = hashlib.sha256(json.dumps(configs, sort_keys=True, default=str).encode())
        for weight in list(self.denoiser.parameters())[:: max(1, len(list(self.denoiser.parameters())) // 16)]:
            digest.update(weight.detach().flatten()[:256].to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


class SDXL(Teacher):
    """Stable Diffusion XL: U-Net with two text encoders, pooled text and image-size embeddings; noise prediction."""

    denoiser_name, student_steps, sampler_steps, guidance, adm_guidance, batch = "unet", 1, 25, 5.0, 8.0, 4  # paper: 1, 25; DMD2: 8.0

    def __init__(self, pipe, *args):
        super().__init__(pipe, *args)
        # The residual before each downsampler, and the bottleneck.
        layers = [len(block.resnets) - 1 for block in pipe.unet.down_blocks]
        self.taps = [(block, lambda out, i=i: out[1][i]) for block, i in zip(pipe.unet.down_blocks, layers)]
        self.taps += [(pipe.unet.mid_block, lambda out: out)]

    def _geometry(self):
        """(pixels a latent, smallest side of a latent, default resolution)."""
        factor, config = self.pipe.vae_scale_factor, self.denoiser.config
        return factor, 2 ** (len(config.block_out_channels) - 1), (config.sample_size * factor,) * 2

    @torch.no_grad()
    def _encode(self, prompts):
        # as pipe.encode_prompt does, which tokenizes everything twice
        embeds = []
        for tokenizer, encoder in ((self.pipe.tokenizer, self.pipe.text_encoder), (self.pipe.tokenizer_2, self.pipe.text_encoder_2)):
            length = tokenizer.model_max_length
            ids = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
            out = encoder(ids.to(self.device), output_hidden_states=True)
            embeds.append(out.hidden_states[-2])
        height, width = self.resolution
        return {"encoder_hidden_states": torch.cat(embeds, dim=-1).to(self.dtype), "text_embeds": out.text_embeds.to(self.dtype),
                "time_ids": torch.tensor([height, width, 0, 0, height, width], device=self.device).expand(len(prompts), 6)}

    def null(self, n):
        """Zeros where the pipeline's config says so (as SDXL's does), else the empty prompt."""
        if not hasattr(self, "_null"):
            self._null = self.encode([""])
            if self.pipe.config.force_zeros_for_empty_prompt:
                self._null |= {name: torch.zeros_like(self._null[name]) for name in ("encoder_hidden_states", "text_embeds")}
        return super().null(n)

    def call(self, net, x, timestep, cond):
        """The raw output of `net`, float32: x [B, C, H, W], the network's timestep [B]."""
        added = {"text_embeds": cond["text_embeds"], "time_ids": cond["time_ids"]}
        with self.autocast():
            return net(x.to(self.dtype), timestep.float(), cond["encoder_hidden_states"], added_cond_kwargs=added, return_dict=False)[0].float()


class SD3(Teacher):
    """Stable Diffusion 3 and 3.5: transformer on picture and text tokens together, three text encoders of which T5 may be absent; flow
    matching, x_t = (1 - sigma) x_0 + sigma eps with sigma = shift u / (1 + (shift - 1) u), u = t/T: equal steps in t are the teacher's own."""

    denoiser_name, student_steps, sampler_steps, guidance, adm_guidance, batch = "transformer", 4, 28, 7.0, 7.0, 4

    def __init__(self, pipe, *args):
        super().__init__(pipe, *args)
        self.taps = self.block_taps(1)  # (text, picture)

    def _read_schedule(self, scheduler):
        self.prediction, self.shift = "flow", scheduler.config.get("shift")
        if self.shift is None or scheduler.config.get("use_dynamic_shifting"):
            raise UserError(f"the teacher {self.path} has no fixed shift of its noise levels; only such flow-matching schedules are known here")

    def _geometry(self):
        factor, config = self.pipe.vae_scale_factor, self.denoiser.config
        return factor, config.patch_size, (config.sample_size * factor,) * 2

    def schedule(self, t):
        u = t / T
        sigma = self.shift * u / (1 + (self.shift - 1) * u)
        return 1 - sigma, sigma

    def timestep(self, t):
        return T * self.schedule(t.double())[1]

    def times(self, steps):
        # diffusers' own default shifts the last step twice (its sigma_min is shifted already), so that it ends at another noise level
        return [*self.student_times(steps), 0.0]

    def student_times(self, steps):
        return [T * (1 - i / steps) for i in range(steps)]

    @torch.no_grad()
    def _encode(self, prompts):
        embeds, _, pooled, _ = self.pipe.encode_prompt(list(prompts), None, None, device=self.device, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeds.to(self.dtype), "pooled_projections": pooled.to(self.dtype)}

    def call(self, net, x, timestep, cond):
        """The raw output of `net`, float32: x [B, C, H, W], the network's timestep [B]."""
        with self.autocast():
            return net(x.to(self.dtype), timestep=timestep.float(), **cond, return_dict=False)[0].float()

    def student_scheduler(self, steps):
        return flow_scheduler(self.schedule(torch.tensor(self.student_times(steps), dtype=torch.float64))[1].tolist())


class CogVideoX(Teacher):
    """CogVideoX: transformer on text and video tokens together, T5 text encoder, 3-D causal autoencoder; v prediction on a schedule with
    zero terminal SNR. 2b has a table of absolute positions, 5b rotary embeddings: the config says which."""

    denoiser_name, student_steps, sampler_steps, guidance, adm_guidance, batch, video = "transformer", 8, 50, 6.0, 6.0, 1, True

    def __init__(self, pipe, path, device, dtype, resolution=None, frames=None):
        super().__init__(pipe, path, device, dtype, resolution)
        config = self.denoiser.config
        self.frames, self.fps = frames or config.sample_frames, 8
        if config.patch_size_t is not None:
            raise UserError(f"the teacher {path} is a CogVideoX 1.5, with patches over time; only the first version is known here")
        if self.frames % 8 != 1:
            raise UserError(f"--frames {self.frames}: this autoencoder wants a multiple of 8, plus 1 (9, 17, ... 49)")
        latent_frames = (self.frames - 1) // pipe.vae_scale_factor_temporal + 1
        self.latent_shape = (self.latent_shape[0], latent_frames, *self.latent_shape[1:])
        self.patches = (latent_frames, *self.patches)
        self.taps = self.block_taps(0)  # (video, text)
        self.rotary = None
        if config.use_rotary_positional_embeddings:
            self.rotary = pipe._prepare_rotary_positional_embeddings(*self.resolution, latent_frames, device)
        pipe.vae.enable_slicing()

    def _geometry(self):
        factor, config = self.pipe.vae_scale_factor_spatial, self.denoiser.config
        return factor, config.patch_size, (config.sample_height * factor, config.sample_width * factor)

    @torch.no_grad()
    def _encode(self, prompts):
        embeds, _ = self.pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False, device=self.device,
                                            max_sequence_length=self.denoiser.config.max_text_seq_length)
        return {"encoder_hidden_states": embeds.to(self.dtype)}

    def call(self, net, x, timestep, cond):
        """The raw output of `net`, float32: x [B, C, F, H, W], the network's timestep [B]."""
        x = x.transpose(1, 2).to(self.dtype)  # frames first
        with self.autocast():
            raw = net(x, cond["encoder_hidden_states"], timestep.float(), image_rotary_emb=self.rotary, return_dict=False)[0]
        return raw.transpose(1, 2).float()


FAMILIES = {"StableDiffusionXLPipeline": SDXL, "StableDiffusion3Pipeline": SD3, "CogVideoXPipeline": CogVideoX}


def flow_scheduler(sigmas):
    """A diffusers scheduler that steps through these noise levels (1 first; 0 follows the last), to x0_hat and with new noise onwards.

    Given a number of steps n, it takes u = 1 ... 0.001 in n equal steps, shifts them to a u / (1 + (a - 1) u), and stretches the result to
    end at `shift_terminal`. Both maps are fractional linear and keep 1, as the student's own levels are such a map of 1 - i/n: two of them
    fix a and the end, and then all agree."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    if len(sigmas) == 1:
        return FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    end, a = 1e-3, 1.0
    if len(sigmas) > 2:
        ratio, d = (1 - end) * (1 - sigmas[1]) / (1 - sigmas[-1]), (1 - end) / (len(sigmas) - 1)
        a = 1 + (d - ratio) / (ratio * (1 - d) - d * end)
    # with dynamic shifting the range of u stays as it is; base = max makes it the same at every resolution
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=math.log(a), max_shift=math.log(a),
                                           shift_terminal=sigmas[-1], stochastic_sampling=True)


def family_default(name):
    """What each family's default is, for --help."""
    return ", ".join(f"{family.__name__} {getattr(family, name):g}" for family in FAMILIES.values())


def short_name(teacher):
    """The last part of a teacher's name, folder or hub id, for the names of output folders."""
    return os.path.basename(os.path.normpath(teacher))


def load_teacher(name, device, dtype=torch.float32, resolution=None, frames=None):
    """A known name, a local pipeline folder or a hub id -> Teacher. UserError where there is none, or of an unknown family."""
    from diffusers import DiffusionPipeline

    for library in ("diffusers", "transformers"):
        importlib.import_module(f"{library}.utils.logging").disable_progress_bar()
    path = TEACHERS.get(name, name)
    if not os.path.isdir(path) and not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise UserError(f"there is no teacher {name!r}: give one of {', '.join(TEACHERS)}, a pipeline folder, or a hub id such as {TEACHERS['sdxl']}")
    try:
        config = DiffusionPipeline.load_config(path)
        family = config["_class_name"]
        if family not in FAMILIES:
            raise UserError(f"the teacher {name!r} is a {family}; known are {', '.join(FAMILIES)}")
        absent = {name: None for name, value in config.items() if value == [None, None]}  # SD3 without T5: diffusers wants to hear it
        pipe = DiffusionPipeline.from_pretrained(path, dtype=dtype, **absent)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if any(word in str(error).lower() for word in ("sentencepiece", "protobuf", "tiktoken")):  # transformers names one or another
            raise UserError(f"the teacher {name!r} has a T5 tokenizer that needs two more packages: pip install sentencepiece protobuf") from error
        raise UserError(f"the teacher {name!r} could not be loaded from {path}: {first_line(error)}") from error
    return FAMILIES[family](pipe, path, device, dtype, resolution, frames)


def concatenate(*conditions):
    return {name: torch.cat([c[name] for c in conditions]) for name in conditions[0]}


class _DeepestTapReached(Exception):
    pass


def tapped(taps, run):
    """The maps that `run()` leaves at taps [(module, output -> map)], in their order; the pass ends at the last of them."""
    maps = []

    def catch(read, last):
        def hook(module, inputs, output):
            maps.append(read(output).float())
            if last:
                raise _DeepestTapReached

        return hook

    handles = [module.register_forward_hook(catch(read, module is taps[-1][0])) for module, read in taps]
    try:
        with contextlib.suppress(_DeepestTapReached):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return maps


# ---------------------------------------------------------------------------------------------------------------------------
# Students
# ---------------------------------------------------------------------------------------------------------------------------


class Student:
    """G_theta: what a network's output means and at which times it is used. The network itself is passed in, bare or wrapped by DDP.

    parametrisation "teacher": predicts as the teacher does, on the teacher's forward process.
    parametrisation "velocity" (after ADP): predicts v = x_T - x_0 on the straight path x_t = (1 - t/T) x_0 + (t/T) x_T."""

    def __init__(self, teacher, parametrisation, steps):
        self.teacher, self.parametrisation, self.steps = teacher, parametrisation, steps
        self.times = teacher.student_times(steps)

    def diffuse(self, x_0, eps, t):
        """x_0 and noise -> the input at times t [B]."""
        if self.parametrisation == "teacher":
            return self.teacher.diffuse(x_0, eps, t)
        r = self.ratio(t, x_0)
        return (1 - r) * x_0 + r * eps

    def x0(self, net, x_t, t, cond):
        """x0_hat = G_theta(x_t, t, c)."""
        if self.parametrisation == "teacher":
            return self.teacher.predict(net, x_t, t, cond)[0]
        return x_t - self.ratio(t, x_t) * self.velocity(net, x_t, t, cond)

    @staticmethod
    def ratio(t, x):
        """t/T for times t [B], shaped to broadcast over x."""
        return (t / T).to(x.dtype).view(-1, *[1] * (x.ndim - 1))

    def velocity(self, net, x_t, t, cond):
        """The raw output of a velocity student. Its timestep input is t itself: T for pure noise."""
        return self.teacher.call(net, x_t, t, cond)

    def scheduler(self):
        """The diffusers scheduler with which the teacher's pipeline samples as this student does. UserError where there is none."""
        if self.parametrisation == "teacher":
            return self.teacher.student_scheduler(self.steps)
        if self.teacher.prediction == "flow":
            return flow_scheduler([t / T for t in self.times])
        if self.steps > 1:
            raise UserError("no diffusers scheduler samples as a velocity student of several steps does; export one of one step, or one that started from the teacher")
        from diffusers import DPMSolverMultistepScheduler

        # One step of flow from noise level 1, network's timestep 1000: x_0 = x_T - v. A shift without end makes the first level exactly 1.
        return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1e30, solver_order=1, final_sigmas_type="zero")

    @torch.no_grad()
    def simulate(self, net, rows, cond, k):
        """Backward simulation: run the student from pure noise through its first k times -> x at self.times[k], [B, ...]."""
        x = rows.normal(*self.teacher.latent_shape)
        for t, s in zip(self.times[:k], self.times[1 : k + 1]):
            t, s = (torch.full((len(x),), value, dtype=torch.float64, device=x.device) for value in (t, s))
            x = self.diffuse(self.x0(net, x, t, cond), rows.normal(*self.teacher.latent_shape), s)
        return x

    @torch.no_grad()
    def sample(self, net, rows, cond):
        """Pure noise -> latents, in self.steps steps."""
        x = self.simulate(net, rows, cond, self.steps - 1)
        return self.x0(net, x, torch.full((len(x),), self.times[-1], dtype=torch.float64, device=x.device), cond)


class Adapted(nn.Module):
    """A network that is a frozen backbone with one of its LoRA adapters switched on, for --lora: as many networks as adapters, for the memory of
    one. Its parameters are the adapter's alone, float32. The backbone itself, called as ever, has all adapters off."""

    def __init__(self, backbone, name, rank):
        super().__init__()
        peft = needed("peft", "peft", "adds LoRA adapters")
        targets = [n.removesuffix(".base_layer") for n in inner_layers(backbone) if "lora_" not in n]
        # paper silent: every linear layer of the blocks; alpha = rank, so the learning rate means the same for all ranks
        backbone.add_adapter(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), name)
        self.layers = {n: m for n, m in backbone.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
        if not hasattr(backbone, "switched_on"):
            backbone.switched_on = []  # every layer reads this one list, so that to switch is to change it
        for layer in self.layers.values():
            layer._active_adapter = backbone.switched_on
        for n, weight in backbone.named_parameters():
            if "lora_" in n:
                weight.data = weight.data.float()
                weight.requires_grad_(True)
        self.weights = nn.ParameterList(weight for n, weight in backbone.named_parameters() if f".{name}." in n)
        self.name, self.__dict__["backbone"] = name, backbone  # not a submodule
        if backbone.is_gradient_checkpointing:
            backbone.enable_gradient_checkpointing(self.checkpoint)

    @contextlib.contextmanager
    def on(self, names):
        before = list(self.backbone.switched_on)
        self.backbone.switched_on[:] = names
        try:
            yield
        finally:
            self.backbone.switched_on[:] = before

    def forward(self, *args, **kwargs):
        with self.on([self.name]):
            return self.backbone(*args, **kwargs)

    def checkpoint(self, function, *args):
        """Gradient checkpointing that computes a block again with the adapter of its first time, whatever is on by then."""
        names = list(self.backbone.switched_on)

        def again(*args):
            with self.on(names):
                return function(*args)

        return torch.utils.checkpoint.checkpoint(again, *args, use_reentrant=False)

    def merged(self):
        """The state dictionary of a plain network with the same outputs, on the main process."""
        state = {n.replace(".base_layer", ""): gathered(w) for n, w in self.backbone.state_dict().items() if "lora_" not in n}
        if is_main():
            state = {n: w.cpu() for n, w in state.items()}  # in float32 it would not fit beside the backbone
            for n, layer in self.layers.items():
                state[f"{n}.weight"] = state[f"{n}.weight"].float() + layer.get_delta_weight(self.name).cpu()
        return state


# ---------------------------------------------------------------------------------------------------------------------------
# Discriminators
# ---------------------------------------------------------------------------------------------------------------------------


class Head(nn.Module):
    """Maps [B, channels, (F,) H, W] -> one logit a row [B]: three [Conv 4x4 stride 2, GroupNorm, SiLU], then [Conv 3x3, GroupNorm, SiLU],
    global average pool, linear (paper, section B.1, after SDXL-Lightning). For video the last convolution is 3x3x3, and goes over frames.

    paper silent: small maps get fewer strided convolutions, so that 4x4 is left; GroupNorm on a 1x1 map wipes out what it says."""

    def __init__(self, shape, width=256):
        """shape: (channels, H, W) or (channels, F, H, W) of the maps."""
        super().__init__()
        channels, video, layers = shape[0], len(shape) == 4, []
        for _ in range(min(3, max(0, int(math.log2(min(shape[-2:]))) - 2))):
            strided = nn.Conv3d(channels, width, (1, 4, 4), (1, 2, 2), (0, 1, 1)) if video else nn.Conv2d(channels, width, 4, 2, 1)
            layers += [strided, nn.GroupNorm(32, width), nn.SiLU()]
            channels = width
        layers += [(nn.Conv3d if video else nn.Conv2d)(channels, width, 3, padding=1), nn.GroupNorm(32, width), nn.SiLU()]
        self.body, self.logit = nn.Sequential(*layers), nn.Linear(width, 1)

    def forward(self, x):
        return self.logit(self.body(x).flatten(2).mean(2))[:, 0]


class Heads(nn.Module):
    """A head for every map: list of [B, C_i, (F,) H_i, W_i] -> logits [B, number of maps]. D(x) is their mean over the maps."""

    def __init__(self, maps, width=256):
        super().__init__()
        self.heads = nn.ModuleList(Head(m.shape[1:], width) for m in maps)

    def forward(self, maps):
        return torch.stack([head(m) for head, m in zip(self.heads, maps)], dim=1)


class PixelBackbone:
    """A frozen vision encoder, the backbone of ADP's pixel discriminator: pixels [B, 3, H, W] in [-1, 1] -> maps [B, C, H/p, W/p].

    `name` is a SAM checkpoint (.pth or .safetensors, official or of the same layout), the name of an official one (sam_vit_b, _l, _h:
    fetched to torch's cache), or DINOv2 as a transformers folder, hub id, or "dinov2"."""

    NO_VIDEO = "the pixel discriminator sees single pictures, not video: give --lambda-pixel 0 --lambda-latent 1"
    SAM = {"sam_vit_b": "sam_vit_b_01ec64.pth", "sam_vit_l": "sam_vit_l_0b3195.pth", "sam_vit_h": "sam_vit_h_4b8939.pth"}

    def __init__(self, name, device, dtype, encoder=None):
        """encoder: SAM's, where it is there already."""
        self.device, self.dtype = device, dtype
        if name == "dinov2" or os.path.isdir(name) or re.fullmatch(r"[\w-]+/[\w.-]+", name) and not os.path.exists(name):
            from transformers import AutoModel

            try:
                self.encoder = AutoModel.from_pretrained("facebook/dinov2-base" if name == "dinov2" else name)
            except (OSError, ValueError) as error:
                raise UserError(f"the pixel backbone {name!r} could not be loaded: {first_line(error)}") from error
            self.patch = self.encoder.config.patch_size
            layers = self.encoder.encoder.layer
            self.taps = [(layers[len(layers) * i // 4 - 1], self._fold) for i in (1, 2, 3, 4)]
        else:
            self.encoder = encoder or load_sam_encoder(name if name not in self.SAM else fetched(
                f"https://dl.fbaipublicfiles.com/segment_anything/{self.SAM[name]}", "give --pixel-backbone PATH"))
            self.patch = self.encoder.patch_embed.proj.stride[0]
            self.position = self.encoder.pos_embed.detach().clone().permute(0, 3, 1, 2)
            # paper and peers: vit_b's layers 3, 6, 9, 12, which are its global-attention blocks; so for the other sizes, too
            self.taps = [(block, lambda out: out.permute(0, 3, 1, 2)) for block in self.encoder.blocks if block.window_size == 0]
        self.encoder.to(device, dtype).requires_grad_(False).eval()
        self.mean, self.std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def _fold(self, out):
        tokens = out[0] if isinstance(out, tuple) else out
        rows, columns = self.grid
        return tokens[:, -rows * columns :].transpose(1, 2).unflatten(2, (rows, columns))  # the class token comes first

    def features(self, pixels):
        """pixels [B, 3, H, W] in [-1, 1], any size from two patches up -> maps. Gradients flow to the pixels."""
        size = [max(2, side // self.patch) * self.patch for side in pixels.shape[2:]]
        if list(pixels.shape[2:]) != size:
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True)
        self.grid = [side // self.patch for side in size]
        x = (((pixels + 1) / 2 - self.mean) / self.std).to(self.dtype)
        if hasattr(self, "position") and list(self.encoder.pos_embed.shape[1:3]) != self.grid:
            position = F.interpolate(self.position, self.grid, mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
            self.encoder.pos_embed = nn.Parameter(position.to(self.device, self.dtype), requires_grad=False)
        return tapped(self.taps, lambda: self.encoder(x))


def load_sam_encoder(path):
    """A SAM checkpoint -> its ImageEncoderViT, whose sizes are read off the tensors: the official files of vit_b, vit_l and vit_h,
    and any other of that layout."""
    from segment_anything.modeling import ImageEncoderViT

    try:
        state = read_tensors(path)
        state = {name.removeprefix("image_encoder."): w for name, w in state.items() if name.startswith("image_encoder.")}
        dim, _, patch, _ = state["patch_embed.proj.weight"].shape
        side = state["pos_embed"].shape[1]
        # a block's relative positions have 2 n - 1 rows, n its window's side or, with global attention, the whole map's
        spans = [(len(state[f"blocks.{i}.attn.rel_pos_h"]) + 1) // 2 for i in range(len([k for k in state if k.endswith("attn.rel_pos_h")]))]
        encoder = ImageEncoderViT(
            img_size=side * patch, patch_size=patch, embed_dim=dim, depth=len(spans), num_heads=dim // state["blocks.0.attn.rel_pos_h"].shape[1],
            norm_layer=functools.partial(nn.LayerNorm, eps=1e-6), use_rel_pos=True, window_size=min(spans),
            global_attn_indexes=[i for i, span in enumerate(spans) if span == side], out_chans=len(state["neck.0.weight"]))
        encoder.load_state_dict(state)
    except FileNotFoundError as error:
        raise UserError(f"there is no SAM checkpoint at {path!r}; give a file, one of {', '.join(PixelBackbone.SAM)}, or dinov2") from error
    except Exception as error:  # torch.load, safetensors and load_state_dict raise many kinds for a file of another layout
        raise UserError(f"{path!r} is not a SAM checkpoint: {first_line(error)}") from error
    return encoder


def hinge_discriminator(real, fake, weights=None):
    """E relu(1 - D(real)) + E relu(1 + D(fake)); logits [B, heads], weights [heads] or None for the mean.

    paper silent: the hinge is taken per head, then averaged."""
    return weighted(F.relu(1 - real), weights) + weighted(F.relu(1 + fake), weights)


def hinge_generator(fake, weights=None):
    """-E D(fake); logits [B, heads], weights [heads] or None for the mean."""
    return -weighted(fake, weights)


def weighted(values, weights):
    return values.mean() if weights is None else (values * weights).sum(1).mean()


# ---------------------------------------------------------------------------------------------------------------------------
# Processes and random numbers
# ---------------------------------------------------------------------------------------------------------------------------


def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main():
    return rank() == 0


def own_device():
    """This process's GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def start_processes(seed):
    """Joins the processes that torchrun started, if it did -> this process's device. The seed is for initial weights."""
    torch.manual_seed(seed)
    device = own_device()
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        # the others wait that long for the main process, which fetches a teacher and writes checkpoints of up to 260 GB
        options = {"timeout": datetime.timedelta(hours=2), **({"device_id": device} if device.type == "cuda" else {})}
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **options)
    return device


def dtype_of(precision, device):
    """"fp32", "bf16" or None (bf16 on a GPU, else fp32) -> the dtype that networks run in."""
    precision = precision or ("bf16" if device.type == "cuda" else "fp32")
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


def barrier():
    if dist.is_initialized():
        dist.barrier()


def distributed(module):
    """`module` wrapped by DDP if there are several processes, and it is not sharded. The bare module stays usable beside it."""
    if not dist.is_initialized() or isinstance(module, FSDPModule):
        return module
    ids = [torch.cuda.current_device()] if next(module.parameters()).is_cuda else None
    return nn.parallel.DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True, forward_sync_buffers=False)  # they are constants


def sharded(net, args, dtype):
    """With --shard fsdp each process keeps its share of the weights of `net`, gradients and optimiser states like them (FSDP2), and a block is put
    together, in `dtype`, while it is used. In place."""
    if args.shard == "fsdp" and dist.is_initialized():
        # inputs stay as they are: a timestep of 999 is 1000 in bf16
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for module in (*reversed(blocks_of(net)), net):
            fully_shard(module, mp_policy=policy, reshard_after_forward=True)
    return net


def blocks_of(net):
    """The modules of a diffusers network that should stay in one piece, outer ones before inner ones."""
    return [module for module in net.modules() if any(kind.__name__ in net._no_split_modules for kind in type(module).__mro__)]


def inner_layers(net):
    """{name: linear layer} of all that are in blocks."""
    inside = {part for block in blocks_of(net) for part in block.modules()}
    return {name: module for name, module in net.named_modules() if isinstance(module, nn.Linear) and module in inside}


def gathered(state):
    """Tensors in any nesting, of which each process may have a share -> the whole ones, on the main process and its CPU. All processes call it."""

    def whole(x):
        if isinstance(x, DTensor):
            x = x.full_tensor()
            return x.cpu() if is_main() else None
        return x

    return tree_map(whole, state)


def zero1_state(optimizer):
    """A ZeroRedundancyOptimizer of AdamW -> its whole state_dict, on the main process and its CPU; all processes call it. A state is the sum
    of what the processes have of it, zero but for one. Its own `consolidate_state_dict` pickles every share byte by byte: hours for SDXL."""
    state = {}
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        own = optimizer.optim.state.get(p)
        values = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        for name, value in values.items():
            if own:
                value.copy_(own[name])
            dist.reduce(value, 0)
        if is_main() and values["step"]:
            state[i] = {name: value.cpu() for name, value in values.items()}
    return {"state": state, "param_groups": torch.optim.Optimizer.state_dict(optimizer)["param_groups"]}


def laid_out(value, like):
    """A whole tensor -> as `like` is laid out over the processes."""
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None) if isinstance(like, DTensor) else value


def means(values):
    """{name: scalar tensor or float} -> {name: float}, averaged over the processes."""
    packed = torch.stack([torch.as_tensor(v, dtype=torch.float32).detach().cpu() for v in values.values()])
    if dist.is_initialized():
        packed = packed.cuda() if dist.get_backend() == "nccl" else packed
        dist.all_reduce(packed)
        packed = packed / world_size()
    return dict(zip(values, packed.tolist()))


@contextlib.contextmanager
def frozen(*modules):
    """Inside, the modules' parameters get no gradient (and DDP's hooks stay quiet)."""
    parameters = [p for module in modules if module is not None for p in module.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


class Rows:
    """Random numbers for the rows of a global batch. A row's numbers depend on (key, row) alone, never on who draws them, so that any
    number of processes, any resumption and any device gives the same; nothing has to be saved. Drawn on the CPU, moved to `device`."""

    def __init__(self, rows, key, device):
        self.device, self.generators = device, [generator(*key, row) for row in rows]

    def normal(self, *shape):
        """[rows, *shape], float32."""
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators]).to(self.device)

    def uniform(self):
        """[rows], float64, in [0, 1)."""
        return torch.cat([torch.rand(1, dtype=torch.float64, generator=g) for g in self.generators]).to(self.device)

    def integers(self, high):
        """A list of one int in [0, high) a row."""
        return [int(torch.randint(high, (1,), generator=g)) for g in self.generators]


def generator(*key):
    """A generator seeded by a tuple of non-negative integers, well mixed."""
    words = (len(key), *key)  # SeedSequence takes (1, 2) and (1, 2, 0) for the same
    return torch.Generator().manual_seed(int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1))


# ---------------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------------


PROMPTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "prompts", "general.txt")  # a few of our own, to try things with


def read_prompts(path):
    """A text file with a prompt a line -> list of str. UserError where there is none, it is not text, or it is empty."""
    try:
        with open(path, encoding="utf-8") as file:
            prompts = [line.strip() for line in file]
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt file {path} is not UTF-8 text") from error
    except OSError as error:
        raise UserError(f"the prompt file {path} cannot be read: {error.strerror}") from error
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise UserError(f"the prompt file {path} has no prompts; write one a line")
    if any("\0" in prompt for prompt in prompts):
        raise UserError(f"the prompt file {path} is not text")
    return prompts


def make_folder(path):
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {path} cannot be made: {error.strerror}") from error


@contextlib.contextmanager
def replacing(path):
    """A temporary path to write to (a file or a folder), moved to `path` at the end: readers never see half of it."""
    temporary = f"{path}.tmp{os.getpid()}"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        remove(temporary)


def remove(path):
    """A file or a folder with all that is in it, if it is there."""
    if os.path.isdir(path):
        shutil.rmtree(path)
    elif os.path.exists(path):
        os.remove(path)


def read_lines(path):
    """The values in a file with one JSON value a line; what an interruption left of the last one is passed over."""
    values = []
    if os.path.exists(path):
        with open(path) as file, contextlib.suppress(ValueError):
            for line in file:
                values.append(json.loads(line))
    return values


def read_tensors(path):
    """A checkpoint file, safetensors or torch's -> what it holds, on the CPU; nothing is unpickled. Raises what the libraries do, and
    ValueError where torch would advise to unpickle."""
    if not path.endswith(".safetensors"):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError("it holds more than tensors, or no tensors") from error
    from safetensors.torch import load_file

    return load_file(path)


def read_json(path):
    """The file's value; None where it is not there or damaged."""
    try:
        with open(path) as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def write_json(path, value):
    with replacing(path) as temporary, open(temporary, "w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")


def find_checkpoint(path):
    """A run or one of its step folders -> (step folder, meta). UserError where it is not there or not complete."""
    if not os.path.isdir(path):
        raise UserError(f"there is no checkpoint {path!r}: give a run folder, or one of its step_... folders")
    if os.path.isfile(os.path.join(path, "latest")):
        path = os.path.join(path, open(os.path.join(path, "latest")).read().strip())
    meta = read_json(os.path.join(path, "meta.json")) or {}
    parts = [os.path.join(path, part) for part in ("student/config.json", "state")]
    if not {"step", "stage", "fingerprint", "parametrisation", "steps"} <= set(meta) or not all(map(os.path.exists, parts)):
        raise UserError(f"{path} is not a complete checkpoint (student/, state/, meta.json); give another step_... folder of the run")
    return path, meta


def open_student(path, teacher, steps=None):
    """A checkpoint -> (its folder, Student, meta). UserError for a student of another teacher."""
    folder, meta = find_checkpoint(path)
    if meta["fingerprint"] != teacher.fingerprint:
        raise UserError(f"the checkpoint {folder} was distilled from {meta['teacher']}, not from {teacher.path}")
    return folder, Student(teacher, meta["parametrisation"], steps or meta["steps"]), meta


def load_student(path, teacher):
    """A checkpoint -> (network to sample with, in the teacher's precision, Student, meta). UserError for a student of another teacher."""
    folder, student, meta = open_student(path, teacher)
    return teacher.network(folder, "student").requires_grad_(False).to(teacher.device, teacher.dtype), student, meta


class Run:
    """A training run's folder: RUN/step_000500/{student/, state/, meta.json}, RUN/latest, metrics.jsonl, curves.png and samples/.

    student/ is a plain diffusers model folder with the weights to sample with. `parts` names everything that training goes on from:
    anything with state_dict and load_state_dict; state/ has a file for each, the same for any number of processes and any --shard.
    UserError if the folder holds a run and --resume is not given, or of another kind."""

    def __init__(self, stage, args, student, parts):
        self.folder, self.args, self.parts, self.start = args.out or os.path.join("runs", f"{stage}-{short_name(args.teacher)}"), args, parts, 0
        self.student, teacher = student, student.teacher
        self.meta = {"stage": stage, "teacher": args.teacher, "fingerprint": teacher.fingerprint, "resolution": teacher.resolution,
                     "frames": teacher.frames, "parametrisation": student.parametrisation, "steps": student.steps, "arguments": vars(args), "torch": torch.__version__}
        if os.path.exists(os.path.join(self.folder, "latest")):
            if not args.resume:
                raise UserError(f"{self.folder} holds a run already: add --resume to go on with it, or give another --out")
            self._restore()
        elif args.resume and os.path.isdir(self.folder) and any(name.startswith("step_") for name in os.listdir(self.folder)):
            raise UserError(f"{self.folder} has no complete checkpoint to resume from; give another --out")
        if means({"start": self.start})["start"] != self.start:  # also: every process has looked before the main one writes
            raise UserError(f"{self.folder} is not the same on all nodes: give an --out that they share")
        make_folder(os.path.join(self.folder, "samples"))
        self.metrics, self.stopping = os.path.join(self.folder, "metrics.jsonl"), False
        if is_main():
            for name in os.listdir(self.folder):
                if ".tmp" in name:  # half a checkpoint that a killed process left
                    remove(os.path.join(self.folder, name))
            kept = [line for line in read_lines(self.metrics) if line["step"] <= self.start]
            with replacing(self.metrics) as temporary, open(temporary, "w") as file:
                file.writelines(json.dumps(line) + "\n" for line in kept)
        self.bar = tqdm(total=args.iterations, initial=self.start, disable=not is_main(), mininterval=1, dynamic_ncols=True, desc=stage)
        self.clock = time.perf_counter()

    def _restore(self):
        folder, meta = find_checkpoint(self.folder)
        for name in ("stage", "fingerprint", "parametrisation", "steps"):
            if meta[name] != self.meta[name]:
                raise UserError(f"{folder} cannot be resumed: its {name} is {meta[name]}, not {self.meta[name]}")
        try:
            for name, part in self.parts.items():
                state = torch.load(os.path.join(folder, "state", f"{name}.pt"), map_location="cpu", weights_only=True, mmap=True)
                if isinstance(part, torch.optim.Optimizer):
                    parameters = [p for group in part.param_groups for p in group["params"]]
                    state["state"] = {i: {key: laid_out(v, parameters[i]) if v.ndim else v for key, v in values.items()} for i, values in state["state"].items()}
                    part.load_state_dict(state)
                    if isinstance(part, ZeroRedundancyOptimizer):
                        part.state.clear()  # a second copy of this process's share
                        for p, values in part.optim.state.items():
                            values["step"] = values["step"].to(p.device)  # left on the CPU, where AdamW's fused kernel does not want it
                else:
                    part.load_state_dict(tree_map(laid_out, state, part.state_dict()))
        except (RuntimeError, KeyError, ValueError, OSError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(f"{folder} cannot be resumed with these settings: {first_line(error)}") from error
        self.start = meta["step"]

    def iterations(self, prompts_of):
        """The numbers of the iterations that are left; prompts_of(step) are what an iteration will need encoded. SIGTERM and SIGINT end them
        after the present one and its checkpoint, so that a preempted job goes on with --resume; a second Ctrl-C ends the process."""

        def stop(number, frame):
            self.stopping = True
            if number == signal.SIGINT:  # schedulers repeat SIGTERM, which must not end the save
                signal.signal(number, before[number])

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            for step in range(self.start, self.args.iterations):
                if self.args.offload and (step - self.start) % 64 == 0:
                    ahead = range(step, min(step + 64, self.args.iterations))
                    self.student.teacher.encode_ahead([prompt for i in ahead for prompt in prompts_of(i)])
                yield step
                if self.stopping:
                    break
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def due(self, step):
        """Whether to save now: every --save-every, at the end, and on every process when one of them was told to stop."""
        self.stopping = bool(means({"stopping": float(self.stopping)})["stopping"])
        return self.stopping or step % self.args.save_every == 0 or step == self.args.iterations

    def log(self, step, metrics):
        """A line of metrics, averaged over the processes."""
        self.bar.update()
        if step % self.args.log_every:
            return
        values = means(metrics.means())
        seconds, self.clock = (time.perf_counter() - self.clock) / self.args.log_every, time.perf_counter()
        if is_main():
            with open(self.metrics, "a") as file:
                file.write(json.dumps({"step": step, **values, "seconds": seconds, "peak_mb": peak_mb()}) + "\n")
            self.bar.set_postfix({name: f"{value:.3g}" for name, value in list(values.items())[:4]})

    def save(self, step, net, ema, prompts):
        """A checkpoint, in one move, and samples of the first prompts from fixed noise. `net` is the student that trains, `ema` its average.
        All processes gather and sample, the main one writes."""
        folder = os.path.join(self.folder, f"step_{step:06d}")
        with replacing(folder) if is_main() else contextlib.nullcontext() as temporary:
            if is_main():
                os.makedirs(os.path.join(temporary, "state"))
            for name, part in self.parts.items():
                state = zero1_state(part) if isinstance(part, ZeroRedundancyOptimizer) else gathered(part.state_dict())
                if is_main():
                    torch.save(state, os.path.join(temporary, "state", f"{name}.pt"))
                if part is net:
                    weights = state
                del state  # before the next part's
            with ema.instead():
                if isinstance(net, Adapted):
                    weights = net.merged()
                elif ema.decay:
                    weights = gathered(net.state_dict())
                if is_main():
                    save_network(self.student.teacher.denoiser, weights, os.path.join(temporary, "student"))
                    write_json(os.path.join(temporary, "meta.json"), {"step": step, **self.meta})
            if is_main():
                remove(folder)
        if is_main():
            with replacing(os.path.join(self.folder, "latest")) as temporary, open(temporary, "w") as file:
                file.write(os.path.basename(folder) + "\n")
            older = sorted(name for name in os.listdir(self.folder) if re.fullmatch(r"step_\d+", name) and name < os.path.basename(folder))
            for name in older[: max(0, len(older) + 1 - self.args.keep)]:
                remove(os.path.join(self.folder, name))
            save_curves(self.metrics, os.path.join(self.folder, "curves.png"))
        with ema.instead():
            save_preview(self.student, net, prompts, self.args.seed, os.path.join(self.folder, "samples", f"step_{step:06d}"))
        barrier()
        self.clock = time.perf_counter()


def save_network(like, state, folder):
    """A state dictionary -> a diffusers model folder, of a network with the class and the configuration of `like`."""
    with torch.device("meta"):
        net = type(like).from_config(like.config)
    net.load_state_dict(state, assign=True)
    net.float().save_pretrained(folder)


@torch.no_grad()
def save_preview(student, net, prompts, seed, path):
    """Samples of fixed noise and of the first prompts: 16 pictures to path.png, or 4 videos to path.mp4 and their frames to path.png. All
    processes draw them, since shares of `net` are of no use alone; the main one writes."""
    teacher = student.teacher
    count = 4 if teacher.video else 16
    latents = student.sample(net, Rows(range(count), (seed,), teacher.device), teacher.encode((prompts * count)[:count]))
    if not is_main():
        return
    pixels = teacher.decode(latents).clamp(-1, 1)
    save_grid(pixels, f"{path}.png")
    if teacher.video and importlib.util.find_spec("imageio_ffmpeg"):
        save_video(torch.cat(list(pixels), dim=-1), f"{path}.mp4", teacher.fps)


def save_grid(pixels, path, columns=8, padding=2):
    """Pixels [n, 3, H, W] in [-1, 1] -> one picture; of videos [n, 3, F, H, W] a row each, of `columns` evenly spaced frames at most."""
    from torchvision.utils import save_image

    if pixels.ndim == 5:
        columns = min(columns, pixels.shape[2])
        pixels = pixels[:, :, torch.linspace(0, pixels.shape[2] - 1, columns).round().long()].transpose(1, 2).flatten(0, 1)
    with replacing(path) as temporary:
        save_image(pixels.cpu().float() / 2 + 0.5, temporary, nrow=columns, padding=padding, format="png")


def save_video(pixels, path, fps):
    """Pixels [3, F, H, W] in [-1, 1] -> an mp4 file."""
    ffmpeg = needed("imageio_ffmpeg", "imageio-ffmpeg", "writes mp4 files")
    frames = ((pixels.cpu().float() / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 3, 0).contiguous().numpy()
    height, width = frames.shape[1:3]
    with replacing(path) as temporary:
        # half the memory and every player: 4:2:0 colours, which want even sides
        options = ["-f", "mp4", "-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2", "-crf", "16"]
        writer = ffmpeg.write_frames(temporary, (width, height), fps=fps, macro_block_size=1, quality=None, output_params=options)
        writer.send(None)
        for frame in frames:
            writer.send(frame)
        writer.close()


def fetched(url, advice, *folders):
    """The path of a file that is published at a URL: in one of these folders or in torch's cache, where it is fetched to. UserError if that fails."""
    folders = [*filter(None, folders), os.path.join(torch.hub.get_dir(), "checkpoints")]
    paths = [os.path.join(folder, os.path.basename(url)) for folder in folders]
    for path in paths:
        if os.path.exists(path):
            return path
    try:
        os.makedirs(folders[-1], exist_ok=True)
        with filelock.FileLock(f"{paths[-1]}.lock"):  # a machine's processes fetch it once
            if not os.path.exists(paths[-1]):
                torch.hub.download_url_to_file(url, paths[-1], progress=is_main())
    except OSError as error:
        raise UserError(f"the file {os.path.basename(url)} is wanted; it is not at {' nor at '.join(paths)} and could not be fetched ({error}): "
                        f"fetch {url} by hand and {advice}") from error
    return paths[-1]


def needed(module, package, does):
    """An optional package's module. UserError with the pip command where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"the package {package} {does} and is not there: pip install {package}") from error


def save_curves(metrics, path):
    """metrics.jsonl -> a picture with a panel for every quantity."""
    import matplotlib.figure

    lines = read_lines(metrics)
    names = [name for name in (lines[-1] if lines else {}) if name != "step"]
    if not names:
        return
    figure = matplotlib.figure.Figure(figsize=(16, 2.2 * math.ceil(len(names) / 4)), layout="constrained")
    for i, name in enumerate(names):
        axes = figure.add_subplot(math.ceil(len(names) / 4), 4, i + 1, title=name)
        axes.plot(*zip(*((line["step"], line[name]) for line in lines if name in line)), linewidth=1)
    save_figure(figure, path)


def save_figure(figure, path):
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=80)


def peak_mb():
    """The most memory that this process has used, in MiB: the GPU's if there is one, else the process's own."""
    import resource  # not on Windows

    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


# ---------------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------------


def adamw(parameters, lr, args):
    """AdamW; with --shard zero1 each process keeps the state of its share of the parameters only."""
    options = {"lr": lr, "betas": args.betas, "weight_decay": args.weight_decay, "fused": True}
    if args.shard == "zero1" and dist.is_initialized():
        return ZeroRedundancyOptimizer(list(parameters), torch.optim.AdamW, **options)
    return torch.optim.AdamW(parameters, **options)


def micro_batches(args, key, device):
    """One entry for each of --accumulate micro-batches of this process, with its rows; the stages note on it what they still need."""
    first = [part * world_size() * args.batch + rank() * args.batch for part in range(args.accumulate)]
    return [types.SimpleNamespace(rows=Rows(range(i, i + args.batch), key, device)) for i in first]


def updating(optimizer, module, parts, clip, metrics, norm_name):
    """`for part in updating(...)`: one step of the optimiser after the bodies have called backward, each on its share of the loss.
    DDP exchanges gradients in the last one only. Adds the gradient's norm before clipping to `metrics` as `norm_name`; where it is not
    finite, as one bad batch can make it, there is no step."""
    for part in parts:
        wait = isinstance(module, nn.parallel.DistributedDataParallel) and part is not parts[-1]
        with module.no_sync() if wait else contextlib.nullcontext():
            yield part
    norm = nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    metrics.add(**{norm_name: norm})
    if norm.isfinite():
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)  # now: gradients of two networks are never alive together


class Means:
    """The metrics of an iteration, each the mean over its micro-batches."""

    def __init__(self):
        self.values = {}

    def add(self, **values):
        for name, value in values.items():
            self.values.setdefault(name, []).append(value.detach())

    def means(self):
        return {name: torch.stack(values).mean() for name, values in self.values.items()}


def set_lr(optimizer, lr, step, args):
    """Constant, then linearly to zero over the last `args.decay` of the iterations."""
    remaining = (args.iterations - step) / max(1, args.decay * args.iterations)
    optimizer.param_groups[0]["lr"] = lr * min(1.0, remaining)


class EMA:
    """A moving average of the student's weights, to sample and to save; decay 0 is the student itself."""

    def __init__(self, net, decay):
        self.weights, self.decay, self.updates = list(net.parameters()), decay, 0
        self.average = [p.detach().clone() for p in self.weights] if decay else []

    @torch.no_grad()
    def update(self):
        self.updates += 1
        if self.decay:
            decay = min(self.decay, self.updates / (self.updates + 10))  # short runs forget their start
            torch._foreach_lerp_(self.average, self.weights, 1 - decay)

    @contextlib.contextmanager
    def instead(self):
        """Inside, the network has the average's weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self):
        for weight, average in zip(self.weights, self.average):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def state_dict(self):
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state):
        self.updates = state["updates"]
        for average, value in zip(self.average, state["average"], strict=True):
            average.copy_(value)


# ---------------------------------------------------------------------------------------------------------------------------
# Command lines
# ---------------------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Shows defaults in --help, and says what is wrong once, not once a process."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(self, name, help, **options):
        if options.get("default") not in (None, False):
            help += f" (default {options['default']})".replace("%", "%%")
        self.add_argument(name, help=help, **options)

    def error(self, message):
        if is_main():
            print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(2)


def add_teacher_arguments(parser, required=True):
    """Which teacher, and what it draws; load_teacher_of(args) reads them."""
    parser.add("--teacher", f"{', '.join(TEACHERS)}, a pipeline folder, or a hub id" + ("" if required else " (default the student's own)"), required=required)
    parser.add("--resolution", "pixels: a side, or HEIGHTxWIDTH (default the teacher's: SDXL and SD3 1024, CogVideoX 480x720)", type=resolution)
    parser.add("--frames", "of a video, a multiple of 8 plus 1 (default the teacher's: CogVideoX 49)", type=positive)
    parser.add("--batch", f"rows at a time in each process (default {family_default('batch')})", type=positive)
    parser.add("--precision", "of the networks' passes; weights that train are fp32 (default bf16 on a GPU, else fp32)", choices=("fp32", "bf16"))


def load_teacher_of(args, device):
    """The teacher of these arguments; its family's batch where none is given."""
    teacher = load_teacher(args.teacher, device, dtype_of(args.precision, device), args.resolution, args.frames)
    args.batch = args.batch or teacher.batch
    return teacher


def load_training_teacher(args, device):
    """The same for training, where gradients run through the teacher as D's backbone, and through its decoder: they are checkpointed, and
    with --shard fsdp the teacher is sharded, too."""
    teacher = load_teacher_of(args, device)
    if args.checkpointing:
        teacher.denoiser.enable_gradient_checkpointing()
        if not teacher.video:
            teacher.pipe.vae.enable_gradient_checkpointing()
    if teacher.video:
        teacher.pipe.vae.enable_tiling()  # only previews are decoded: whole, one of CogVideoX takes 23 GB
    if args.offload:
        teacher.offload(autoencoder=not getattr(args, "lambda_pixel", 0))  # the pixel discriminator decodes in every iteration
    teacher.fingerprint  # read it while its weights are whole
    sharded(teacher.denoiser, args, None)
    return teacher


def add_training_arguments(parser):
    """The arguments that both training stages share. Learning rates and the like: paper silent, DMD2's recipe for SDXL."""
    add_teacher_arguments(parser)
    parser.add("--out", "the run's folder (default runs/STAGE-TEACHER)")
    parser.add("--resume", "go on from the run's newest checkpoint, if there is one", action="store_true")
    parser.add("--iterations", "generator updates", type=positive, default=10000)
    parser.add("--shard", "what the processes share: nothing (ddp); the optimisers' states (zero1: 9 bytes a parameter that trains on 8 GPUs, instead of "
               "16); all states and weights, the teacher's too (fsdp: 2 bytes)", choices=("ddp", "zero1", "fsdp"), default="ddp")
    parser.add("--lora", "rank of adapters on the frozen teacher, which are all that trains; 0 trains every weight", type=whole, default=0)
    parser.add("--offload", "keep text encoders and autoencoder on the CPU but while they are used; prompts are encoded 64 iterations ahead", action="store_true")
    parser.add("--accumulate", "micro-batches of --batch rows in each process for one update", type=positive, default=1)
    parser.add("--lr", "of the student", type=non_negative, default=5e-7)
    parser.add("--head-lr", "of the discriminators' heads", type=non_negative, default=5e-6)
    parser.add("--head-width", "hidden channels of the heads, a multiple of 32", type=width, default=256)  # paper
    parser.add("--betas", "of AdamW", type=share, nargs=2, default=(0.9, 0.999))
    parser.add("--weight-decay", "of AdamW", type=non_negative, default=0.01)
    parser.add("--clip", "gradient norm to clip to", type=above_zero, default=10.0)
    parser.add("--decay", "share of the iterations, at the end, over which the learning rates (in ADP the student's) fall to zero", type=share, default=0.0)
    parser.add("--ema", "decay of the student's moving average, which is what is saved; 0 is none", type=share, default=0.0)
    parser.add("--no-checkpointing", "keep activations instead of computing them twice", dest="checkpointing", action="store_false")
    # not the teacher: hooks read its blocks
    parser.add("--compile", "torch.compile the blocks of student and fake score", action="store_true")
    parser.add("--log-every", "iterations", type=positive, default=10)
    parser.add("--save-every", "iterations", type=positive, default=500)
    parser.add("--keep", "newest checkpoints", type=positive, default=3)
    parser.add("--seed", "of everything random", type=seed, default=0)
    parser.add("--plan", "say what each of so many GPUs (8 where no number is given) would hold, and stop; without weights, GPU or network",
               type=positive, nargs="?", const=8)
    parser.add("--gpu-gb", "memory of a GPU that --plan compares with, in 1e9 bytes", type=above_zero, default=80)


def number(kind, wanted, allowed):
    """An argument's type: a number of this kind (int or float) that is as wanted."""

    def parse(text):
        value = kind(text)
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"must be {wanted}, not {text}")
        return value

    parse.__name__ = {int: "whole number", float: "number"}[kind]  # argparse says "invalid number value: 'x'"
    return parse


def resolution(text):
    """"1024" or "480x720" -> (height, width)."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match or "0" in match.groups():
        raise argparse.ArgumentTypeError(f"must be a number of pixels or HEIGHTxWIDTH, not {text}")
    return int(match[1]), int(match[2] or match[1])


positive = number(int, "at least 1", lambda value: value >= 1)
steps = number(int, f"from 1 to {T:.0f}", lambda value: 1 <= value <= T)
seed = number(int, "from 0 to 2^63 - 1", lambda value: 0 <= value < 2**63)
whole = number(int, "at least 0", lambda value: value >= 0)
width = number(int, "a multiple of 32", lambda value: value > 0 and value % 32 == 0)
non_negative = number(float, "at least 0", lambda value: 0 <= value < math.inf)
above_zero = number(float, "above 0", lambda value: 0 < value < math.inf)
share = number(float, "at least 0 and below 1", lambda value: 0 <= value < 1)


def launch(main):
    """Runs a script's main(); a UserError becomes one sentence, said once, and exit code 2."""
    try:
        main()
    except UserError as error:
        if is_main():
            print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if dist.is_initialized():
        dist.destroy_process_group()
