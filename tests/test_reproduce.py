"""tools/reproduce.py: what runs after what, what is complete, and that documented tables are the JSON's."""

import json
import os
import shlex
import shutil
import subprocess

import pytest

import helpers
from support.errors import UserError
from support.files import read_json
from tools import plots, processes, reproduce, tables
from tools.variants import VARIANTS

PLACES = ("pairs", "init", "out", "resume")


def parse_training(words):
    """The words of a command of a training stage -> its settings, without folders."""
    script, *options = words
    if script == "tools/variants.py":
        assert options.pop(0) in VARIANTS
        script = "adm.py"
    settings = vars(helpers.training_arguments(script.removesuffix(".py"), options))
    return {name: value for name, value in settings.items() if name not in PLACES}


@pytest.mark.parametrize("given", [None, "0,1"])
def test_make_hides_the_gpus_unless_it_is_told_of_some(given, monkeypatch):
    """The demo's second process would stop on a machine with one."""
    for name in ("CUDA_VISIBLE_DEVICES", "MAKEFLAGS", "MAKELEVEL"):  # the tests are run by a make, too
        monkeypatch.delenv(name, raising=False)
    if given:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    words = ["make", "--eval", "show: ; @echo GPUs=$$CUDA_VISIBLE_DEVICES", "show"]
    result = subprocess.run(words, cwd=helpers.ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == f"GPUs={given or ''}"


def test_the_table_of_the_demo_is_of_the_commands_of_make_demo():
    """The same settings, on one process with twice the batch; and make demo's ADP saves but once."""
    words = ["make", "-n", "-o", ".venv/ready", "demo", "SEED=1", "DEMO=runs/demo"]
    result = subprocess.run(words, cwd=helpers.ROOT, capture_output=True, text=True, check=True)
    lines = [line for line in result.stdout.replace("\\\n", " ").splitlines() if "nproc_per_node" in line]
    commands = [shlex.split(line.partition("--nproc_per_node=2")[2]) for line in lines]
    runs = reproduce.Runs("runs", False)
    names = ["pairs", *reproduce.list_runs("demo")]
    assert len(commands) == len(names) + 1  # the last is evaluate.py
    for name, theirs in zip(names[1:], commands[1:]):
        theirs = parse_training(theirs)
        ours = parse_training(runs.command(name, 1))
        assert ours.pop("batch") == 2 * theirs.pop("batch")
        assert ours.pop("save_every") <= theirs.pop("save_every")
        assert ours == theirs, name
    assert set(commands[0]) - set(runs.command("pairs", 1)) == {"runs/demo/pairs"}
    missing = set(shlex.split(reproduce.TABLES["demo"][1])) - set(commands[-1])
    assert missing == {"oracle,lpips", "--lpips-net", "random", "--lpips-size"}


def test_every_command_is_one_that_its_stage_takes():
    for name, command in reproduce.RUNS.items():
        words = reproduce.Runs("runs", False).command(name, 0)
        if words[0] != "collect_ode.py":
            parse_training(words)
        assert not list_unfilled(words), command


def list_unfilled(words):
    return [word for word in words if "{" in word]


def test_runs_come_after_those_that_they_need():
    ordered = reproduce.order_runs(["pipeline", "demo"], [3, 4])
    assert len(ordered) == len(set(ordered))
    for i, (name, seed) in enumerate(ordered):
        for needed in reproduce.list_needed(name):
            assert (needed, seed) in ordered[:i]
    assert reproduce.list_needed("dmdx") == ["adp"]


def test_every_run_is_of_a_table():
    of_tables = {name for table in reproduce.TABLES for name, _ in reproduce.order_runs([table], [0])}
    assert of_tables == set(reproduce.RUNS)


@pytest.fixture
def commands(monkeypatch):
    """Commands are noted, not run, and leave checkpoints of iteration 4 -> the list of their words."""
    noted = []

    def run_command(words, log):
        noted.append(words)
        return {"commit": "abc", "machine": "here", "date": "2026-01-01", "cpu_seconds": 60}

    monkeypatch.setattr(reproduce, "run_command", run_command)
    monkeypatch.setattr(reproduce, "find_checkpoint", lambda *_: ("step_000004", {"step": 4}))
    return noted


def test_a_record_names_the_gpu_where_there_is_one(monkeypatch):
    plain = processes.describe_machine()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "H100")
    assert processes.describe_machine() == f"{plain}, H100"


def test_what_is_complete_is_not_run_again(tmp_path, commands):
    runs = reproduce.Runs(str(tmp_path), True)
    wanted = [("pairs", 0), ("adp", 0), ("dmd", 0), ("dmdx", 0)]
    runs.make_all(wanted[:2], jobs=1)
    assert [words[0] for words in commands] == ["collect_ode.py", "adp.py"]
    assert "--resume" not in commands[0]
    assert "--resume" in commands[1]  # what was interrupted goes on
    runs.make_all(wanted, jobs=2)
    outs = [words[words.index("--out") + 1] for words in commands]
    assert sorted(outs) == sorted(str(tmp_path / f"{name}-0") for name, _ in wanted)
    record = json.loads((tmp_path / "dmd-0.json").read_text())
    assert record["command"].startswith("adm.py --teacher assets/tiny-sdxl --seed 0")
    assert f"--init {tmp_path}/adp-0" in record["command"]
    assert record["cpu_seconds"] == 60


