"""Folders of results: whether one can be written, and whether what it holds is what is wanted."""

import hashlib
import itertools
import json
import os
import tempfile

import xxhash

from support.errors import UserError
from support.files import read_json

ABSENT = object()
SAID = 3  # differences in a sentence


def check_new(path):
    """UserError where there is something at this path, or nothing can be written there."""
    if os.path.lexists(path):
        raise UserError(f"{path} is there already; give another folder")
    check_writable(path)


def check_writable(path):
    """UserError where no folder can be made or written at this path, whose parents need not be there. Tries
    it, in a folder that it removes again."""
    if not path:
        raise UserError("the name of a folder is empty")
    place = os.path.abspath(path)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        raise UserError(f"the folder {path} cannot be made: {place} is no folder")
    missing = os.path.relpath(path, place) + ".tmp0000000"  # what is written atomically is called so at first
    try:
        missing.encode()  # names that are no text are refused as well
        with tempfile.TemporaryDirectory(dir=place) as trial:
            os.makedirs(os.path.join(trial, missing))
    except (OSError, ValueError) as error:
        raise UserError(f"the folder {path} cannot be written: {error}") from error


def check_index(folder, index, has_results):
    """UserError where a folder's index.json differs from `index`, {name: value}, or where there is no
    readable one beside results."""
    path = os.path.join(folder, "index.json")
    old = read_json(path)
    if isinstance(old, dict):
        difference = describe_difference(old, index)
        if difference:
            raise UserError(
                f"{folder} holds results of other settings: {difference}; give another --out, or delete it"
            )
    elif has_results or os.path.lexists(path):
        raise UserError(
            f"nobody knows of what the results in {folder} are: its index.json is missing or damaged; "
            "give another --out, or delete it"
        )


def describe_difference(old, new):
    """What differs between two indexes, {name: value} of what JSON can hold, in words with both values; ""
    where nothing does. An old one that is none has no values."""
    old, new = json.loads(json.dumps([old, new]))  # no tuples
    old = old if isinstance(old, dict) else {}
    found = []
    for name in {**old, **new}:
        differences = find_differences(old.get(name, ABSENT), new.get(name, ABSENT), name)
        found += itertools.islice(differences, 1)
    more = f", and {len(found) - SAID} more differ" if len(found) > SAID else ""
    return ", ".join(found[:SAID]) + more


def find_differences(old, new, name):
    """A sentence for each value that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from find_differences(old.get(key, ABSENT), new.get(key, ABSENT), f"{name} {key}")
    elif isinstance(old, list) and isinstance(new, list):
        for i, (a, b) in enumerate(itertools.zip_longest(old, new, fillvalue=ABSENT)):
            yield from find_differences(a, b, f"{name}[{i}]")
    elif old != new:
        yield f"its {name} is {show(old)}, not {show(new)}"


def show(value):
    return "absent" if value is ABSENT else repr(value)


def hash_folder(folder):
    """The digest of a folder's files: their names and all that is in them."""
    digests = []
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            with open(path, "rb") as file:
                digests.append([name, hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()])
    return xxhash.xxh3_128_hexdigest(json.dumps(digests).encode())
