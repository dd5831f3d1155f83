"""Image files of unknown origin, read as a viewer shows them."""

from __future__ import annotations

import errno
import logging
import os
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from utils.errors import UserError, one_line

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".j2k", ".tga"),
)
# No others, whatever a file's name: Pillow hands some (EPS) to other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000")
BROKEN, OF_RESULTS = "broken link", "results folder"
SAMPLES = "samples.json"  # of generate.py
RESULTS = (("analysis.json", "rec"), (SAMPLES, "00000000.png"))  # of test.py, generate.py
UNMARKED = "TGA"  # a format without a mark at its beginning: the suffix has to say it
TURNS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Faults of an image are raised or do not matter: Pillow must not print them.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())
one_at_a_time = threading.Lock()


def image_names(folder: Path, left_out: Counter[str] | None = None) -> list[str]:
    """Return the names of the images in folder and below, relative to it, sorted.

    An image is a regular file with one of SUFFIXES, or a link to one; left_out counts the others,
    by suffix. Hidden files and folders are skipped, and folders below that hold RESULTS, and
    pictures without a number beside SAMPLES, as the grid; links are followed, but not in circles.
    Raises OSError where a folder cannot be read.
    """
    names: list[str] = []
    pending = [(str(folder), "", frozenset[tuple[int, int]]())]
    while pending:
        place, prefix, above = pending.pop()  # above: its parent folders
        status = Path(place).stat()
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            continue
        if prefix and any(all(Path(place, name).exists() for name in own) for own in RESULTS):
            if left_out is not None:
                left_out[OF_RESULTS] += 1
            continue
        numbered = Path(place, SAMPLES).exists()
        with os.scandir(place) as entries:
            for entry in entries:
                kind = None if entry.name.startswith(".") else kind_of(entry)
                if kind == "folder":
                    pending.append((entry.path, f"{prefix}{entry.name}/", above | {identity}))
                elif kind == "file" and entry.name.lower().endswith(SUFFIXES):
                    if not numbered or Path(entry.name).stem.isdigit():
                        names.append(prefix + entry.name)
                elif left_out is not None and not entry.name.startswith((".", SAMPLES)):
                    suffix = Path(entry.name).suffix.lower() or "without suffix"
                    left_out[suffix if kind == "file" else BROKEN] += 1
    return sorted(names)


def listed(left_out: Counter[str]) -> str:
    """Return the files left out as text, the most frequent suffix first."""
    ordered = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(
        counted(number, suffix) if suffix in (BROKEN, OF_RESULTS) else f"{number:,} {suffix}"
        for suffix, number in ordered
    )


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def kind_of(entry: os.DirEntry[str]) -> Literal["folder", "file"] | None:
    """Return the kind of an entry or its target; None for pipes, devices and broken links."""
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):  # also broken links
            return None
        raise


@contextmanager
def open_image(source: Path | IO[bytes], name: str) -> Iterator[ImageFile]:
    """Open an image file of one of FORMATS, without decoding it.

    Raises UserError, one line with the name, for any failure here and in the block: the file is
    not such an image, damaged, larger than Pillow's limit or without pixels.
    """
    try:
        if isinstance(source, Path) and not source.is_file() and source.exists():
            raise ValueError("it is not a regular file")
        unmarked = [UNMARKED] if name.lower().endswith(f".{UNMARKED.lower()}") else []
        with Image.open(source, formats=[*FORMATS, *unmarked]) as image:
            if image.format == "MPO":  # a camera's JPEG, with further pictures behind the first
                image.format = "JPEG"
            if min(image.size) < 1:
                raise ValueError(f"its size is {image.width}×{image.height}")
            yield image
    except UserError:
        raise
    except Exception as error:  # damaged files raise anything
        fault = "read" if isinstance(error, OSError) and error.errno else "decoded"
        raise UserError(f"image {name} cannot be {fault}: {reason_of(error)}") from error


