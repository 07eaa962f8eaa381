"""The benchmark runs, and counts the passes that its budget allows."""
import json

import pytest

import helpers


def test_passes_of_an_iteration(tmp_path):
    """Accumulating two halves makes the same passes on each, and one more through the student, whose graphs would not fit together."""
    result = helpers.command("tiny/bench.py", "--stages", "adp", "adm", "--options", "", "--batch 2 --accumulate 2", "--batch", "4", "--iterations", "1",
                             "--json", str(tmp_path / "bench.json"))
    assert result.returncode == 0, result.stderr
    rows = {(row["stage"], row["options"]): row for row in json.load(open(tmp_path / "bench.json"))}
    passes = {key: (row["forward_full"], row["forward_partial"], *row["backward"].values()) for key, row in rows.items()}
    assert passes == {("adp", ""): (1, 2, 1, 0, 1, 0), ("adp", "--batch 2 --accumulate 2"): (2, 4, 2, 0, 2, 0),
                      ("adm", ""): (5, 2, 1, 1, 1, 1), ("adm", "--batch 2 --accumulate 2"): (12, 4, 2, 2, 2, 2)}
    assert all(row["overhead"] == pytest.approx(row["seconds_iteration"] / row["seconds_passes"] - 1) for row in rows.values() if not row["options"])
    assert result.stdout.count("\n") == 6 and "| 1.00 |" in result.stdout


def test_two_processes_are_compared_with_two_that_exchange_nothing(tmp_path):
    result = helpers.command("tiny/bench.py", "--stages", "dmd", "--processes", "1", "2", "--batch", "2", "--iterations", "1", "--json", str(tmp_path / "bench.json"))
    assert result.returncode == 0, result.stderr
    one, two = json.load(open(tmp_path / "bench.json"))
    assert (one["processes"], two["processes"]) == (1, 2) and one["forward_full"] == two["forward_full"] == 5 and one["rows"] == two["rows"] == 2
    assert two["overhead"] == two["seconds_iteration"] / two["seconds_apart"] - 1 and "seconds_passes" not in two and "seconds_apart" not in one
