"""Sets of square uint8 images, held in memory or decoded from files on demand."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import IO, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from utils.errors import UserError
from utils.image_files import open_image, viewed, viewed_size

Pixels: TypeAlias = npt.NDArray[np.uint8]
Split: TypeAlias = Literal["train", "test", "val"]  # val only where a folder has its own

CROPS = ("centre", "random", "patch")  # what is cut out of a training image
Place: TypeAlias = tuple[float, float]  # of a cut, in [0, 1): along the width, along the height


class FolderSplits(NamedTuple):
    """Splits of a folder of images."""

    test: str  # digest of the test images
    by_name: bool  # by a hash of the names; otherwise the folder has train/ and test/ or val/
    has_val: bool = False  # beside train/ and test/


class Labels(NamedTuple):
    """Classes of images."""

    numbers: Tensor  # (n,), int64
    names: tuple[str, ...]  # of the classes


class ImageSet(Dataset[Tensor], ABC):
    """Square images, each a uint8 tensor (channels, image_size, image_size)."""

    channels: int
    image_size: int
    splits: FolderSplits | None = None  # of the folder that the images are from

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def cropped(self, index: int, place: Place | None = None) -> Tensor:
        """Return one image, (C, H, W), uint8: its square from the middle, or from a place.

        A place of 0 is left or top; images that are square already have only one. Raises UserError
        naming a damaged image.
        """

    def __getitem__(self, index: int) -> Tensor:
        return self.cropped(index)

    def picture(self, index: int, scale: float) -> Pixels:
        """Return a whole image, (h, w, 3), at a scale of its own size."""
        raise NotImplementedError(f"{type(self).__name__} has no files")

    def name(self, index: int) -> str:
        """Return an image's name in messages and records: its file's path, if it has one."""
        return f"{index:08d}"

    def split_keys(self) -> Sequence[str]:
        """Return the images' names within the set, by which some are held out."""
        return [self.name(index) for index in range(len(self))]

    def labels(self) -> Labels:
        """Return the class of every image. Raises UserError where they have no classes."""
        raise UserError(f"the images ({self.name(0)} …) have no classes")

    def identity(self) -> Iterator[str]:
        """Yield strings that change whenever the images do; they name the image cache."""
        raise NotImplementedError(f"{type(self).__name__} has no files")


class TensorImages(ImageSet):
    """Images held in memory: (n, C, H, W), uint8; labels are read when they are asked for."""

    def __init__(self, images: Tensor, labels: Callable[[], Labels] | None = None) -> None:
        self.images = images
        self.read_labels = labels
        self.channels, self.image_size = images.shape[1], images.shape[3]

    def __len__(self) -> int:
        return len(self.images)

    def cropped(self, index: int, _place: Place | None = None) -> Tensor:
        return self.images[index]

    def labels(self) -> Labels:
        return self.read_labels() if self.read_labels else super().labels()


class FileImages(ImageSet):
    """Image files of any size and mode, by their names below a folder, decoded on demand to RGB.

    bits: those that 16-bit grey levels use.
    """

    channels = 3
    bits = 16

    def __init__(self, folder: Path, names: Sequence[str], image_size: int) -> None:
        self.folder = folder
        self.names = sorted(names)
        self.image_size = image_size

    def __len__(self) -> int:
        return len(self.names)

    def cropped(self, index: int, place: Place | None = None) -> Tensor:
        path = self.folder / self.names[index]
        return decode(path, self.image_size, str(path), place, self.bits)

    def picture(self, index: int, scale: float) -> Pixels:
        path = self.folder / self.names[index]
        return decode_picture(path, scale, str(path), self.bits)

    def name(self, index: int) -> str:
        return str(self.folder / self.names[index])

    def split_keys(self) -> Sequence[str]:
        return self.names

    def labels(self) -> Labels:
        """Return the folder of every image: the first one of its name, as in ImageNet."""
        folders = [name.rpartition("/")[0].partition("/")[0] for name in self.names]
        if "" in folders:
            return super().labels()
        names = sorted(set(folders))
        numbers = {name: number for number, name in enumerate(names)}
        return Labels(torch.tensor([numbers[folder] for folder in folders]), tuple(names))

    def identity(self) -> Iterator[str]:
        folder = str(self.folder)  # a Path for each of a million would take seconds
        if self.bits != FileImages.bits:
            yield f"{self.bits} bits"
        for name in self.names:
            yield f"{name} {size_and_time(os.path.join(folder, name))}"  # noqa: PTH118


