"""Data sets by name: a new one is one entry of DATASETS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from datasets.cache import keep_decoded
from datasets.celeba import open_celeba
from datasets.cifar import open_cifar10
from datasets.folders import list_images, open_ffhq, open_folder, open_imagenet, warn_of_empty_bits
from datasets.idx import open_fashion_mnist, open_mnist, open_sample
from datasets.image_sets import FileImages, ImageSet, Split, joined
from datasets.lsun import open_lsun
from datasets.patches import patches_of
from modules.options import unknown_name
from utils.errors import UserError, one_line


@dataclass(frozen=True)
class DatasetEntry:
    """Properties of a data set that is not opened yet."""

    channels: int
    image_size: int  # height and width in pixels; the default where resizable
    open: Callable[[Path, Split, int], ImageSet]  # folder, split, image_size → the images
    resizable: bool = False
    bundled: bool = False  # in this repository: no folder is read


DATASETS = {
    "mnist": DatasetEntry(1, 28, open_mnist),
    "fashion-mnist": DatasetEntry(1, 28, open_fashion_mnist),
    "fashion-mnist-sample": DatasetEntry(1, 28, open_sample, bundled=True),
    "cifar10": DatasetEntry(3, 32, open_cifar10),
    "celeba": DatasetEntry(3, 128, open_celeba, resizable=True),
    "imagenet": DatasetEntry(3, 256, open_imagenet, resizable=True),
    "ffhq": DatasetEntry(3, 256, open_ffhq, resizable=True),
    "lsun-bedroom": DatasetEntry(3, 256, partial(open_lsun, "bedroom"), resizable=True),
    "lsun-church": DatasetEntry(3, 256, partial(open_lsun, "church_outdoor"), resizable=True),
    "folder": DatasetEntry(3, 256, open_folder, resizable=True),
}


def open_dataset(
    name: str,
    data_folder: str | None,
    split: Split | Literal["all"],
    image_size: int | None = None,
    image_cache: str | None = None,
    patch_scale: float | None = None,
    bits: int = FileImages.bits,
) -> ImageSet:
    """Open one split of a data set, or all images; torchvision downloads it if it can.

    data_folder is by default data/<name>, image_size the entry's; image_cache is a folder that
    keeps the decoded images of sets on disk. With patch_scale those are cut into `Patches`. bits:
    those that 16-bit grey levels use. Raises UserError, one line naming the flag or the file, where
    the set is missing, empty, damaged or not of that size.
    """
    if name not in DATASETS:
        raise UserError(unknown_name("--dataset", name, DATASETS))
    entry = DATASETS[name]
    size = entry.image_size if image_size is None else image_size
    if size != entry.image_size and not entry.resizable:
        raise UserError(
            f"--image_size {size} contradicts --dataset {name}, whose images are "
            f"{entry.image_size}×{entry.image_size}"
        )
    if size < 1:
        raise UserError(f"--image_size {size} is less than 1")
    if data_folder == "":
        raise UserError("--data_folder is empty")
    if entry.bundled and data_folder is not None:
        raise UserError(
            f"--data_folder {data_folder} has no effect: the images of --dataset {name} are in "
            "this repository; --dataset folder reads your own"
        )
    folder = Path("data") / name if data_folder is None else Path(data_folder)
    if name == "folder" and data_folder is None and not folder.exists():
        raise UserError("--dataset folder needs --data_folder, the folder of the images")
    try:
        refuse_files(folder)
        if name == "folder" and split == "all":
            images: ImageSet = FileImages(folder, list_images(folder), size)
        elif split == "all":
            images = joined([entry.open(folder, part, size) for part in ("train", "test")])
        else:
            images = entry.open(folder, split, size)
    except OSError as error:
        place, reason = error.filename or folder, error.strerror or one_line(error)
        raise UserError(f"--data_folder {place} cannot be read: {reason}") from error
    if len(images) == 0:
        raise UserError(f"--data_folder {folder} holds no {split} images of --dataset {name}")
    if isinstance(images, FileImages):
        images.bits = bits
        if bits == FileImages.bits:
            warn_of_empty_bits(images.folder, images.names)
    elif bits != FileImages.bits:
        raise UserError(f"--bits {bits} has no effect with --dataset {name}")
    if patch_scale is not None:
        return patches_of(images, patch_scale, image_cache, f"{name}-{split}")
    if image_cache is None or not entry.resizable:
        return images
    return keep_decoded(images, Path(image_cache), f"{name}-{split}-{size}")


def refuse_files(folder: Path) -> None:
    """Raise UserError where the folder, or one of its parents, is a file."""
    nearest = next((place for place in (folder, *folder.parents) if place.exists()), None)
    if nearest and not nearest.is_dir():
        inside = "" if nearest == folder else f": {nearest}"
        raise UserError(f"--data_folder {folder}{inside} is not a folder")
