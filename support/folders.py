"""Folders of results, and whether what one holds is what is wanted."""

import itertools
import os

from support.errors import UserError
from support.files import as_json, read_sealed

ABSENT = object()
SAID = 3  # differences in a sentence


def check_index(folder, index, has_results):
    """UserError where a folder's index.json differs from `index`, {name: value}, or where there is no
    readable one beside results."""
    path = os.path.join(folder, "index.json")
    was_there = os.path.lexists(path)  # before it is read: another rank may write it now
    old = read_sealed(path)
    if isinstance(old, dict):
        difference = describe_difference(old, index)
        if difference:
            raise UserError(
                f"{folder} holds results of other settings: {difference}; give another --out, or delete it"
            )
    elif has_results or was_there:
        raise UserError(
            f"nobody knows of what the results in {folder} are: its index.json is missing or damaged; "
            "give another --out, or delete it"
        )


def describe_difference(old, new):
    """What differs between two indexes, {name: value} of what JSON can hold, in words with both values; ""
    where nothing does. An old one that is none has no values."""
    old, new = as_json(old), as_json(new)
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
