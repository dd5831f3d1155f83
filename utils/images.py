"""Between bytes, the network's range and picture files; image files of strangers."""

from __future__ import annotations

import errno
import logging
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from torch import Tensor

from utils.errors import UserError, one_line
from utils.files import whole_file

SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm"),
)
# No others, whatever a file's name: Pillow hands some (EPS) to other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
TURNS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What is wrong with an image is raised or does not matter: Pillow shall print nothing about it.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())
one_at_a_time = threading.Lock()


# ----------------------------------------------------------------------------------------- values


def to_signed(images: Tensor) -> Tensor:
    """Bytes 0…255 → float32 in [−1, 1], what the network sees; any shape."""
    return images.float() / 127.5 - 1


def to_bytes(images: Tensor) -> Tensor:
    """Values in [−1, 1] → bytes, rounded; values outside are clipped; any shape."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def in_colour(images: Tensor) -> Tensor:
    """Greyscale as three equal channels: (B, 1 or 3, H, W) → (B, 3, H, W)."""
    return images.expand(-1, 3, -1, -1)


def mean_squared_errors(images: Tensor, others: Tensor) -> Tensor:
    """Mean squared error of each pair, in the range given: (B, C, H, W) twice → (B,)."""
    return (images - others).square().flatten(1).mean(1)


def psnr(mean_squared_error: Tensor, peak: float) -> Tensor:
    """10·log10(peak² / mse) in dB, peak being the width of the value range; any shape."""
    return 10 * torch.log10(peak**2 / mean_squared_error)


def signed_psnr(mean_squared_error: Tensor) -> Tensor:
    """PSNR of values in [−1, 1], at most 126 dB; any shape."""
    return psnr(mean_squared_error.clamp_min(1e-12), peak=2.0)


# ---------------------------------------------------------------------------------------- reading


def image_names(folder: Path) -> list[str]:
    """The names of the images in folder and below, relative to it, sorted.

    An image is a regular file of one of SUFFIXES, or a link to one. Hidden files and folders are
    left out; links are followed, but not in circles. Raises OSError where a folder cannot be read.
    """
    names: list[str] = []
    above: frozenset[tuple[int, int]] = frozenset()  # the folders on the way to this one
    pending = [(str(folder), "", above)]
    while pending:
        place, prefix, above = pending.pop()
        status = Path(place).stat()
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            continue
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                kind = kind_of(entry)
                if kind == "folder":
                    pending.append((entry.path, f"{prefix}{entry.name}/", above | {identity}))
                elif kind == "file" and entry.name.lower().endswith(SUFFIXES):
                    names.append(prefix + entry.name)
    return sorted(names)


def kind_of(entry: os.DirEntry[str]) -> Literal["folder", "file"] | None:
    """What an entry is or links to; None for pipes, sockets, devices and broken links."""
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):  # other ways for a link to be broken
            return None
        raise


@contextmanager
def open_image(source: Path | IO[bytes], name: str) -> Iterator[ImageFile]:
    """An image file of one of FORMATS, opened but not decoded.

    Raises UserError, one line with the name, for whatever fails here and in the block: the file is
    no such image, damaged, larger than Pillow's limit or of no pixels.
    """
    try:
        if isinstance(source, Path) and not source.is_file() and source.exists():
            raise ValueError("it is not a regular file")
        with Image.open(source, formats=FORMATS) as image:
            if min(image.size) < 1:
                raise ValueError(f"its size is {image.width}×{image.height}")
            yield image
    except UserError:
        raise
    except Exception as error:  # damaged files raise whatever the decoder stumbled over
        raise UserError(f"image {name} cannot be decoded: {reason_of(error)}") from error


def reason_of(error: Exception) -> str:
    """Why an image could not be decoded, without the name that Pillow may repeat."""
    if isinstance(error, UnidentifiedImageError):
        return f"it is empty, damaged or none of {', '.join(FORMATS)}"
    if isinstance(error, MemoryError):
        return "there is not enough memory for its pixels"
    return (isinstance(error, OSError) and error.strerror) or one_line(error)


def orientation(image: Image.Image) -> int:
    """EXIF orientation of an image that is not decoded yet, 1 … 8; 1 where EXIF is damaged.

    A PNG's EXIF counts where it precedes the pixels, as in browsers.
    """
    if image.format == "TIFF" or not image.info:  # Pillow turns TIFF by itself
        return 1
    try:
        # Not image.getexif(), which decodes a PNG in search of EXIF behind its pixels.
        found = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except Exception:  # as varied as the damage; a viewer shows such images unturned
        return 1
    return found if isinstance(found, int) and found in TURNS else 1


def viewed_size(image: Image.Image) -> tuple[int, int]:
    """Width and height as a viewer shows an image that is not decoded yet."""
    width, height = image.size
    return (height, width) if orientation(image) >= 5 else (width, height)


def layout(image: ImageFile) -> tuple[Any, ...]:
    """How the file of an image that is not decoded yet lays out its pixels, in Pillow's words."""
    found = image.tile[0][3] if image.tile else None
    return found if isinstance(found, tuple) else (found,)


