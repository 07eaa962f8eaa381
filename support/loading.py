"""Loads a pipeline's networks so that no weight is missing, made up, or not a number."""

import importlib
import os

from torch import nn

from support.errors import UserError


def load_networks(path, config, dtype):
    """The networks of a diffusers pipeline, a folder or hub id with this model_index.json -> {component:
    module}.

    UserError for a weight that the files lack, which the libraries would fill with random numbers, and for
    one that is not finite. Raises what the libraries do for files that are not there."""
    networks = {}
    for name, value in config.items():
        if not isinstance(value, (list, tuple)) or not value[0]:
            continue
        kind = getattr(importlib.import_module(value[0]), value[1], None)
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            networks[name] = load_network(kind, path, name, dtype)
    return networks


def load_network(kind, path, subfolder, dtype):
    """A network of this class of diffusers or transformers, whole and finite, or a UserError."""
    net, report = kind.from_pretrained(path, subfolder=subfolder, dtype=dtype, output_loading_info=True)
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(f"the weights in {path}/{subfolder} are not all there: {missing[0]} is missing")
    for name, weight in net.named_parameters():
        if not weight.isfinite().all():
            raise UserError(f"the weights in {path}/{subfolder} are damaged: {name} is not finite")
    return net


def describe_teacher(name):
    """A teacher's name as another working directory finds it: the path of a folder becomes absolute."""
    return os.path.abspath(name) if os.path.isdir(name) else name