class ChosenImages(ImageSet):
    """Some images of another set, by their indices (n,), int64."""

    def __init__(self, images: ImageSet, chosen: Tensor) -> None:
        self.images = images
        self.chosen = chosen
        self.channels, self.image_size = images.channels, images.image_size
        self.splits = images.splits

    def __len__(self) -> int:
        return len(self.chosen)

    def cropped(self, index: int, place: Place | None = None) -> Tensor:
        return self.images.cropped(int(self.chosen[index]), place)

    def name(self, index: int) -> str:
        return self.images.name(int(self.chosen[index]))

    def labels(self) -> Labels:
        return chosen_labels(self.images, self.chosen)

    def identity(self) -> Iterator[str]:
        yield from self.images.identity()
        yield hashlib.sha256(self.chosen.numpy().tobytes()).hexdigest()

    def split_keys(self) -> Sequence[str]:
        keys = self.images.split_keys()
        return [keys[index] for index in self.chosen.tolist()]


class JoinedImages(ImageSet):
    """The images of several sets, one set after another."""

    def __init__(self, parts: Sequence[ImageSet]) -> None:
        self.parts = parts
        self.ends = list(accumulate(map(len, parts)))
        self.channels, self.image_size = parts[0].channels, parts[0].image_size

    def __len__(self) -> int:
        return self.ends[-1]

    def find(self, index: int) -> tuple[ImageSet, int]:
        """Return the part that holds an image, and the image's position there."""
        number = bisect_right(self.ends, index)
        return self.parts[number], index - self.ends[number] + len(self.parts[number])

    def cropped(self, index: int, place: Place | None = None) -> Tensor:
        part, position = self.find(index)
        return part.cropped(position, place)

    def picture(self, index: int, scale: float) -> Pixels:
        part, position = self.find(index)
        return part.picture(position, scale)

    def name(self, index: int) -> str:
        part, position = self.find(index)
        return part.name(position)

    def labels(self) -> Labels:
        return joined_labels(self.parts)

    def identity(self) -> Iterator[str]:
        return chain.from_iterable(part.identity() for part in self.parts)


def joined(parts: Sequence[ImageSet]) -> ImageSet:
    """Join sets, in memory if they are."""
    in_memory = [part.images for part in parts if isinstance(part, TensorImages)]
    if len(in_memory) == len(parts):
        return TensorImages(torch.cat(in_memory), partial(joined_labels, parts))
    return JoinedImages(parts)


def joined_labels(parts: Sequence[ImageSet]) -> Labels:
    """Labels of the images of several sets, whose classes are joined by name."""
    found = [part.labels() for part in parts]
    names = tuple(dict.fromkeys(name for labels in found for name in labels.names))
    numbers = [
        torch.tensor([names.index(name) for name in labels.names])[labels.numbers]
        for labels in found
    ]
    return Labels(torch.cat(numbers), names)


def chosen_labels(images: ImageSet, chosen: Tensor) -> Labels:
    """Labels of the images of these indices."""
    numbers, names = images.labels()
    return Labels(numbers[chosen], names)


def decode(
    source: Path | IO[bytes], size: int, name: str, place: Place | None = None, bits: int = 16
) -> Tensor:
    """Decode an image file → (3, size, size), uint8: RGB as a viewer shows it, `square_of` it.

    The shorter side becomes size; Pillow's bicubic filter antialiases where it shrinks. Raises
    UserError naming an image that is damaged or larger than Pillow's limit.
    """
    with open_image(source, name) as image:
        square = square_of(viewed(image, "RGB", bits), place)
        pixels = np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def decode_picture(source: Path | IO[bytes], scale: float, name: str, bits: int = 16) -> Pixels:
    """Decode an image file → (h, w, 3): RGB as a viewer shows it, at a scale of its own size.

    Raises UserError as `decode` does.
    """

    def scaled(size: tuple[int, int]) -> tuple[int, int]:
        return max(1, round(scale * size[0])), max(1, round(scale * size[1]))

    with open_image(source, name) as image:
        size = scaled(viewed_size(image))
        image.draft(
            "RGB", scaled(image.size)
        )  # a JPEG is decoded at half its size if that is enough
        return np.asarray(viewed(image, "RGB", bits).resize(size, Image.Resampling.BICUBIC))


def square_of(image: Image.Image, place: Place | None = None) -> Image.Image:
    """Cut out the largest square: in the middle, or at a place."""
    side = min(image.size)
    left, top = offsets(image.size, side, place)
    return image.crop((left, top, left + side, top + side))


def offsets(size: tuple[int, int], side: int, place: Place | None) -> tuple[int, int]:
    """Return left and top of a square in an image of this width and height; None: the middle."""
    spare = size[0] - side, size[1] - side
    if place is None:
        return spare[0] // 2, spare[1] // 2
    return int(place[0] * (spare[0] + 1)), int(place[1] * (spare[1] + 1))


def size_and_time(path: str) -> str:
    """Return a file's size and modification time; "missing" where it cannot be read."""
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError:
        return "missing"
    return f"{status.st_size} {status.st_mtime_ns}"
