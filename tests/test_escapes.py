"""No text of a user becomes a path, a word of a shell, markup or a terminal's command that it was not."""

import json
import os
import re
import shlex
import stat
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import sample
from metrics.images import Images
from metrics.page import save_page
from metrics.plots import save_sheet
from metrics.rows import format_markdown
from metrics.systems import name_systems
from metrics.vbench import check_vbench, link_videos, read_prompts_of_table, run_vbench
from support.arguments import Parser
from support.errors import UserError, launch
from support.escapes import make_cell, make_printable
from support.files import short_name
from support.media import draw_curves, save_labelled_grid, save_video

# prompts that mean something to somebody
HOSTILE = (
    "costs $5 and $x^2$",
    "$\\frac{$",
    "\\$ \\alpha $",
    "a | b \\| c",
    "</script><b>&amp;",
    "\x1b[31mred\x07",
    "tab\tand\nline",
    "\u202ereversed",
    "emoji 🦊, 中文",
    "%s %d {0} {x}",
    "PAGES NAMES TITLE",
    "x" * 380,
    "../../x",
)

# Terminals and tables -------------------------------------------------------------------------------------

SHOWN = (
    ("a b, ü 中", "a b, ü 中"),
    ("\x1b[31m", "\\x1b[31m"),
    ("a\nb\r\tc", "a\\nb\\r\\tc"),
    ("\u202e\udcff\x00", "\\u202e\\udcff\\x00"),
)


@pytest.mark.parametrize("text, shown", SHOWN)
def test_what_a_terminal_gets(text, shown):
    assert make_printable(text) == shown
    shown.encode()


@pytest.mark.parametrize("text", HOSTILE)
def test_a_cell_of_a_table_stays_one(text):
    lines = format_markdown([["system", "value"], [text, "1"]]).splitlines()
    assert len(lines) == 3
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", lines[2])) == 3
    assert "\x1b" not in make_cell(text)


def test_a_mistake_is_one_clean_line(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["sample.py"])

    def fail():
        raise UserError("there is no folder \x1b[31m\nnew\udcff")

    with pytest.raises(SystemExit):
        launch(fail)
    assert capsys.readouterr().err == "sample.py: there is no folder \\x1b[31m\\nnew\\udcff\n"
    with pytest.raises(SystemExit):
        Parser("").parse_args(["--\x1b[31m"])
    assert "\x1b" not in capsys.readouterr().err


def test_a_prompt_that_is_no_text_is_refused():
    with pytest.raises(UserError, match="is not UTF-8 text"):
        sample.parse_arguments(["--teacher", "sdxl", "--prompt", "a", "bytes \udcff"])


# Names of folders -----------------------------------------------------------------------------------------


def test_default_folders_stay_below_their_place(tmp_path, monkeypatch):
    place = tmp_path / "teachers" / "mine"
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    names = {
        "..": "teachers",
        ".": "mine",
        "./": "mine",
        "../..": tmp_path.name,
        "/": "root",
        "x/..": "mine",
        "THUDM/CogVideoX-2b": "CogVideoX-2b",
        "a/b/": "b",
        "v1.": "v1.",
    }
    for path, name in names.items():
        assert short_name(path) == name
    for path in (*HOSTILE, *names):
        assert "/" not in short_name(path)
        assert short_name(path) not in ("", ".", "..")


BAD_NAMES = ("..", ".", "", "a/b", "a b", ".hidden", "a\n", "$x", "x" * 101, "teacher")
BAD_NAMES += ("report.json", "table.md", "grid.png", "side-by-side.html")


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_of_systems_that_are_no_folders(name):
    """Nor may they be files of the report."""
    with pytest.raises(UserError, match="NAME=FOLDER"):
        name_systems([f"{name}=runs/x"], [])


