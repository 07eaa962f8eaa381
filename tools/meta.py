"""Teachers, and the data that training takes, as shapes without numbers on torch's meta device."""

import copy
import functools
import os
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from common import find_family
from support.errors import UserError
from support.files import ROOT, read_json
from support.hub import TEACHERS
from support.loading import assemble, read_teacher
from support.offload import decode_in_tiles
from support.parallel import choose_dtype, shares_weights
from support.training import checkpoint_teacher

CONFIGS = os.path.join(ROOT, "assets", "configs")  # of the known teachers
META = torch.device("meta")
CLIP_LENGTH = 77

# ----------------------------------------------------------------------------------------------------------
# Configs
# ----------------------------------------------------------------------------------------------------------


def read_configs(name):
    """A known teacher or a local pipeline folder -> its configs, without weights: {"pipeline": class,
    "denoiser", "scheduler", "vae": config, "text_encoders": {name: parameters}, "text_length": tokens of the
    first, "switches": the pipeline's own, may be absent}. UserError for anything else."""
    path = TEACHERS.get(name, name)
    known = {hub_id: key for key, hub_id in TEACHERS.items()}
    if path in known and not os.path.isdir(path):
        return read_json(os.path.join(CONFIGS, f"{known[path]}.json"))
    if not os.path.exists(os.path.join(path, "model_index.json")):
        names = ", ".join(TEACHERS)
        raise UserError(
            f"--plan knows {names}, and pipeline folders with a model_index.json; {name!r} is none of them"
        )
    teacher = read_teacher(name, path)
    tokenizer = read_config(path, "tokenizer", "tokenizer_config.json")
    return {
        "pipeline": teacher.pipeline,
        "denoiser": teacher.configs[find_family(teacher.pipeline).denoiser_name],
        "vae": teacher.configs["vae"],
        "text_encoders": count_text_encoders(path, teacher.classes),
        "scheduler": teacher.configs["scheduler"],
        "switches": teacher.switches,
        "text_length": tokenizer.get("model_max_length", CLIP_LENGTH),
    }


def read_config(path, part, file="config.json"):
    config = read_json(os.path.join(path, part, file))
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a complete pipeline folder: {part}/{file} is missing or damaged")
    return config


def count_text_encoders(path, classes):
    """A pipeline folder and the classes of its components -> {name of a text encoder: its parameters}."""
    counts = {}
    for part, kind in classes.items():
        if part.startswith("text_encoder") and kind:
            config = kind.config_class.from_dict(read_config(path, part))
            with META:
                counts[part] = count_parameters(kind(config))
    return counts


def count_parameters(module):
    return sum(p.numel() for p in module.parameters())


# ----------------------------------------------------------------------------------------------------------
# Teacher and data
# ----------------------------------------------------------------------------------------------------------


def make_teacher_on_meta(args, configs):
    """The teacher of these arguments, prepared for training as on a GPU. Its text encoders are not there, its
    prompts have no meaning, and what trains is a copy of its own network."""
    family = find_family(configs["pipeline"])
    dtype = choose_dtype(args.precision, torch.device("cuda"))
    pipe = make_pipeline_on_meta(configs, dtype)
    teacher = family(pipe, args.teacher, META, dtype, args.resolution, args.frames)
    if args.checkpointing:
        checkpoint_teacher(teacher, make_checkpoint(dtype))
        if pipe.vae.is_gradient_checkpointing:
            pipe.vae.enable_gradient_checkpointing(make_checkpoint(torch.float32))
    decode_in_tiles(teacher)
    decode = teacher._decode
    shapes = teacher.condition_shapes(configs["text_length"])

    def encode(prompts):
        sizes = {name: (len(prompts), *shape) for name, shape in shapes.items()}
        return {name: torch.empty(size, device=META, dtype=dtype) for name, size in sizes.items()}

    def copy_trainable(args, adapter, folder=None):
        net = copy.deepcopy(teacher.denoiser)
        # autocast's copies of weights count, where the weights are not what the passes want
        wanted = dtype if shares_weights(args) or args.lora else torch.float32
        return convert(net, wanted).requires_grad_(True).train()

    def decode_without_autocast(latents):
        with GPUAutocast(torch.float32):
            return decode(latents)

    teacher.encode = encode
    teacher.trainable = copy_trainable
    teacher._decode = decode_without_autocast
    teacher.autocast = lambda: GPUAutocast(dtype)
    return teacher


def make_checkpoint(dtype):
    """torch's checkpoint, of which the second pass has the autocast of the first, too."""
    return functools.partial(
        checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), GPUAutocast(dtype))
    )


def make_pipeline_on_meta(configs, dtype):
    """The diffusers pipeline of these configs, with denoiser, VAE and scheduler alone."""
    import diffusers

    def make(config):
        return getattr(diffusers, config["_class_name"]).from_config(config)

    name = find_family(configs["pipeline"]).denoiser_name
    parts = {"scheduler": make(configs["scheduler"])}  # its numbers are looked at
    with META:
        parts[name] = convert(make(configs["denoiser"]), dtype)
        parts["vae"] = convert(make(configs["vae"]), dtype)
    return assemble(getattr(diffusers, configs["pipeline"]), parts, configs.get("switches", {}))


def convert(module, dtype):
    """The module with weights of this type; diffusers' own `to` warns."""
    return nn.Module.to(module, dtype)


class DataOnMeta:
    """Stands in for a list of prompts, and for ODE pairs (support.pairs.Pairs)."""

    def __init__(self, latent_shape):
        self.latent_shape = latent_shape

    def __len__(self):
        return 1

    def __getitem__(self, i):
        return ""

    def prompts(self, numbers):
        return [""] * len(numbers)

    def batch(self, numbers):
        """Numbers of n pairs -> (x_T [n, ...], x_0 [n, ...])."""
        x_T, x_0 = (torch.empty(len(numbers), *self.latent_shape, device=META) for _ in range(2))
        return x_T, x_0


# ----------------------------------------------------------------------------------------------------------
# What a GPU does in a pass
# ----------------------------------------------------------------------------------------------------------

LOWER = {
    F.linear,
    F.scaled_dot_product_attention,
    torch.Tensor.__matmul__,
    torch.Tensor.matmul,
    torch.baddbmm,
    torch.bmm,
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    torch.einsum,
    torch.matmul,
}
FLOAT = {
    F.group_norm,
    F.interpolate,
    F.layer_norm,
    F.rms_norm,
    F.softmax,
    torch.Tensor.pow,
    torch.Tensor.softmax,
    torch.rsqrt,
    torch.softmax,
}


class GPUAutocast(TorchFunctionMode):
    """What torch.autocast("cuda", dtype) does, for tensors on the meta device, which it does not know: matrix
    products and convolutions in `dtype`, norms and softmax in float32. Attention is the flash kernel's, which
    never makes the matrix of all pairs. With dtype float32 it is attention alone."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.dtype != torch.float32 and (func in LOWER or func in FLOAT):
            dtype = self.dtype if func in LOWER else torch.float32
            args = [self._cast(x, dtype) for x in args]
            kwargs = {name: self._cast(x, dtype) for name, x in kwargs.items()}
        if func is F.scaled_dot_product_attention:
            return attend(*args, **kwargs)
        return func(*args, **kwargs)

    @staticmethod
    def _cast(x, dtype):
        if not isinstance(x, torch.Tensor) or x.dtype not in (torch.float32, torch.bfloat16):
            return x
        return x.to(dtype)


def attend(query, key, value, *_, **__):
    """The flash kernel, whatever the mask: its memory is the same."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