def test_what_a_signal_ended_is_not_complete(tmp_path, commands):
    """Its command ends with 0, but at iteration 4 of 1700."""
    runs = reproduce.Runs(str(tmp_path), False)
    runs.make("pairs", 0)
    with pytest.raises(UserError, match="adp-0 was stopped at iteration 4: start again to go on"):
        runs.make("adp", 0)
    assert runs.read("adp", 0) is None


def test_runs_of_another_command_are_not_taken(tmp_path, commands):
    """As those of --quick in the same folder."""
    reproduce.Runs(str(tmp_path), True).make("pairs", 0)
    with pytest.raises(UserError, match="pairs-0.json is of another command than .*give another --out"):
        reproduce.Runs(str(tmp_path), False).make_all([("pairs", 0), ("adp", 0)], jobs=1)
    assert len(commands) == 1


def test_a_command_that_fails_is_named_with_its_output(tmp_path):
    log = tmp_path / "log"
    with pytest.raises(UserError, match=r"-c 'exit\(\"no\"\)' failed: its output is in .*log"):
        reproduce.run_command(["-c", 'exit("no")'], str(log))
    assert "no" in log.read_text()


def test_gauges_are_averaged_over_the_end_of_a_run(tmp_path):
    folder = tmp_path / "dmdx-0"
    folder.mkdir()
    lines = [{"step": 10 * i, "loss_f": float(i)} for i in range(6)]
    lines[-1]["cosine"] = 0.5
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    gauges = reproduce.Runs(str(tmp_path), False).average_gauges("dmdx", 0)
    assert gauges == {"loss_f": 4.5, "cosine": 0.5}
    plots.save_gauges({"dmdx": str(folder / "metrics.jsonl")}, str(tmp_path / "training.png"))
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")


