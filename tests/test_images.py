"""Users' pictures: every kind gives its right pixels or one sentence; folders, and what lies there beside."""

import base64
import contextlib
import io
import json
import os
import re
import struct
import sys
import warnings
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from metrics import plots
from metrics.fid import Fid
from metrics.images import Images
from metrics.page import save_page
from metrics.rows import describe_samples, format_table, make_row, round_values
from metrics.systems import find_images, find_reference
from support.errors import UserError
from support.images import list_images, measure_image, open_image

GREY = np.array([[0, 64], [128, 255]], np.uint8)
DEEP = GREY.astype(np.uint16) * 257  # the same grey in 16 bits
COLOUR = np.array([[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (255, 255, 255)]], np.uint8)
ALPHA = np.array([[255, 0], [255, 51]], np.uint8)
ON_WHITE = np.array([[(255, 0, 0), (255, 255, 255)], [(0, 0, 255), (255, 255, 255)]], np.uint8)
GREY_ON_WHITE = np.array([[0, 255], [128, 255]], np.uint8)


def repeat(grey):
    """[H, W] -> [H, W, 3]."""
    return np.repeat(grey[..., None], 3, 2)


def write_png(path, bits, kind, rows, transparent=None):
    """A PNG of 2 pixels a row, for depths that Pillow does not write. kind: 0 grey, 2 RGB, 4 grey and alpha,
    6 RGBA; rows: bytes each."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    content = b"\x89PNG\r\n\x1a\n"
    content += chunk(b"IHDR", struct.pack(">IIBBBBB", 2, len(rows), bits, kind, 0, 0, 0))
    if transparent:
        content += chunk(b"tRNS", transparent)
    content += chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    path.write_bytes(content + chunk(b"IEND", b""))


def write_deep_png(path, kind, pixels):
    """16-bit values [H, 2, C] as PNG."""
    write_png(path, 16, kind, [row.astype(">u2").tobytes() for row in pixels])


def save(pixels, mode=None, **options):
    """A writer of a picture of these pixels, in another mode if one is given."""

    def write(path):
        image = Image.fromarray(pixels)
        (image.convert(mode) if mode else image).save(path, **options)

    return write


def save_filled(mode, value, **options):
    """A writer of a picture of one colour."""
    return lambda path: Image.new(mode, (2, 2), value).save(path, **options)


def save_palette(path):
    """Indices with a transparent one, whose colour is red."""
    image = Image.fromarray(np.array([[0, 1], [0, 1]], np.uint8)).convert("P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.save(path, transparency=0)


def fill(*colour):
    return np.full((2, 2, 3), colour, np.uint8)


PALETTE = np.array([[(255, 255, 255), (0, 0, 255)]] * 2, np.uint8)
DEEP_COLOUR = COLOUR.astype(np.uint16) * 257
DEEP_RGBA = np.dstack([DEEP_COLOUR, ALPHA.astype(np.uint16) * 257])
DEEP_LA = np.dstack([DEEP, ALPHA.astype(np.uint16) * 257])

# name, writer, the pixels that are wanted, their tolerance: that of a JPEG is of its compression
RIGHT = {
    "grey": ("a.png", save(GREY), repeat(GREY), 0),
    "RGB": ("a.bmp", save(COLOUR), COLOUR, 0),
    "one bit": (
        "a.png",
        save(np.array([[0, 255], [255, 0]], np.uint8), "1"),
        repeat(np.array([[0, 255], [255, 0]])),
        0,
    ),
    "palette": ("a.gif", save(COLOUR, "P"), COLOUR, 0),
    "transparent palette": ("a.png", save_palette, PALETTE, 0),
    "transparent GIF": ("a.gif", save_palette, PALETTE, 0),
    "RGBA": ("a.png", save(np.dstack([COLOUR, ALPHA])), ON_WHITE, 0),
    "RGBA, WebP": ("a.webp", save(np.dstack([COLOUR, ALPHA]), lossless=True, exact=True), ON_WHITE, 0),
    "RGBA, TIFF": ("a.tif", save(np.dstack([COLOUR, ALPHA])), ON_WHITE, 0),
    "half transparent black": ("a.png", save_filled("RGBA", (0, 0, 0, 51)), fill(204, 204, 204), 1),
    "grey with alpha": ("a.png", save(np.dstack([GREY, ALPHA])), repeat(GREY_ON_WHITE), 0),
    "a transparent colour": ("a.png", save(GREY, transparency=64), repeat(GREY_ON_WHITE), 0),
    "16 bits, PNG": ("a.png", save(DEEP), repeat(GREY), 0),
    "16 bits, TIFF": ("a.tiff", save(DEEP), repeat(GREY), 0),
    "16 bits, TIFF, big end first": ("a.tiff", save(DEEP.astype(">u2")), repeat(GREY), 0),
    "16 bits, PGM": ("a.pgm", save(DEEP.astype(np.int32)), repeat(GREY), 0),
    "16 bits, JPEG 2000": ("a.jp2", save(DEEP), repeat(GREY), 0),
    "16 bits, RGB": ("a.png", lambda path: write_deep_png(path, 2, DEEP_COLOUR), COLOUR, 0),
    "16 bits, RGBA": ("a.png", lambda path: write_deep_png(path, 6, DEEP_RGBA), ON_WHITE, 0),
    "16 bits, alpha": ("a.png", lambda path: write_deep_png(path, 4, DEEP_LA), repeat(GREY_ON_WHITE), 0),
    "4 bits": ("a.png", lambda path: write_png(path, 4, 0, [b"\x0f"]), repeat(np.array([[0, 255]])), 0),
    "CMYK, JPEG": ("a.jpg", save_filled("CMYK", (0, 255, 255, 0), quality=95), fill(255, 0, 0), 2),
    "CMYK, TIFF": ("a.tif", save_filled("CMYK", (255, 0, 255, 0)), fill(0, 255, 0), 0),
    "YCbCr": ("a.tif", save_filled("YCbCr", (76, 85, 255)), fill(254, 0, 0), 0),
    "LAB": ("a.tif", save_filled("LAB", (136, 208, 195)), fill(250, 3, 11), 3),
    "one pixel": ("a.png", save(COLOUR[:1, :1]), COLOUR[:1, :1], 0),
    "large suffix": ("A.PNG", save(COLOUR), COLOUR, 0),
    "another format's suffix": ("a.jpg", save(COLOUR, format="png"), COLOUR, 0),
}


@pytest.mark.parametrize("name, write, wanted, tolerance", RIGHT.values(), ids=RIGHT)
def test_every_kind_of_picture(tmp_path, name, write, wanted, tolerance):
    write(tmp_path / name)
    image = open_image(str(tmp_path / name))
    assert image.mode == "RGB"
    np.testing.assert_allclose(np.array(image, int), wanted, atol=tolerance)
    assert measure_image(str(tmp_path / name)) == image.size
    assert list_images(tmp_path) == ([name], [])


@pytest.mark.parametrize("suffix", ("jpg", "png", "webp", "tif"))
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(tmp_path, suffix, orientation):
    """Stored as the tag says, a picture with a red left half has it on the left again."""
    upright = Image.new("RGB", (32, 16), (0, 0, 255))
    upright.paste((255, 0, 0), (0, 0, 16, 16))
    upright.paste((255, 255, 255), (0, 0, 8, 8))
    turn = Image.Transpose
    undo = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_90,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[274] = orientation
    stored.save(tmp_path / f"a.{suffix}", exif=exif)
    found = open_image(str(tmp_path / f"a.{suffix}"))
    assert found.size == (32, 16)
    for place in ((3, 3), (12, 12), (28, 8)):
        assert np.abs(np.subtract(found.getpixel(place), upright.getpixel(place))).max() < 40


def save_frames(path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "lime")]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def save_telephone(path):
    """A JPEG with a second picture, as telephones write them."""
    first, second = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (8, 8), "blue")
    first.save(path, format="MPO", save_all=True, append_images=[second])


def test_the_first_picture_of_a_telephones_jpeg(tmp_path):
    save_telephone(tmp_path / "a.jpg")
    image = open_image(str(tmp_path / "a.jpg"))
    assert image.size == (16, 16)
    assert np.subtract(image.getpixel((8, 8)), (255, 0, 0)).max() < 3


def save_half(suffix):
    def write(path):
        noise = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path, format=suffix)
        os.truncate(path, path.stat().st_size // 2)

    return write


def save_white_is_zero(path):
    Image.fromarray(DEEP).save(path, tiffinfo={262: 0})


WRONG = {
    "animated GIF": ("a.gif", save_frames, "it has 3 frames or pages"),
    "animated WebP": ("a.webp", save_frames, "it has 3 frames or pages"),
    "animated PNG": ("a.png", save_frames, "it has 3 frames or pages"),
    "pages": ("a.tiff", save_frames, "it has 3 frames or pages"),
    "floats": ("a.tif", save(GREY.astype(np.float32)), "its mode F has no known range"),
    "32 bits": ("a.tif", save(GREY.astype(np.int32)), "its mode I has no known range"),
    "16 bits, white is 0": ("a.tif", save_white_is_zero, "its mode I;16 has no known range"),
    "transparent in 16 bits": (
        "a.png",
        lambda path: write_png(path, 16, 2, [bytes(12)], bytes(6)),
        "a transparent colour in RGB;16B",
    ),
    "transparent in 4 bits": (
        "a.png",
        lambda path: write_png(path, 4, 0, [b"\x0f"], b"\0\x0f"),
        "a transparent colour in L;4",
    ),
    "text": ("a.png", lambda path: path.write_text("a picture"), "cannot identify image file"),
    "nothing": ("a.jpg", lambda path: path.write_bytes(b""), "cannot identify image file"),
    "half a JPEG": ("a.jpg", save_half("jpeg"), "truncated"),
    "half a PNG": ("a.png", save_half("png"), "truncated"),
    "half a WebP": ("a.webp", save_half("webp"), ""),
    "half a TIFF": ("a.tif", save_half("tiff"), ""),
    "half a GIF": ("a.gif", save_half("gif"), "truncated"),
    "half a BMP": ("a.bmp", save_half("bmp"), "truncated"),
    "a bomb": ("a.png", lambda path: write_bomb(path, 20_000, 20_000), "exceeds limit"),
}


def write_bomb(path, width, height):
    """A PNG that says so of its size, and has no pixels."""
    write_png(path, 8, 0, [])
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)


@pytest.mark.parametrize("name, write, reason", WRONG.values(), ids=WRONG)
def test_every_wrong_picture_is_refused(tmp_path, name, write, reason):
    path = tmp_path / name
    write(path)
    with pytest.raises(UserError) as error:
        open_image(str(path))
    message = str(error.value)
    assert message.startswith(f"the image {path} cannot be read: ")
    assert reason in message
    assert "\n" not in message


def test_a_large_picture_is_no_warning(tmp_path):
    """From 89 million pixels Pillow warns."""
    write_bomb(tmp_path / "a.png", 10_000, 10_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert measure_image(str(tmp_path / "a.png")) == (10_000, 10_000)


# Folders --------------------------------------------------------------------------------------------------

SUFFIXES = ("png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "gif", "jp2", "ppm", "avif", "tga", "ico")


@pytest.fixture
def mixed(tmp_path):
    """A folder with a picture of each of SUFFIXES, and seven other files."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, suffix in enumerate(SUFFIXES):
        pixels = rng.integers(256, size=(32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.{suffix}")
    for name in ("grid.png", ".hidden.png", "index.json", "notes.txt", "film.mp4", "film.mpg"):
        (folder / name).write_text("{}")
    (folder / "inner.png").mkdir()
    return folder


def test_every_suffix_is_taken_and_the_rest_is_named(mixed, tmp_path, capsys):
    images = find_reference(str(tmp_path), str(mixed))
    assert images.count() == len(SUFFIXES)
    assert [os.path.basename(row[0]) for row in images.files] == [f"{i}.{s}" for i, s in enumerate(SUFFIXES)]
    images.measure()
    assert images.sizes == {(32, 32)}
    names = ".hidden.png, film.mp4, film.mpg, inner.png, notes.txt"
    note = f"note: 5 files of {mixed} are no images and are passed over: {names}"
    assert f"{note}\n" == capsys.readouterr().err


def test_a_folder_without_pictures_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("")
    for prompts in (None, ["x"]):
        with pytest.raises(UserError, match=f"the folder {tmp_path} has no images"):
            find_images("x", str(tmp_path / "out"), str(tmp_path), prompts)


def test_a_wrong_picture_is_refused_before_anything_is_scored(mixed, tmp_path):
    save_frames(mixed / "99.gif")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n")
    words = ["--images", f"x={mixed}", "--prompts", str(prompts), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="99.gif cannot be read: it has 3 frames"):
        evaluate.main([*words, "--metrics", "oracle"])
    assert not (tmp_path / "out").exists()


def test_the_oracle_refuses_other_sizes_before_anything_is_drawn(teacher_folder, mixed, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n")
    common = ["--prompts", str(prompts), "--metrics", "oracle", "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="images of 32x32 pixels; teacher has one of 64x64"):
        evaluate.main(["--teacher", teacher_folder, "--resolution", "64", *common])
    Image.new("RGB", (32, 33)).save(mixed / "99.png")
    with pytest.raises(UserError, match="images of 32x32 pixels; x has one of 32x33"):
        evaluate.main(["--images", f"x={mixed}", *common])
    assert not (tmp_path / "out").exists()


# How many -------------------------------------------------------------------------------------------------


def make_fid_row(tmp_path, count, reference_count):
    pytest.importorskip("torchmetrics")
    folder = tmp_path / "few"
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (2, 2)).save(folder / f"{i}.png")
    fid = Fid.__new__(Fid)
    rng = np.random.default_rng(0)
    own, reference = ([{"features": rng.normal(size=(n, 3))}] for n in (count, reference_count))
    images = find_images("few", str(tmp_path), str(folder), ["a circle"])
    row, _, _ = make_row(images, {"fid": fid}, {"fid": own}, {"fid": reference})
    return fid, round_values(row)


def test_fid_says_how_many_images_it_is_of(tmp_path):
    fid, row = make_fid_row(tmp_path, 5, 3000)
    assert row["fid_images"] == [5, 3000]
    assert fid.note([row]).startswith("; few of 5 and 3,000 images; fewer than 2,048 images")
    assert "fid_images" not in format_table([row])
    assert fid.note([{"system": "x", "fid_images": [2048, 3000]}]) == "; x of 2,048 and 3,000 images"


def test_a_score_that_is_no_number_is_refused(greys):
    scorer = SimpleNamespace(distances=(), result=lambda own, reference: {"clip": own[0]["clip"].mean()})
    scores = {"clip": [{"clip": np.array([1.0, 2.0, np.nan, 4.0])}]}
    third = re.escape(greys[0].files[1][0])
    with pytest.raises(UserError, match=f"clip gave no number for 1 of 4 images of .*, {third} the first"):
        make_row(greys[0], {"clip": scorer}, scores, scores)
    scores["clip"][0]["clip"][2] = 3
    row, _, values = make_row(greys[0], {"clip": scorer}, scores, scores)
    assert row["clip"] == 2.5
    assert values["clip"].tolist() == [1.5, 3.5]


def test_the_reference_is_not_compared_with_its_distance_to_itself(greys):
    """The oracle's tv, of the reference, is to uniform."""
    scorer = SimpleNamespace(distances=("tv",), result=lambda own, reference: {"tv": np.array([0.25, 0.75])})
    own, reference = ({"oracle": [{"accuracy": np.ones(4)}]} for _ in range(2))
    row, _, values = make_row(greys[0], {"oracle": scorer}, own, reference)
    assert values["tv"].tolist() == [0.25, 0.75]
    row, _, values = make_row(greys[0], {"oracle": scorer}, own, own)
    assert row["tv"] == 0.5
    assert values == {}


def test_fid_of_one_image_is_refused(tmp_path):
    (tmp_path / "one").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "one/0.png")
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    words = ["--images", f"x={tmp_path}/one", "--prompts", str(tmp_path / "prompts.txt")]
    with pytest.raises(UserError, match="--metrics fid wants more than one image; x has one"):
        evaluate.main([*words, "--metrics", "fid", "--reference", f"{tmp_path}/one"])


def test_how_many_samples_are_said():
    rows = [{"system": "a", "prompts": 4, "samples": 8}, {"system": "b", "prompts": 4, "samples": 8}]
    assert describe_samples(rows) == "4 prompts, 2 samples each"
    rows[1]["samples"] = 4
    assert describe_samples(rows) == "4 prompts, samples each: 2 of a, 1 of b"


# Where results go -----------------------------------------------------------------------------------------

NAMES = ("report.json", "table.md", "grid.png", "bars.png", "differences.png", "side-by-side.html")
NAMES += ("best-and-worst-x.png", ".reference-x", "..", ".", "a/b", "", "x" * 61)


@pytest.mark.parametrize("name", NAMES)
def test_a_system_is_not_called_as_a_file_is(tmp_path, name):
    with pytest.raises(UserError, match="cannot be a system's name: write NAME=FOLDER"):
        evaluate.main(["--images", f"{name}={tmp_path}", "--prompts", "nowhere.txt"])


OUTPUTS = {
    "out among the images": (["--out", "images"], "the results in images would be among the images there"),
    "grid among the images": (
        ["--grid", "images/grid.png"],
        "the results in images would be among the images",
    ),
    "a name among the images": (
        ["--out", ".", "--images", "images=images"],
        "would be among the images there",
    ),
    "a folder of references": (
        ["--out", "folder", "--reference", "folder", "--metrics", "fid"],
        "the results in folder would be among the images",
    ),
    "one system twice": (["--out", "new", "--side-by-side", "x", "x"], "not 'x' with itself"),
    "the teacher's steps": (["--out", "new", "--steps", "4"], "add --teacher, or leave them out"),
    "the teacher's guidance": (["--out", "new", "--guidance", "0"], "add --teacher, or leave them out"),
    "its negative prompt": (["--out", "new", "--negative-prompt", "x"], "add --teacher, or leave them out"),
    "json, a folder": (["--json", "folder"], "'folder' cannot be written: give the name of a file"),
    "json, a new folder": (["--json", "new/"], "'new/' cannot be written: give the name of a file"),
    "json, below a file": (["--json", "file/a.json"], "the folder file cannot be made"),
    "json, a device": (["--json", os.devnull], "cannot be written: give the name of a file"),
    "json, a long name": (["--json", "a" * 250], "is too long"),
    "json, the prompts": (["--json", "prompts.txt"], "two files would be prompts.txt"),
    "json, the table": (["--json", "out/table.md", "--out", "out"], "two files would be out/table.md"),
    "json, the grid": (["--json", "a.png", "--grid", "./a.png"], "two files would be ./a.png"),
    "grid, a folder": (["--grid", "folder.png"], "'folder.png' cannot be written"),
    "grid, below a file": (["--grid", "file/deep/a.png"], "the folder file/deep cannot be made"),
    "grid, no PNG": (["--grid", "a.jpg"], "--grid a.jpg: it is a PNG file"),
    "out, a file": (["--out", "file"], "the folder file cannot be made"),
    "out, below a file": (["--out", "file/out"], "the folder file/out cannot be made"),
    "out, the report a folder": (["--out", "taken"], "'taken/report.json' cannot be written"),
    "out, a system a file": (["--out", "system"], "the folder system/x cannot be made"),
    "out, another command's samples": (["--out", "drawn"], "drawn has what another command made"),
    "out, not permitted": (["--out", "locked/out"], "the folder locked/out cannot be written to"),
    "json, not permitted": (["--json", "locked/a.json"], "the folder locked cannot be written to"),
}


@pytest.mark.parametrize("words, sentence", OUTPUTS.values(), ids=OUTPUTS)
def test_wrong_outputs_are_refused_before_the_work(tmp_path, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    for folder in ("folder", "folder.png", "taken/report.json", "system", "images", "locked", "drawn"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("file", "system/x", "drawn/index.json"):
        (tmp_path / file).write_text("")
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    Image.new("RGB", (32, 32)).save(tmp_path / "images/0.png")
    permit = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path) and permit(path, mode))
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: pytest.fail("the work began"))
    with pytest.raises(UserError) as error:
        evaluate.main(["--images", "x=images", "--prompts", "prompts.txt", *words])
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


def test_outputs_where_they_are_without_being_told(tmp_path, monkeypatch):
    """--json and --grid may be the files that --out would write, and may be there from the last time."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/report.json").write_text("{}")
    reached = []
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: reached.append(True))
    words = ["--out", "out", "--json", "out/report.json", "--grid", "out/grid.png"]
    evaluate.main(["--images", "x=images", "--prompts", "prompts.txt", *words])
    assert reached == [True]


@pytest.mark.parametrize("student", ("runs/adm", "runs/adm/best", "runs/adm/step_000001"))
@pytest.mark.parametrize("out", ("runs", "runs/adm"))
def test_results_do_not_go_into_a_students_run(tmp_path, monkeypatch, student, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/adm/step_000001").mkdir(parents=True)
    (tmp_path / "runs/adm/best").write_text("step_000001\n")
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: pytest.fail("the work began"))
    with pytest.raises(UserError, match="would be in the student's run"):
        evaluate.main(["--student", f"adm={student}", "--prompts", "prompts.txt", "--out", out])
    assert not (tmp_path / "runs/adm/adm").exists()


PACKAGES = {"clip": "open_clip", "hpsv2": "open_clip", "lpips": "lpips", "fid": "torchmetrics"}


@pytest.mark.parametrize("metric, package", PACKAGES.items())
def test_a_missing_package_is_named_before_anything_is_drawn(tmp_path, monkeypatch, metric, package):
    monkeypatch.setitem(sys.modules, package, None)
    for i in range(2):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{i}.png")
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    weights = tmp_path / "weights/xswu/HPSv2"
    weights.mkdir(parents=True)
    (weights / "HPS_v2_compressed.pt").write_bytes(b"")
    words = ["--images", f"x={tmp_path}", "--images", f"y={tmp_path}", "--metrics", metric]
    words += ["--prompts", str(tmp_path / "prompts.txt")]
    with pytest.raises(UserError, match=f"pip install {package.replace('open_clip', 'open_clip_torch')}"):
        evaluate.main([*words, "--weights-dir", str(tmp_path / "weights"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


# What people look at --------------------------------------------------------------------------------------


@pytest.fixture
def greys(tmp_path):
    """Two systems with two samples of two prompts, videos of three frames: each system, sample, prompt and
    frame has a grey of its own, 100 s + 50 k + 4 p + 10 (frame + 1)."""
    systems = []
    for s in (0, 1):
        files = []
        for p in (0, 1):
            files.append([])
            for k in (0, 1):
                values = np.repeat(np.array([10, 20, 30], np.uint8) + 4 * p + 50 * k + 100 * s, 16)
                pixels = np.broadcast_to(values[:, None, None], (48, 16, 3))
                files[p].append(str(tmp_path / f"{s}-{p}-{k}.png"))
                Image.fromarray(np.ascontiguousarray(pixels)).save(files[p][k])
        images = Images(f"s{s}", str(tmp_path / f"s{s}"), files, {})
        images.frames, images.fps = 3, 8
        systems.append(images)
    return systems


def read_grey(image):
    return round(float(np.asarray(image.convert("RGB")).mean()))


def test_frames_are_those_of_their_sample(greys):
    assert [read_grey(frame) for frame in greys[1].read_frames(0, 1)] == [160, 170, 180]


def test_every_sample_is_a_video_of_its_own(greys, monkeypatch):
    """As VBench reads them."""
    means = []

    def save_video(pixels, path, fps):
        means.append(round(float(pixels.mean() + 1) * 127.5))

    monkeypatch.setattr("metrics.images.save_video", save_video)
    greys[0].write_videos()
    assert means == [20, 70, 24, 74]


def test_a_page_shows_both_systems(greys, tmp_path):
    save_page(*greys, {"s0": {}, "s1": {}}, ["a", "b"], str(tmp_path / "page.html"))
    text = (tmp_path / "page.html").read_text()
    pages = json.loads(re.search(r"const pages = (\[.*?\]), names", text)[1])
    shown = []
    for page in pages:
        for side in ("a", "b"):
            picture = base64.b64decode(page[side].split(",")[1])
            shown.append(read_grey(Image.open(io.BytesIO(picture))))
    assert shown == pytest.approx([10, 110, 14, 114], abs=1)


def test_a_grid_has_a_row_for_every_system_and_a_column_for_every_prompt(greys, monkeypatch):
    grids = []
    for images in greys:
        images.frames = 1
    monkeypatch.setattr(plots, "save_labelled_grid", lambda grid, *rest: grids.append(grid))
    plots.save_examples({images.name: images for images in greys}, ["a", "b"], "x")
    means = (grids[0].mean((2, 3, 4)) + 1) * 127.5
    assert means.round().tolist() == [[20, 24], [120, 124]]


def test_a_grid_of_videos_has_a_row_for_every_system_and_prompt(greys, monkeypatch):
    grids = []
    monkeypatch.setattr(plots, "save_labelled_grid", lambda *given: grids.append(given))
    plots.save_examples({images.name: images for images in greys}, ["a", "b"], "x")
    grid, rows, columns, _ = grids[0]
    means = (grid.mean((2, 3, 4)) + 1) * 127.5
    assert means.round().tolist() == [[10, 20, 30], [14, 24, 34], [110, 120, 130], [114, 124, 134]]
    assert rows == ["s0: a", "s0: b", "s1: a", "s1: b"]
    assert columns == ["frame 0", "frame 1", "frame 2"]


def test_differences_are_a_systems_minus_the_references(monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    plots.save_differences({"r": {"clip": np.zeros(3)}, "s": {"clip": np.ones(3)}}, "r", "x")
    [axes] = figures[0].axes
    assert "100% of the prompts" in axes.get_xlabel()
    assert axes.get_legend().get_texts()[0].get_text() == "mean 1 (1 to 1)"  # with its interval


def test_the_best_prompts_come_before_the_worst(greys, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    greys[0].files = greys[0].files + greys[1].files  # of greys 10, 14, 110, 114
    plots.save_sheet(greys[0], "clip", np.arange(4.0), list("abcd"), "x")
    assert "mean of 2 samples, of which the first is shown" in figures[0].get_suptitle()
    titles = [axes.get_title().split("\n")[0] for axes in figures[0].axes]
    assert titles == ["clip 3.000", "clip 2.000", "clip 0.000", "clip 1.000"]
    assert [axes.images[0].get_array().mean() for axes in figures[0].axes] == [114, 110, 10, 14]


def test_a_picture_that_cannot_be_written_ends_the_drawing(tmp_path):
    """Threads write them."""
    drawn = torch.zeros(1, 1, 3, 8, 8)
    teacher = SimpleNamespace(frames=None, fps=None, resolution=(8, 8))
    system = SimpleNamespace(teacher=teacher, on_device=contextlib.nullcontext, images=lambda *args: drawn)
    files = [[str(tmp_path / "0.png")], [str(tmp_path / "no folder" / "1.png")]]
    images = Images("student", str(tmp_path), files, {}, system)
    with pytest.raises(UserError, match=r"1\.png cannot be written"):
        images.draw(["a circle", "a square"], [0], 1)
    assert (tmp_path / "0.png").exists()


def test_a_picture_is_drawn_from_the_seed_of_its_name(tmp_path):
    seeds = []

    def draw(prompts, numbers, given):
        seeds.append(given)
        return torch.zeros(len(prompts), 1, 3, 8, 8)

    teacher = SimpleNamespace(frames=None, fps=None, resolution=(8, 8))
    system = SimpleNamespace(teacher=teacher, on_device=contextlib.nullcontext, images=draw)
    files = [[str(tmp_path / f"{p}-{seed}.png") for seed in (5, 6)] for p in range(2)]
    images = Images("x", str(tmp_path), files, {}, system)
    images.draw(["a", "b"], range(5, 7), 2)
    assert seeds == [[5], [6]]
    seeds.clear()
    os.remove(files[1][0])
    images.draw(["a", "b"], range(5, 7), 2)
    assert seeds == [[5]]  # half of a batch is there
