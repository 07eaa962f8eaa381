"""Files of scores, which know whether they are whole."""

import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from support.files import write_atomically


def save_scores(columns, path):
    """{column: array} -> a safetensors file with their checksum."""
    columns = {name: np.ascontiguousarray(column) for name, column in columns.items()}
    with write_atomically(path) as temporary:
        save_file(columns, temporary, metadata={"xxh3_128": compute_checksum(columns)})


def read_scores(path):
    """What save_scores wrote; None where the file is not there, or damaged."""
    try:
        with safe_open(path, "np") as file:
            checksum = (file.metadata() or {}).get("xxh3_128")
            columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    return columns if checksum == compute_checksum(columns) else None


def compute_checksum(columns):
    """Of names, kinds, shapes and values."""
    digest = xxhash.xxh3_128()
    for name, column in sorted(columns.items()):
        digest.update(f"{name} {column.dtype} {column.shape}".encode())
        digest.update(column.tobytes())
    return digest.hexdigest()
