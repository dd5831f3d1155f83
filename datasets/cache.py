"""Cache of decoded images on disk, for later epochs and later runs."""

from __future__ import annotations

import hashlib
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from errno import EDQUOT, EIO, ENOSPC
from pathlib import Path

import PIL
import torch
from torch import Tensor

from datasets.image_sets import ImageSet, Labels, Place
from utils.errors import UserError, one_line
from utils.logger import log

FORMAT = "LooC decoded images 1"
PREPROCESSING = "centre square, bicubic"  # of datasets.image_sets.decode; to be changed with it
CHECKSUM = 4  # bytes


class CachedImages(ImageSet):
    """Another set's images, each decoded on its first use and read from the file afterwards.

    The file is a header and a record for each image: a checksum, then the pixels. A record is valid
    if its checksum is: one cut off by a kill, written by two processes at once, damaged, or still
    empty is decoded again. No file stays open, so that worker processes and threads may share it;
    a memory map instead would end the process, without a message, where the file is cut short.

    Raises OSError naming the file where it cannot be read or written any more.
    """

    def __init__(self, images: ImageSet, path: Path, key: str) -> None:
        self.images = images
        self.path = path
        self.channels, self.image_size = images.channels, images.image_size
        self.splits = images.splits
        self.header = f"{FORMAT} {key}\n".encode()
        self.record = CHECKSUM + self.channels * self.image_size**2  # bytes
        prepare(path, self.header, len(self.header) + len(images) * self.record)

    def __len__(self) -> int:
        return len(self.images)

    def cropped(self, index: int, _place: Place | None = None) -> Tensor:
        image = self.stored(index)
        if image is None:
            image = self.images[index]
            self.store(index, image)
        return image

    def name(self, index: int) -> str:
        return self.images.name(index)

    def split_keys(self) -> Sequence[str]:
        return self.images.split_keys()

    def labels(self) -> Labels:
        return self.images.labels()

    def stored(self, index: int) -> Tensor | None:
        """Return an image (C, H, W) from the file; None where its record is not valid."""
        image = torch.empty(self.channels, self.image_size, self.image_size, dtype=torch.uint8)
        stored = bytearray(CHECKSUM)
        with naming(self.path), self.path.open("rb", buffering=0) as file:
            os.preadv(file.fileno(), [stored, image.numpy().data], self.offset(index))
        return image if stored == checksum(image) else None

    def store(self, index: int, image: Tensor) -> None:
        with naming(self.path), self.path.open("r+b", buffering=0) as file:
            os.pwritev(file.fileno(), [checksum(image), image.numpy().data], self.offset(index))

    def offset(self, index: int) -> int:
        """Return the position in the file where the record of an image begins."""
        return len(self.header) + index * self.record


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name flag and file in each OSError: those of an open file name none."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise OSError(error.errno or EIO, reason, f"--image_cache: {path}") from error


def checksum(image: Tensor) -> bytes:
    """CRC of the pixels; never zero, which marks an empty record."""
    return (zlib.crc32(image.numpy().data) or 1).to_bytes(CHECKSUM, "little")


def keep_decoded(images: ImageSet, folder: Path, label: str) -> CachedImages:
    """Return the images with a cache in folder, in a file whose name begins with label.

    The name depends on the image files and on how they are decoded: a changed file, or another
    version of Pillow, gets another cache. Raises UserError where the cache cannot be created.
    """
    key = key_of(images, PREPROCESSING, PIL.__version__, str(images.image_size))
    return CachedImages(images, folder / f"{label}-{key[:16]}.images", key)


def key_of(images: ImageSet, *preprocessing: str) -> str:
    """Return a digest of the image files and of how they are decoded."""
    digest = hashlib.sha256()
    for part in (*preprocessing, *images.identity()):
        digest.update(os.fsencode(part) + b"\0")
    return digest.hexdigest()


def prepare(path: Path, header: bytes, size: int) -> None:
    """Create a file of this size; the header, written last, says that its space is reserved."""
    import fcntl  # which Windows lacks

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_prepared(path, header, size):  # perhaps read-only for this user
            return
        path.touch()
        with path.open("r+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if is_prepared(path, header, size):
                return
            if path.stat().st_size:
                log.warning("%s is damaged or not an image cache; it is created again", path)
            os.ftruncate(file.fileno(), 0)
            try:
                os.posix_fallocate(file.fileno(), 0, size)  # a sparse file would fail hours later
            except OSError:
                os.ftruncate(file.fileno(), 0)
                raise
            os.pwrite(file.fileno(), header, 0)
            log.info("%s takes %.2f GB for decoded images", path, size / 1e9)
    except OSError as error:
        reason = error.strerror or one_line(error)
        if error.errno in (ENOSPC, EDQUOT):
            free = shutil.disk_usage(path.parent).free
            reason += f"; it needs {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
        raise UserError(f"--image_cache: {path} cannot be created: {reason}") from error


def is_prepared(path: Path, header: bytes, size: int) -> bool:
    """Return whether the file is there, with this header and size."""
    if not path.exists():
        return False
    with path.open("rb") as file:
        return file.read(len(header)) == header and path.stat().st_size == size
