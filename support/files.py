"""Files: written in one move, read without trust, fetched once a machine."""

import contextlib
import json
import os
import pickle
import shutil

import torch

from support.errors import UserError
from support.parallel import is_main

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def short_name(path):
    """The last part of a teacher's name, folder or hub id, for the names of output folders."""
    return os.path.basename(os.path.normpath(path))


def make_folder(path):
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {path} cannot be made: {error.strerror}") from error


@contextlib.contextmanager
def write_atomically(path):
    """A temporary path to write to (a file or a folder), moved to `path` at the end: readers never see half
    of it.

    It ends as `path` does, for libraries that choose a format by the suffix."""
    stem, suffix = os.path.splitext(path)
    temporary = f"{stem}.tmp{os.getpid()}{suffix}"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        remove(temporary)


def remove(path):
    """A file or a folder with all that is in it, if it is there."""
    if os.path.isdir(path):
        shutil.rmtree(path)
    elif os.path.exists(path):
        os.remove(path)


def read_json(path):
    """The file's value; None where it is not there or damaged."""
    try:
        with open(path) as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def read_json_lines(path):
    """The values in a file with one JSON value a line; a damaged line is passed over."""
    values = []
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    values.append(json.loads(line))
    return values


def write_json(path, value):
    with write_atomically(path) as temporary, open(temporary, "w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")


def read_tensors(path):
    """A checkpoint file, safetensors or torch's -> what it holds, on the CPU; nothing is unpickled. Raises
    what the libraries do, and ValueError where torch would advise to unpickle."""
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError("it holds more than tensors, or no tensors") from error


def fetch(url, advice, *folders):
    """The path of a file that is published at a URL: in one of these folders or in torch's cache, where it is
    fetched to. UserError if that fails. (hf_hub_download does not fit: these files are on no hub.)"""
    from filelock import FileLock

    cache = os.path.join(torch.hub.get_dir(), "checkpoints")
    folders = [*filter(None, folders), cache]
    name = os.path.basename(url)
    paths = [os.path.join(folder, name) for folder in folders]
    for path in paths:
        if os.path.exists(path):
            return path
    path = paths[-1]
    try:
        os.makedirs(cache, exist_ok=True)
        with FileLock(f"{path}.lock"):  # the ranks of a machine fetch it once
            if not os.path.exists(path):
                torch.hub.download_url_to_file(url, path, progress=is_main())
    except OSError as error:
        places = " nor at ".join(paths)
        raise UserError(
            f"the file {name} is wanted; it is not at {places} and could not be fetched ({error}): "
            f"fetch {url} by hand and {advice}"
        ) from error
    return path
