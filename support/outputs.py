"""Where results will go, tried before the work begins."""

import os
import tempfile

from support.checkpoints import STEP
from support.errors import UserError


def check_new(path):
    """UserError where there is something at this path, or nothing can be written there."""
    if os.path.lexists(path):
        raise UserError(f"{path} is there already; give another folder")
    check_folder(path)


def check_folder(path):
    """UserError where no folder can be made or written at this path, whose parents need not be there, and
    within a checkpoint or a pipeline. Tries it, in a folder that it removes again."""
    if not path:
        raise UserError("the name of a folder is empty")
    owner = find_owner(path)
    if owner:
        raise UserError(f"the folder {path} would be in {owner}, a checkpoint or a pipeline: give another")
    place = os.path.abspath(path)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        raise UserError(f"the folder {path} cannot be made: {place} is no folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"the folder {path} cannot be written to: {place} does not permit it")
    missing = os.path.relpath(path, place) + "." * 60  # what is written atomically has a longer name at first
    try:
        missing.encode()  # names that are no text are refused as well
        with tempfile.TemporaryDirectory(dir=place) as trial:
            os.makedirs(os.path.join(trial, missing))
    except (OSError, ValueError) as error:
        raise UserError(f"the folder {path} cannot be written: {error}") from error


def find_owner(path):
    """The checkpoint or the pipeline's folder that a path lies in, or is; None if in none."""
    place = os.path.realpath(path)
    while place != os.path.dirname(place):
        is_checkpoint = STEP.fullmatch(os.path.basename(place)) and os.path.exists(f"{place}/meta.json")
        if is_checkpoint or os.path.exists(f"{place}/model_index.json"):
            return place
        place = os.path.dirname(place)
    return None


def check_file(path):
    """UserError where a file could not be written, or what is there is no file, as a folder or a device."""
    name = os.path.basename(path)
    if not name or os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path!r} cannot be written: give the name of a file")
    if len(os.fsencode(name)) > 200:  # most systems allow 255, and it gets a longer name for a while
        raise UserError(f"the file name {name[:20]}... is too long: give one of at most 200 bytes")
    check_folder(os.path.dirname(path) or ".")
