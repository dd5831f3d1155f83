"""MNIST, Fashion-MNIST and its sample: grey images in idx files, plain or gzip'd, kept in memory.

The format is that of http://yann.lecun.com/exdb/mnist/: the bytes 0 0 8 3, three big-endian 32-bit
sizes (images, height, width), then the pixels. Labels have the bytes 0 0 8 1 and one size.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from datasets.image_sets import ImageSet, Labels, Split, TensorImages
from datasets.staging import fetch
from utils.errors import UserError, one_line

SIDE = 28  # height and width of every image, in pixels
FILES: dict[Split, str] = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}


class IdxKind(NamedTuple):
    """Kind of an idx file."""

    content: str
    magic: int  # uint8, and the number of dimensions
    shape: list[int]  # of an item


IMAGES, LABELS = IdxKind("images", 0x803, [SIDE, SIDE]), IdxKind("labels", 0x801, [])

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # the package dataset-fashion-mnist
SAMPLE = Path(__file__).parent / "fashion_mnist_sample"
SAMPLE_SHA256: dict[Split, str] = {
    "train": "0df3df2ca78c4b6eab18b144ec46fc520fd9ad770c009c37d5a67bf1dc78de1c",
    "test": "acf67a3c5ab42db185cc165eda9226a7a63d0a28ffbf0d9fbc8befcb6574171c",
}


def open_mnist(folder: Path, split: Split, _image_size: int) -> ImageSet:
    """MNIST (LeCun, Cortes, Burges): 60,000 training and 10,000 test images of 28 × 28."""
    return open_idx("mnist", "MNIST", folder, split)


def open_fashion_mnist(folder: Path, split: Split, _image_size: int) -> ImageSet:
    """Fashion-MNIST (Xiao, Rasul, Vollgraf, arXiv 1708.07747), of the shape of MNIST."""
    return open_idx("fashion-mnist", "FashionMNIST", folder, split, elsewhere=[DEBIAN])


def open_sample(_folder: Path, split: Split, _image_size: int) -> ImageSet:
    """Every tenth image of Fashion-MNIST, 6,000 and 1,000; part of this repository."""
    path = SAMPLE / f"{FILES[split]}.gz"
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != SAMPLE_SHA256[split]:
        raise UserError(
            f"{path} is damaged: its sha256 is {digest[:12]}…, not {SAMPLE_SHA256[split][:12]}…"
        )
    images = parse_idx(content, path)
    return TensorImages(images, partial(read_labels, path, "FashionMNIST", len(images)))


def open_idx(
    name: str, torchvision_class: str, folder: Path, split: Split, elsewhere: Sequence[Path] = ()
) -> ImageSet:
    """Open a split from torchvision's layout, the folder itself, elsewhere, or a download."""
    places = [folder / torchvision_class / "raw", folder, *elsewhere]
    path = find_idx(places, split)
    if path is None:
        import torchvision

        looked = ", ".join(map(str, places))
        missing = f"--dataset {name}: {FILES[split]} (or .gz) is in none of {looked}"
        build = getattr(torchvision.datasets, torchvision_class)
        fetch(lambda root: build(root, download=True), folder, missing)
        path = find_idx(places, split)
        if path is None:
            raise UserError(f"{missing}, not even after the download")
    images = parse_idx(path.read_bytes(), path)
    return TensorImages(images, partial(read_labels, path, torchvision_class, len(images)))


def find_idx(places: Sequence[Path], split: Split) -> Path | None:
    """Return the first file of the split's images, plain before gzip'd."""
    paths = [place / (FILES[split] + suffix) for place in places for suffix in ("", ".gz")]
    return next((path for path in paths if path.is_file()), None)


def read_labels(images: Path, torchvision_class: str, num_images: int) -> Labels:
    """Read the file of labels beside the images'. Raises UserError if it does not fit them."""
    import torchvision

    name = images.name.removesuffix(".gz").replace("images-idx3", "labels-idx1")
    paths = [images.with_name(name), images.with_name(f"{name}.gz")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise UserError(f"{paths[0]} (or .gz), the labels of {images.name}, does not exist")
    numbers = parse_idx(path.read_bytes(), path, LABELS)
    if len(numbers) != num_images:
        raise UserError(f"{path} has {len(numbers)} labels, {images.name} {num_images} images")
    names = tuple(getattr(torchvision.datasets, torchvision_class).classes)
    if len(numbers) and int(numbers.max()) >= len(names):
        raise UserError(f"{path} holds label {int(numbers.max())}, there are {len(names)} classes")
    return Labels(numbers.long(), names)


def parse_idx(content: bytes, path: Path, kind: IdxKind = IMAGES) -> Tensor:
    """Parse an idx file, gzip'd if its name ends in .gz → images (n, 1, 28, 28), labels (n,)."""
    header = struct.Struct(f">{2 + len(kind.shape)}I")
    try:
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        magic, number, *sides = header.unpack_from(content)
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise UserError(f"{path} is damaged: {one_line(error)}") from error
    if magic != kind.magic:
        raise UserError(f"{path} is not an idx file of {kind.content}")
    if sides != kind.shape:
        height, width = sides
        raise UserError(f"{path} holds images of {height}×{width}, not {SIDE}×{SIDE}")
    expected = header.size + number * math.prod(sides)
    if len(content) != expected:
        raise UserError(f"{path} is damaged: {len(content):,} bytes instead of {expected:,}")
    values = torch.frombuffer(bytearray(content), dtype=torch.uint8)[header.size :]
    return values.view(number, 1, *sides) if sides else values
