"""Files: written in one move, read without trust, fetched once a machine."""

import contextlib
import json
import os
import pickle
import shutil
import sys

import torch

from support.errors import UserError
from support.parallel import is_main

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROMPTS = os.path.join(ROOT, "prompts", "general.txt")  # 64 of our own, to try things with


def read_prompts(path):
    """A text file with a prompt a line -> list of str. UserError where there is none, it is not text, or
    empty."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.strip() for line in file]
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt file {path} is not UTF-8 text") from error
    except OSError as error:
        raise UserError(f"the prompt file {path} cannot be read: {error.strerror}") from error
    prompts = [line for line in lines if line]
    if not prompts:
        raise UserError(f"the prompt file {path} has no prompts; write one a line")
    if any("\0" in prompt for prompt in prompts):
        raise UserError(f"the prompt file {path} is not text")
    return prompts


def read_training_prompts(path):
    """read_prompts, with a note where it is the built-in list."""
    prompts = read_prompts(path)
    if is_main() and os.path.realpath(path) == os.path.realpath(PROMPTS):
        print(
            f"note: the {len(prompts)} built-in prompts are only to try things with; a student needs as many "
            "as you can get: give --prompts FILE",
            file=sys.stderr,
        )
    return prompts


def has_closed_vocabulary(tokenizer):
    """Whether it knows a few words only, as those of the tiny teachers."""
    return len(tokenizer) <= 1000


def check_vocabulary(tokenizer, prompts):
    """UserError for a prompt with a word that a closed vocabulary cannot express."""
    if not has_closed_vocabulary(tokenizer):
        return
    for prompt in dict.fromkeys(prompts):
        words = prompt.split()
        unknown = [word for word in words if tokenizer.unk_token_id in tokenizer(word).input_ids]
        if unknown:
            raise UserError(
                f"the prompt {prompt!r} has words that this teacher's tokenizer does not know: "
                f"{', '.join(unknown)}; give it other prompts"
            )


def short_name(path):
    """The last part of a teacher's name, folder or hub id, for the names of output folders; that of the
    folder which it means where it is "." or ".."."""
    return os.path.basename(os.path.abspath(path)) or "root"


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
