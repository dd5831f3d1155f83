"""Sets of uint8 images, in memory or decoded on demand, and what is drawn and measured of them."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from utils.errors import UserError
from utils.images import open_image, viewed

Split: TypeAlias = Literal["train", "test"]

CROPS = ("centre", "random")  # where the square is cut out of a training image
VARIANCE_SAMPLE = 2048  # images decoded to measure the variance of a set on disk
CHUNK = 2**24  # pixels counted at a time


# --------------------------------------------------------------------------------------- the sets


class ImageSet(Dataset[Tensor], ABC):
    """Square images, each a uint8 tensor (channels, image_size, image_size)."""

    channels: int
    image_size: int

    @abstractmethod
    def __len__(self) -> int:
        """How many images."""

    @abstractmethod
    def __getitem__(self, index: int) -> Tensor:
        """One image, (C, H, W), uint8. Raises UserError naming an image that is damaged."""

    def cropped(self, index: int, _place: float) -> Tensor:
        """One image, its square cut out at place along the longer side: from 0, left or top, to 1.

        Where images are square as they are, there is but one.
        """
        return self[index]

    def name(self, index: int) -> str:
        """What an image is called in messages and records: its file's path, if it has one."""
        return f"{index:08d}"

    def identity(self) -> Iterator[str]:
        """What tells these images from others, and from themselves before a change."""
        raise NotImplementedError(f"{type(self).__name__} has no files")


class TensorImages(ImageSet):
    """Images held in memory: (n, C, H, W), uint8."""

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.channels, self.image_size = images.shape[1], images.shape[3]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


class FileImages(ImageSet):
    """Image files of any size and mode, by their names below a folder, decoded on demand to RGB."""

    channels = 3

    def __init__(self, folder: Path, names: Sequence[str], image_size: int) -> None:
        self.folder = folder
        self.names = sorted(names)
        self.image_size = image_size

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Tensor:
        path = self.folder / self.names[index]
        return decode(path, self.image_size, str(path))

    def cropped(self, index: int, place: float) -> Tensor:
        path = self.folder / self.names[index]
        return decode(path, self.image_size, str(path), place)

    def name(self, index: int) -> str:
        return str(self.folder / self.names[index])

    def identity(self) -> Iterator[str]:
        folder = str(self.folder)  # a Path for each of a million would take seconds
        return (f"{name} {size_and_time(os.path.join(folder, name))}" for name in self.names)  # noqa: PTH118


class ChosenImages(ImageSet):
    """Some images of another set, by their indices (n,), int64."""

    def __init__(self, images: ImageSet, chosen: Tensor) -> None:
        self.images = images
        self.chosen = chosen
        self.channels, self.image_size = images.channels, images.image_size

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[int(self.chosen[index])]

    def cropped(self, index: int, place: float) -> Tensor:
        return self.images.cropped(int(self.chosen[index]), place)

    def name(self, index: int) -> str:
        return self.images.name(int(self.chosen[index]))


# --------------------------------------------------------------------------------------- decoding


def decode(source: Path | IO[bytes], size: int, name: str, place: float | None = None) -> Tensor:
    """An image file → (3, size, size), uint8: RGB as a viewer shows it, `square_of` it, bicubic.

    The shorter side becomes size; Pillow's bicubic filter antialiases where it shrinks. Raises
    UserError naming an image that is damaged or larger than Pillow's limit.
    """
    with open_image(source, name) as image:
        square = square_of(viewed(image, "RGB"), place)
        pixels = np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def square_of(image: Image.Image, place: float | None = None) -> Image.Image:
    """The largest square in the middle of an image, or at place in [0, 1) of those there are."""
    side = min(image.size)
    spare = max(image.size) - side  # pixels of the longer side that are left out
    offset = spare // 2 if place is None else int(place * (spare + 1))
    left, top = (offset, 0) if image.width > side else (0, offset)
    return image.crop((left, top, left + side, top + side))


def size_and_time(path: str) -> str:
    """Of a file: its length and when it was last changed; of one that cannot be read, neither."""
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError:
        return "missing"
    return f"{status.st_size} {status.st_mtime_ns}"


# ------------------------------------------------------------------------------- drawing, measuring


def permutation(n: int, *key: int | str) -> Tensor:
    """The numbers 0 … n − 1 in an order that is a function of the key alone, (n,), int64."""
    return torch.randperm(n, generator=generator_of(key))


def draws(n: int, *key: int | str) -> Tensor:
    """n numbers drawn from [0, 1), a function of the key alone, (n,)."""
    return torch.rand(n, generator=generator_of(key))


def generator_of(key: tuple[int | str, ...]) -> torch.Generator:
    """A generator that starts the same for the same key."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def hold_out(n: int, purpose: str) -> tuple[Tensor, Tensor]:
    """Indices (kept, held out), each ascending; held out is a tenth, rounded, and at least one."""
    order = permutation(n, purpose)
    tenth = max(1, (n + 5) // 10)
    return order[tenth:].sort().values, order[:tenth].sort().values


def split_validation(images: ImageSet) -> tuple[ImageSet, ImageSet]:
    """(train, validation): validation is a tenth of the set, the same in every run.

    Sets in memory give sets in memory. Raises UserError for fewer than two images.
    """
    if len(images) < 2:
        raise UserError(
            f"--data_folder gives {len(images)} training image; a tenth is held out for "
            "validation, so that 2 are needed, or --validation test"
        )
    train, validation = hold_out(len(images), "validation")
    return choose(images, train), choose(images, validation)


def choose(images: ImageSet, indices: Tensor) -> ImageSet:
    """The images of those indices (n,), int64."""
    if isinstance(images, TensorImages):
        return TensorImages(images.images[indices])
    return ChosenImages(images, indices)


def pixel_variance(images: ImageSet, skip_bad: bool = False) -> float:
    """Variance of pixel / 255 over all pixels and channels, in [0, 1/4].

    Exact for sets in memory; for others that of at most VARIANCE_SAMPLE images, the same in every
    run. Raises UserError naming an image that is damaged; skip_bad leaves those out, and it is
    raised where no image remains.
    """
    if isinstance(images, TensorImages):
        counts = sum_counts(
            [pixel_counts(part) for part in torch.split(images.images.flatten(), CHUNK)]
        )
    else:
        sample = permutation(len(images), "variance")[:VARIANCE_SAMPLE].sort().values.tolist()

        def count(index: int) -> Tensor:
            try:
                return pixel_counts(images[index])
            except UserError:
                if skip_bad:
                    return torch.zeros(256, dtype=torch.int64)
                raise

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            counts = sum_counts(list(pool.map(count, sample)))
    if counts.sum() == 0:
        raise UserError(f"none of the {len(sample):,} images of --data_folder can be decoded")
    levels = torch.arange(256, dtype=torch.float64) / 255
    share = counts.double() / counts.sum()  # (256,), of each of the 256 values
    mean = (share * levels).sum()
    return float((share * (levels - mean).square()).sum())


def pixel_counts(pixels: Tensor) -> Tensor:
    """How often each of the 256 values occurs: uint8 of any shape → (256,), int64."""
    return torch.bincount(pixels.flatten().cpu(), minlength=256)


def sum_counts(counts: list[Tensor]) -> Tensor:
    """(256,) of each part → (256,) of all."""
    return torch.stack(counts).sum(0)
