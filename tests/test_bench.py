"""The benchmark runs, and counts the passes that its budget allows."""

import json
import multiprocessing
from unittest import mock

import pytest
from test_plan import OnePassMore

import adm
import helpers
from support.errors import UserError
from tools import bench
from tools.measure import Watch, measure

pytestmark = pytest.mark.slow


@pytest.fixture
def run_bench(tmp_path, monkeypatch, capsys):
    """A function: words of the command, which runs here, one iteration, in forked processes -> (what it
    printed, the rows of --json)."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: fork)

    def run(*words):
        path = tmp_path / "bench.json"
        capsys.readouterr()
        bench.main([*words, "--iterations", "1", "--json", str(path)])
        return capsys.readouterr().out, json.loads(path.read_text())

    return run


def measure_here(tmp_path, teacher, name, extra="", words=()):
    """A stage in this process, one iteration -> (row, complaints)."""
    options = bench.parse_arguments(["--batch", "2", "--iterations", "1", *words])
    return measure(name, 1, extra, options, str(teacher), str(tmp_path / "measured"))


def test_the_command_says_what_is_wrong():
    result = helpers.run_script("tools/bench.py", "--random-weights")
    assert result.returncode == 2
    assert "bench.py: --random-weights is for a known teacher: sdxl" in result.stderr


def list_passes(row):
    return (row["forward_full"], row["forward_partial"], *row["backward"].values())


def test_passes_of_an_iteration(run_bench):
    """Accumulating two halves makes the same passes on each, and one more through the student, whose graphs
    would not fit together."""
    halves = "--batch 2 --accumulate 2"
    words = ["--stages", "adp", "adm", "--options", "", halves, "--batch", "4"]
    out, rows = run_bench(*words)
    passes = {(row["stage"], row["options"]): list_passes(row) for row in rows}
    assert passes == {
        ("adp", ""): (1, 2, 1, 0, 1, 0),
        ("adp", halves): (2, 4, 2, 0, 2, 0),
        ("adm", ""): (5, 2, 1, 1, 1, 1),
        ("adm", halves): (12, 4, 2, 2, 2, 2),
    }
    for row in rows:
        assert row["overhead"] == pytest.approx(row["seconds_iteration"] / row["seconds_passes"] - 1)
    assert out.count("\n") == 6
    assert "| 1.00 |" in out


def test_two_processes_are_compared_with_two_that_exchange_nothing(run_bench):
    _, rows = run_bench("--stages", "dmd", "--processes", "1", "2", "--batch", "2")
    one, two = rows
    assert one["processes"] == 1
    assert two["processes"] == 2
    assert one["forward_full"] == two["forward_full"] == 5
    assert one["rows"] == two["rows"] == 2
    assert two["overhead"] == two["seconds_iteration"] / two["seconds_apart"] - 1
    assert "seconds_passes" not in two
    assert "seconds_apart" not in one


def test_passes_through_adapters(tmp_path, teacher_folder):
    row, _ = measure_here(tmp_path, teacher_folder, "adm+r1r2", "--lora 4")
    assert list_passes(row) == (5, 4, 1, 1, 1, 1)
    assert row["seconds_passes"] > 0


def test_a_brief_measurement_has_two_iterations_and_no_passes_alone(tmp_path, teacher_folder):
    row, _ = measure_here(tmp_path, teacher_folder, "adm+r1r2", words=["--brief"])
    assert list_passes(row) == (5, 4, 1, 1, 1, 1)
    assert row["seconds_iteration"] > 0
    assert "seconds_passes" not in row
    assert len((tmp_path / "measured" / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_passes_of_video(tmp_path):
    teacher = helpers.make_teacher(tmp_path / "teacher", 0, "cogvideox")
    row, complaints = measure_here(tmp_path, teacher, "adm+r1r2")
    assert list_passes(row) == (5, 4, 1, 1, 1, 1)
    assert row["seconds_passes"] > 0
    assert complaints == []


def test_a_change_of_the_method_is_counted(tmp_path, teacher_folder):
    with mock.patch.object(adm, "ADM", OnePassMore):
        row, complaints = measure_here(tmp_path, teacher_folder, "adm+r1r2")
    assert list_passes(row) == (6, 4, 1, 1, 1, 1)
    assert complaints == ["adm+r1r2: an iteration makes 6 full forward passes, its budget is 5"]


def test_a_benchmark_that_is_told_to_stop_says_so():
    with pytest.raises(UserError, match="told to stop"):
        Watch(adm.iterate, 1).finish()
