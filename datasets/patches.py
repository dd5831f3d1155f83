"""Patches of pictures at their own resolution, and a cache of whole decoded pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from datasets.cache import key_of, naming
from datasets.image_sets import ImageSet, Pixels, Place, offsets
from utils.errors import UserError, one_line

PREPROCESSING = "whole pictures, bicubic"  # of datasets.image_sets.decode_picture


class Patches(ImageSet):
    """Squares of image_size pixels, cut out of another set's pictures at a scale of their own size.

    A picture whose shorter side is less than image_size is enlarged to it. If a folder is given, it
    keeps each picture decoded, in a file of its own that appears complete or not at all: a cut
    reads its own rows alone.

    Raises OSError naming the file where it cannot be read or written any more.
    """

    def __init__(self, images: ImageSet, scale: float, folder: Path | None = None) -> None:
        self.images, self.scale, self.folder = images, scale, folder
        self.channels, self.image_size = images.channels, images.image_size
        self.splits = images.splits

    def __len__(self) -> int:
        return len(self.images)

    def cropped(self, index: int, place: Place | None = None) -> Tensor:
        side = self.image_size
        pixels = self.kept(index) if self.folder else self.images.picture(index, self.scale)
        if min(pixels.shape[:2]) < side:
            pixels = enlarged(pixels, side)
        height, width, _ = pixels.shape
        left, top = offsets((width, height), side, place)
        patch = pixels[top : top + side, left : left + side]  # (side, side, 3)
        return torch.from_numpy(patch.transpose(2, 0, 1).copy())

    def name(self, index: int) -> str:
        return self.images.name(index)

    def split_keys(self) -> Sequence[str]:
        return self.images.split_keys()

    def kept(self, index: int) -> Pixels:
        """Return a picture from its file, or decode it and write the file."""
        path = Path(self.folder or "", f"{index:08d}.npy")
        with naming(path):
            return self.read_or_write(path, index)

    def read_or_write(self, path: Path, index: int) -> Pixels:
        with suppress(FileNotFoundError, ValueError, EOFError):  # not there yet, or damaged
            found: Pixels = np.load(path, mmap_mode="r")
            return found
        pixels = self.images.picture(index, self.scale)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("w+b") as file:
                np.save(file, pixels)  # its errors have no reason with "wb"
                file.flush()
                os.fsync(file.fileno())  # or a power cut could leave an empty file
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return pixels


def enlarged(pixels: Pixels, side: int) -> Pixels:
    """Enlarge a picture (h, w, 3) until its shorter side has this length."""
    picture = Image.fromarray(pixels)
    factor = side / min(picture.size)
    width, height = (max(side, round(factor * length)) for length in picture.size)
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))


def patches_of(images: ImageSet, scale: float, cache: str | None, label: str) -> Patches:
    """Cut patches out of a set's pictures; cache is a folder that keeps these decoded.

    Their own folder there begins with label. Changed image files, another version of Pillow or
    another scale get another one. Raises UserError where it cannot be created.
    """
    if cache is None:
        return Patches(images, scale)
    key = key_of(images, PREPROCESSING, PIL.__version__, repr(scale))
    folder = Path(cache) / f"{label}-pictures-{key[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise UserError(f"--image_cache: {folder} cannot be created: {reason}") from error
    return Patches(images, scale, folder)
