"""SAM's checkpoints: where the official ones are, and how the sizes are read off any file of their layout."""

import functools
import os

import torch
from torch import nn

from support.errors import UserError, first_line, require
from support.files import fetch, read_tensors
from support.tensors import is_finite

URL = "https://dl.fbaipublicfiles.com/segment_anything"
OFFICIAL = {
    "sam_vit_b": "sam_vit_b_01ec64.pth",
    "sam_vit_l": "sam_vit_l_0b3195.pth",
    "sam_vit_h": "sam_vit_h_4b8939.pth",
}


def require_sam():
    return require("segment_anything.modeling", "segment-anything", "has the pixel discriminator's encoder")


def find_sam(name):
    """A file, or the name of an official checkpoint, which is fetched -> the file. UserError where there is
    none."""
    require_sam()
    if name in OFFICIAL:
        return fetch(f"{URL}/{OFFICIAL[name]}", "give --pixel-backbone PATH")
    if not os.path.exists(name):
        names = ", ".join(OFFICIAL)
        raise UserError(f"there is no SAM checkpoint at {name!r}; give a file, one of {names}, or dinov2")
    return name


def load_sam_encoder(path):
    """A SAM checkpoint (.pth or .safetensors) or the name of an official one -> its ImageEncoderViT.
    UserError for anything else."""
    path = find_sam(path)
    ImageEncoderViT = require_sam().ImageEncoderViT
    try:
        prefix = "image_encoder."
        tensors = read_tensors(path)
        state = {n.removeprefix(prefix): w for n, w in tensors.items() if n.startswith(prefix)}
        dim, _, patch, _ = state["patch_embed.proj.weight"].shape
        side = state["pos_embed"].shape[1]
        depth = len([name for name in state if name.endswith("attn.rel_pos_h")])
        # a block's relative positions have 2 n - 1 rows, n its window's side or, with global attention, the
        # map's
        positions = [state[f"blocks.{i}.attn.rel_pos_h"] for i in range(depth)]
        spans = [(len(rows) + 1) // 2 for rows in positions]
        encoder = ImageEncoderViT(
            img_size=side * patch,
            patch_size=patch,
            embed_dim=dim,
            depth=depth,
            num_heads=dim // positions[0].shape[1],
            norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=min(spans),
            global_attn_indexes=[i for i, span in enumerate(spans) if span == side],
            out_chans=len(state["neck.0.weight"]),
        )
        encoder.load_state_dict(state)
        for weight in encoder.parameters():
            if not weight.is_meta and not is_finite(weight):
                raise ValueError("it has weights that are not finite")
    except Exception as error:  # the libraries raise many kinds for a file of another layout
        raise UserError(f"{path!r} is not a SAM checkpoint: {first_line(error)}") from error
    return encoder


def make_sam_encoder_on_meta(name):
    """The encoder of an official name in its published sizes, as shapes without numbers; None for any other
    name, and for a file. DINOv2 counts as vit_b, which is as large as its base."""
    is_official = name in OFFICIAL or name.startswith(("dinov2", "facebook/dinov2"))
    if not is_official or os.path.exists(name):
        return None
    sizes = {"sam_vit_l": (1024, 24, 16), "sam_vit_h": (1280, 32, 16)}
    dim, depth, heads = sizes.get(name, (768, 12, 12))
    quarter = depth // 4
    with torch.device("meta"):
        return require_sam().ImageEncoderViT(
            embed_dim=dim,
            depth=depth,
            num_heads=heads,
            use_rel_pos=True,
            window_size=14,
            global_attn_indexes=range(quarter - 1, depth, quarter),
        )
