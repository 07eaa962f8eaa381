"""LoRA: several networks that are one frozen backbone, each with its own adapter switched on (--lora)."""

import contextlib
import re
import warnings

import torch
from safetensors import SafetensorError
from torch import nn

from support.errors import UserError, require
from support.lora_files import read_adapter
from support.parallel import find_linear_layers


class Adapted(nn.Module):
    """A frozen backbone with one of its LoRA adapters switched on: as many networks as adapters, for the
    memory of one.

    Its parameters are the adapter's alone, float32. The backbone itself, called as ever, has all adapters
    off."""

    def __init__(self, backbone, name, rank, endings=None):
        """endings: of the names of the layers that it adapts (--lora-targets), by default all of them."""
        super().__init__()
        peft = require("peft", "peft", "adds LoRA adapters")
        # paper silent: lora targets: every linear layer of the blocks; alpha = rank, so that the learning
        # rate means the same for all ranks
        targets = list(find_targets(backbone, endings))
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
        with warnings.catch_warnings():
            # that there is more than one adapter is meant
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
            backbone.add_adapter(config, name)
        self.name = name
        self.__dict__["backbone"] = backbone  # not a submodule: its weights are not this network's to train
        self._share_switch(peft.tuners.lora.LoraLayer)
        self.weights = nn.ParameterList()
        for n, weight in backbone.named_parameters():
            if "lora_" in n:
                weight.data = weight.data.float()
                weight.requires_grad_(True)
            if f".{name}." in n:
                self.weights.append(weight)
        if backbone.is_gradient_checkpointing:
            backbone.enable_gradient_checkpointing(self.checkpoint)

    def _share_switch(self, kind):
        """All layers read one list of the adapters that are on, so that to switch is to change that list.
        (peft's own set_adapter and disable_adapters also set requires_grad, which here says what a loss may
        train.)"""
        modules = self.backbone.named_modules()
        self.layers = {n: module for n, module in modules if isinstance(module, kind)}
        if not hasattr(self.backbone, "switched_on"):
            self.backbone.switched_on = []
        for layer in self.layers.values():
            layer._active_adapter = self.backbone.switched_on
            layer.cast_input_dtype_enabled = False  # autocast would undo it, after 24 GB of traffic (SD3.5)

    @contextlib.contextmanager
    def switch_on(self, names):
        before = list(self.backbone.switched_on)
        self.backbone.switched_on[:] = names
        try:
            yield
        finally:
            self.backbone.switched_on[:] = before

    def forward(self, *args, **kwargs):
        with self.switch_on([self.name]):
            return self.backbone(*args, **kwargs)

    def checkpoint(self, function, *args):
        """Gradient checkpointing that computes a block again with the adapter of its first time, whatever
        is on."""
        names = list(self.backbone.switched_on)

        def run_again(*args):
            with self.switch_on(names):
                return function(*args)

        return torch.utils.checkpoint.checkpoint(run_again, *args, use_reentrant=False)

    def load_layers(self, layers):
        """Takes over the weights of read_layers of another adapter. ValueError where that is of other layers
        or another rank."""
        weights = self._list_weights()
        if weights.keys() != layers.keys():
            raise ValueError("an adapter of other layers")
        for n, weight in weights.items():
            if weight.shape != layers[n].shape:
                raise ValueError("an adapter of another rank")
            weight.data.copy_(layers[n])

    def read_layers(self):
        """{name as peft has it: weight} of the adapter alone, float32, on the CPU."""
        return {n: weight.detach().cpu() for n, weight in self._list_weights().items()}

    def _list_weights(self):
        """{name as peft has it: parameter} of the adapter alone."""
        weights = {}
        for n, layer in self.layers.items():
            weights[f"{n}.lora_A.weight"] = layer.lora_A[self.name].weight
            weights[f"{n}.lora_B.weight"] = layer.lora_B[self.name].weight
        return weights


def find_targets(net, endings=None):
    """{name: linear layer} of those in blocks that --lora adapts: all, or those whose names have one of these
    endings (to_q, attn.to_out.0). UserError for an ending that none has."""
    layers = {}
    for name, layer in find_linear_layers(net).items():
        if "lora_" not in name:
            layers[name.removesuffix(".base_layer")] = layer
    if not endings:
        return layers
    chosen = {}
    for ending in endings:
        fitting = {name: layer for name, layer in layers.items() if f".{name}".endswith(f".{ending}")}
        if not fitting:
            kinds = sorted({re.sub(r".*blocks\.\d+\.", "", name) for name in layers})
            raise UserError(f"--lora-targets {ending} is the end of none of {', '.join(kinds)}")
        chosen |= fitting
    return chosen


def make_adapted(backbone, name, args, folder=None):
    """The backbone with an adapter of this name, zero or that of the student in the checkpoint `folder`.
    UserError where that student is of another kind."""
    net = Adapted(backbone, name, args.lora, args.lora_targets)
    if folder:
        try:
            net.load_layers(read_adapter(folder))
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{folder} has no adapter as --lora {args.lora} makes: {error}") from error
    return net
