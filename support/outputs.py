"""Where results will go, tried before the work begins."""

import os

from support.errors import UserError


def check_folder(path):
    """UserError where a folder is none, cannot be made, or cannot be written to."""
    place = os.path.abspath(path)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        raise UserError(f"the folder {path} cannot be made: {place} is no folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"the folder {path} cannot be written to: {place} does not permit it")


def check_file(path):
    """UserError where a file could not be written, or what is there is no file, as a folder or a device."""
    name = os.path.basename(path)
    if not name or os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path!r} cannot be written: give the name of a file")
    if len(os.fsencode(name)) > 200:  # most systems allow 255, and it gets a longer name for a while
        raise UserError(f"the file name {name[:20]}... is too long: give one of at most 200 bytes")
    check_folder(os.path.dirname(path) or ".")
