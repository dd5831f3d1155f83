"""Folders of image files, decoded on demand: any folder, FFHQ and ImageNet."""

from __future__ import annotations

import hashlib
import os
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from datasets.image_sets import FileImages, FolderSplits, ImageSet, Split
from datasets.sampling import hold_out_by_name
from datasets.staging import fetch
from utils.errors import UserError
from utils.image_files import SUFFIXES, brightest, counted, image_names, is_deep, listed
from utils.logger import warn_once

FFHQ_TRAIN = 60_000
FFHQ_TEST = 10_000
SPLIT_NAMES = ("train", "training", "test", "testing", "val", "valid", "validation")
SAMPLED = 32  # images whose bytes are read when a set is opened
HEADERS = 256  # images whose number of bits is read then
IMAGENET_FOLDERS: dict[Split, str] = {"train": "train", "test": "val"}


def open_folder(folder: Path, split: Split, image_size: int) -> ImageSet:
    """Any folder of images, at any depth.

    Its subfolders train and test (or val) are the splits, if it has them; val beside both is for
    validation. Otherwise about a tenth, chosen by a hash of each name, is the test set.
    """
    names = list_images(folder)
    own = [name for name in ("train", "test", "val") if (folder / name).is_dir()]
    if "train" in own and len(own) > 1:
        parts = {
            part: [name[len(part) + 1 :] for name in names if name.startswith(f"{part}/")]
            for part in own
        }
        beside = len(names) - sum(map(len, parts.values()))
        if beside:
            warn_once(f"{folder}: {beside:,} images beside {slashed(own)} are left out")
        part = own[1] if split == "test" else split
        if not parts[part]:
            raise UserError(f"--data_folder {folder / part} holds no images")
        images = FileImages(folder / part, parts[part], image_size)
        digest = digest_of(folder / own[1], parts[own[1]])
        images.splits = FolderSplits(digest, by_name=False, has_val=len(own) == 3)
        return images
    with os.scandir(folder) as entries:
        unlike = sorted(e.name for e in entries if e.name.lower() in SPLIT_NAMES and e.is_dir())
    if unlike:
        lacking = "neither test/ nor val/" if "train" in own else "no train/"
        warn_once(
            f"{folder} has {slashed(unlike)} but {lacking}: all {len(names):,} images are split, "
            "about a tenth for testing"
        )
    if len(names) == 1:
        raise UserError(
            f"--data_folder {folder} holds 1 image: training, validation and testing need 3"
        )
    train, test = ([names[i] for i in part.tolist()] for part in hold_out_by_name(names, "test"))
    images = FileImages(folder, test if split == "test" else train, image_size)
    images.splits = FolderSplits(digest_of(folder, test), by_name=True)
    return images


def open_ffhq(folder: Path, split: Split, image_size: int) -> ImageSet:
    """FFHQ (Karras, Laine, Aila, CVPR 2019): by sorted name 60,000 to train, 10,000 to test."""
    names = list_images(folder)
    if len(names) != FFHQ_TRAIN + FFHQ_TEST:
        raise UserError(
            f"--data_folder {folder} holds {len(names):,} images; "
            f"--dataset ffhq has {FFHQ_TRAIN + FFHQ_TEST:,}"
        )
    names = names[:FFHQ_TRAIN] if split == "train" else names[FFHQ_TRAIN:]
    return FileImages(folder, names, image_size)


def open_imagenet(folder: Path, split: Split, image_size: int) -> ImageSet:
    """ImageNet (ILSVRC 2012): 1,281,167 training images; its 50,000 for validation as test set.

    Read from <folder>/train and <folder>/val; torchvision unpacks missing ones from the
    ILSVRC2012 archives in folder.
    """
    part = folder / IMAGENET_FOLDERS[split]
    if not part.is_dir():
        unpack_imagenet(folder, part)
    return FileImages(part, list_images(part), image_size)


def unpack_imagenet(folder: Path, part: Path) -> None:
    """Let torchvision unpack one split. Raises UserError where its archives are missing."""
    from torchvision.datasets import ImageNet
    from torchvision.datasets.imagenet import ARCHIVE_META

    archives = [ARCHIVE_META[which][0] for which in (part.name, "devkit")]
    absent = [name for name in archives if not (folder / name).is_file()]
    missing = f"--dataset imagenet: the folder {part} is missing"
    if absent:
        raise UserError(f"{missing}; to unpack it, {folder} lacks {' and '.join(absent)}")
    fetch(lambda root: ImageNet(root, split=part.name), folder, missing, archives)


def digest_of(folder: Path, names: Sequence[str]) -> str:
    """Digest of images' names, and of the beginning of some files: other images have other ones."""
    digest = hashlib.sha256("\0".join(names).encode(errors="surrogateescape"))
    for name in names[:: max(1, len(names) // SAMPLED)]:
        with suppress(OSError), (folder / name).open("rb") as file:  # decoding it will tell
            digest.update(file.read(2**16))
    return digest.hexdigest()


def warn_of_empty_bits(folder: Path, names: Sequence[str]) -> None:
    """Warn once where images of 16 bits leave their upper bit empty, as 12-bit data do.

    A sample is looked at, drawn with a fixed seed: of the images first, of those of 16 bits then.
    """
    deep = [name for name in sample(names, HEADERS) if is_deep(folder / name)]
    levels = []
    for name in sample(deep, SAMPLED):
        with suppress(UserError):  # decoding it for training will tell
            levels.append(brightest(folder / name))
    if levels and max(levels) < 128:
        bits = max(9, 8 + max(levels).bit_length())
        warn_once(
            f"{folder}: all images of 16 bits that were looked at ({len(levels):,}) use only their "
            f"lower {bits} bits and would become dark; give --bits {bits} if they are grey, or "
            "scale them to the full range first"
        )


def sample(names: Sequence[str], most: int) -> list[str]:
    return random.Random(0).sample(names, min(most, len(names)))


def slashed(folders: Sequence[str]) -> str:
    return ", ".join(f"{name}/" for name in folders)


def list_images(folder: Path, flag: str = "--data_folder") -> list[str]:
    """Return `image_names`, and tell once which files are left out.

    Raises UserError where the folder is missing or holds no image.
    """
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(f"{flag} {folder} {problem}")
    left_out: Counter[str] = Counter()
    names = image_names(folder, left_out)
    others = f"; left out: {listed(left_out)}" if left_out else ""
    if not names:
        raise UserError(f"{flag} {folder} holds no images ({', '.join(SUFFIXES)}){others}")
    if others:
        warn_once(f"{flag} {folder}: {counted(len(names), 'image')}{others}")
    return names
