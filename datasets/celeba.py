"""CelebA: aligned faces in torchvision's layout, decoded on demand."""

from __future__ import annotations

import os
from pathlib import Path

from datasets.image_sets import FileImages, ImageSet, Split
from datasets.staging import fetch
from utils.errors import UserError

IMAGES = "img_align_celeba"
PARTITIONS = ("list_eval_partition.txt", "list_eval_partition.csv")  # the second is Kaggle's
NUMBERS: dict[Split, str] = {"train": "0", "test": "2"}  # 1 is CelebA's own validation set


def open_celeba(folder: Path, split: Split, image_size: int) -> ImageSet:
    """CelebA (Liu, Luo, Wang, Tang, ICCV 2015): 162,770 training and 19,962 test images.

    Read from <folder>/celeba or folder: img_align_celeba, a folder (perhaps within another of this
    name) or .zip, and the list of partitions, .txt or .csv.
    """
    base = next((place for place in (folder / "celeba", folder) if is_base(place)), None)
    if base is None:
        from torchvision.datasets import CelebA

        looked = f"{folder / CelebA.base_folder}, {folder}"
        missing = f"--dataset celeba: {IMAGES} and {PARTITIONS[0]} are in none of {looked}"
        fetch(lambda root: CelebA(root, download=True), folder, missing)
        base = folder / CelebA.base_folder
    if not (base / IMAGES).is_dir():
        unpack(base)
    images, path = base / IMAGES, next(path for path in lists(base) if path.is_file())
    if (images / IMAGES).is_dir():
        images /= IMAGES
    names = partition(path, NUMBERS[split])
    absent = sorted({*names} - {*os.listdir(images)})  # noqa: PTH208, of 200,000 images
    if absent:
        raise UserError(f"{images} lacks {len(absent):,} images of {path}, such as {absent[0]}")
    return FileImages(images, names, image_size)


def is_base(folder: Path) -> bool:
    """Return whether the folder holds the images, packed or not, and the list of partitions."""
    images = (folder / IMAGES).is_dir() or (folder / f"{IMAGES}.zip").is_file()
    return images and any(path.is_file() for path in lists(folder))


def lists(folder: Path) -> list[Path]:
    return [folder / name for name in PARTITIONS]


def unpack(base: Path) -> None:
    """Unpack img_align_celeba.zip. Raises UserError where it is damaged."""
    from torchvision.datasets.utils import extract_archive

    archive = (base / f"{IMAGES}.zip").absolute()
    missing = f"--dataset celeba: {base / IMAGES} is missing"
    fetch(lambda root: extract_archive(str(archive), root), base, missing)
    if not (base / IMAGES).is_dir():
        raise UserError(f"{archive} holds no folder {IMAGES}")


def partition(path: Path, number: str) -> list[str]:
    """Return the names of one partition. Raises UserError naming a damaged line."""
    names = []
    lines = path.read_text("utf-8-sig", errors="replace").splitlines()
    for i, line in enumerate(lines, start=1):
        fields = line.replace(",", " ").split()
        if i == 1 and fields == ["image_id", "partition"]:
            continue
        if len(fields) != 2 or fields[1] not in ("0", "1", "2"):
            raise UserError(f"{path} line {i} is not an image's name and 0, 1 or 2")
        if fields[1] == number:
            names.append(fields[0])
    return names
