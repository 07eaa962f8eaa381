"""Teachers behind one interface, students, discriminators and hinge losses: what the method is made of.

Conventions: time t is a float in [0, T], T = 1000, from data (0) to noise (T); tensors of times have one
entry a row. Latents are [B, C, H, W], or [B, C, F, H, W] for video, scaled as the denoiser wants them;
pixels are [B, 3, H, W] or [B, 3, F, H, W] in [-1, 1]. A condition is a dictionary of tensors, each with one
row a prompt. Schedules are computed in float64, networks run in `teacher.dtype`, everything between them in
float32. A row is one sample of the batch."""

import contextlib
import functools
import importlib
import math
import os

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from support import loading
from support.backbones import PixelBackbone  # noqa: F401  one of the method's parts
from support.checkpoints import compute_fingerprint, find_checkpoint
from support.configs import read_size, unscale
from support.errors import UserError, note
from support.inputs import check_inputs, find_start
from support.lora import make_adapted
from support.lora_files import add_adapter
from support.parallel import choose_dtype, compile_blocks, freeze_named, shard
from support.prompts import check_vocabulary
from support.schedulers import (
    make_flow_scheduler,
    make_lcm_scheduler,
    make_velocity_scheduler,
    read_alphas_cumprod,
    read_shift,
    space_timesteps,
)
from support.taps import choose_four, read_taps
from support.teacher_lora import merge_into_network, merge_into_teacher, read_lora
from support.tensors import broadcast, concatenate
from support.training import fill_training_arguments, set_up_for_training

T = 1000.0

# ----------------------------------------------------------------------------------------------------------
# Teachers
# ----------------------------------------------------------------------------------------------------------


