"""What the tests share beside the fixtures."""
import functools
import hashlib
import json
import os
import subprocess
import sys
import types

import torch
from segment_anything.modeling import ImageEncoderViT
from torch import nn

import collect_ode
from tiny import train

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TRAINING = types.SimpleNamespace(lora=0, shard="ddp", checkpointing=True, compile=False)  # what of a stage's arguments its networks depend on
QUICK = ["--batch", "2", "--iterations", "2", "--log-every", "1", "--head-width", "128", "--lr", "1e-4", "--head-lr", "1e-4"]


def random_teacher(folder, seed, family="sdxl"):
    torch.manual_seed(seed)
    train.FAMILIES[family]["build"]().to(dtype=torch.float16).save_pretrained(folder)
    return str(folder)


def random_sam(seed, **sizes):
    """An image encoder of SAM's kind for 64x64 pixels, windows of 3 in the blocks 0 and 2, no weight zero."""
    torch.manual_seed(seed)
    sizes = {"img_size": 64, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3, "out_chans": 16, "window_size": 3,
             "global_attn_indexes": (1, 3), **sizes}
    encoder = ImageEncoderViT(**sizes, use_rel_pos=True, norm_layer=functools.partial(nn.LayerNorm, eps=1e-6)).eval()
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.2)
    return encoder


def collect(*arguments):
    """collect_ode.py in this process."""
    collect_ode.main(arguments)


def command(*words, processes=None, timeout=900):
    """A script of the repository as a command, with torchrun if `processes` is given -> its result, output captured as text."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    return subprocess.run([sys.executable, *torchrun, *words], cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def metrics(folder):
    """The lines of a run's metrics.jsonl without what differs from machine to machine."""
    lines = [json.loads(line) for line in open(os.path.join(folder, "metrics.jsonl"))]
    return [{name: value for name, value in line.items() if name not in ("seconds", "peak_mb")} for line in lines]


def state(folder):
    """A checkpoint's state/, {name: value}."""
    names = os.listdir(os.path.join(folder, "state"))
    return {name.removesuffix(".pt"): torch.load(os.path.join(folder, "state", name), weights_only=True) for name in names}


def snapshot(folder):
    """{path: digest} of all files below, folders included."""
    found = {}
    for place, folders, files in os.walk(folder):
        found |= {os.path.join(place, name): None for name in folders}
        found |= {os.path.join(place, name): hashlib.sha256(open(os.path.join(place, name), "rb").read()).hexdigest() for name in files}
    return found


def steady(adamw):
    """common.adamw with a larger epsilon: with Adam's own the first steps follow a gradient's sign, and entries that are zero but for
    rounding move by the whole learning rate."""

    def made(*arguments):
        optimizer = adamw(*arguments)
        optimizer.param_groups[0]["eps"] = 1e-3
        return optimizer

    return made


def adam(state):
    """An optimiser's state_dict -> (its averages of the gradients [N], about the largest step that it took last)."""
    parts, group = state["state"].values(), state["param_groups"][0]
    mean, square = (torch.cat([part[name].flatten() for part in parts]) for name in ("exp_avg", "exp_avg_sq"))
    return mean, (group["lr"] * mean / (square.sqrt() + group["eps"])).abs().max().item()
