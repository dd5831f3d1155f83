"""Decoded images kept on disk, so that none is decoded twice, in later epochs and runs either."""

from __future__ import annotations

import hashlib
import os
import shutil
import zlib
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import IO

import PIL
import torch
from torch import Tensor

from datasets.images import ImageSet
from utils.errors import UserError, one_line
from utils.logger import log

FORMAT = "LooC decoded images 1"
PREPROCESSING = "centre square, bicubic"  # of datasets.images.decode; to be changed with it
MARK = 4  # bytes of a checksum


class CachedImages(ImageSet):
    """Another set's images, each decoded when it is first asked for and from then on read back.

    The file is a header and a record for each image: a checksum, then the pixels. A record counts
    where its checksum is right, which that of zeros is not: what was cut off by a kill, written by
    two at once, or damaged on the disk is decoded again. Nothing stays open, so that worker
    processes and threads may share it.

    Raises OSError where the file cannot be read or written any more: images are not at fault.
    """

    def __init__(self, images: ImageSet, path: Path, key: str) -> None:
        self.images = images
        self.path = path
        self.channels, self.image_size = images.channels, images.image_size
        self.header = f"{FORMAT} {key}\n".encode()
        self.record = MARK + self.channels * self.image_size**2  # bytes
        prepare(path, self.header, len(self.header) + len(images) * self.record)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        image = self.stored(index)
        if image is None:
            image = self.images[index]
            self.store(index, image)
        return image

    def name(self, index: int) -> str:
        return self.images.name(index)

    def stored(self, index: int) -> Tensor | None:
        """An image (C, H, W) from the file; None where it is not there, or not whole."""
        image = torch.empty(self.channels, self.image_size, self.image_size, dtype=torch.uint8)
        mark = bytearray(MARK)
        with self.path.open("rb", buffering=0) as file:
            os.preadv(file.fileno(), [mark, image.numpy().data], self.offset(index))
        return image if mark == checksum(image) else None

    def store(self, index: int, image: Tensor) -> None:
        with self.path.open("r+b", buffering=0) as file:
            os.pwritev(file.fileno(), [checksum(image), image.numpy().data], self.offset(index))

    def offset(self, index: int) -> int:
        """Where in the file the record of an image begins."""
        return len(self.header) + index * self.record


def checksum(image: Tensor) -> bytes:
    """Of the pixels, never zeros, which are what an empty record holds."""
    return (zlib.crc32(image.numpy().data) or 1).to_bytes(MARK, "little")


def keep_decoded(images: ImageSet, folder: Path, label: str) -> CachedImages:
    """The images with a cache in folder, whose file's name begins with label.

    It is found by what the images are and how they are decoded: a file that has changed, or another
    version of Pillow, makes another cache. Raises UserError naming the folder or the file where it
    cannot be made.
    """
    digest = hashlib.sha256()
    for part in (PREPROCESSING, PIL.__version__, str(images.image_size), *images.identity()):
        digest.update(os.fsencode(part) + b"\0")
    key = digest.hexdigest()
    return CachedImages(images, folder / f"{label}-{key[:16]}.images", key)


def prepare(path: Path, header: bytes, size: int) -> None:
    """Have a file with that header and of that size, its space reserved; keep one that is there.

    Processes that do so at once wait for each other. The header, written last, tells that the space
    was granted.
    """
    import fcntl  # which Windows lacks

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_prepared(path, header, size):  # perhaps of someone else, and not to be written
            return
        path.touch()
        with path.open("r+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if is_prepared(path, header, size):
                return
            if path.stat().st_size:
                log.warning("%s is damaged or no image cache: it is made anew", path)
            reserve(file, size)
            os.pwrite(file.fileno(), header, 0)
            log.info("%s takes %.2f GB for decoded images", path, size / 1e9)
    except OSError as error:
        reason = error.strerror or one_line(error)
        if error.errno in (ENOSPC, EDQUOT):
            free = shutil.disk_usage(path.parent).free
            reason += f"; it takes {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
        raise UserError(f"--image_cache: {path} cannot be made: {reason}") from error


def is_prepared(path: Path, header: bytes, size: int) -> bool:
    """Whether the file is there, of that header and size."""
    if not path.exists():
        return False
    with path.open("rb") as file:
        return file.read(len(header)) == header and path.stat().st_size == size


def reserve(file: IO[bytes], size: int) -> None:
    """Empty the file and take the space for size bytes of zeros, or leave it empty and raise."""
    os.ftruncate(file.fileno(), 0)
    try:
        os.posix_fallocate(file.fileno(), 0, size)  # a hole would end in a full disk, hours later
    except OSError:
        os.ftruncate(file.fileno(), 0)
        raise
