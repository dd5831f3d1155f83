"""Pairs of image files of one name: found, checked, read and compared in worker processes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch.utils.data import DataLoader, Dataset

from utils.errors import UserError, printable
from utils.evaluation.metrics import Pixels, Values
from utils.evaluation.protocols import Protocol
from utils.image_files import (
    SUFFIXES,
    image_names,
    more_than_8_bits,
    open_image,
    viewed,
    viewed_size,
)

GREY_MODES = ("1", "L", "LA", "La")
MAX_NAMED = 5  # names in an error

# --num_workers is the user's choice, and more than the cores may suit a slow disk.
warnings.filterwarnings("ignore", "This DataLoader will create")


@dataclass(frozen=True)
class Pair:
    """Two image files of one name and one size, and the mode that both are read in."""

    name: str
    original: Path
    reconstruction: Path
    size: tuple[int, int]  # width, height
    mode: Literal["L", "RGB"]


@dataclass(frozen=True)
class Batch:
    """Images of one size, and what was measured where they were read."""

    names: list[str]  # B
    images: tuple[Pixels, Pixels]  # originals and reconstructions, (B, C, H, W)
    for_inception: tuple[Pixels, Pixels]  # (B, C, h, w)
    values: dict[str, Values]  # (B,) each
    skipped: dict[str, str]  # name → why the pair could not be decoded and is not among them


# ---------------------------------------------------------------------------------------- finding


def open_pairs(
    gt_path: Path, g_path: Path, *, num_test: int | None, skip_bad: bool
) -> tuple[list[Pair], dict[str, str]]:
    """The pairs in the order of their names, num_test of them, and why others are left out.

    Reads no more than the images' headers.
    """
    folders = {"--gt_path": gt_path, "--g_path": g_path}
    files = {flag: images_in(flag, folder) for flag, folder in folders.items()}
    names = sorted({name for found in files.values() for name in found})
    if num_test is not None and num_test > len(names):
        raise UserError(f"--num_test {num_test}, but there are {len(names)} images")
    names = names[:num_test]
    check_partners(names, files)
    originals, reconstructions = files.values()
    headers, skipped = {}, {}
    for name in names:
        try:
            headers[name] = read_header(originals[name]), read_header(reconstructions[name])
        except UserError as error:
            if not skip_bad:
                raise
            skipped[name] = str(error)
    different = [
        f"{name} ({width}×{height} and {w}×{h})"
        for name, (((width, height), _), ((w, h), _)) in headers.items()
        if (width, height) != (w, h)
    ]
    if different:
        raise UserError(
            f"{len(different)} of {len(names)} pairs differ in size: {first_few(different)}"
        )
    pairs = [
        Pair(name, originals[name], reconstructions[name], size, mode if mode == other else "RGB")
        for name, ((size, mode), (_, other)) in headers.items()
    ]
    return pairs, skipped


def images_in(flag: str, folder: Path) -> dict[str, Path]:
    """The images of a folder and its subfolders by their relative path without suffix."""
    try:
        files = image_names(folder)
    except OSError as error:
        raise UserError(f"{flag} {error.filename} cannot be read: {error.strerror}") from error
    found: dict[str, Path] = {}
    for file in files:
        name, path = file[: file.rindex(".")], folder / file
        if name in found:
            raise UserError(f"{flag} holds two images of one name: {found[name]} and {path}")
        found[name] = path
    if not found:
        raise UserError(f"{flag} {folder} holds no images ({' '.join(SUFFIXES)})")
    return found


def check_partners(names: list[str], files: dict[str, dict[str, Path]]) -> None:
    """Raise UserError where a name is not in both folders."""
    lacking = {flag: [name for name in names if name not in found] for flag, found in files.items()}
    if any(lacking.values()):
        problems = [
            f"{flag} lacks {len(missing)} of {len(names)} ({first_few(missing)})"
            for flag, missing in lacking.items()
            if missing
        ]
        raise UserError(f"images are paired by name, and {'; '.join(problems)}")


def first_few(names: Sequence[str]) -> str:
    return ", ".join(map(printable, names[:MAX_NAMED])) + (", …" if len(names) > MAX_NAMED else "")


# ---------------------------------------------------------------------------------------- reading


def read_header(path: Path) -> tuple[tuple[int, int], Literal["L", "RGB"]]:
    """Width and height, and the mode to read it in. Raises UserError where it cannot be read."""
    with open_image(path, str(path)) as image:
        if more_than_8_bits(image):
            raise UserError(f"image {path} has more than 8 bits a channel")
        return viewed_size(image), "L" if image.mode in GREY_MODES else "RGB"


def read_image(path: Path, pair: Pair) -> tuple[Pixels, str | None]:
    """The pixels of one image of the pair as (C, H, W), and the format of its file.

    Raises UserError where it is damaged.
    """
    with open_image(path, str(path)) as image:
        picture = viewed(image, pair.mode)
        if picture.size != pair.size:
            raise ValueError("its size is not that of its header")
        pixels = np.asarray(picture)
        return pixels[None] if pair.mode == "L" else pixels.transpose(2, 0, 1), image.format


def read_pair(pair: Pair, protocol: Protocol) -> tuple[Pixels, Pixels]:
    """Original and reconstruction as they are measured, (C, H, W)."""
    original, original_format = read_image(pair.original, pair)
    reconstruction, format_ = read_image(pair.reconstruction, pair)
    return (
        protocol.prepare(original, "original", original_format),
        protocol.prepare(reconstruction, "reconstruction", format_),
    )


class ReadAndCompare(Dataset[Batch]):
    """Reads a batch of pairs and computes the metrics that need no network; runs in workers."""

    def __init__(
        self, parts: list[list[Pair]], compared: list[str], protocol: Protocol, inception: bool
    ) -> None:
        self.parts = parts
        self.compared = compared
        self.protocol = protocol
        self.inception = inception

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> Batch:
        read: dict[str, tuple[Pixels, Pixels]] = {}
        skipped: dict[str, str] = {}
        for pair in self.parts[index]:
            try:
                read[pair.name] = read_pair(pair, self.protocol)
            except UserError as error:  # raised here, it would arrive in the worker's traceback
                skipped[pair.name] = str(error)
        if not read:
            nothing = np.empty(0, np.uint8), np.empty(0, np.uint8)
            return Batch([], nothing, nothing, {}, skipped)
        x, y = (np.stack(images) for images in zip(*read.values()))
        values = {}
        for name in self.compared:
            compare: Callable[[Pixels, Pixels], Values] | None = self.protocol.comparison(name)
            if compare is not None:
                values[name] = compare(x, y)
        resized = (x, y)
        if self.inception:
            resized = self.protocol.for_inception(x), self.protocol.for_inception(y)
        return Batch(list(read), (x, y), resized, values, skipped)


def batches(
    pairs: list[Pair],
    compared: list[str],
    protocol: Protocol,
    *,
    inception: bool,
    batch_size: int,
    num_workers: int | None,
    skip_bad: bool,
) -> Iterator[Batch]:
    """Consecutive pairs of one size and mode, batch_size at a time, read by num_workers.

    Where inception, its images are prepared too. Raises UserError naming an image that is damaged,
    unless skip_bad.
    """
    groups = [list(group) for _, group in groupby(pairs, lambda pair: (pair.size, pair.mode))]
    parts = [
        group[i : i + batch_size] for group in groups for i in range(0, len(group), batch_size)
    ]
    loader: DataLoader[Batch] = DataLoader(
        ReadAndCompare(parts, compared, protocol, inception),
        batch_size=None,
        num_workers=min(cores() if num_workers is None else num_workers, len(parts)),
        collate_fn=as_is,
    )
    for batch in loader:
        if batch.skipped and not skip_bad:
            raise UserError(next(iter(batch.skipped.values())))
        yield batch


def as_is(batch: Any) -> Any:
    """Leaves numpy arrays as they are: tensors would need shared memory, scarce in containers."""
    return batch


def cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