class Teacher:
    """A frozen diffusers pipeline: the real score F_phi, and the backbone of every latent discriminator.

    A family adds _encode, condition_shapes, call, _geometry (see SDXL's) and taps, [(module, its output ->
    a map)]. What differs between two models of a family is read from their configs, never from their
    names."""

    denoiser_name: str  # the pipeline's component
    student_steps: int  # paper: of its students
    sampler_steps: int  # of the teacher itself, for pairs and comparisons
    guidance: float  # of the same: the pipeline's default
    adm_guidance: float  # of the real score in ADM
    batch: int  # rows at a time on a rank
    null_prompt = ""  # of the unconditional condition
    lora = None  # a LoRA file that was merged into the weights
    embeds_guidance = False  # whether the network is told its guidance
    student_guidance = 1  # what students and fake scores are told, and their pipelines called with
    unused = ()  # names of the network's weights on which its output does not depend
    packing = 1  # a side of the square of latents that is one token of the network's input
    video = False
    frames = None
    fps = None

    def __init__(self, pipe, path, device, dtype, resolution=None, frames=None):
        """Its networks stay where they are. resolution: (height, width) in pixels, default the teacher's.
        UserError for what it cannot do."""
        self.pipe = pipe
        self.path = path
        self.folder = path  # where the weights are read again, if that is another
        self.variant = None  # of the weights' files
        self.device = device
        self.dtype = dtype
        self.denoiser = getattr(pipe, self.denoiser_name)
        self.offload = None  # support.offload.Offload, with --offload
        for module in loading.list_networks(pipe).values():
            module.requires_grad_(False).eval()
        factor, patch, default = self._geometry()
        self.resolution = list(resolution or read_size(path, default, factor))
        if any(side % (factor * patch) for side in self.resolution):
            size = "x".join(map(str, self.resolution))
            said = f"--resolution {size}" if resolution else f"its own resolution {size}, in its config,"
            raise UserError(f"{said} is not a multiple of {factor * patch}, as the teacher {path} needs")
        if frames and not self.video:
            raise UserError(f"--frames is for video teachers; {path} draws pictures")
        height, width = (side // factor for side in self.resolution)
        self.latent_shape = (self.denoiser.config.in_channels // self.packing**2, height, width)
        self.patches = (height // patch, width // patch)  # the map of a transformer's tokens
        self._read_schedule(pipe.scheduler)

    def _set_frames(self, frames, multiple):
        """The length of a video. UserError for one that is no multiple plus 1."""
        if frames % multiple != 1:
            raise UserError(
                f"--frames {frames}: this autoencoder wants a multiple of {multiple}, plus 1 "
                f"({multiple + 1}, {2 * multiple + 1}, ...)"
            )
        self.frames = frames
        latent_frames = (frames - 1) // self.pipe.vae_scale_factor_temporal + 1
        channels, height, width = self.latent_shape
        self.latent_shape = (channels, latent_frames, height, width)
        self.patches = (latent_frames, *self.patches)

    def _read_schedule(self, scheduler):
        """The variance-preserving schedule of SDXL and CogVideoX; abar at t = 0, 1, ..., T.

        paper silent: time axis: clean data first, then the training schedule, so that timestep n of the
        network is t = n + 1, both ends are exact, and nothing divides by alpha_T."""
        self.prediction = scheduler.config.prediction_type
        abar = read_alphas_cumprod(scheduler, self.path)
        self.alphas_cumprod = torch.cat([torch.ones(1, dtype=torch.float64), abar]).to(self.device)

    # The forward process, x_t = alpha_t x_0 + sigma_t eps -------------------------------------------------

    def schedule(self, t):
        """alpha_t, sigma_t for float64 times t [B]. abar is interpolated linearly between the integer times;
        alpha_0 = 1 and sigma_0 = 0 exactly."""
        below = t.floor().long().clamp(max=int(T) - 1)
        abar = torch.lerp(self.alphas_cumprod[below], self.alphas_cumprod[below + 1], t - below)
        return abar.sqrt(), (1 - abar).sqrt()

    def alpha_sigma(self, t, x):
        """alpha_t, sigma_t for times t [B] (any float), in x's dtype and shaped to broadcast over x [B,
        ...]."""
        t = torch.as_tensor(t, dtype=torch.float64, device=x.device)
        alpha, sigma = self.schedule(t.expand(len(x)).clamp(0, T))
        return broadcast(alpha, x), broadcast(sigma, x)

    def timestep(self, t):
        """Time t [B] -> the network's own timestep input [B]."""
        return (t - 1).clamp(min=0)

    def diffuse(self, x_0, eps, t):
        """x_t = alpha_t x_0 + sigma_t eps."""
        alpha, sigma = self.alpha_sigma(t, x_0)
        return alpha * x_0 + sigma * eps

    # Predictions ------------------------------------------------------------------------------------------

    def target(self, x_0, eps, t):
        """What the raw output is trained to be."""
        if self.prediction == "flow":
            return eps - x_0
        if self.prediction == "epsilon":
            return eps
        alpha, sigma = self.alpha_sigma(t, x_0)
        return alpha * eps - sigma * x_0

    def convert(self, raw, x_t, t):
        """Raw output -> (x0_hat, eps_hat). Exact at both ends: v and flow need no division, and alpha_T > 0
        where noise is predicted."""
        alpha, sigma = self.alpha_sigma(t, x_t)
        if self.prediction == "epsilon":
            return (x_t - sigma * raw) / alpha, raw
        if self.prediction == "flow":
            return x_t - sigma * raw, x_t + alpha * raw
        return alpha * x_t - sigma * raw, sigma * x_t + alpha * raw

    def raw(self, net, x_t, t, cond):
        """The raw output of `net` at times t [B]."""
        return self.call(net, x_t, self.timestep(t), cond)

    def predict(self, net, x_t, t, cond):
        """(x0_hat, eps_hat) of `net`, a network with this teacher's parametrisation; x_t [B, ...], t [B]."""
        return self.convert(self.raw(net, x_t, t, cond), x_t, t)

    def guided(self, x_t, t, cond, scale):
        """(x0_hat, eps_hat) of the teacher with classifier-free guidance. One pass up to scale 1, where the
        pipelines guide no more, else two, as one of twice the batch: count_passes says so."""
        if scale <= 1:
            return self.predict(self.denoiser, x_t, t, cond)
        both = concatenate(cond, self.null(len(x_t)))
        x_twice = torch.cat([x_t, x_t])
        t_twice = torch.cat([t, t])
        raw, raw_null = self.raw(self.denoiser, x_twice, t_twice, both).chunk(2)
        return self.convert(self.combine(raw, raw_null, scale), x_t, t)

    def combine(self, raw, raw_null, scale):
        """The guided raw output: null + scale (cond - null)."""
        return raw_null + scale * (raw - raw_null)

    def count_passes(self, scale):
        """The passes that `guided` makes at this scale."""
        return 1 if scale <= 1 else 2

    def tell_guidance(self, cond, scale):
        """The condition of a network that is told its guidance, this scale; others have none in it."""
        return cond

    def step(self, x0_hat, eps_hat, s):
        """The probability-flow ODE's step to time s [B], which is DDIM's, and Euler's for flow:
        x_s = alpha_s x0_hat + sigma_s eps_hat."""
        return self.diffuse(x0_hat, eps_hat, s)

    def times(self, steps):
        """The teacher's own times for a sampler of so many steps: its scheduler's spacing, then 0."""
        timesteps = space_timesteps(self.pipe.scheduler.config, steps)
        return [*(timestep + 1.0 for timestep in timesteps), 0.0]

    def student_times(self, steps, first=T):
        """The times of a student of so many steps.

        paper silent: student times: equidistant from T downwards, as DMD2's (999, 749, 499, 249 for four
        steps); whole numbers, since the network knows no others. DMD2's single step is from 399."""
        first = round(first)
        return [first - (i * first) // steps for i in range(steps)]

    @torch.no_grad()
    def sample(self, x_T, cond, steps, scale):
        """Noise x_T [B, ...] -> x_0 by `steps` deterministic steps with guidance."""
        x = x_T
        times = torch.tensor(self.times(steps), dtype=torch.float64, device=x_T.device)
        for t, s in zip(times[:-1], times[1:]):
            x0_hat, eps_hat = self.guided(x, t.expand(len(x)), cond, scale)
            x = self.step(x0_hat, eps_hat, s.expand(len(x)))
        return x

    # Text -------------------------------------------------------------------------------------------------

    def encode(self, prompts):
        """n prompts -> condition."""
        return self.offload.look_up(prompts) if self.offload else self._encode(prompts)

    def check(self, prompts):
        """UserError for a prompt with a word that its tokenizer cannot express."""
        check_vocabulary(self.pipe.tokenizer, prompts)

    def null(self, n):
        """The unconditional condition, n rows: that of null_prompt."""
        return {name: value.expand(n, *value.shape[1:]) for name, value in self._null.items()}

    @functools.cached_property
    def _null(self):
        return self.encode([self.null_prompt])

    # Networks ---------------------------------------------------------------------------------------------

    def autocast(self):
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        # a pass uses each weight once: copies that are kept to its end would be of no use
        return torch.autocast(self.device.type, self.dtype, cache_enabled=False)

    def network(self, checkpoint=None):
        """The denoiser, or the student in a checkpoint's folder, from its files, float32. UserError for
        damaged ones."""
        if checkpoint and os.path.isdir(os.path.join(checkpoint, "student")):
            return self._read_network(checkpoint, "student")
        net = merge_into_network(self, self._read_network(self.folder, self.denoiser_name, self.variant))
        return add_adapter(net, checkpoint) if checkpoint else net  # of a --lora run

    def _read_network(self, folder, name, variant=None):
        net = loading.load_network(type(self.denoiser), folder, name, torch.float32, variant)
        return net.float()  # again, since diffusers leaves CogVideoX's table of positions in float64

    def trainable(self, args, adapter, folder=None):
        """A network of the denoiser's architecture whose float32 weights train: the denoiser's own, or
        those of the student in the checkpoint `folder`. With --lora it is the frozen denoiser with an
        adapter of this name, zero or that of the checkpoint."""
        if args.lora:
            net = make_adapted(self.denoiser, adapter, args, folder)
            freeze_named(self.denoiser, self.unused)
            return net
        net = self.network(folder)
        freeze_named(net.requires_grad_(True).train(), self.unused)
        if args.checkpointing:
            net.enable_gradient_checkpointing()
        net = shard(net, args, self.dtype).to(self.device)
        if args.compile:
            compile_blocks(net)
        return net

    def features(self, x_t, t, cond):
        """x_t [B, ...] at times t [B] -> the maps [B, C_i, (F,) H_i, W_i] of the frozen denoiser at
        `self.taps`. The pass ends at the deepest tap. Gradients flow to x_t.

        paper silent: condition: D's backbone is given the prompt, too, as F_phi always is."""
        return read_taps(self.taps, lambda: self.raw(self.denoiser, x_t, t, cond))

    @torch.no_grad()
    def make_heads(self, width, backbone=None):
        """Heads for a discriminator that sees the maps of `features`, and after them a pixel backbone's."""
        x = torch.zeros(1, *self.latent_shape, device=self.device)
        maps = self.features(x, torch.ones(1, device=self.device), self.null(1))
        if backbone:
            maps = maps + backbone.features(self.decode(x))
        return Heads(maps, width).to(self.device)

    def block_taps(self, blocks, output=None):
        """Four evenly spaced blocks of a transformer. The first tokens of a block's output, or of its
        outputs that of number `output`, are the image's or the video's [B, tokens, C], and are folded back
        to maps."""

        def fold(out):
            tokens = out if output is None else out[output]
            return tokens[:, : math.prod(self.patches)].transpose(1, 2).unflatten(2, self.patches)

        return [(block, fold) for block in choose_four(blocks)]

    def decode(self, latents):
        """Latents -> pixels, about [-1, 1], not clamped; gradients flow. A megapixel at a time, which is
        checkpointed where the autoencoder itself is not."""
        rows = max(1, 2**20 // math.prod(self.resolution))
        latents = unscale(latents, self.pipe.vae)
        parts = latents.split(rows)
        present = self.offload.resident("vae") if self.offload else contextlib.nullcontext()
        with present:
            checkpoints_itself = self.pipe.vae.is_gradient_checkpointing
            if torch.is_grad_enabled() and not checkpoints_itself and len(parts) > 1:
                pixels = [checkpoint(self._decode, part, use_reentrant=False) for part in parts]
            else:
                pixels = [self._decode(part) for part in parts]
        return torch.cat(pixels)

    def _decode(self, latents):
        # without autocast, as the pipelines do: that would give back what norms make in float32
        return self.pipe.vae.decode(latents.to(self.dtype), return_dict=False)[0].float()

    # The pipeline itself -----------------------------------------------------------------------------------

    def pack(self, x):
        """Latents -> in the form that the pipeline and its network have them."""
        return x

    def unpack(self, x):
        """The inverse of pack."""
        return x

    def call_settings(self, scale):
        """The arguments with which the pipeline, called with a prompt and a number of steps, draws what this
        teacher draws, guided at this scale. A student's scale is student_guidance."""
        height, width = self.resolution
        return {"guidance_scale": scale, "height": height, "width": width}

    def student_scheduler(self, steps):
        """The diffusers scheduler of a student with the teacher's parametrisation."""
        return make_lcm_scheduler(self.alphas_cumprod.cpu(), self.prediction, steps)

    @functools.cached_property
    def fingerprint(self):
        """Tells this teacher from any other, whatever the precision it was loaded in."""
        return compute_fingerprint(self.denoiser, self.pipe.scheduler)


class SDXL(Teacher):
    """Stable Diffusion XL: U-Net, two text encoders, pooled text and size embeddings; noise prediction."""

    denoiser_name = "unet"
    null_prompt = None  # zeros, where "" is a prompt
    student_steps = 1  # paper
    sampler_steps = 25  # paper
    guidance = 5.0
    adm_guidance = 8.0  # DMD2
    batch = 4

    def __init__(self, pipe, *args):
        super().__init__(pipe, *args)
        # paper silent: taps: the residual before each downsampler, and the bottleneck, where the pass can end
        self.taps = []
        for block in pipe.unet.down_blocks:
            last = len(block.resnets) - 1
            self.taps.append((block, lambda out, last=last: out[1][last]))
        if pipe.unet.mid_block is not None:
            self.taps.append((pipe.unet.mid_block, lambda out: out))

    def _geometry(self):
        """(pixels a latent, multiple that a side of the latents must be of, default side of the latents, or
        height and width)."""
        config = self.denoiser.config
        return self.pipe.vae_scale_factor, 2 ** (len(config.block_out_channels) - 1), config.sample_size

    @torch.no_grad()
    def _encode(self, prompts):
        # as pipe.encode_prompt does, without its look at what is cut off
        pipe = self.pipe
        embeds = []
        for tokenizer, encoder in (
            (pipe.tokenizer, pipe.text_encoder),
            (pipe.tokenizer_2, pipe.text_encoder_2),
        ):
            texts = pipe.maybe_convert_prompt(list(prompts), tokenizer)  # textual inversion's several tokens
            tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
            out = encoder(tokens.input_ids.to(self.device), output_hidden_states=True)
            embeds.append(out.hidden_states[-2])
        height, width = self.resolution
        time_ids = torch.tensor([height, width, 0, 0, height, width], device=self.device)
        return {
            "encoder_hidden_states": torch.cat(embeds, dim=-1).to(self.dtype),
            "text_embeds": out.text_embeds.to(self.dtype),
            "time_ids": time_ids.expand(len(prompts), 6),
        }

    def condition_shapes(self, length):
        """{name: shape} of the condition of one prompt; length: of the first tokenizer's rows."""
        config = self.denoiser.config
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        text = (length, config.cross_attention_dim)
        return {"encoder_hidden_states": text, "text_embeds": (pooled,), "time_ids": (6,)}

    @functools.cached_property
    def _null(self):
        """Zeros where there is no negative prompt and the pipeline's config says so, as SDXL's does."""
        null = self.encode([self.null_prompt or ""])
        if self.pipe.config.force_zeros_for_empty_prompt and self.null_prompt is None:
            for name in ("encoder_hidden_states", "text_embeds"):
                null[name] = torch.zeros_like(null[name])
        return null

    def call(self, net, x, timestep, cond):
        """The raw output of `net`, float32: x [B, C, H, W], the network's timestep [B]."""
        text = cond["encoder_hidden_states"]
        added = {"text_embeds": cond["text_embeds"], "time_ids": cond["time_ids"]}
        with self.autocast():
            x = x.to(self.dtype)
            return net(x, timestep.float(), text, added_cond_kwargs=added, return_dict=False)[0].float()


class FlowTeacher(Teacher):
    """Flow matching: x_t = (1 - sigma) x_0 + sigma eps with sigma = S u / (1 + (S - 1) u), u = t/T, so that
    equal steps in t are the teacher's own. The raw output is eps - x_0. The shift S is the scheduler's, or
    with use_dynamic_shifting that of the number of tokens."""

    denoiser_name = "transformer"
    batch = 4

    def _read_schedule(self, scheduler):
        self.prediction = "flow"
        self.shift = read_shift(scheduler.config, math.prod(self.patches))

    def schedule(self, t):
        u = t / T
        sigma = self.shift * u / (1 + (self.shift - 1) * u)
        return 1 - sigma, sigma

    def timestep(self, t):
        return T * self.schedule(t.double())[1]

    def times(self, steps):
        # diffusers' default shifts the last step twice, as its sigma_min is shifted already: another level
        return [*self.student_times(steps), 0.0]

    def student_times(self, steps, first=T):
        return [first * (1 - i / steps) for i in range(steps)]

    def student_scheduler(self, steps):
        times = torch.tensor(self.student_times(steps), dtype=torch.float64)
        _, sigmas = self.schedule(times)
        return self.flow_scheduler(sigmas.tolist())

    def flow_scheduler(self, sigmas):
        """The diffusers scheduler of a student that steps through these noise levels."""
        return make_flow_scheduler(sigmas)


class SD3(FlowTeacher):
    """Stable Diffusion 3 and 3.5: transformer on image and text tokens together, three text encoders of
    which T5 may be absent; flow matching with a fixed shift."""

    student_steps = 4  # paper
    sampler_steps = 28
    guidance = 7.0
    adm_guidance = 7.0

    def __init__(self, pipe, *args):
        super().__init__(pipe, *args)
        self.taps = self.block_taps(self.denoiser.transformer_blocks, 1)  # (text, image)
        factor, patch, _ = self._geometry()
        largest = self.denoiser.config.pos_embed_max_size
        if largest and max(self.patches) > largest:
            size = "x".join(map(str, self.resolution))
            raise UserError(
                f"--resolution {size} is too large: the teacher {self.path} has positions for "
                f"{largest * patch * factor} pixels a side (pos_embed_max_size: {largest})"
            )

    def _geometry(self):
        config = self.denoiser.config
        return self.pipe.vae_scale_factor, config.patch_size, config.sample_size

    @torch.no_grad()
    def _encode(self, prompts):
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            list(prompts), None, None, device=self.device, do_classifier_free_guidance=False
        )
        pooled = pooled.to(self.dtype)
        return {"encoder_hidden_states": embeds.to(self.dtype), "pooled_projections": pooled}

    def condition_shapes(self, length):
        config = self.denoiser.config
        text = (length + 256, config.joint_attention_dim)  # T5's tokens follow CLIP's
        return {"encoder_hidden_states": text, "pooled_projections": (config.pooled_projection_dim,)}

    def call(self, net, x, timestep, cond):
        """The raw output of `net`, float32: x [B, C, H, W], the network's timestep [B]."""
        with self.autocast():
            x = x.to(self.dtype)
            return net(x, timestep=timestep.float(), **cond, return_dict=False)[0].float()


class CogVideoX(Teacher):
    """CogVideoX: transformer on text and video tokens together, T5 text encoder, 3-D causal VAE; v
    prediction at zero terminal SNR. 2b has a table of absolute positions, 5b rotary embeddings: the config
    says."""

    denoiser_name = "transformer"
    student_steps = 8  # paper
    sampler_steps = 50
    guidance = 6.0
    adm_guidance = 6.0
    batch = 1
    video = True
    fps = 8

    def __init__(self, pipe, path, device, dtype, resolution=None, frames=None):
        super().__init__(pipe, path, device, dtype, resolution)
        config = self.denoiser.config
        self._set_frames(frames or config.sample_frames, 8)
        self.taps = self.block_taps(self.denoiser.transformer_blocks, 0)  # (video, text)
        self.rotary = None
        if config.use_rotary_positional_embeddings:
            size = (*self.resolution, self.patches[0])
            self.rotary = pipe._prepare_rotary_positional_embeddings(*size, device)
        pipe.vae.enable_slicing()

    def _geometry(self):
        config = self.denoiser.config
        size = (config.sample_height, config.sample_width)
        return self.pipe.vae_scale_factor_spatial, config.patch_size, size

    @torch.no_grad()
    def _encode(self, prompts):
        length = self.denoiser.config.max_text_seq_length
        embeds, _ = self.pipe.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=length,
        )
        return {"encoder_hidden_states": embeds.to(self.dtype)}

    def condition_shapes(self, length):
        config = self.denoiser.config
        return {"encoder_hidden_states": (config.max_text_seq_length, config.text_embed_dim)}

    def call(self, net, x, timestep, cond):
        """The raw output of `net`, float32: x [B, C, F, H, W], the network's timestep [B]."""
        text = cond["encoder_hidden_states"]
        x = self.pack(x).to(self.dtype)
        with self.autocast():
            raw = net(x, text, timestep.float(), image_rotary_emb=self.rotary, return_dict=False)[0]
        return self.unpack(raw).float()

    def pack(self, x):
        return x.transpose(1, 2)  # frames first

    unpack = pack  # its own inverse

    def call_settings(self, scale):
        length = self.denoiser.config.max_text_seq_length
        own = {"num_frames": self.frames, "max_sequence_length": length}
        return super().call_settings(scale) | own


FAMILIES = {  # the paper's
    "StableDiffusionXLPipeline": SDXL,
    "StableDiffusion3Pipeline": SD3,
    "CogVideoXPipeline": CogVideoX,
}
OTHER_FAMILIES = {  # pipeline: (module of teachers/, its class)
    "StableDiffusionPipeline": ("stable_diffusion", "StableDiffusion"),
    "WanPipeline": ("wan", "Wan"),
    "ZImagePipeline": ("z_image", "ZImage"),
    "QwenImagePipeline": ("qwen_image", "QwenImage"),
    "FluxPipeline": ("flux", "Flux"),
}


def find_family(pipeline):
    """The Teacher class of a pipeline's class name."""
    if pipeline in FAMILIES:
        return FAMILIES[pipeline]
    module, name = OTHER_FAMILIES[pipeline]
    return getattr(importlib.import_module(f"teachers.{module}"), name)


def read_family(name):
    """The Teacher class of a known name, a pipeline folder or a hub id, by its JSON files alone."""
    return find_family(loading.read_teacher(name, loading.find_teacher(name)).pipeline)


def open_teacher(name, device, dtype=torch.float32, resolution=None, frames=None, variant=None):
    """A known name, a pipeline folder or a hub id -> Teacher, whose networks are on the CPU. UserError for
    what is no teacher of a known family, or would not be computed as its own pipeline does. variant: of the
    weights' files."""
    path = loading.find_teacher(name)
    pipe, folder = loading.load_pipeline(name, path, dtype, variant)
    teacher = find_family(type(pipe).__name__)(pipe, path, device, dtype, resolution, frames)
    teacher.folder = folder
    teacher.variant = variant
    return teacher


def open_teacher_from(args, device):
    """The teacher of these arguments, its networks on the CPU; its family's batch where none is given."""
    lora = read_lora(args.teacher_lora)  # what cannot be is refused before weights are read
    negative = getattr(args, "negative_prompt", None)  # adp.py has none
    if negative is not None and read_family(args.teacher).embeds_guidance:
        raise UserError("--negative-prompt is for teachers that are guided by a second pass; this is not")
    dtype = choose_dtype(args.precision, device)
    teacher = open_teacher(args.teacher, device, dtype, args.resolution, args.frames, args.variant)
    if lora:
        merge_into_teacher(teacher, args.teacher_lora, lora)
    if negative is not None:
        teacher.check([negative])
        teacher.null_prompt = negative
        if args.guidance is not None and args.guidance <= 1:
            note("--negative-prompt: of no effect without a --guidance above 1")
    args.batch = args.batch or teacher.batch
    return teacher


def load_teacher_from(args, device):
    """open_teacher_from's, ready to draw, and tried out."""
    return loading.place(open_teacher_from(args, device), args.offload)


def load_training_teacher(args, device, prompts=()):
    """open_teacher_from's, made ready to train with: a GPU gets what it will keep, no more. UserError for
    what the stage cannot do with it, and for prompts that its tokenizer cannot express."""
    check_inputs(args)
    fill_training_arguments(args, read_family(args.teacher))
    teacher = open_teacher_from(args, device)
    teacher.check(prompts)
    teacher.student_guidance = args.student_guidance or teacher.student_guidance
    set_up_for_training(teacher, args)
    loading.try_out(teacher)
    return teacher


# ----------------------------------------------------------------------------------------------------------
# Students
# ----------------------------------------------------------------------------------------------------------


class Student:
    """G_theta: what a network's output means and at which times it is used; the network is passed in.

    parametrisation "teacher": predicts as the teacher does, on the teacher's forward process.
    parametrisation "velocity" (after ADP): predicts v = x_T - x_0 on the straight path
    x_t = (1 - t/T) x_0 + (t/T) x_T."""

    def __init__(self, teacher, parametrisation, steps, guidance=None, first_time=None):
        """guidance: what its network is told, where it is told any; default the teacher's
        student_guidance. first_time: in units of T, default 1. UserError for another on a straight path."""
        self.teacher = teacher
        self.parametrisation = parametrisation
        self.steps = steps
        self.guidance = guidance or teacher.student_guidance
        self.first_time = first_time or 1.0
        if self.first_time < 1 and (parametrisation == "velocity" or teacher.prediction == "flow"):
            raise UserError("--first-time: on a straight path x_t has the size of pure noise at t = T alone")
        self.times = teacher.student_times(steps, self.first_time * T)
        if len(set(self.times)) < steps:
            few = "times are whole numbers up to 1000, and there are not so many"
            raise UserError(f"--first-time {self.first_time:g} with {steps} steps: {few}")

    def diffuse(self, x_0, eps, t):
        """x_0 and noise -> the input at times t [B]."""
        if self.parametrisation == "teacher":
            return self.teacher.diffuse(x_0, eps, t)
        r = self.ratio(t, x_0)
        return (1 - r) * x_0 + r * eps

    def x0(self, net, x_t, t, cond):
        """x0_hat = G_theta(x_t, t, c)."""
        if self.parametrisation == "teacher":
            cond = self.teacher.tell_guidance(cond, self.guidance)
            x0_hat, _ = self.teacher.predict(net, x_t, t, cond)
            return x0_hat
        return x_t - self.ratio(t, x_t) * self.velocity(net, x_t, t, cond)

    @staticmethod
    def ratio(t, x):
        """t/T for times t [B], shaped to broadcast over x."""
        return broadcast(t / T, x)

    def velocity(self, net, x_t, t, cond):
        """The raw output of a velocity student.

        paper silent: velocity timestep: its timestep input is t itself, T for pure noise, and x_t as it
        is."""
        return self.teacher.call(net, x_t, t, self.teacher.tell_guidance(cond, self.guidance))

    def time(self, k, x):
        """The student's k-th time as a tensor [B], for x [B, ...]."""
        return torch.full((len(x),), self.times[k], dtype=torch.float64, device=x.device)

    def denoise(self, net, x, k, cond):
        """x0_hat of x [B, ...] at the student's k-th time."""
        return self.x0(net, x, self.time(k, x), cond)

    @torch.no_grad()
    def simulate(self, net, rng, cond, k):
        """Backward simulation: run the student from pure noise through its first k times -> x at
        self.times[k], [B, ...]."""
        x = rng.normal(*self.teacher.latent_shape)  # paper silent: backward simulation: as DMD2's
        for i in range(k):
            x0_hat = self.denoise(net, x, i, cond)
            x = self.diffuse(x0_hat, rng.normal(*self.teacher.latent_shape), self.time(i + 1, x))
        return x

    @torch.no_grad()
    def sample(self, net, rng, cond):
        """Pure noise -> latents, in self.steps steps."""
        x = self.simulate(net, rng, cond, self.steps - 1)
        return self.denoise(net, x, self.steps - 1, cond)

    def scheduler(self):
        """The diffusers scheduler with which the teacher's pipeline samples as this student does. UserError
        where there is none."""
        if self.parametrisation == "teacher":
            return self.teacher.student_scheduler(self.steps)
        if self.teacher.prediction == "flow":
            return self.teacher.flow_scheduler([t / T for t in self.times])
        if self.steps > 1:
            raise UserError(
                "no diffusers scheduler samples as a velocity student of several steps does; "
                "export one of one step, or one that started from the teacher"
            )
        return make_velocity_scheduler()


def start_student(args, teacher):
    """The student that training starts from -> (Student, folder of its weights). Without --init the folder
    is None: weights and parametrisation are the teacher's."""
    found = find_start(args, "student")
    if found is None:
        steps = args.steps or teacher.student_steps
        return Student(teacher, "teacher", steps, None, args.first_time), None
    folder, meta = found
    student = read_student(folder, meta, teacher, args.steps, args.first_time)
    student.guidance = teacher.student_guidance  # --student-guidance, by default the checkpoint's own
    return student, folder


def open_student(path, teacher):
    """A checkpoint -> (its folder, Student, meta). UserError for a student of another teacher."""
    folder, meta = find_checkpoint(path, "student")
    return folder, read_student(folder, meta, teacher), meta


def read_student(folder, meta, teacher, steps=None, first_time=None):
    """The Student of a checkpoint, of other steps and first_time if given. UserError for a foreign one."""
    if meta["fingerprint"] != teacher.fingerprint:
        source = loading.name_both(meta["teacher"], meta.get("teacher_lora"))
        own = loading.name_both(teacher.path, teacher.lora)
        raise UserError(f"the checkpoint {folder} was distilled from {source}, not from {own}")
    guidance = meta["arguments"].get("student_guidance")
    steps = steps or meta["steps"]
    first_time = first_time or meta.get("first_time")
    return Student(teacher, meta["parametrisation"], steps, guidance, first_time)


def load_student(folder, teacher):
    """The network of a student to sample with, from its checkpoint's folder: in the teacher's precision, on
    the device but with --offload."""
    net = loading.lower_precision(teacher.network(folder).requires_grad_(False), teacher.dtype)
    return net if teacher.offload else net.to(teacher.device)


# ----------------------------------------------------------------------------------------------------------
# Discriminators
# ----------------------------------------------------------------------------------------------------------


class Head(nn.Module):
    """Maps [B, channels, (F,) H, W] -> one logit a row [B]: three [Conv 4x4 stride 2, GroupNorm, SiLU], then
    [Conv 3x3, GroupNorm, SiLU], global average pool, linear (paper, section B.1, after SDXL-Lightning).

    paper silent: head strides: small maps get fewer strided convolutions, so that 4x4 is left; GroupNorm on
    a 1x1 map wipes out what it says.
    paper silent: video heads: strided convolutions frame by frame, then one 3x3x3; the pool goes over
    frames."""

    def __init__(self, shape, width=256):
        """shape: (channels, H, W) or (channels, F, H, W) of the maps."""
        super().__init__()
        channels = shape[0]
        video = len(shape) == 4
        halvings = int(math.log2(min(shape[-2:]))) - 2
        layers = []
        for _ in range(min(3, max(0, halvings))):
            if video:
                layers.append(nn.Conv3d(channels, width, (1, 4, 4), (1, 2, 2), (0, 1, 1)))
            else:
                layers.append(nn.Conv2d(channels, width, 4, 2, 1))
            layers += [nn.GroupNorm(32, width), nn.SiLU()]
            channels = width
        last = nn.Conv3d if video else nn.Conv2d
        layers += [last(channels, width, 3, padding=1), nn.GroupNorm(32, width), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        # paper silent: head bias: none: while |D| < 1 the hinge says nothing of it, and AdamW would move it
        self.logit = nn.Linear(width, 1, bias=False)

    def forward(self, x):
        pooled = self.body(x).flatten(2).mean(2)
        return self.logit(pooled)[:, 0]


class Heads(nn.Module):
    """A head for every map: list of [B, C_i, (F,) H_i, W_i] -> logits [B, number of maps], of which D(x) is
    the mean, in ADP weighted."""

    def __init__(self, maps, width=256):
        super().__init__()
        self.heads = nn.ModuleList(Head(m.shape[1:], width) for m in maps)

    def forward(self, *groups):
        """The float32 logits of one list of maps, of any precision, or of several such lists, in one pass."""
        maps = [torch.cat(parts).float() for parts in zip(*groups)]
        logits = torch.stack([head(m) for head, m in zip(self.heads, maps)], dim=1)
        return logits.chunk(len(groups)) if len(groups) > 1 else logits


def hinge_discriminator(real, fake, weights=None):
    """E relu(1 - D(real)) + E relu(1 + D(fake)); logits [B, heads], weights [heads] or None for the mean.

    paper silent: hinge per head: it is taken per head, then averaged, so that every head learns."""
    return weigh(F.relu(1 - real), weights) + weigh(F.relu(1 + fake), weights)


def hinge_generator(fake, weights=None):
    """-E D(fake); logits [B, heads], weights [heads] or None for the mean."""
    return -weigh(fake, weights)


def weigh(values, weights):
    """values [B, heads] -> their weighted sum over the heads (None: their mean), averaged over the rows."""
    return values.mean() if weights is None else (values * weights).sum(1).mean()
