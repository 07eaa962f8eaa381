"""Checkpoints: what is in one, whether it is whole, and how networks and optimisers are read and written."""

import hashlib
import json
import math
import os
import re

import torch
from torch.distributed.optim import ZeroRedundancyOptimizer

from support.configs import list_fields
from support.errors import UserError, note
from support.files import (
    as_json,
    compute_checksum,
    compute_checksum_of_json,
    list_files,
    read_sealed,
    write_text,
)
from support.parallel import add_up, agree, lay_out, list_parameters, local_world_size, rank
from support.tensors import sample_bits

META = {  # what has to be in meta.json
    "step",
    "stage",
    "teacher",
    "fingerprint",
    "resolution",
    "frames",
    "parametrisation",
    "steps",
    "arguments",
    "files",
}
LORA_FILE = "pytorch_lora_weights.safetensors"  # what a pipeline looks for in a folder
CONTENT = {"student", "state", "meta.json", LORA_FILE, "scheduler"}
# how the paths of a part's files begin
PARTS = {"student": ("student/", LORA_FILE), "state": ("state/",)}
STEP = re.compile(r"step_\d+")  # a checkpoint's folder


def compute_fingerprint(net, scheduler):
    """Tells this teacher from any other, whatever the precision it was loaded in and the version of
    diffusers: its configurations and some numbers of every weight."""
    configs = [list_settings(net), list_settings(scheduler)]
    digest = hashlib.sha256(json.dumps(configs, sort_keys=True).encode())
    digest.update(sample_bits(net.parameters()))
    return digest.hexdigest()[:16]


def list_settings(part):
    """{field of a part's config: its value}, of those that are not the default: diffusers' versions add
    fields, and a part is the same without them."""
    settings = {}
    for name, parameter in list_fields(type(part)).items():
        value, default = (as_json(value) for value in (part.config.get(name), parameter.default))
        if value != default:
            settings[name] = value
    return settings


# ----------------------------------------------------------------------------------------------------------
# Which checkpoint
# ----------------------------------------------------------------------------------------------------------


def find_checkpoint(path, part=None):
    """A run, one of its step folders, or its file `best` or `latest` -> (step folder, meta). Of a run it is
    the newest that is whole; what is wrong with newer ones is said. The files of `part`, "student" or
    "state", are compared with their checksums. UserError where there is no whole checkpoint."""
    path = follow(path)
    if not os.path.isdir(path):
        raise UserError(f"there is no checkpoint {path!r}: give a run folder, or one of its step_... folders")
    if list_checkpoints(path):
        found = find_newest(path, part)
        if found is None:
            raise UserError(f"{path} has no complete checkpoint: give another run")
        return found
    meta, problem = open_checkpoint(path, part)
    if problem:
        raise UserError(f"{path} is not a complete checkpoint: {problem}; give another step_... folder")
    return path, meta


def find_newest(run, part=None, together=False):
    """(step folder, meta) of the newest whole checkpoint of a run, or None. Says what is wrong with newer
    ones. part, together: as open_checkpoint has them; UserError then where nodes have not the same ones."""
    for folder in list_checkpoints(run):
        if together:
            check_that_nodes_share(run, read_step(folder))
        meta, problem = open_checkpoint(folder, part, together)
        if problem is None:
            return folder, meta
        note(f"{folder} is passed over: {problem}")
    if together:
        check_that_nodes_share(run, -1)
    return None


def check_that_nodes_share(out, found):
    """UserError where the ranks have found different things, a number each, in the folder `out`. All call
    it."""
    if not agree(found):
        raise UserError(f"{out} is not the same on all nodes: give an --out that they share")


def find_best(run, identity, last):
    """(step folder, score) of the whole checkpoint with the highest held-out score of this identity, of those
    of at most `last` iterations; (None, -infinity) where there is none. Says what is wrong with better
    ones."""
    scored = []
    for folder in list_checkpoints(run):
        meta, _ = open_checkpoint(folder)
        held_out = meta and meta.get("held_out")
        if not held_out or meta["step"] > last:
            continue
        if held_out["of"] != identity:
            note(f"the held-out score of {folder} is of another metric, or of other prompts or seeds")
            continue
        scored.append((held_out["score"], -meta["step"], folder))  # of two that are equal the earlier one
    for score, _, folder in sorted(scored, reverse=True):
        _, problem = open_checkpoint(folder, "student")
        if problem is None:
            return folder, score
        note(f"{folder}, the best one, is passed over: {problem}")
    return None, -math.inf


def write_pointer(path, folder):
    """A run's file `latest` or `best`, which names one of its step folders."""
    write_text(path, os.path.basename(folder) + "\n")


