"""Prompt files: every kind gives its prompts, or one sentence that says what is wrong with it."""

import codecs
import gzip
import json
import sys

import pytest

import sample
from support import prompts as prompts_module
from support.errors import UserError
from support.prompts import read_prompts, read_training_prompts

TWO = ["a red circle", "ein Kreis, größer"]
ROWS = [{"id": 1, "caption": TWO[0]}, {"id": 2, "caption": TWO[1]}]
CSV = 'id,caption\n1,a red circle\n2,"ein Kreis, größer"\n'
TSV = "id\tcaption\n1\ta red circle\n2\tein Kreis, größer\n"
LINES = "\n".join(TWO) + "\n"
JSON_LINES = "\n".join(map(json.dumps, ROWS)) + "\n"

# name, bytes: each holds TWO
RIGHT = {
    "text": ("a.txt", LINES.encode()),
    "no suffix": ("a", LINES.encode()),
    "no last line end": ("a.txt", LINES.strip().encode()),
    "empty lines": ("a.txt", f"\n \n{TWO[0]}\n\n  {TWO[1]}\t\n".encode()),
    "a BOM": ("a.txt", codecs.BOM_UTF8 + LINES.encode()),
    "joined files with BOMs": ("a.txt", b"\xef\xbb\xbfa red circle\n" + codecs.BOM_UTF8 + TWO[1].encode()),
    "UTF-16, little end first": ("a.txt", codecs.BOM_UTF16_LE + LINES.encode("utf-16-le")),
    "UTF-16, big end first": ("a.txt", codecs.BOM_UTF16_BE + LINES.encode("utf-16-be")),
    "UTF-32": ("a.txt", LINES.encode("utf-32")),
    "CRLF": ("a.txt", LINES.replace("\n", "\r\n").encode()),
    "CR": ("a.txt", LINES.replace("\n", "\r").encode()),
    "csv": ("a.csv", CSV.encode()),
    "large suffix": ("A.CSV", CSV.encode()),
    "csv, BOM": ("a.csv", CSV.removeprefix("id,").replace("1,", "").replace("2,", "").encode("utf-8-sig")),
    "csv, UTF-16": ("a.csv", CSV.encode("utf-16")),
    "csv, CRLF": ("a.csv", CSV.replace("\n", "\r\n").encode()),
    "csv, CR": ("a.csv", CSV.replace("\n", "\r").encode()),
    "csv, line breaks in cells": ("a.csv", 'caption\n"a red\ncircle"\n"ein Kreis,\r\n\n größer"\n'.encode()),
    "csv, spaces": ("a.csv", CSV.replace("1,", "1, ").replace("2,", "2, ").encode()),
    "csv, empty lines": ("a.csv", f"\n{CSV}\n".replace("\n", "\n\n").encode()),
    "csv, Prompt": ("a.csv", CSV.replace("caption", "Prompt").encode()),
    "csv, TEXT": ("a.csv", CSV.replace("caption", "TEXT").encode()),
    "tsv": ("a.tsv", TSV.encode()),
    "jsonl": ("a.jsonl", JSON_LINES.encode()),
    "jsonl, BOM, CRLF": ("a.jsonl", JSON_LINES.replace("\n", "\r\n").encode("utf-8-sig")),
    "jsonl of strings": ("a.ndjson", "\n\n".join(map(json.dumps, TWO)).encode()),
    "json": ("a.json", json.dumps(ROWS, indent=1).encode()),
    "json of strings, BOM": ("a.json", json.dumps(TWO).encode("utf-8-sig")),
    "json, line breaks": ("a.json", json.dumps(["a red\ncircle", "ein Kreis,\u2028größer"]).encode()),
}


