"""Frozen vision encoders, SAM's or DINOv2, as the backbone of ADP's pixel discriminator."""

import math
import os

import torch
import torch.nn.functional as F
from torch import nn

from support.hub import is_hub_id
from support.loading import check_dinov2, load_dinov2
from support.sam import find_sam, load_sam_encoder, make_sam_encoder_on_meta
from support.taps import choose_four, read_taps


def check_backbone(name):
    """UserError where there is no such pixel backbone: said before a teacher is read."""
    dinov2 = find_dinov2(name)
    if dinov2:
        check_dinov2(dinov2)
    else:
        find_sam(name)


def find_dinov2(name):
    """The folder or hub id of a name that means DINOv2; None for one that means SAM."""
    if name == "dinov2":
        return "facebook/dinov2-base"
    return name if os.path.isdir(name) or is_hub_id(name) else None


class PixelBackbone:
    """A frozen vision encoder, the backbone of ADP's pixel discriminator: pixels [B, 3, H, W] in [-1, 1] ->
    maps [B, C, H/p, W/p].

    `name` is a SAM checkpoint (.pth or .safetensors, official or of the same layout), the name of an
    official one (sam_vit_b, _l, _h: fetched to torch's cache), or DINOv2 as a transformers folder, hub id,
    or "dinov2"."""

    MEAN = (0.485, 0.456, 0.406)
    STD = (0.229, 0.224, 0.225)

    def __init__(self, name, device, dtype, encoder=None):
        """encoder: SAM's, where it is there already."""
        self.device = device
        self.dtype = dtype
        self.position = None
        if device.type == "meta":  # --plan wants nothing but sizes
            encoder = make_sam_encoder_on_meta(name)
        dinov2 = find_dinov2(name)
        if encoder is None and dinov2:
            self._use_dinov2(dinov2)
        else:
            self._use_sam(encoder or load_sam_encoder(name))
        self.encoder.to(device, dtype)
        self.encoder.requires_grad_(False)
        self.encoder.eval()
        self.mean = torch.tensor(self.MEAN, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(self.STD, device=device).view(1, 3, 1, 1)

    def _use_sam(self, encoder):
        self.encoder = encoder
        self.patch = encoder.patch_embed.proj.stride[0]
        position = encoder.pos_embed.detach().clone()
        self.position = position.permute(0, 3, 1, 2)
        # the paper: vit_b's layers 3, 6, 9 and 12, its global-attention blocks; so of the others, too
        blocks = [block for block in encoder.blocks if block.window_size == 0]
        self.taps = [(block, lambda out: out.permute(0, 3, 1, 2)) for block in blocks]

    def _use_dinov2(self, name):
        self.encoder = load_dinov2(name)
        self.patch = self.encoder.config.patch_size
        self.taps = [(layer, self._fold) for layer in choose_four(self.encoder.encoder.layer)]

    def _fold(self, out):
        tokens = out[0] if isinstance(out, tuple) else out
        count = math.prod(self.grid)
        tokens = tokens[:, -count:]  # the class token comes first
        return tokens.transpose(1, 2).unflatten(2, self.grid)

    def _fit_positions(self):
        """Gives SAM's encoder positions for self.grid, unless it has them already."""
        rows, columns = self.encoder.pos_embed.shape[1:3]
        if self.grid == [rows, columns]:
            return
        position = F.interpolate(self.position, self.grid, mode="bicubic", align_corners=False)
        position = position.permute(0, 2, 3, 1).to(self.device, self.dtype)
        self.encoder.pos_embed = nn.Parameter(position, requires_grad=False)

    def features(self, pixels):
        """pixels [B, 3, H, W] in [-1, 1], any size from two patches up -> maps. Gradients flow to the
        pixels."""
        size = [max(2, side // self.patch) * self.patch for side in pixels.shape[2:]]
        if list(pixels.shape[2:]) != size:
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True)
        self.grid = [side // self.patch for side in size]
        if self.position is not None:
            self._fit_positions()
        x = ((pixels + 1) / 2 - self.mean) / self.std
        return read_taps(self.taps, lambda: self.encoder(x.to(self.dtype)))
