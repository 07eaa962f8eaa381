"""Image grids, videos and plots, read back from their files."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from support import media
from support.errors import UserError


def read_image(path):
    return np.asarray(Image.open(path)).astype(int)


def plain(red, green, blue, height=4, width=4):
    """An image [3, height, width] of one colour, each share in [-1, 1]."""
    return torch.tensor([red, green, blue]).view(3, 1, 1).expand(3, height, width)


# Grids ----------------------------------------------------------------------------------------------------


def test_a_grid_fills_row_by_row(tmp_path):
    colours = [(-1.0, -1.0, -1.0), (1.0, -1.0, -1.0), (-1.0, 1.0, -1.0), (-1.0, -1.0, 1.0), (0.0, 0.0, 0.0)]
    images = torch.stack([plain(*colour) for colour in colours])
    media.save_grid(images, str(tmp_path / "grid.png"), columns=3, padding=2)
    grid = read_image(tmp_path / "grid.png")
    assert grid.shape == (2 * 6 + 2, 3 * 6 + 2, 3)
    assert grid[4, 4].tolist() == [0, 0, 0]
    assert grid[4, 10].tolist() == [255, 0, 0]
    assert grid[4, 16].tolist() == [0, 255, 0]
    assert grid[10, 4].tolist() == [0, 0, 255]
    assert grid[10, 10].tolist() == [128, 128, 128]


def test_an_image_without_padding_is_kept_to_the_pixel(tmp_path):
    values = torch.randint(256, (3, 5, 7))
    media.save_grid(values[None] / 127.5 - 1, str(tmp_path / "one.png"), padding=0)
    assert np.array_equal(read_image(tmp_path / "one.png"), values.permute(1, 2, 0).numpy())


def test_a_video_is_a_row_of_evenly_spaced_frames(tmp_path):
    brightness = torch.arange(9) / 127.5 - 1  # frame i has the value i
    videos = brightness.view(1, 1, 9, 1, 1).expand(2, 3, 9, 4, 4)
    media.save_grid(videos, str(tmp_path / "grid.png"), columns=3, padding=0)
    grid = read_image(tmp_path / "grid.png")
    assert grid.shape == (8, 12, 3)
    assert grid[0, ::4, 0].tolist() == [0, 4, 8]
    assert grid[4, ::4, 0].tolist() == [0, 4, 8]


@pytest.mark.parametrize(
    "size, wanted",
    [
        ((32, 32), (96, 96)),
        ((40, 60), (120, 180)),
        ((96, 96), (96, 96)),
        ((160, 160), (160, 160)),
        ((1024, 1024), (192, 192)),
        ((480, 720), (128, 192)),
    ],
)
def test_sizes_in_a_labelled_grid(size, wanted):
    assert media.choose_size(*size) == wanted


def test_a_labelled_grid_has_every_image_enlarged_and_labels_in_the_margins(tmp_path):
    # six colours that no label has, with one black pixel in four
    colours = torch.tensor(
        [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [255, 0, 255], [0, 255, 255]]
    )
    images = (colours / 127.5 - 1).view(2, 3, 3, 1, 1).repeat(1, 1, 1, 32, 32)
    images[..., ::2, ::2] = -1.0
    path = str(tmp_path / "grid.png")
    prompts = ["a circle", "a long prompt " * 20, ""]
    media.save_labelled_grid(images, ["teacher, 25 steps", "student"], prompts, path)
    grid = read_image(path)
    corners = []
    for colour in colours.numpy():
        y, x = np.nonzero((grid == colour).all(-1))
        assert len(y) == 32 * 32 * 3 // 4 * 9  # each pixel is a square of 3 x 3, nothing is blended
        assert (y.max() - y.min(), x.max() - x.min()) == (95, 95)
        corners.append((y.min(), x.min()))
    assert corners == sorted(corners)  # rows from above, columns from the left
    top, left = corners[0]
    assert grid[:top, left:].min() < 50  # the prompts
    assert grid[top:, :left].min() < 50  # the systems
    assert grid[:top, :left].min() == 255
    assert top < 150  # the long prompt was shortened


def test_a_large_image_is_averaged_in_a_labelled_grid(tmp_path):
    images = torch.ones(1, 1, 3, 384, 384)
    images[..., ::2, :] = -1.0
    media.save_labelled_grid(images, ["row"], ["column"], str(tmp_path / "grid.png"))
    grid = read_image(tmp_path / "grid.png")
    grey = (abs(grid - 127.5) < 20).all(-1)
    assert 190 * 190 < grey.sum() < 194 * 194


def test_long_prompts_are_shortened_at_a_word():
    assert media.shorten("a red circle") == "a red circle"
    short = media.shorten("word " * 40)
    assert 50 < len(short) <= 60
    assert short.endswith("word...")


# Videos ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(32, 48), (34, 50), (33, 47)])
def test_a_video_comes_back(tmp_path, height, width):
    imageio = pytest.importorskip("imageio")
    pytest.importorskip("imageio_ffmpeg")
    pixels = torch.stack([plain(x, 0.5, -0.25, height, width) for x in torch.linspace(-0.8, 0.8, 9)], dim=1)
    path = str(tmp_path / "video.mp4")
    media.save_video(pixels, path, fps=6)
    with imageio.get_reader(path) as reader:
        assert reader.get_meta_data()["fps"] == 6
    frames = np.stack(imageio.mimread(path)).astype(int)
    assert frames.shape == (9, height + height % 2, width + width % 2, 3)
    wanted = (pixels[:, :, 0, 0] / 2 + 0.5).T * 255
    assert abs(frames - wanted.numpy()[:, None, None]).max() < 6  # the edge that was added, too
    assert [file.name for file in tmp_path.iterdir()] == ["video.mp4"]


@pytest.mark.parametrize("module, package", [("imageio", "imageio"), ("imageio_ffmpeg", "imageio-ffmpeg")])
def test_a_missing_package_is_one_sentence(monkeypatch, tmp_path, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"pip install {package}$"):
        media.save_video(torch.zeros(3, 9, 32, 32), str(tmp_path / "x.mp4"), 8)


@pytest.mark.parametrize("has_path", (True, False))
def test_a_missing_ffmpeg_is_one_sentence(monkeypatch, has_path):
    """IMAGEIO_FFMPEG_EXE that names nothing, or a package without its program."""

    def find():
        if has_path:
            return "/nowhere/ffmpeg"
        raise RuntimeError("No ffmpeg exe could be found")

    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", find)
    with pytest.raises(UserError, match="imageio-ffmpeg cannot write mp4 files: (there is n|N)o "):
        media.require_video_writer()


# Curves ---------------------------------------------------------------------------------------------------


def titles_of(figure):
    return [axes.get_title().split(":")[0] for axes in figure.axes]


def draw(lines):
    return media.draw_curves(media.collect_curves(lines), {})


def test_the_running_mean_by_hand():
    values = np.array([0.0, 1, 2, 3, 4, 5, 36])
    # over five, cut at the ends: (0+1+2)/3, (0+1+2+3)/4, ..., (4+5+36)/3
    assert media.smooth(values) == pytest.approx([1, 1.5, 2, 3, 10, 12, 15])
    long = media.smooth(np.eye(1, 400, 200)[0])  # a single 1
    assert (long > 0).sum() == 21 and long.max() == pytest.approx(1 / 21)


def test_the_running_mean_leaves_out_what_is_not_finite():
    values = np.array([1.0, 1, np.nan, 1, 1, np.inf, 1, 1])
    assert media.smooth(values) == pytest.approx(np.ones(8))
    assert np.isnan(media.smooth(np.full(8, np.nan))).all()


def test_a_quantity_may_be_missing_in_some_lines():
    lines = [{"step": 10, "mse": 1.0}, {"step": 20, "mse": 0.5, "loss_D": 2.0}, {"step": 30, "loss_D": 1.5}]
    curves = media.collect_curves(lines)
    assert sorted(curves) == ["loss_D", "mse"]
    assert curves["mse"].tolist() == [[10, 20], [1.0, 0.5]]
    assert curves["loss_D"].tolist() == [[20, 30], [2.0, 1.5]]


def test_lines_that_are_no_metrics_are_passed_over():
    lines = [
        3,
        None,
        {"mse": 1.0},
        {"step": "x", "mse": 1.0},
        {"step": 1, "mse": "bad", "note": None, "loss_D": 2},
    ]
    assert list(media.collect_curves(lines)) == ["loss_D"]


def test_panels_are_in_order_and_unknown_ones_last():
    line = {
        "step": 1,
        "mine": 1,
        "peak_mb": 1,
        "norm_f": 1,
        "D_gap": 1,
        "loss_f": 1,
        "loss_D": 2,
        "loss_G": 0,
    }
    figure = draw([line])
    assert titles_of(figure) == ["loss_G", "loss_D", "loss_f", "D_gap", "norm_f", "peak_mb", "mine"]
    assert {axes.get_xlabel() for axes in figure.axes} == {"iteration"}


def test_every_quantity_that_the_stages_log_has_a_title():
    logged = "loss_f norm_f dmd_loss cosine across loss_G norm_G loss_D D_abs D_gap norm_D seconds peak_mb"
    logged += " std mse D_real D_fake norm_heads"
    for name in logged.split():
        assert media.choose_title(name) != name


def test_the_held_out_scores_have_rows_of_their_own():
    names = ["held_out_seconds", "held_out_clip", "held_out_tv_shape", "mine", "held_out_valid"]
    assert media.sort_names(names) == {
        "Cost": ["held_out_seconds"],
        "Held out": ["held_out_clip", "held_out_valid"],
        "Held-out modes": ["held_out_tv_shape"],
        "Other": ["mine"],
    }


def test_many_points_have_a_running_mean_over_them():
    lines = [{"step": i, "loss_f": float(i % 2)} for i in range(21)]
    thin, bold = draw(lines).axes[0].lines
    assert thin.get_ydata().tolist() == [i % 2 for i in range(21)]
    assert bold.get_ydata() == pytest.approx(media.smooth(thin.get_ydata()))
    assert thin.get_alpha() < 0.6 and thin.get_linewidth() < bold.get_linewidth()
    assert len(draw(lines[:20]).axes[0].lines) == 1


@pytest.mark.parametrize(
    "values, scale",
    [([1.0, 99.0], "linear"), ([1.0, 101.0], "log"), ([0.0, 1000.0], "linear"), ([-1.0, 1000.0], "linear")],
)
def test_the_scale_of_an_axis(values, scale):
    lines = [{"step": i, "norm_G": value} for i, value in enumerate([*values, float("nan")])]
    assert draw(lines).axes[0].get_yscale() == scale


def test_curves_of_a_run_that_was_interrupted(tmp_path):
    lines = [json.dumps({"step": i, "mse": float("nan") if i == 3 else 1.0}) for i in range(30)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 30, "ms')
    media.save_curves(str(tmp_path / "metrics.jsonl"), str(tmp_path / "curves.png"))
    assert read_image(tmp_path / "curves.png").std() > 1


def test_own_titles_come_first(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(media, "save_figure", lambda figure, path: figures.append(figure))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "mse": 1.0, "mine": 2}\n')
    media.save_curves(str(tmp_path / "metrics.jsonl"), "curves.png", {"mine": "what I measure"})
    assert titles_of(figures[0]) == ["mse", "what I measure"]


@pytest.mark.parametrize("content", [None, b"", b"\n", b"{}", b"null\n", b"not json", b"\xff\xfe\x00"])
def test_nothing_to_draw_is_no_error(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    media.save_curves(str(tmp_path / "metrics.jsonl"), str(tmp_path / "curves.png"))
    assert not (tmp_path / "curves.png").exists()