def test_a_folder_gives_its_own_name(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    assert name_systems(["."], ["../other/"]) == ({"run": "."}, {"other": "../other/"})


# Pictures and pages ---------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path):
    """A picture of each hostile prompt."""
    Image.new("RGB", (16, 16), "red").save(tmp_path / "0.png")
    return Images("PAGES", str(tmp_path), [[str(tmp_path / "0.png")]] * len(HOSTILE), {})


@pytest.mark.filterwarnings("ignore:Glyph")  # of characters that the font lacks
def test_prompts_in_plots_are_text(images, tmp_path, monkeypatch):
    """matplotlib would set $...$ as formulas, and fail where they are none."""
    titles = []
    monkeypatch.setattr("metrics.plots.save_figure", lambda figure, path: titles.extend(figure.axes))
    values = np.arange(len(HOSTILE), dtype=float)
    save_sheet(images, "clip", values, HOSTILE, str(tmp_path / "sheet.png"))
    assert not any(axes.title.get_parse_math() for axes in titles)
    monkeypatch.undo()
    save_sheet(images, "clip", values, HOSTILE, str(tmp_path / "sheet.png"))
    assert (tmp_path / "sheet.png").stat().st_size > 1000
    figure = draw_curves({"$\\frac{$": (np.arange(3), np.arange(3.0))}, {})
    figure.savefig(tmp_path / "curve.png")


def test_prompts_in_grids(tmp_path):
    pixels = torch.zeros(1, len(HOSTILE), 3, 8, 8)
    save_labelled_grid(pixels, ["a $system$ \x1b"], HOSTILE, str(tmp_path / "grid.png"))
    assert (tmp_path / "grid.png").stat().st_size > 1000


def test_prompts_and_names_in_the_page(images, tmp_path):
    save_page(images, images, {"PAGES": {}}, HOSTILE, str(tmp_path / "page.html"))
    text = (tmp_path / "page.html").read_text()
    assert "<title>PAGES and PAGES</title>" in text
    assert text.count("</script>") == 1
    pages = json.loads(re.search(r"const pages = (\[.*?\]), names = \[\"PAGES\"", text)[1])
    assert [page["prompt"] for page in pages] == list(HOSTILE)


@pytest.mark.parametrize("folder", ("-y", "a:b", "x.zip", "100%d", "'; $(x)", "*"))
def test_videos_in_folders_that_ffmpeg_would_misread(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    os.mkdir(folder)
    save_video(torch.zeros(3, 2, 16, 16), f"{folder}/0000-0.mp4", 8)
    assert os.listdir(folder) == ["0000-0.mp4"]
    assert os.path.getsize(f"{folder}/0000-0.mp4") > 200


# VBench ---------------------------------------------------------------------------------------------------

ENTRIES = (
    [{"prompt_en": "a", "dimension": ["../x"]}],
    [{"prompt_en": "a", "dimension": ["quality"]}],
    [{"prompt_en": "a", "dimension": "color"}],
    [{"prompt_en": "", "dimension": ["color"]}],
    [{"prompt_en": 3, "dimension": ["color"]}],
    [{"prompt_en": "a\0", "dimension": ["color"]}],
    [{"prompt_en": "\ud800", "dimension": ["color"]}],
    [{"prompt_en": "a"}],
    [],
    {},
)


@pytest.mark.parametrize("entries", ENTRIES)
def test_lists_that_are_not_vbenchs(tmp_path, entries):
    """They are read as any list, and nothing in these is a caption."""
    path = tmp_path / "info.json"
    path.write_text(json.dumps(entries))
    with pytest.raises(UserError, match="has no columns called|has no prompts|is no list of texts"):
        read_prompts_of_table(str(path))


UNNAMED = ("a/b", "../x", "/etc/x", "x" * 380, "ü" * 126)


@pytest.mark.parametrize("prompt", UNNAMED)
def test_prompts_that_vbench_could_not_find(tmp_path, prompt):
    """Before anything is loaded; other metrics take them."""
    entries = [{"prompt_en": prompt, "dimension": ["color"]}]
    (tmp_path / "info.json").write_text(json.dumps(entries))
    assert read_prompts_of_table(str(tmp_path / "info.json"))[0] == [prompt]
    words = ["--teacher", "nowhere", "--prompts", str(tmp_path / "info.json"), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="cannot be a file's name"):
        evaluate.main(words)


def test_a_prompt_twice_in_a_dimension():
    check_vbench(["a", "a"], [["color"], ["scene"]], 5)
    with pytest.raises(UserError, match="'a' is twice in the dimension scene"):
        check_vbench(["a", "b", "a"], [["scene"], ["scene"], ["color", "scene"]], 5)


def test_how_many_videos_vbench_wants_is_said(capsys):
    check_vbench(["a"], [["color"]], 5)
    assert capsys.readouterr().err == ""
    check_vbench(["a"], [["color"]], 8)
    assert "VBench reads 5 videos of every prompt; --seeds 8" in capsys.readouterr().err
    check_vbench(["a"], [["temporal_flickering"]], 5)
    said = capsys.readouterr().err
    assert "--seeds 25" in said
    assert "static_filter.py" in said


def test_videos_are_copied_where_a_disk_has_no_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "video.mp4").write_bytes(b"frames")
    link_videos([tmp_path / "video.mp4"], tmp_path, "a cat")
    assert (tmp_path / "a cat-0.mp4").read_bytes() == b"frames"


def test_vbenchs_command_and_files(tmp_path, monkeypatch, capsys):
    """Odd folders and prompts: the printed command is one that a shell reads back, from anywhere, and results
    of an earlier run are not taken for this one's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "0.mp4").write_text("a video")
    prompts = ["$(rm x); 'a' \"b\"", "..", "-x", "\x1b[31m"]
    folder = "-o'ut $HOME"
    run_vbench(folder, [["0.mp4"]] * 4, prompts, [["color"]] * 4)
    place = tmp_path / folder
    wanted = [
        "--videos_path",
        f"{place}/color",
        "--dimension",
        "color",
        "--output_path",
        f"{place}/results/color",
    ]
    assert shlex.split(capsys.readouterr().out) == ["vbench", "evaluate", *wanted]
    assert sorted(os.listdir(place / "color")) == sorted(f"{prompt}-0.mp4" for prompt in prompts)

    (place / "results/color").mkdir(parents=True)
    (place / "results/color/old_eval_results.json").write_text('{"color": [0.9, []]}')
    (tmp_path / "vbench").write_text(f"#!{sys.executable}\n")  # does nothing
    (tmp_path / "vbench").chmod(stat.S_IRWXU)
    with pytest.raises(UserError, match="vbench gave no result"):
        run_vbench(folder, [["0.mp4"]], prompts[:1], [["color"]])