def write_scores(folder, rights):
    """rights: {prompt: accuracy of each of its samples}."""
    folder.mkdir()
    lines = [{"prompt": p, "accuracy": right} for p, samples in rights.items() for right in samples]
    (folder / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_gain_is_taken_prompt_by_prompt(tmp_path):
    """Prompts differ far more than students: the interval of the gain has no part of that."""
    write_scores(tmp_path / "adp-0", {0: [0.0, 0.0], 1: [1.0, 0.0], 2: [1.0, 0.0]})
    write_scores(tmp_path / "dmd-0", {0: [1.0, 0.0], 1: [1.0, 1.0], 2: [1.0, 1.0]})
    write_scores(tmp_path / "adp-1", {0: [0.0, 0.0], 1: [0.0, 0.0], 2: [1.0, 1.0]})
    write_scores(tmp_path / "dmd-1", {0: [0.0, 0.0], 1: [0.0, 0.0], 2: [1.0, 1.0]})
    measure = reproduce.Runs.measure_gain
    assert measure(str(tmp_path), "adp", "dmd", [0]) == [0.5, 0.5, 0.5]
    assert measure(str(tmp_path), "adp", "dmd", [0, 1]) == [0.25, 0.25, 0.25]
    mean, low, high = measure(str(tmp_path), "adp", "adp", [0])
    assert mean == low == high == 0
    write_scores(tmp_path / "dmdx-0", {0: [0.0, 0.0], 1: [1.0, 1.0], 2: [1.0, 0.0]})
    mean, low, high = measure(str(tmp_path), "adp", "dmdx", [0])
    assert mean == pytest.approx(1 / 6, abs=1e-5)
    assert (low, high) == (0, 0.5)


# The tables -----------------------------------------------------------------------------------------------


def make_row(accuracy, tv):
    ci = {"accuracy": [accuracy - 0.01, accuracy + 0.03]}
    return {"nfe": 1, "accuracy": accuracy, "tv_uniform": tv, "tv_uniform_of": {"size": tv}, "ci": ci}


def make_entry():
    """An entry of results.json of one student with two seeds."""
    runs = []
    for seed, accuracy in enumerate((0.7, 0.8)):
        record = {"seed": seed, "date": "2026-01-02", "commit": "0123456789", "machine": "2 x CPU"}
        record["command"] = f"adm.py --iterations 450 --seed {seed}"
        runs.append({"name": "dmdx", **record, "cpu_seconds": 90, "row": make_row(accuracy, 0.1 * seed)})
    teacher = make_row(0.97, 0.03) | {"nfe": 50, "prompts": 64, "samples": 4096}
    return {"teacher": teacher, "runs": runs}


def test_a_table_has_the_means_and_the_spread_over_the_seeds(tmp_path):
    lines = tables.write_tables(str(tmp_path), {"demo": make_entry()})["results.md"].splitlines()
    lines = lines[lines.index("<!-- table demo -->") :]
    assert lines[1] == "| student | NFE | accuracy | tv_uniform | tv_uniform of size | CPU minutes |"
    assert lines[3] == "| teacher | 50 | 0.970 | 0.030 | 0.03 |  |"
    label = tables.LABELS["dmdx"]
    assert lines[4] == f"| {label} | 1 | 0.750 ± 0.071 | 0.050 ± 0.071 | 0.05 | 1.5 |"
    below = " ".join(lines[6:8])
    assert below.startswith("Seeds 0, 1;")
    assert "64 samples each; one seed's accuracy has an interval of at most 0.030" in below  # the wider side
    assert "2 x CPU; 2026-01-02." in below


def test_one_seed_has_no_spread():
    entry = make_entry()
    assert tables.describe(entry | {"runs": entry["runs"][:1]}).startswith("Seed 0 alone; 64 prompts,")


def test_a_gain_stands_in_the_lines_of_those_that_are_compared(tmp_path):
    entry = make_entry()
    for seed, run in enumerate(make_entry()["runs"]):
        entry["runs"].insert(seed, run | {"name": "adp", "row": make_row(0.69 - 0.02 * seed, 0.1)})
    entry["gains"] = {"dmdx": [0.07, 0.03, 0.08]}
    lines = tables.write_tables(str(tmp_path), {"pipeline": entry})["results.md"].splitlines()
    lines = lines[lines.index("<!-- table pipeline -->") :]
    assert lines[1].endswith("| CPU minutes | gain in accuracy | paper: CLIP | paper: MPS |")
    assert lines[4].endswith("| 1.5 |  | 35.77 | 10.66 |")
    assert lines[5].endswith("| 1.5 | +0.070 ± 0.025 (+0.010 +0.130) | 35.26 | 11.20 |")
    entry["runs"] = [run for run in entry["runs"] if run["seed"] == 0]
    lines = tables.write_tables(str(tmp_path), {"pipeline": entry})["results.md"].splitlines()
    assert lines[lines.index("<!-- table pipeline -->") + 5].endswith("| +0.070 ± 0.025 | 35.26 | 11.20 |")


def test_the_papers_numbers_and_the_gauges_stand_beside_ours(tmp_path):
    entry = make_entry()
    for seed, run in enumerate(entry["runs"]):
        run["gauges"] = dict.fromkeys(tables.GAUGES, 0.1 * seed)
    texts = tables.write_tables(str(tmp_path), {"pipeline": entry, "health": entry})
    assert "| 1.5 | 35.26 | 11.20 |" in texts["results.md"]
    assert "| CPU minutes | loss_f | dmd_loss | cosine | D_gap | D_abs | norm_G |" in texts["training.md"]
    assert "| 1.5 | 0.050 | 0.050 | 0.050 | 0.050 | 0.050 | 0.050 |" in texts["training.md"]


def test_the_words_around_a_table_stay(tmp_path):
    path = tmp_path / "results.md"
    path.write_text("# Results\n\n<!-- table demo -->\nold\n<!-- end -->\n\nWords.\n")
    text = tables.write_tables(str(tmp_path), {"demo": make_entry()})["results.md"]
    assert text.startswith("# Results\n\n<!-- table demo -->\n| student")
    assert text.endswith("<!-- end -->\n\nWords.\n")
    assert "old" not in text
    assert path.read_text() == text
    more = tables.write_tables(str(tmp_path), {"ttur": make_entry()})["results.md"]
    assert more.startswith(text)  # a table without a place of its own comes last
    assert "## The table ttur\n\n<!-- table ttur -->\n| student" in more


def test_the_documented_tables_are_those_of_the_json(tmp_path):
    """Nobody has changed a number by hand."""
    docs = os.path.join(helpers.ROOT, "docs")
    with open(os.path.join(docs, "results.json")) as file:
        results = json.load(file)
    assert results
    for file in ("results.md", "results-steps.md", "training.md"):
        shutil.copyfile(os.path.join(docs, file), tmp_path / file)
    for file, text in tables.write_tables(str(tmp_path), results).items():
        with open(os.path.join(docs, file)) as documented:
            assert documented.read() == text


def test_the_documented_tables_are_of_the_commands_that_are_there_now():
    results = read_json(os.path.join(helpers.ROOT, "docs/results.json"))
    runs = reproduce.Runs("runs/reproduce", False)
    for table, entry in results.items():
        names, command = reproduce.list_runs(table), reproduce.TABLES[table][1]
        assert list(tables.group_runs(entry)) == list(names), table
        for run in entry["runs"]:
            now = parse_training(runs.command(run["name"], run["seed"]))
            assert parse_training(shlex.split(run["command"])) == now
        words = shlex.split(entry["command"])
        assert words[: words.index("--student")] == runs.complete(command), table


def test_the_plot_is_drawn(tmp_path):
    path = tmp_path / "results.png"
    plots.save_plot({"demo": make_entry()}, str(path))
    assert path.read_bytes().startswith(b"\x89PNG")
    plots.save_plot({}, str(tmp_path / "none.png"))
    assert not (tmp_path / "none.png").exists()
