"""The image files that are measured: finding, checking, reading and comparing them."""

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
from utils.evaluation.protocols import PROTOCOLS, SIDES, Protocol, Side, from_picture
from utils.logger import log, progress
from utils.workers import from_workers, start_worker

Mode: TypeAlias = Literal["L", "RGB"]

GREY_MODES = ("1", "L", "LA", "La")
MAX_NAMED = 5  # names in an error


@dataclass(frozen=True)
class Entry:
    """A pair of image files of one size, or a single one, and the mode in which it is read."""

    name: str
    files: dict[Side, Path]
    size: tuple[int, int]  # width, height
    mode: Mode


@dataclass(frozen=True)
class Batch:
    """Images of one size, and the metrics that worker processes computed."""

    names: list[str]  # B
    images: dict[Side, Pixels]  # (B, C, H, W) each
    for_inception: dict[Side, Pixels]  # (B, C, h, w) each
    values: dict[str, Values]  # (B,) each
    skipped: dict[str, str]  # name → why the entry could not be decoded


class Found(NamedTuple):
    """The files of a folder."""

    images: dict[str, Path]  # by name without suffix
    left_out: Counter[str]  # other files, by suffix


Files: TypeAlias = dict[str, Found]  # by flag


def find_images(config: EvaluationConfig) -> Files:
    """Find the images of both folders. Raises UserError if there are fewer than --num_test."""
    folders = {"--gt_path": Path(config.gt_path), "--g_path": Path(config.g_path)}
    files = {flag: images_in(flag, folder) for flag, folder in folders.items()}
    numbers = {f" in {flag}": len(found.images) for flag, found in files.items()}
    if not config.unpaired:
        numbers = {"": len(set().union(*(found.images for found in files.values())))}
    for place, number in numbers.items():
        if config.num_test is not None and config.num_test > number:
            raise UserError(f"--num_test {config.num_test}, but there are {number} images{place}")
    if folders["--gt_path"].samefile(folders["--g_path"]):
        log.warning("--gt_path and --g_path are one folder: images are compared with themselves")
    return files


def open_entries(config: EvaluationConfig, files: Files) -> tuple[list[Entry], dict[str, str]]:
    """Return the entries to measure, by their headers, and why others are skipped.

    They are sorted by name; without pairs the originals are first.
    """
    entries, skipped = (open_singles if config.unpaired else open_pairs)(config, files)
    for flag, found in files.items():
        if found.left_out:
            others = image_files.listed(found.left_out)
            number = image_files.counted(len(found.images), "image")
            log.warning("%s: %s; left out: %s", flag, number, others)
    return entries, skipped


def open_singles(config: EvaluationConfig, files: Files) -> tuple[list[Entry], dict[str, str]]:
    """Open the images of both folders, each for itself."""
    entries: list[Entry] = []
    skipped: dict[str, str] = {}
    sizes: dict[str, set[str]] = {}
    for side, (flag, found) in zip(SIDES, files.items()):
        for name in headers(flag, sorted(found.images)[: config.num_test]):
            path = found.images[name]
            try:
                size, mode = read_header(path)
            except UserError as error:
                if not config.skip_bad_images:
                    raise
                skipped[str(path)] = str(error)
                continue
            sizes.setdefault(f"{size[0]}×{size[1]}", set()).add(flag)
            entries.append(Entry(str(path), {side: path}, size, mode))
    differing = [f"{size} ({flag})" for size, (flag, *more) in sizes.items() if not more]
    if differing:
        log.warning(
            "the folders differ in the sizes of their images, and blur counts as a difference: %s",
            first_few(differing),
        )
    return entries, skipped


def open_pairs(config: EvaluationConfig, files: Files) -> tuple[list[Entry], dict[str, str]]:
    """Open the pairs. Raises UserError if an image lacks its partner or differs in size."""
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
        raise UserError(f"images are paired by name, and {problems}; --unpaired compares sets")
    pairs, skipped, different = [], {}, []
    for name in headers("pairs", names):
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


def open_pair(name: str, original: Path, reconstruction: Path) -> Entry:
    """Read the headers of a pair. Raises UserError if it cannot be measured."""
    (size, mode), (other, other_mode) = read_header(original), read_header(reconstruction)
    if size != other:
        raise DifferentSizes(" and ".join(f"{width}×{height}" for width, height in (size, other)))
    files = dict(zip(SIDES, (original, reconstruction)))
    return Entry(name, files, size, mode if mode == other_mode else "RGB")


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


def headers(what: str, names: Sequence[str]) -> Iterator[str]:
    """Yield the names, with a progress bar where their files take long."""
    with progress(len(names), "header", desc=what, delay=1, leave=False) as bar:
        for name in names:
            yield name
            bar.update()


def first_few(names: Sequence[str]) -> str:
    return ", ".join(map(printable, names[:MAX_NAMED])) + (", …" if len(names) > MAX_NAMED else "")


def read_header(path: Path) -> tuple[tuple[int, int], Mode]:
    """Width and height, and the mode to read the image in. Raises UserError if it is damaged."""
    with image_files.open_image(path, str(path)) as image:
        if image_files.more_than_8_bits(image):
            raise UserError(f"image {path} has more than 8 bits per channel")
        return image_files.viewed_size(image), "L" if image.mode in GREY_MODES else "RGB"


def read_image(path: Path, entry: Entry) -> tuple[Pixels, str | None]:
    """Read one image of the entry (C, H, W), and its format. Raises UserError if it is damaged."""
    with image_files.open_image(path, str(path)) as image:
        picture = image_files.viewed(image, entry.mode)
        if picture.size != entry.size:
            raise ValueError("its size differs from its header")
        return from_picture(picture), image.format


def read_entry(entry: Entry, protocol: Protocol) -> list[Pixels]:
    """Read the images of an entry as they are measured, (C, H, W) each."""
    files = entry.files.items()
    return [protocol.prepare(*read_image(path, entry), side) for side, path in files]


def read_and_compare(
    entries: list[Entry], compared: Container[str], protocol: Protocol, inception: bool
) -> Batch:
    """Read entries of the same sides, and compare pairs by the chosen metrics without network."""
    read: dict[str, list[Pixels]] = {}
    skipped: dict[str, str] = {}
    for entry in entries:
        try:
            read[entry.name] = read_entry(entry, protocol)
        except UserError as error:  # raised here, it would come with a traceback of the worker
            skipped[entry.name] = str(error)
    if not read:
        return Batch([], {}, {}, {}, skipped)
    images = dict(zip(entries[0].files, map(np.stack, zip(*read.values()))))
    compare = {name: protocol.comparison(name) for name in METRICS if name in compared}
    values = {name: function(*images.values()) for name, function in compare.items() if function}
    resized = {side: protocol.for_inception(x) for side, x in images.items()} if inception else {}
    return Batch(list(read), images, resized, values, skipped)


def batches(config: EvaluationConfig, entries: Sequence[Entry]) -> Iterator[Batch]:
    """Yield batches of consecutive entries of one size, mode and side, read by worker processes.

    Raises UserError naming a damaged image, unless such entries are skipped.
    """
    size = config.batch_size
    groups = [
        list(group)
        for _, group in groupby(entries, lambda entry: (entry.size, entry.mode, *entry.files))
    ]
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
