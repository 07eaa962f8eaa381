"""Prompts: read from text, tables, JSON and Parquet, and checked against a teacher's vocabulary."""

import codecs
import csv
import io
import json
import os
import textwrap

from support.errors import UserError, first_line, note, require
from support.files import ROOT

PROMPTS = os.path.join(ROOT, "prompts", "general.txt")  # 64 of our own, to try things with
COLUMNS = ("caption", "prompt", "text")  # where the prompts of a table are, in small letters or large
# the longer marks first: UTF-32's begins with UTF-16's
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_prompts(path, column=None, option="--prompt-column"):
    """The prompts of a file -> list of str, each of one line: its inner line breaks become spaces.

    The suffix says what it is: .csv, .tsv, .jsonl, .json (a list) or .parquet; any other is text with a
    prompt a line. column: the column or key that has the prompts, else the one that is in COLUMNS; `option`
    chooses it. Empty prompts are left out, with a note but for empty lines of text. UserError, which names
    the file, for what cannot be read or is no prompt."""
    suffix = os.path.splitext(path)[1].lower()
    read = READERS.get(suffix, read_lines)
    try:
        prompts, empty = clean(read(path, column))
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UserError(f"the prompt file {path} cannot be read: {reason}") from error
    except UnicodeDecodeError as error:
        advice = "save it as UTF-8, or unpack it"
        raise UserError(f"the prompt file {path} is not {error.encoding.upper()} text: {advice}") from error
    except ValueError as error:
        sentence = first_line(error).replace("--prompt-column", option)
        raise UserError(f"the prompt file {path} {sentence}") from error
    if not prompts:
        raise UserError(f"the prompt file {path} has no prompts; write one a line")
    if empty and read is not read_lines:
        note(f"{empty} empty prompts of {path} are left out")
    return prompts


def read_training_prompts(path, column=None):
    """read_prompts, with a note where it is the built-in list."""
    prompts = read_prompts(path, column)
    if os.path.realpath(path) == os.path.realpath(PROMPTS):
        note(
            f"the {len(prompts)} built-in prompts are only to try things with; a student needs as many "
            "as you can get: give --prompts FILE"
        )
    return prompts


def clean(values):
    """What a reader below yields -> (the prompts, the number of empty ones)."""
    prompts = []
    empty = 0
    for row, value in enumerate(values, 1):
        if value is not None and not isinstance(value, str):
            raise ValueError(f"has in row {row} no text but {textwrap.shorten(repr(value), 60)}")
        prompt = join_lines(value or "")
        if "\0" in prompt or not is_encodable(prompt):
            raise ValueError(f"is not text: row {row} has characters that no text has")
        if prompt:
            prompts.append(prompt)
        else:
            empty += 1
    return prompts, empty


def join_lines(text):
    """A text without its line breaks, outer spaces and byte order marks (of files that were joined)."""
    lines = [line.strip() for line in text.replace("\ufeff", "").splitlines()]
    return " ".join(filter(None, lines))


