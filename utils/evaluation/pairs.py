"""Pairs of image files with the same name: finding, checking, reading and comparing them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from torch.utils.data import DataLoader

from utils import image_files
from utils.errors import UserError, printable
from utils.evaluation.config import EvaluationConfig
from utils.evaluation.metrics import CHOICES, METRICS, Pixels, Values
from utils.evaluation.protocols import PROTOCOLS, Protocol, from_picture
from utils.logger import log
from utils.workers import from_workers, start_worker

GREY_MODES = ("1", "L", "LA", "La")
MAX_NAMED = 5  # names in an error


@dataclass(frozen=True)
class Pair:
    """Two image files with the same name and size, and the mode in which both are read."""

    name: str
    original: Path
    reconstruction: Path
    size: tuple[int, int]  # width, height
    mode: Literal["L", "RGB"]


@dataclass(frozen=True)
class Batch:
    """Images of one size, and the metrics that worker processes computed."""

    names: list[str]  # B
    images: tuple[Pixels, Pixels]  # originals and reconstructions, (B, C, H, W)
    for_inception: tuple[Pixels, Pixels]  # (B, C, h, w)
    values: dict[str, Values]  # (B,) each
    skipped: dict[str, str]  # name → why the pair could not be decoded


class Found(NamedTuple):
    """The files of a folder."""

    images: dict[str, Path]  # by name without suffix
    left_out: Counter[str]  # other files, by suffix


Files: TypeAlias = dict[str, Found]  # by flag


def find_images(config: EvaluationConfig) -> Files:
    """Find the images of both folders. Raises UserError if there are fewer than --num_test."""
    folders = {"--gt_path": Path(config.gt_path), "--g_path": Path(config.g_path)}
    files = {flag: images_in(flag, folder) for flag, folder in folders.items()}
    number = len(set().union(*(found.images for found in files.values())))
    if config.num_test is not None and config.num_test > number:
        raise UserError(f"--num_test {config.num_test}, but there are {number} images")
    if folders["--gt_path"].samefile(folders["--g_path"]):
        log.warning("--gt_path and --g_path are one folder: images are compared with themselves")
    return files


def open_pairs(config: EvaluationConfig, files: Files) -> tuple[list[Pair], dict[str, str]]:
    """Return the pairs to measure, by their headers, and why others are skipped; sorted by name."""
    originals, reconstructions = (found.images for found in files.values())
    names = sorted({*originals, *reconstructions})[: config.num_test]
    lacking = {
        flag: [name for name in names if name not in found.images] for flag, found in files.items()
    }
    if any(lacking.values()):
        problems = "; ".join(
            f"{flag} lacks {len(missing)} of {len(names)} ({first_few(missing)})"
            for flag, missing in lacking.items()
            if missing
        )
        raise UserError(f"images are paired by name, and {problems}")
    for flag, found in files.items():
        if found.left_out:
            others = image_files.listed(found.left_out)
            number = image_files.counted(len(found.images), "image")
            log.warning("%s: %s; left out: %s", flag, number, others)
    pairs, skipped, different = [], {}, []
    for name in names:
        try:
            pairs.append(open_pair(name, originals[name], reconstructions[name]))
        except DifferentSizes as error:
            different.append(f"{name} ({error.sizes})")
        except UserError as error:
            if not config.skip_bad_images:
                raise
            skipped[name] = str(error)
    if different:
        number = f"{len(different)} of {len(names)}"
        raise UserError(f"{number} pairs differ in size: {first_few(different)}")
    return pairs, skipped


def open_pair(name: str, original: Path, reconstruction: Path) -> Pair:
    """Read the headers of a pair. Raises UserError if it cannot be measured."""
    (size, mode), (other, other_mode) = read_header(original), read_header(reconstruction)
    if size != other:
        raise DifferentSizes(" and ".join(f"{width}×{height}" for width, height in (size, other)))
    return Pair(name, original, reconstruction, size, mode if mode == other_mode else "RGB")


class DifferentSizes(UserError):
    """The images of a pair differ in size."""

    def __init__(self, sizes: str) -> None:
        super().__init__(f"original and reconstruction differ in size ({sizes})")
        self.sizes = sizes


def images_in(flag: str, folder: Path) -> Found:
    """Images in a folder and its subfolders, by relative path without suffix, and other files."""
    left_out: Counter[str] = Counter()
    try:
        files = image_files.image_names(folder, left_out)
    except OSError as error:
        raise UserError(f"{flag} {error.filename} cannot be read: {error.strerror}") from error
    found: dict[str, Path] = {}
    for file in files:
        name, path = file[: file.rindex(".")], folder / file
        if name in found:
            raise UserError(f"{flag} holds two images with the same name: {found[name]} and {path}")
        found[name] = path
    if not found:
        others = f"; left out: {image_files.listed(left_out)}" if left_out else ""
        known = " ".join(image_files.SUFFIXES)
        raise UserError(f"{flag} {folder} holds no images ({known}){others}")
    return Found(found, left_out)


def first_few(names: Sequence[str]) -> str:
    return ", ".join(map(printable, names[:MAX_NAMED])) + (", …" if len(names) > MAX_NAMED else "")


def read_header(path: Path) -> tuple[tuple[int, int], Literal["L", "RGB"]]:
    """Width and height, and the mode to read the image in. Raises UserError if it is damaged."""
    with image_files.open_image(path, str(path)) as image:
        if image_files.more_than_8_bits(image):
            raise UserError(f"image {path} has more than 8 bits per channel")
        return image_files.viewed_size(image), "L" if image.mode in GREY_MODES else "RGB"


def read_image(path: Path, pair: Pair) -> tuple[Pixels, str | None]:
    """Read one image of the pair (C, H, W), and its format. Raises UserError if it is damaged."""
    with image_files.open_image(path, str(path)) as image:
        picture = image_files.viewed(image, pair.mode)
        if picture.size != pair.size:
            raise ValueError("its size differs from its header")
        return from_picture(picture), image.format


def read_pair(pair: Pair, protocol: Protocol) -> tuple[Pixels, Pixels]:
    """Read original and reconstruction as they are measured, (C, H, W)."""
    original = protocol.prepare(*read_image(pair.original, pair), "original")
    return original, protocol.prepare(*read_image(pair.reconstruction, pair), "reconstruction")


def read_and_compare(
    pairs: list[Pair], compared: Container[str], protocol: Protocol, inception: bool
) -> Batch:
    """Read pairs, and compare them by the chosen metrics without network."""
    read: dict[str, tuple[Pixels, Pixels]] = {}
    skipped: dict[str, str] = {}
    for pair in pairs:
        try:
            read[pair.name] = read_pair(pair, protocol)
        except UserError as error:  # raised here, it would come with a traceback of the worker
            skipped[pair.name] = str(error)
    if not read:
        nothing = np.empty(0, np.uint8), np.empty(0, np.uint8)
        return Batch([], nothing, nothing, {}, skipped)
    x, y = (np.stack(images) for images in zip(*read.values()))
    compare = {name: protocol.comparison(name) for name in METRICS if name in compared}
    values = {name: function(x, y) for name, function in compare.items() if function is not None}
    resized = (protocol.for_inception(x), protocol.for_inception(y)) if inception else (x, y)
    return Batch(list(read), (x, y), resized, values, skipped)


def batches(config: EvaluationConfig, pairs: Sequence[Pair]) -> Iterator[Batch]:
    """Yield batches of consecutive pairs of one size and mode, read by worker processes.

    Raises UserError naming a damaged image, unless such pairs are skipped.
    """
    size = config.batch_size
    groups = [list(group) for _, group in groupby(pairs, lambda pair: (pair.size, pair.mode))]
    parts = [group[i : i + size] for group in groups for i in range(0, len(group), size)]
    compared = {name for choice in config.metrics for name in CHOICES[choice]}
    protocol = PROTOCOLS[config.protocol]
    read = partial(
        read_and_compare, compared=compared, protocol=protocol, inception=config.inception
    )
    affine = hasattr(os, "sched_getaffinity")  # cores this process may use, where that is known
    cores = len(os.sched_getaffinity(0)) if affine else os.cpu_count() or 1
    workers = cores if config.num_workers is None else config.num_workers
    loader: DataLoader[Batch] = DataLoader(
        parts,  # type: ignore[arg-type]
        batch_size=None,
        num_workers=min(workers, len(parts)),
        collate_fn=read,
        worker_init_fn=start_worker,
    )
    for batch in from_workers(loader, workers):
        if batch.skipped and not config.skip_bad_images:
            raise UserError(next(iter(batch.skipped.values())))
        yield batch