def reason_of(error: Exception) -> str:
    """Return why an image could not be decoded, without the file name that Pillow may add."""
    if isinstance(error, UnidentifiedImageError):
        return f"it is empty, damaged or none of {', '.join(FORMATS)}"
    if isinstance(error, MemoryError):
        return "there is not enough memory for its pixels"
    return (isinstance(error, OSError) and error.strerror) or one_line(error)


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 … 8, of an image not decoded yet; 1 if EXIF is damaged."""
    if image.format == "TIFF" or not image.info:  # Pillow turns TIFF itself
        return 1
    try:
        # Not image.getexif(), which decodes a PNG to find EXIF after its pixels.
        found = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF raises anything; viewers show such images unturned
        return 1
    return found if isinstance(found, int) and found in TURNS else 1


def viewed_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height as a viewer shows them, of an image not decoded yet."""
    width, height = image.size
    return (height, width) if orientation(image) >= 5 else (width, height)


def layout(image: ImageFile) -> tuple[Any, ...]:
    """Return Pillow's description of the pixel format in the file of an image not decoded yet."""
    found = image.tile[0][3] if image.tile else None
    return found if isinstance(found, tuple) else (found,)


def more_than_8_bits(image: ImageFile) -> bool:
    """Return whether the file has more than 8 bits per channel; the image is not decoded yet."""
    found = layout(image)
    deep_ppm = image.format == "PPM" and len(found) == 2 and found[1] > 255
    return image.mode.startswith(("I", "F")) or ";16" in str(found[0]) or deep_ppm


def is_deep(path: Path) -> bool:
    """Return `more_than_8_bits` of a file; False if it is damaged."""
    with suppress(UserError), open_image(path, str(path)) as image:
        return more_than_8_bits(image)
    return False


def brightest(path: Path) -> int:
    """Return the highest level of an image, of 255."""
    with open_image(path, str(path)) as image:
        return int(np.asarray(viewed(image, "RGB")).max())


def viewed(image: ImageFile, mode: Literal["L", "RGB"], bits: int = 16) -> Image.Image:
    """Decode an image as a viewer shows it: first frame, upright, transparency over white.

    16-bit grey levels, which use that many bits, are reduced to the upper 8 of these. Raises
    ValueError where they have more than 16 bits.
    """
    turn = TURNS.get(orientation(image))
    scale_transparency(image)
    with libtiff_silent() if image.format == "TIFF" else nullcontext():
        image.load()
    picture = image if turn is None else image.transpose(turn)
    if picture.mode.startswith(("I", "F")):
        picture = upper_bits(picture, bits)
    elif picture.has_transparency_data:
        picture = over_white(picture)
    return picture if picture.mode == mode else picture.convert(mode)


def scale_transparency(image: ImageFile) -> None:
    """Scale a PNG's transparent value to 8 bits, as Pillow does with its pixels."""
    value, pixels = image.info.get("transparency"), layout(image)[0]
    if value is None or image.format != "PNG":
        return
    if pixels == "L;2" and value < 4:
        image.info["transparency"] = value * 85
    elif pixels == "L;4" and value < 16:
        image.info["transparency"] = value * 17
    elif pixels == "RGB;16B" and max(value) > 255:
        image.info["transparency"] = tuple(part >> 8 for part in value)


@contextmanager
def libtiff_silent() -> Iterator[None]:
    """Silence libtiff, which prints errors that Pillow raises as well."""
    with one_at_a_time, Path(os.devnull).open("wb") as nowhere:
        screen = os.dup(2)
        try:
            os.dup2(nowhere.fileno(), 2)
            yield
        finally:
            os.dup2(screen, 2)
            os.close(screen)


def upper_bits(image: Image.Image, bits: int) -> Image.Image:
    """Reduce grey levels of that many bits to 8, white above them and where transparent."""
    levels = np.asarray(image)
    if image.mode == "F" or levels.min() < 0 or levels.max() > 0xFFFF:
        raise ValueError(f"its grey levels have more than 16 bits (mode {image.mode})")
    upper = (levels >> (bits - 8)).clip(max=255).astype(np.uint8)
    if "transparency" in image.info:
        upper[levels == image.info["transparency"]] = 255
    return Image.fromarray(upper)


def over_white(image: Image.Image) -> Image.Image:
    """Put an image of any mode with transparency over white → RGB."""
    if image.mode == "La":  # premultiplied grey, which Pillow converts to LA only
        image = image.convert("LA")
    if image.mode != "RGBA":
        image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image)
    return white