def follow(path):
    """A run's file `latest` or `best` -> the step folder that it names. Any other path stays as it is."""
    if not os.path.isfile(path):
        return path
    with open(path, encoding="utf-8", errors="replace") as file:
        name = file.read(40).strip()
    return os.path.join(os.path.dirname(path), name) if STEP.fullmatch(name) else path


def list_checkpoints(run):
    """The step folders of a run, newest first, whole or not."""
    names = os.listdir(run) if os.path.isdir(run) else []
    steps = [os.path.join(run, name) for name in names if STEP.fullmatch(name)]
    return sorted(filter(os.path.isdir, steps), key=read_step, reverse=True)


def read_step(folder):
    """The iteration that a step folder's name has."""
    return int(os.path.basename(folder).removeprefix("step_"))


def is_ours(folder):
    """Whether a step folder holds nothing but what a checkpoint does, whole or not."""
    return set(os.listdir(folder)) <= CONTENT


def open_checkpoint(folder, part=None, together=False):
    """A step folder -> (its meta, None), or (None, what keeps it from being whole, in words). The files of
    `part` are compared with their checksums; `together`: all ranks call it, those of a node share the
    reading, and all hear the same. UserError then where nodes have not the same in it."""
    meta = read_sealed(os.path.join(folder, "meta.json"))
    missing = find_missing(folder, meta)
    if together:
        found = "0" if missing else compute_checksum_of_json(meta)
        check_that_nodes_share(folder, int(found[:12], 16))
    if missing:
        return None, missing
    names = [name for name in meta["files"] if part and name.startswith(PARTS[part])]
    damaged = torch.zeros(len(names))
    sharing = local_world_size() if together else 1
    for i in range(rank() % sharing, len(names), sharing):
        path = os.path.join(folder, names[i])
        damaged[i] = compute_checksum(path) != meta["files"][names[i]]
    if together:
        damaged = add_up(damaged)
    if damaged.any():
        return None, f"its {names[damaged.argmax()]} is damaged"
    return meta, None


def find_missing(folder, meta):
    """What is missing of a checkpoint, in words, or None. meta: None where it could not be read."""
    if meta is None or not set(meta) >= META:
        return "its meta.json is missing or damaged"
    for name in meta["files"]:
        if not os.path.isfile(os.path.join(folder, name)):
            return f"its {name} is missing"
    return None


def describe_files(folder):
    """{path of a file below the folder: its checksum}, for meta.json."""
    paths = {os.path.relpath(path, folder): path for path in list_files(folder)}
    return {name: compute_checksum(path) for name, path in sorted(paths.items())}


# ----------------------------------------------------------------------------------------------------------
# What is in it
# ----------------------------------------------------------------------------------------------------------


def compute_global_batch(meta):
    """The samples of an update, on all ranks together, by a checkpoint's meta.json."""
    arguments = meta["arguments"]
    return arguments["batch"] * arguments["accumulate"] * meta.get("processes", 1)


def estimate_bytes(parts):
    """About what a checkpoint of these parts ({name of support.run.STATE: part}) takes on the disk: float32,
    the student once more than training goes on from."""
    weights = list(parts["G"].parameters())
    for part in parts.values():
        if isinstance(part, torch.optim.Optimizer):
            weights += 2 * list_parameters(part)  # AdamW's two averages
        elif isinstance(part, torch.nn.Module):
            weights += part.parameters()
        elif part.average:
            weights += parts["G"].parameters()
    return 4 * sum(weight.numel() for weight in weights)


def count_most(args):
    """The checkpoints of a run on the disk while one is written, with --eval-every the best beside --keep."""
    return args.keep + (2 if args.eval_every else 1)


def restore_optimizer(optimizer, state):
    """Loads a whole state_dict into an optimiser whose states may be laid out over the ranks. Its settings,
    as the betas, stay those that it was made with."""
    settings = [dict(group) for group in optimizer.param_groups]
    parameters = list_parameters(optimizer)
    for i, values in state["state"].items():
        for name, value in values.items():
            if value.ndim:
                values[name] = lay_out(value, parameters[i])
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, settings):
        group.update(own)
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        optimizer.state.clear()  # a second copy of this rank's share
        for p, values in optimizer.optim.state.items():
            # left on the CPU, where AdamW's fused kernel does not want it
            values["step"] = values["step"].to(p.device)


def save_network(like, state, folder):
    """A state dictionary -> a diffusers model folder, of a network with the class and configuration of
    `like`."""
    with torch.device("meta"):
        net = type(like).from_config(like.config)
    net.load_state_dict(state, assign=True)
    net.float().save_pretrained(folder)