def more_than_8_bits(image: ImageFile) -> bool:
    """Whether the file of an image that is not decoded yet has more than 8 bits a channel."""
    found = layout(image)
    deep_ppm = image.format == "PPM" and len(found) == 2 and found[1] > 255
    return image.mode.startswith(("I", "F")) or ";16" in str(found[0]) or deep_ppm


def viewed(image: ImageFile, mode: Literal["L", "RGB"]) -> Image.Image:
    """An image as a viewer shows it: first frame, upright, over white where it is transparent.

    Of 16-bit grey levels the upper 8 bits. Raises ValueError where they have more bits.
    """
    turn = TURNS.get(orientation(image))
    scale_transparency(image)
    with libtiff_silent() if image.format == "TIFF" else nullcontext():
        image.load()
    picture = image if turn is None else image.transpose(turn)
    if picture.mode.startswith(("I", "F")):
        picture = upper_bits(picture)
    elif picture.has_transparency_data:
        picture = over_white(picture)
    return picture if picture.mode == mode else picture.convert(mode)


def scale_transparency(image: ImageFile) -> None:
    """Give the transparent value of a PNG, if it has one, the 8 bits that its pixels will have.

    Pillow scales pixels of 2, 4 and 3 × 16 bits, but not this value.
    """
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
    """Nothing on the screen: libtiff writes there what Pillow raises as well."""
    with one_at_a_time, Path(os.devnull).open("wb") as nowhere:
        screen = os.dup(2)
        try:
            os.dup2(nowhere.fileno(), 2)
            yield
        finally:
            os.dup2(screen, 2)
            os.close(screen)


def upper_bits(image: Image.Image) -> Image.Image:
    """16-bit grey levels → 8-bit ones, white where they are transparent."""
    levels = np.asarray(image)
    if image.mode == "F" or levels.min() < 0 or levels.max() > 0xFFFF:
        raise ValueError(f"its grey levels have more than 16 bits (mode {image.mode})")
    upper = (levels >> 8).astype(np.uint8)
    if "transparency" in image.info:
        upper[levels == image.info["transparency"]] = 255
    return Image.fromarray(upper)


def over_white(image: Image.Image) -> Image.Image:
    """An image of any mode with transparency → RGB."""
    if image.mode == "La":  # grey times alpha, which Pillow converts to nothing but LA
        image = image.convert("LA")
    if image.mode != "RGBA":
        image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image)
    return white


# ---------------------------------------------------------------------------------------- writing


def to_picture(image: Tensor) -> Image.Image:
    """A byte tensor (C, H, W), C 1 or 3, as a Pillow image."""
    array = image.cpu().numpy()
    return Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0))


def save_picture(path: Path, image: Tensor, jpeg_quality: int = 75) -> None:
    """Write a byte tensor (C, H, W); the suffix of path chooses PNG or JPEG."""
    picture = to_picture(image)
    if path.suffix == ".png":
        picture.save(path, compress_level=1)  # the level changes size and time, never a pixel
    else:
        picture.save(path, quality=jpeg_quality)


def fitted(picture: Image.Image, enlarged: int, largest: int) -> Image.Image:
    """A picture whose longer side is at most largest, and small ones enlarged to at most enlarged.

    By a whole factor, without smoothing.
    """
    longest = max(picture.size)
    if longest > largest:
        share = largest / longest
        size = max(1, round(picture.width * share)), max(1, round(picture.height * share))
        return picture.resize(size, Image.Resampling.LANCZOS)
    factor = max(1, enlarged // longest)
    size = picture.width * factor, picture.height * factor
    return picture.resize(size, Image.Resampling.NEAREST)


def comparison(originals: Tensor, reconstructions: Tensor, columns: int = 8) -> Tensor:
    """Rows of originals, each above its reconstructions, 2 pixels apart.

    Byte tensors (n, C, H, W), n at most a few dozen → one byte tensor (C, height, width).
    """
    rows = []
    for start in range(0, len(originals), columns):
        for images in (originals, reconstructions):
            row = images[start : start + columns]
            missing = columns - len(row) if start else 0
            blank = row.new_full((missing, *row.shape[1:]), 255)
            tiles = [
                torch.nn.functional.pad(tile, (2, 2, 2, 2), value=255)
                for tile in torch.cat([row, blank])
            ]
            rows.append(torch.cat(tiles, dim=2))
    return torch.cat(rows, dim=1)


def save_comparison(path: Path, originals: Tensor, reconstructions: Tensor) -> None:
    """Write `comparison` as PNG, small images enlarged without smoothing."""
    picture = to_picture(comparison(originals, reconstructions))
    factor = max(1, 96 // originals.shape[-1])
    size = (picture.width * factor, picture.height * factor)
    with whole_file(path) as temporary:
        picture.resize(size, Image.Resampling.NEAREST).save(temporary, format="PNG")
