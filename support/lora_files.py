"""LoRA files as diffusers' pipelines read them: of a student that trained so, or split off a whole one."""

import contextlib
import os

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from support.checkpoints import LORA_FILE
from support.errors import UserError

LAYERS = (nn.Linear, nn.Conv2d, nn.Conv3d)  # those that have a low-rank form in peft
OVERSAMPLE = 32  # directions beside the wanted ones, for the randomised SVD


def takes_lora(teacher):
    """Whether its pipeline reads LoRA files of the denoiser."""
    kind = type(teacher.pipe)
    return teacher.denoiser_name in getattr(kind, "_lora_loadable_modules", ())


def check_pipeline(teacher):
    """UserError where plain diffusers could not read a LoRA file of this teacher."""
    if not takes_lora(teacher):
        kind = type(teacher.pipe).__name__
        raise UserError(f"diffusers' {kind} reads no LoRA files: export the whole student with --export")


def save_layers(teacher, layers, folder, name=LORA_FILE):
    """Writes adapters {peft's name in the denoiser: weight}, all of one rank, as the teacher's pipeline does.
    alpha, in the file's header, is the rank: the pipeline takes them at scale 1."""
    rank = next(len(weight) for key, weight in layers.items() if "lora_A" in key)
    targets = sorted({key.split(".lora_")[0] for key in layers})
    config = {"r": rank, "lora_alpha": rank, "target_modules": targets}
    part = teacher.denoiser_name
    parts = {f"{part}_lora_layers": layers, f"{part}_lora_adapter_metadata": config}
    type(teacher.pipe).save_lora_weights(folder, weight_name=name, **parts)


def save_adapter(student, layers, folder):
    """Writes the adapter of a student (common.Student) to a checkpoint's folder: as a LoRA file, with its
    scheduler beside it where diffusers has one; where the pipeline reads none in the same form."""
    teacher = student.teacher
    if not takes_lora(teacher):
        names = {f"{teacher.denoiser_name}.{name}": weight for name, weight in layers.items()}
        return save_file(names, os.path.join(folder, LORA_FILE))
    save_layers(teacher, layers, folder)
    with contextlib.suppress(UserError):  # there is no such scheduler: then the file is all
        student.scheduler().save_pretrained(os.path.join(folder, "scheduler"))


def read_adapter(folder):
    """The adapter in a checkpoint's folder, {peft's name in the denoiser: weight}."""
    tensors = load_file(os.path.join(folder, LORA_FILE))
    # there each has the denoiser's name in the pipeline before it
    return {name.partition(".")[2]: weight for name, weight in tensors.items()}


@torch.no_grad()
def add_adapter(net, folder):
    """Adds the adapter in a checkpoint's folder to the weights of its teacher's network -> the network."""
    layers = read_adapter(folder)
    for name, down in layers.items():
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            net.get_parameter(f"{module}.weight").add_(layers[f"{module}.lora_B.weight"] @ down)
    return net


# ----------------------------------------------------------------------------------------------------------
# A whole student as a LoRA
# ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def split_change(student, teacher, rank, device):
    """Two float32 networks of one architecture -> (adapters {peft's name: weight} of this rank, nearest to
    what training changed; names of what changed and has no adapter; |what is missing| / |change|, over all
    weights)."""
    torch.manual_seed(0)  # of the SVD: the same file every time
    before = dict(teacher.named_parameters())
    modules = dict(student.named_modules())
    layers, left_out = {}, []
    missing, whole = 0.0, 0.0
    for name, weight in student.named_parameters():
        change = (weight - before[name]).to(device)
        if not change.any():
            continue
        size = change.square().sum().item()
        whole += size
        module, _, kind = name.rpartition(".")
        if kind == "weight" and has_low_rank_form(modules[module]):
            down, up = factorise(change.flatten(1), rank)
            missing += (change.flatten(1) - up @ down).square().sum().item()
            ones = (1,) * (weight.ndim - 2)  # a convolution's second factor is one of 1x1
            layers[f"{module}.lora_A.weight"] = down.view(rank, *weight.shape[1:]).cpu()
            layers[f"{module}.lora_B.weight"] = up.view(len(weight), rank, *ones).cpu()
        else:
            missing += size
            left_out.append(name)
    if not layers:
        raise UserError("the student's weights are the teacher's: there is nothing to write")
    return layers, left_out, (missing / whole) ** 0.5


def has_low_rank_form(module):
    return isinstance(module, LAYERS) and getattr(module, "groups", 1) == 1


def factorise(matrix, rank):
    """matrix [m, n] -> (down [rank, n], up [m, rank]), whose product is nearest to it but for what a
    randomised SVD misses: a whole one takes hours for a large teacher. With zeros where there are fewer
    directions than `rank`, as readers take alpha / rank for the scale."""
    count = min(rank + OVERSAMPLE, *matrix.shape)
    left, values, right = torch.svd_lowrank(matrix, q=count, niter=4)
    root = values[:rank].sqrt()
    up = left[:, :rank] * root
    down = root[:, None] * right[:, :rank].T
    padding = rank - len(root)
    return F.pad(down, (0, 0, 0, padding)).contiguous(), F.pad(up, (0, padding)).contiguous()
