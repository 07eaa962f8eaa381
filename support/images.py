"""Users' pictures: found in folders, and opened as upright 8-bit RGB, or refused by name."""

import contextlib
import os
import warnings

import numpy as np

from support.errors import UserError, first_line

# What Pillow turns into RGB, and into RGBA; all others are 16 or 32 bits
MODES = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "LA", "PA", "RGBA", "RGBa")
# Formats that Pillow knows by their first bytes and cannot read by itself
UNREADABLE = ("BUFR", "GRIB", "HDF5", "MPEG", "WMF")


def list_images(folder):
    """A folder's files -> (names of those whose suffix Pillow reads, all other names), sorted. The others
    have folders, hidden files and the grid.png that sample.py writes, too."""
    from PIL import Image

    Image.init()
    suffixes = set()
    for suffix, form in Image.registered_extensions().items():
        if form in Image.OPEN and form not in UNREADABLE:
            suffixes.add(suffix)
    images, others = [], []
    for name in sorted(os.listdir(folder)):
        suffix = os.path.splitext(name)[1].lower()
        is_shown = not name.startswith(".") and name != "grid.png"
        if suffix in suffixes and is_shown and os.path.isfile(os.path.join(folder, name)):
            images.append(name)
        else:
            others.append(name)
    return images, others


def open_image(path):
    """A picture file -> PIL image of mode RGB: upright by its EXIF tag, 16 bits to their upper 8, what is
    transparent over white. Colour profiles are not applied.

    UserError, which names the file, for what is damaged, has several frames or pages, or values of no known
    range."""
    from PIL import Image, ImageOps

    with open_header(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode not in MODES:  # 16 bits, see check_header
            upper = np.asarray(image) >> 8
            image = Image.fromarray(upper.astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")


def measure_image(path):
    """A picture file -> (width, height). UserError for what open_image refuses, as far as its header says."""
    with open_header(path) as image:
        return image.size


@contextlib.contextmanager
def open_header(path):
    """The PIL image of a file, not decoded yet. UserError, which names the file, for what is wrong with it,
    now or while it is used."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            # of more than 89 million pixels; of twice as many there is an error
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                check_header(image)
                yield image
    except Exception as error:  # Pillow raises many kinds for a damaged file
        raise UserError(f"the image {path} cannot be read: {first_line(error)}") from error


def check_header(image):
    """ValueError for a PIL image that has no right value as 8-bit RGB."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a JPEG with a second picture, as telephones write them
        raise ValueError(f"it has {frames} frames or pages, and an image is one")
    if image.mode not in MODES and not has_16_bits(image):
        raise ValueError(f"its mode {image.mode} has no known range: save it with 8 bits a channel")
    if image.format == "PNG" and image.mode != "P" and "transparency" in image.info:
        depth = image.tile[0].args
        if depth not in ("1", "L", "RGB"):  # Pillow compares the transparent colour at another depth
            raise ValueError(f"it has a transparent colour in {depth}: save it with 8 bits a channel")


def has_16_bits(image):
    """Whether its values go from 0, black, to 65535, white."""
    if image.format == "TIFF":
        bits, black_is_zero = image.tag_v2.get(258), image.tag_v2.get(262) == 1
        return image.mode.startswith("I;16") and bits == (16,) and black_is_zero
    if image.format == "PPM":
        return image.mode == "I"
    return image.mode.startswith("I;16") and image.format in ("PNG", "JPEG2000")
