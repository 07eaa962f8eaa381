"""tools/full_size.py finds what is wrong with a run, and measures what the stages write."""

import json
import os

import pytest

import helpers
from tools import full_size

LINES = [{"step": 1, "loss_f": 0.5, "norm_G": 0.0}, {"step": 2, "loss_f": 0.4, "norm_G": 0.1}]


def test_a_healthy_run_has_no_faults():
    assert full_size.find_faults("it", ["norm_G"], LINES) == []


@pytest.mark.parametrize(
    "change, fault",
    [
        ({"loss_f": float("nan")}, "it: loss_f is nan at iteration 2"),
        ({"norm_G": 0.0}, "it: no gradient, norm_G is never above 0"),
        ({"left_out": 1}, "it: an update was left out at iteration 2"),
    ],
)
def test_what_is_wrong_is_said(change, fault):
    lines = [LINES[0], LINES[1] | change]
    assert full_size.find_faults("it", ["norm_G"], lines) == [fault]


def test_the_plan_is_that_of_the_command(teacher_folder):
    words = ["--teacher", teacher_folder, "--batch", "1", "--lora", "4"]
    assert 0 < full_size.plan(words) < full_size.plan([*words, "--batch", "8"]) < 1


def test_a_row_is_of_the_stages_that_ran(tmp_path, monkeypatch):
    """The commands are noted, not run; each leaves lines."""
    commands = []

    def run(words, out, threads):
        commands.append(words)
        os.makedirs(out)
        with open(os.path.join(out, "metrics.jsonl"), "w") as file:
            for step, seconds in enumerate((9, 5, 7), start=1):
                line = {"step": step, "seconds": seconds, "norm_G": 1, "norm_f": 1, "norm_heads": 1}
                file.write(json.dumps(line) + "\n")
        return 11.3

    monkeypatch.setattr(full_size, "run", run)
    monkeypatch.setattr(full_size, "plan", lambda words: 10.1)
    monkeypatch.setattr(full_size, "write_random", lambda name, path: helpers.make_teacher(path, 0))
    row, faults = full_size.measure("sdxl", str(tmp_path), 1)
    assert [words[0] for words in commands] == ["adm.py", "collect_ode.py", "adp.py"]
    assert list(row.values()) == ["sdxl", "6", "11.3", "10.1", "9"]
    assert faults == ["adm.py, sdxl: no gradient, norm_D is never above 0"]
