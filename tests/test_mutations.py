"""The table of tests/mutate.py still fits the code: each of its changes is of exactly one line."""

import ast
import os

import helpers
from mutate import EQUAL, MUTATIONS


def test_every_mutation_changes_one_line():
    for mutation in MUTATIONS:
        with open(os.path.join(helpers.ROOT, mutation.file), encoding="utf-8") as file:
            before = file.read()
        after = mutation.change(before)
        ast.parse(after)
        pairs = zip(before.splitlines(), after.splitlines(), strict=True)
        assert sum(one != other for one, other in pairs) == 1, mutation


def test_every_mutation_has_a_name_of_its_own():
    names = [mutation.name for mutation in MUTATIONS]
    assert len(set(names)) == len(names)
    assert set(EQUAL) <= set(names)
