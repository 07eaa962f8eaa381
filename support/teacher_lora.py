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

# the names of a layer's two factors, as peft, diffusers, kohya and, with a number, XLabs have them
FACTOR = re.compile(
    r"(?P<layer>.+?)[._]lora(?P<number>[12]?)(_linear_layer)?[._]"
    r"(?P<kind>A|B|down|up)(\.default(_0)?)?\.weight"
)
DOWN = ("A", "down")
# what else a layer may have: its scale times its rank, the magnitudes of DoRA as peft names them, a bias
ALPHA = re.compile(r"(?P<layer>.+)\.alpha")
MAGNITUDE = re.compile(r"(?P<layer>.+)\.lora_magnitude_vector(\.weight)?")
BIAS = re.compile(r"(?P<layer>.+)\.(lora_B\.bias|diff_b)")
TOLERANCE = 1e-3  # of sizes: bf16 rounds a number by more, but not all of them the same way


@dataclass
class Content:
    """What a LoRA file says, or what has come of it into the networks."""

    layers: int  # with factors that are not zero
    magnitudes: int
    biases: int
    size: float  # the sum over the layers of |scale up down|^2, or of |up down|^2 where none has an alpha
    has_alphas: bool


def read_lora(path):
    """The LoRA file of --teacher-lora -> Content; of None, None. UserError for any other file, and for one
    with something in it that is never merged."""
    if path is None:
        return None
    require("peft", "peft", "merges --teacher-lora")
    if not os.path.isfile(path):
        raise UserError(f"there is no file --teacher-lora {path}")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--teacher-lora {path} is no .safetensors file: {shorten(error)}") from error
    for name, tensor in tensors.items():
        if tensor.element_size() == 1:
            raise UserError(f"--teacher-lora {path} is in eight bits, as {name}: convert it to bf16")
        if not is_finite(tensor):
            raise UserError(f"--teacher-lora {path} is damaged: {name} is not finite")
    layers = find_layers(path, tensors)
    alphas = find(ALPHA, tensors)
    magnitudes = find(MAGNITUDE, tensors)
    biases = {layer: bias for layer, bias in find(BIAS, tensors).items() if bias.any()}
    check_that_no_more_is_there(path, tensors, layers, biases)
    sizes = []
    for layer, (down, up) in layers.items():
        scale = alphas[layer].flatten()[0].item() / len(down) if layer in alphas else 1
        sizes.append(measure(down, up, scale))
    count = sum(size > 0 for size in sizes)
    return Content(count, len(magnitudes), len(biases), sum(sizes), bool(alphas))


def find_layers(path, tensors):
    """The tensors of a LoRA file -> {layer: its factors (down, up)}. UserError for what is damaged."""
    downs, ups = {}, {}
    for name, tensor in tensors.items():
        factor = FACTOR.fullmatch(name)
        if factor:
            layer = factor["layer"] + factor["number"]
            if factor["kind"] in DOWN:
                downs[layer] = tensor
            else:
                ups[layer] = tensor
    if not downs and not ups:
        raise UserError(f"--teacher-lora {path} is no LoRA: no tensor in it is named as a low-rank factor")
    halves = sorted(downs.keys() ^ ups.keys())
    if halves:
        raise UserError(f"--teacher-lora {path} is damaged: {halves[0]} has lost one of its two factors")
    for layer, down in downs.items():
        up = ups[layer]
        if min(down.ndim, up.ndim) < 2 or len(down) != up[0].numel():
            raise UserError(f"--teacher-lora {path} is damaged: the factors of {layer} are of two ranks")
    return {layer: (down, ups[layer]) for layer, down in downs.items()}


def find(pattern, tensors):
    """{layer: tensor} of those tensors whose names the pattern matches."""
    found = {}
    for name, tensor in tensors.items():
        match = pattern.fullmatch(name)
        if match:
            found[match["layer"]] = tensor
    return found


def check_that_no_more_is_there(path, tensors, layers, biases):
    """UserError for what is neither zero, nor a low-rank factor, nor goes with one: diffusers drops most of
    that."""
    known = (FACTOR, ALPHA, MAGNITUDE, BIAS)
    more = [f"the bias of {layer}" for layer in biases if layer not in layers]
    for name, tensor in tensors.items():
        if not any(pattern.fullmatch(name) for pattern in known) and tensor.any():
            more.append(name)
    if more:
        raise UserError(f"--teacher-lora {path} is more than a LoRA: {more[0]} is no low-rank factor")


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
            warnings.simplefilter("ignore")  # peft's; what comes of them is looked for
            pipe.load_lora_weights(path)
            if content:
                networks = [getattr(pipe, part) for part in parts]
                check_that_all_is_there(path, content, read_adapters(networks, content.has_alphas))
            pipe.fuse_lora(components=parts)
    except UserError:
        raise
    except Exception as error:  # of many kinds, as files can misfit in many ways
        raise UserError(f"--teacher-lora {path} does not fit the teacher: {shorten(error)}") from error
    pipe.unload_lora_weights()


def read_adapters(networks, has_alphas):
    """The Content of the adapters that peft has put into networks."""
    found = Content(0, 0, 0, 0.0, has_alphas)
    for network in networks:
        for module in network.modules():
            for name, down in getattr(module, "lora_A", {}).items():
                up = module.lora_B[name]
                if down.weight.is_meta or up.weight.is_meta:  # the file had nothing for it
                    continue
                size = measure(down.weight, up.weight, module.scaling[name] if has_alphas else 1)
                found.size += size
                found.layers += size > 0
                found.magnitudes += name in module.lora_magnitude_vector
                found.biases += up.bias is not None
    return found


def check_that_all_is_there(path, content, found):
    """UserError where the adapters `found` are less than a file's `content`, or of another size. They may be
    of more layers, as diffusers splits some."""
    for kind in ("layers", "magnitudes", "biases"):
        wanted = getattr(content, kind)
        lost = wanted - getattr(found, kind)
        if lost > 0:
            what = f"{lost} of its {wanted} {kind} find no place in it"
            raise UserError(f"--teacher-lora {path} does not fit the teacher: {what}")
    if abs(found.size - content.size) > TOLERANCE * content.size:
        share = (
            f"{found.size / content.size:.3g} of its change, in squares" if content.size else "what is zero"
        )
        raise UserError(
            f"--teacher-lora {path} cannot be merged: diffusers reads {share}, for parts of it or its alphas "
            "have names that it does not know"
        )