def is_encodable(text):
    """False for half of a surrogate pair, which JSON's escapes can write."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# ----------------------------------------------------------------------------------------------------------
# Readers: (path, column) -> the values of all rows, texts if the file is right. They raise ValueError with
# the end of a sentence that begins "the prompt file PATH".
# ----------------------------------------------------------------------------------------------------------


def open_text(path, newline=None):
    """The decoded file: UTF-8, or what its byte order mark says. newline: as open() has it."""
    with open(path, "rb") as file:
        data = file.read()
    encodings = [encoding for mark, encoding in MARKS.items() if data.startswith(mark)]
    encoding = encodings[0] if encodings else "utf-8-sig"
    return io.StringIO(data.decode(encoding), newline)


def read_lines(path, column):
    if column:
        raise ValueError(f"has a prompt a line and no columns: --prompt-column is for {', '.join(READERS)}")
    return open_text(path)


def read_csv(path, column):
    return read_table(path, column, ",")


def read_tsv(path, column):
    return read_table(path, column, "\t")


def read_table(path, column, delimiter):
    # newline: the csv module tells a row's end from a line break in a cell
    file = open_text(path, newline="")
    rows = csv.reader(file, delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        heads = [name.strip() for name in next(filter(None, rows), [])]
        place = heads.index(choose_column(heads, column))
        for row in filter(None, rows):
            if len(row) != len(heads):
                raise ValueError(
                    f"has {len(row)} cells in line {rows.line_num} and {len(heads)} in its first: put cells "
                    f"that have a {delimiter!r} into double quotes"
                )
            yield row[place]
    except csv.Error as error:
        raise ValueError(f"is no table at line {rows.line_num}: {error}") from error


def read_json_list(path, column):
    values = parse_json(open_text(path).read(), "; a value a line is .jsonl")
    if not isinstance(values, list):
        raise ValueError("is no list of texts or of dictionaries")
    return pick_values(values, column)


def read_json_values(path, column):
    return pick_values(parse_lines(open_text(path)), column)


def parse_lines(lines):
    """The JSON value of every line that is not empty."""
    for number, line in enumerate(lines, 1):
        line = line.strip("\ufeff \t\n")
        if line:
            yield parse_json(line, f", in line {number} of the file")


def parse_json(text, note):
    """The JSON value. note: the end of the sentence where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {first_line(error)}{note}") from error


def pick_values(values, column):
    """Texts, or of dictionaries the values of a key; the first dictionary chooses it."""
    chosen = None
    for value in values:
        if isinstance(value, dict):
            chosen = choose_column(list(value), chosen or column)
            yield value[chosen]
        elif column:
            raise ValueError(f"has a value without keys: --prompt-column {column} finds nothing in it")
        else:
            yield value


def read_parquet(path, column):
    parquet = require("pyarrow.parquet", "pyarrow", "reads .parquet files")
    pyarrow = require("pyarrow", "pyarrow", "reads .parquet files")
    with open(path, "rb") as file:
        try:
            table = parquet.ParquetFile(file)
            chosen = choose_column(table.schema_arrow.names, column)
            return table.read([chosen]).column(0).to_pylist()
        except pyarrow.ArrowException as error:
            raise ValueError(f"is no Parquet file: {first_line(error)}") from error


def choose_column(names, column):
    """The column of these names that has the prompts."""
    if column:
        found = [name for name in names if name == column]
        wanted = f"{len(found) or 'no'} columns {column!r}"
    else:
        found = [name for name in names if name.lower() in COLUMNS]
        wanted = f"{len(found) or 'no'} columns called {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}"
    if len(found) != 1:
        there = textwrap.shorten(", ".join(map(repr, names)), 300)
        raise ValueError(f"has {wanted}, but {there}: choose one with --prompt-column NAME")
    return found[0]


READERS = {
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".jsonl": read_json_values,
    ".ndjson": read_json_values,
    ".json": read_json_list,
    ".parquet": read_parquet,
}


# ----------------------------------------------------------------------------------------------------------
# Vocabularies
# ----------------------------------------------------------------------------------------------------------


def has_closed_vocabulary(tokenizer):
    """Whether it knows a few words only, as those of the tiny teachers."""
    return len(tokenizer) <= 1000


def check_vocabulary(tokenizer, prompts):
    """UserError for a prompt with a word that a closed vocabulary cannot express."""
    if not has_closed_vocabulary(tokenizer):
        return
    for prompt in dict.fromkeys(prompts):
        words = prompt.split()
        unknown = [word for word in words if tokenizer.unk_token_id in tokenizer(word).input_ids]
        if unknown:
            raise UserError(
                f"the prompt {prompt!r} has words that this teacher's tokenizer does not know: "
                f"{', '.join(unknown)}; give it other prompts"
            )
