"""Everything that becomes an image, a video or a plot."""

import math
import os
import shutil
import tempfile
import textwrap

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from support.errors import UserError, first_line, require
from support.files import sample_json_lines, write_atomically

# ----------------------------------------------------------------------------------------------------------
# Images and videos
# ----------------------------------------------------------------------------------------------------------


def save_grid(images, path, columns=8, padding=2):
    """Images [n, 3, H, W] in [-1, 1] -> one PNG file, `columns` images a row.

    Videos [n, 3, F, H, W] are a row each, of evenly spaced frames, at most `columns`."""
    from torchvision.utils import save_image

    if images.ndim == 5:
        frames = images.shape[2]
        columns = min(columns, frames)
        chosen = torch.linspace(0, frames - 1, columns).round().long()
        images = images[:, :, chosen].transpose(1, 2).flatten(0, 1)
    images = images.cpu().float() / 2 + 0.5
    with write_atomically(path) as temporary:
        save_image(images, temporary, nrow=columns, padding=padding, format="png")


def save_labelled_grid(images, row_labels, column_labels, path):
    """Images [rows, columns, 3, H, W] in [-1, 1] -> one PNG file, with a label at the left of every row (a
    system) and above every column (a prompt). Small images are enlarged, large ones shrunk."""
    height, width = choose_size(*images.shape[-2:])
    font_size = max(13, min(height, width) // 10)
    font = ImageFont.load_default(font_size)
    gap = font_size // 2

    row_texts = [wrap(label, 12 * font_size, font) for label in row_labels]
    column_texts = [wrap(shorten(label), width, font) for label in column_labels]
    left = gap + max(measure(text, font)[0] for text in row_texts) + gap
    top = gap + max(measure(text, font)[1] for text in column_texts) + gap
    paper_size = (left + len(column_labels) * (width + gap), top + len(row_labels) * (height + gap))
    paper = Image.new("RGB", paper_size, "white")
    draw = ImageDraw.Draw(paper)

    for column, text in enumerate(column_texts):
        x = left + column * (width + gap)
        draw.multiline_text((x, top - gap), text, fill="black", font=font, anchor="ld")
    for row, text in enumerate(row_texts):
        y = top + row * (height + gap)
        draw.multiline_text((gap, y + height // 2), text, fill="black", font=font, anchor="lm")
        for column in range(len(column_texts)):
            x = left + column * (width + gap)
            paper.paste(resize(to_image(images[row, column]), height, width), (x, y))
    with write_atomically(path) as temporary:
        paper.save(temporary, format="png")


def choose_size(height, width):
    """An image's size in pixels -> its size in a labelled grid: the shorter side grows to 96 or more by a
    whole factor, or else the longer one shrinks to at most 192."""
    factor = math.ceil(96 / min(height, width))
    if factor > 1:
        return height * factor, width * factor
    share = min(1, 192 / max(height, width))
    return round(height * share), round(width * share)


def resize(image, height, width):
    """A PIL image at another size: pixels become squares where it grows, are averaged where it shrinks."""
    method = Image.Resampling.NEAREST if height > image.height else Image.Resampling.LANCZOS
    return image.resize((width, height), method)


def to_image(pixels):
    """Pixels [3, H, W] in [-1, 1] -> a PIL image."""
    values = (pixels.detach().cpu().float() / 2 + 0.5).clamp(0, 1) * 255
    return Image.fromarray(values.round().byte().permute(1, 2, 0).contiguous().numpy())


def shorten(label):
    return textwrap.shorten(label, 60, placeholder="...")


def wrap(label, width, font):
    """A label broken into lines that fit about `width` pixels."""
    letters = int(width / font.getlength("e"))
    return textwrap.fill(label, max(1, letters))


def measure(text, font):
    """Width and height of a text of several lines, in whole pixels."""
    box = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), text, font=font)
    return math.ceil(box[2]), math.ceil(box[3])


def require_video_writer():
    """UserError where the packages that write mp4 files are missing."""
    require("imageio", "imageio", "writes mp4 files")
    ffmpeg = require("imageio_ffmpeg", "imageio-ffmpeg", "writes mp4 files")
    try:
        program = ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise UserError(f"imageio-ffmpeg cannot write mp4 files: {first_line(error)}") from error
    if not shutil.which(program):
        raise UserError(f"imageio-ffmpeg cannot write mp4 files: there is no program {program}")


def save_video(pixels, path, fps):
    """Pixels [3, F, H, W] in [-1, 1] -> an mp4 file.

    An odd side grows by a row or column: H.264 keeps the colours of 2 x 2 pixels together."""
    from diffusers.utils import export_to_video

    require_video_writer()
    height, width = pixels.shape[-2:]
    pixels = F.pad(pixels.cpu().float(), (0, width % 2, 0, height % 2), mode="replicate")
    frames = [to_image(frame) for frame in pixels.unbind(1)]
    # ffmpeg would read some of a user's names as options or addresses
    with tempfile.TemporaryDirectory() as place, write_atomically(path) as temporary:
        video = os.path.join(place, "video.mp4")
        # 1: no side is scaled to a multiple of 16
        export_to_video(frames, video, fps=fps, quality=9, macro_block_size=1)
        shutil.copyfile(video, temporary)


# ----------------------------------------------------------------------------------------------------------
# Plots
# ----------------------------------------------------------------------------------------------------------

# What the stages log, in the order of the panels
TITLES = {
    "Losses": {
        "mse": "mse: squared error of the student's velocity",
        "loss_G": "loss_G: the student's loss\n(ADP and --loss adm: -D(fake); dmd: dmd_loss)",
        "loss_D": "loss_D: the discriminator's hinge loss\n(+ penalties), 2 = D cannot tell",
        "loss_f": "loss_f: the fake score's denoising loss",
        "dmd_loss": "dmd_loss: half the squared DMD direction\n(ADM only logs it)",
        "std": "std: standard deviation of the student's samples,\nrising on and on = saturation",
    },
    "Discriminator": {
        "cosine": "cosine between D's gradient and x_real - x_fake,\n1 = D points where the scores differ",
        "across": "across: share of D's squared gradient that is\nacross x_real - x_fake, 0 = all along it",
        "D_gap": "D_gap: D(real) - D(fake),\n0 = D cannot tell",
        "D_abs": "D_abs: mean of |D|",
        "D_real": "D_real: D of the teacher's samples",
        "D_fake": "D_fake: D of the student's samples",
    },
    "Gradient norms": {
        "norm_G": "norm_G: of the student's gradient,\nbefore clipping",
        "norm_f": "norm_f: of the fake score's gradient,\nbefore clipping",
        "norm_D": "norm_D: of the discriminator's gradient,\nbefore clipping",
        "norm_heads": "norm_heads: of the discriminators' gradient,\nbefore clipping",
    },
    "Cost": {
        "seconds": "seconds an iteration",
        "peak_mb": "peak_mb: peak memory in MiB",
        "held_out_seconds": "held_out_seconds: seconds a held-out score",
    },
}


def save_curves(metrics, path, titles=None):
    """metrics.jsonl -> a PNG file with a panel for every quantity; no file where there is nothing to draw.

    titles {name: title} come before our own."""
    curves = collect_curves(sample_json_lines(metrics, 2000))
    if curves:
        save_figure(draw_curves(curves, titles or {}), path)


def collect_curves(lines):
    """Lines of metrics, dictionaries -> {name: (iterations [n], values [n])}. A quantity need not be in every
    line; what is no number is passed over."""
    points = {}
    for line in lines:
        if not isinstance(line, dict) or not is_number(line.get("step")):
            continue
        for name, value in line.items():
            if name != "step" and is_number(value):
                points.setdefault(name, []).append((line["step"], value))
    return {name: np.array(pairs, dtype=float).T for name, pairs in points.items()}


def is_number(value):
    return isinstance(value, int | float)


def draw_curves(curves, titles):
    """What collect_curves returns -> a figure with a row of panels for every kind of quantity."""
    import matplotlib.figure

    rows = sort_names(curves)
    columns = max(len(names) for names in rows.values())
    size = (1 + 4.2 * columns, 2.8 * len(rows))
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    figure.suptitle("Thin lines: as logged. Bold lines: their running mean.", x=0.01, ha="left", fontsize=10)
    grid = figure.add_gridspec(len(rows), columns)
    for row, (heading, names) in enumerate(rows.items()):
        for column, name in enumerate(names):
            axes = figure.add_subplot(grid[row, column])
            axes.set_title(titles.get(name) or choose_title(name), fontsize=10, parse_math=False)
            axes.set_xlabel("iteration")
            if column == 0:
                axes.set_ylabel(heading, fontsize=12, weight="bold", labelpad=12)
            draw_curve(axes, *curves[name])
    return figure


def sort_names(names):
    """Names of quantities -> {heading: names}, in the order of TITLES, unknown ones last."""
    rows = {}
    for heading, known in TITLES.items():
        rows[heading] = [name for name in known if name in names]
    found = sum(rows.values(), [])
    left = [name for name in names if name not in found]
    modes = [name for name in left if name.startswith("held_out_tv_")]
    scores = [name for name in left if name.startswith("held_out_") and name not in modes]
    rows |= {"Held out": scores, "Held-out modes": modes}
    rows["Other"] = [name for name in left if name not in scores + modes]
    return {heading: row for heading, row in rows.items() if row}


def choose_title(name):
    """A quantity's title."""
    for known in TITLES.values():
        if name in known:
            return known[name]
    return name


def draw_curve(axes, steps, values):
    """A line; where there are many points it is pale, with their running mean over it."""
    if len(values) > 20:
        axes.plot(steps, values, color="C0", linewidth=0.7, alpha=0.45)
        axes.plot(steps, smooth(values), color="C0", linewidth=1.8)
    else:
        axes.plot(steps, values, color="C0", marker=".")
    finite = values[np.isfinite(values)]
    if len(finite) and 0 < finite.min() < finite.max() / 100:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)


def smooth(values):
    """The running mean of values [n], n >= 5, over about 5 % of them, at least 5. At the ends the window is
    cut; values that are not finite are left out."""
    window = max(5, len(values) // 20)
    window += 1 - window % 2  # an odd one has a middle
    finite = np.isfinite(values)
    ones = np.ones(window)
    total = np.convolve(np.where(finite, values, 0), ones, mode="same")
    count = np.convolve(finite, ones, mode="same")
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def save_figure(figure, path):
    with write_atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=80)
