"""The Hugging Face hub: whether it answers, which is asked once and not for half a minute a file."""

import functools
import os
import re

WEIGHTS = (".bin", ".ckpt", ".pt", ".pth", ".safetensors")


def is_hub_id(name):
    """Whether a name may be one of the hub's, OWNER/NAME: nothing is there of this name, and it is no path of
    a file of weights."""
    looks_so = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not name.endswith(WEIGHTS)
    return bool(looks_so) and not os.path.exists(name)


@functools.cache
def is_offline():
    """Whether the hub cannot be reached: the libraries are then to look into their cache alone, since they
    would ask five times for each file."""
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return True
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # of whatever HTTP library the hub's client has
        return True
    return False
