"""--teacher-lora: a LoRA file, in any form that diffusers reads, merged into the teacher's weights.

diffusers warns of what it can only read in part, and goes on. Here such a file is refused: what it says is
compared with what has come into the networks."""

import copy
import os
import re
import warnings
from dataclasses import dataclass

from safetensors import SafetensorError
from safetensors.torch import load_file

from support.errors import UserError, require
from support.files import compute_checksum, compute_checksum_of_json
from support.loading import quiet, shorten
from support.lora_files import takes_lora
from support.tensors import is_finite

# the names of a layer's two factors, as peft, diffusers and kohya have them
FACTOR = re.compile(r"(?P<layer>.+?)[._]lora(_linear_layer)?[._](?P<kind>A|B|down|up)(\.default_0)?\.weight")
DOWN = ("A", "down")
# what else every family reads: alphas, and in peft's form DoRA's magnitudes and biases
MORE = re.compile(r".+(\.alpha|\.lora_magnitude_vector(\.weight)?|\.lora_B\.bias)")
TOLERANCE = 1e-3  # of sizes: bf16 rounds


@dataclass
class Content:
    """What a LoRA file says."""

    factors: int  # how many
    has_alphas: bool  # whether a layer has a scale of its own, alpha / rank
    size: float  # the sum of |scale up down|^2 over its layers


def read_lora(path):
    """The LoRA file of --teacher-lora -> Content; of None, None. UserError for any other file, and for one
    with something in it that would not be merged."""
    if path is None:
        return None
    require("peft", "peft", "merges --teacher-lora")
    if not os.path.isfile(path):
        raise UserError(f"there is no file --teacher-lora {path}")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--teacher-lora {path} is no .safetensors file: {shorten(error)}") from error
    size = 0.0
    layers = find_layers(path, tensors)
    for layer, (down, up) in layers.items():
        alpha = tensors.get(f"{layer}.alpha")
        size += measure(down, up, 1 if alpha is None else alpha.item() / len(down))
    has_alphas = any(name.endswith(".alpha") for name in tensors)
    return Content(2 * len(layers), has_alphas, size)


def find_layers(path, tensors):
    """The tensors of a LoRA file -> {layer: its factors (down, up)}. UserError for what is damaged, and what
    would be lost."""
    found = {"down": {}, "up": {}}
    rest = []
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise UserError(f"--teacher-lora {path} is damaged: {name} is not finite")
        factor = FACTOR.fullmatch(name)
        if factor:
            found["down" if factor["kind"] in DOWN else "up"][factor["layer"]] = tensor
        elif not MORE.fullmatch(name) and tensor.float().any():
            rest.append(name)
    downs, ups = found["down"], found["up"]
    if not downs and not ups:
        raise UserError(f"--teacher-lora {path} is no LoRA: no tensor in it is named as a low-rank factor")
    if rest:
        what = f"{rest[0]} is no low-rank factor, and diffusers drops what it does not know"
        raise UserError(f"--teacher-lora {path} is more than a LoRA: {what}")
    for layer in sorted(downs.keys() ^ ups.keys()):
        raise UserError(f"--teacher-lora {path} is damaged: {layer} has lost one of its two factors")
    for layer, down in downs.items():
        up = ups[layer]
        if min(down.ndim, up.ndim) < 2 or len(down) != up.shape[1]:
            raise UserError(f"--teacher-lora {path} is damaged: the factors of {layer} are of two ranks")
    return {layer: (down, ups[layer]) for layer, down in downs.items()}


def measure(down, up, scale):
    """|scale up down|^2 of a layer's factors [rank, ...] and [n, rank, ...], whose product is not made."""
    down, up = down.flatten(1).double(), up.flatten(1).double()
    return scale**2 * ((up.T @ up) * (down @ down.T)).sum().item()


def merge_into_teacher(teacher, path, content):
    """Adds a LoRA file to the weights of the teacher's networks; what is in it is part of the fingerprint.
    content: read_lora's. UserError where it does not fit."""
    # its own is of the weights before: what is merged in bf16 rounds otherwise than in fp32
    teacher.fingerprint = compute_checksum_of_json([teacher.fingerprint, compute_checksum(path)])[:16]
    if not takes_lora(teacher):
        kind = type(teacher.pipe).__name__
        raise UserError(f"diffusers' {kind} reads no LoRA files: leave --teacher-lora out")
    merge(teacher.pipe, path, list_lora_parts(teacher.pipe), content)
    teacher.lora = path


def merge_into_network(teacher, net):
    """Merges the teacher's LoRA, if it has one, into a network of its denoiser's weights -> the network."""
    if teacher.lora:
        pipe = copy.copy(teacher.pipe)
        setattr(pipe, teacher.denoiser_name, net)
        merge(pipe, teacher.lora, [teacher.denoiser_name])
    return net


def list_lora_parts(pipe):
    """The names of the networks of a pipeline that a LoRA file may be of."""
    return [name for name in pipe._lora_loadable_modules if getattr(pipe, name, None) is not None]


def merge(pipe, path, parts, content=None):
    """Adds a LoRA file to the weights of these networks of the pipeline. UserError where they have not all
    of its `content`."""
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's; what comes of them is looked for below
            pipe.load_lora_weights(path)
    except Exception as error:  # of many kinds, as files can misfit in many ways
        raise UserError(f"--teacher-lora {path} does not fit the teacher: {shorten(error)}") from error
    if content:
        check_that_all_is_there(pipe, path, parts, content)
    pipe.fuse_lora(components=parts)
    pipe.unload_lora_weights()


def check_that_all_is_there(pipe, path, parts, content):
    """UserError where the loaded adapters are fewer than the file's, or of another size."""
    found = 0
    size = 0.0
    for part in parts:
        for module in getattr(pipe, part).modules():
            for name, down in getattr(module, "lora_A", {}).items():
                found += 2
                if not down.weight.is_meta:  # else the file had nothing for it
                    scale = module.scaling[name] if content.has_alphas else 1
                    size += measure(down.weight, module.lora_B[name].weight, scale)
    if found < content.factors:
        lost = f"{content.factors - found} of its {content.factors} factors find no layer"
        raise UserError(f"--teacher-lora {path} does not fit the teacher: {lost}")
    if abs(size - content.size) > TOLERANCE * content.size:
        share = f"{size / content.size:.3g} of its change, in squares"
        raise UserError(
            f"--teacher-lora {path} cannot be merged: diffusers reads {share}, for parts of it or its alphas "
            "have names that it does not know"
        )
