"""A few faults of every kind of tests/faults.py, with fixed dice; its own command has the large numbers."""

import random

import pytest

import faults

pytestmark = pytest.mark.slow

SHORT = {
    "kills": 2,
    "signals": 2,
    "full disks": 2,
    "damage": 6,
    "command lines": 10,
    "teachers": 2,
    "files": 2,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return faults.World(str(tmp_path_factory.mktemp("world")))


def test_every_kind_is_tried():
    assert SHORT.keys() == faults.FAULTS.keys()


@pytest.mark.parametrize("name", SHORT)
def test_faults(world, name):
    outcomes = []
    for i, trial in enumerate(faults.FAULTS[name][: SHORT[name]]):
        outcome = trial(world, random.Random(f"1/{name}/{i}"))
        if outcome.startswith("NOT RUN"):
            pytest.skip(outcome)
        outcomes.append(outcome)
    assert not [outcome for outcome in outcomes if outcome.startswith("FAILED")]