@pytest.mark.parametrize("name, content", RIGHT.values(), ids=RIGHT)
def test_every_kind_of_file(tmp_path, capsys, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    assert read_prompts(str(path)) == TWO
    assert capsys.readouterr().err == ""


def test_empty_cells_are_left_out_with_a_note(tmp_path, capsys):
    path = tmp_path / "a.csv"
    path.write_text('id,caption\n1,a red circle\n2,\n3," "\n4,a square\n')
    assert read_prompts(str(path)) == ["a red circle", "a square"]
    assert f"note: 2 empty prompts of {path} are left out" in capsys.readouterr().err
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": null}\n{"text": "a square"}\n')
    assert read_prompts(str(path)) == ["a square"]
    assert "note: 1 empty prompts" in capsys.readouterr().err


def test_a_column_of_another_name(tmp_path):
    table = tmp_path / "a.csv"
    table.write_text("caption,long\na circle,a large red circle\n")
    assert read_prompts(str(table), "long") == ["a large red circle"]
    assert read_training_prompts(str(table), "caption") == ["a circle"]
    values = tmp_path / "a.jsonl"
    values.write_text('{"prompt": "a circle", "prompt_en": "a square"}\n')
    assert read_prompts(str(values), "prompt_en") == ["a square"]


WRONG = {
    "nothing": ("a.txt", b"", "has no prompts"),
    "white space": ("a.txt", b"\n \r\n\t\n", "has no prompts"),
    "a BOM alone": ("a.txt", codecs.BOM_UTF8, "has no prompts"),
    "Latin-1": ("a.txt", "größer".encode("latin-1"), "is not UTF-8 text"),
    "half of UTF-16": ("a.txt", codecs.BOM_UTF16_LE + b"a\0b", "is not UTF-16-LE text"),
    "UTF-16 without a mark": ("a.txt", LINES.encode("utf-16-le"), "is not UTF-8 text"),
    "NUL bytes": ("a.txt", b"a circle\na \0square\n", "is not text: row 2"),
    "NUL bytes in a cell": ("a.csv", b"caption\na \0square\n", "is not text: row 1"),
    "gzip": ("a.csv.gz", gzip.compress(CSV.encode()), "is not UTF-8 text: save it as UTF-8, or unpack it"),
    "gzip called csv": ("a.csv", gzip.compress(CSV.encode()), "is not UTF-8 text"),
    "a picture called csv": ("a.csv", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "is not UTF-8 text"),
    "Parquet called text": ("a.txt", b"PAR1\x15\x04\x15\0\x02PAR1", "is not text"),
    "csv without a caption": (
        "a.csv",
        b"id,title\n1,x\n",
        "no columns called caption, prompt or text, but 'id', 'title'",
    ),
    "csv of semicolons": (
        "a.csv",
        b"id;caption\n1;x\n",
        "but 'id;caption': choose one with --prompt-column NAME",
    ),
    "csv without heads": ("a.csv", b"a red circle\na square\n", "but 'a red circle'"),
    "csv, two to choose from": (
        "a.csv",
        b"text,caption\nx,y\n",
        "has 2 columns called caption, prompt or text",
    ),
    "csv, the same twice": ("a.csv", b"caption,caption\nx,y\n", "has 2 columns"),
    "csv, a comma too many": (
        "a.csv",
        b"caption\na red circle, small\n",
        "has 2 cells in line 2 and 1 in its first",
    ),
    "csv, a cell too few": ("a.csv", b"id,caption\n1,x\n2\n", "has 1 cells in line 3 and 2 in its first"),
    "csv, an open quote": ("a.csv", b'caption\n"a red circle\na square\n', "is no table at line 3"),
    "csv, a quote inside": ("a.csv", b'caption\n"a red" circle\n', "is no table at line 2"),
    "csv, heads alone": ("a.csv", b"id,caption\n", "has no prompts"),
    "csv, empty": ("a.csv", b"", "has no columns called"),
    "jsonl, no JSON": ("a.jsonl", b'{"text": "x"}\n{"text": \n', "is not JSON: Expecting value"),
    "jsonl, a list": ("a.jsonl", b'["a circle"]\n', "has in row 1 no text but ['a circle']"),
    "jsonl, a number": ("a.jsonl", b'{"text": "x"}\n{"text": 5}\n', "has in row 2 no text but 5"),
    "jsonl, no such key": ("a.jsonl", b'{"text": "x"}\n{"texts": "y"}\n', "no columns 'text', but 'texts'"),
    "jsonl called json": ("a.json", JSON_LINES.encode(), "a value a line is .jsonl"),
    "json of one dictionary": ("a.json", b'{"prompts": ["x"]}', "is no list of texts or of dictionaries"),
    "json, empty list": ("a.json", b"[]", "has no prompts"),
    "json, half a surrogate": ("a.json", b'["\\ud800"]', "is not text: row 1"),
    "json, deep": ("a.json", b"[" * 200_000, "is not JSON"),
    "json, NaN": ("a.json", b"[NaN]", "has in row 1 no text but nan"),
    "json, a long number": ("a.json", b"[" + b"1" * 5000 + b"]", "is not JSON"),
    "json, keys": ("a.json", b'[{"id": 1, "title": "x"}]', "but 'id', 'title'"),
}


@pytest.mark.parametrize("name, content, sentence", WRONG.values(), ids=WRONG)
def test_every_wrong_file_is_refused(tmp_path, name, content, sentence):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_prompts(str(path))
    message = str(error.value)
    assert message.startswith(f"the prompt file {path} ")
    assert sentence in message
    assert "\n" not in message


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "folder.csv").mkdir()
    for name, sentence in (("folder.csv", "Is a directory"), ("nowhere.json", "No such file")):
        with pytest.raises(UserError, match=f"{name} cannot be read: {sentence}"):
            read_prompts(str(tmp_path / name))


@pytest.mark.parametrize("name, content", (("a.txt", "x"), ("a.json", '["x"]'), ("a.csv", "caption\nx")))
def test_a_column_that_is_not_there_is_refused(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match="--prompt-column"):
        read_prompts(str(tmp_path / name), "title")


def test_sample_takes_a_column_of_files_alone():
    with pytest.raises(UserError, match="--prompt-column says where the prompts of --prompts FILE are"):
        sample.main(["--teacher", "nowhere", "--prompt", "x", "--prompt-column", "caption"])


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    captions = pyarrow.array(["a red\ncircle", None, "a square"]).dictionary_encode()
    table = pyarrow.table({"id": [1, 2, 3], "caption": captions, "other": ["x", "y", "z"]})
    path = str(tmp_path / "a.parquet")
    parquet.write_table(table, path)
    assert read_prompts(path) == ["a red circle", "a square"]
    assert read_prompts(path, "other") == ["x", "y", "z"]
    with pytest.raises(UserError, match="has in row 1 no text but 1"):
        read_prompts(path, "id")
    with pytest.raises(UserError, match="no columns 'title', but 'id', 'caption', 'other'"):
        read_prompts(path, "title")
    (tmp_path / "b.parquet").write_text("a red circle\n")
    with pytest.raises(UserError, match="b.parquet is no Parquet file"):
        read_prompts(str(tmp_path / "b.parquet"))


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="pip install pyarrow"):
        read_prompts(str(tmp_path / "a.parquet"))


def test_the_built_in_prompts_are_noted(capsys):
    assert len(read_training_prompts(prompts_module.PROMPTS)) == 64
    assert "only to try things with" in capsys.readouterr().err
