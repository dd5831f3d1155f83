"""LSUN: the published lmdb databases, or folders of images; decoded on demand.

torchvision's own class is not used: it keeps its list of keys in a pickle, opened unchecked.
"""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from datasets.folders import open_folder
from datasets.image_sets import (
    ImageSet,
    Pixels,
    Place,
    Split,
    decode,
    decode_picture,
    size_and_time,
)
from utils.errors import UserError, one_line
from utils.packages import need

ENDINGS: dict[Split, str] = {"train": "train_lmdb", "test": "val_lmdb"}

# A process may open a database only once at a time; opening takes about 40 µs.
opening = threading.Lock()


def open_lsun(category: str, folder: Path, split: Split, image_size: int) -> ImageSet:
    """LSUN (Yu et al., arXiv 1506.03365), one category; its validation set is the test set.

    Read from <folder>/<category>_train_lmdb and …_val_lmdb where either exists, else from image
    files as `open_folder` does.
    """
    databases = {which: folder / f"{category}_{ending}" for which, ending in ENDINGS.items()}
    if (folder / "data.mdb").is_file():
        parent = folder.absolute().parent
        raise UserError(f"--data_folder {folder} is a database itself: give its folder, {parent}")
    if not any(path.is_dir() for path in databases.values()):
        others = ", ".join(sorted(path.name for path in folder.glob("*_lmdb")))
        if others:
            wanted = " or ".join(path.name for path in databases.values())
            raise UserError(f"--data_folder {folder} has {others}, but no {wanted}")
        return open_folder(folder, split, image_size)
    if not databases[split].is_dir():
        raise UserError(f"--data_folder {folder} has no {databases[split].name}")
    return LmdbImages(databases[split], image_size)


class LmdbImages(ImageSet):
    """The images of an lmdb database; no file stays open, so that workers may share it."""

    channels = 3

    def __init__(self, path: Path, image_size: int) -> None:
        self.path = path
        self.image_size = image_size
        self.keys = read_keys(path)  # (n,), bytes of fixed length: millions need little memory

    def __len__(self) -> int:
        return len(self.keys)

    def cropped(self, index: int, place: Place | None = None) -> Tensor:
        return decode(self.file(index), self.image_size, self.name(index), place)

    def picture(self, index: int, scale: float) -> Pixels:
        return decode_picture(self.file(index), scale, self.name(index))

    def file(self, index: int) -> io.BytesIO:
        """Return the content of an image file."""
        with opening, open_database(self.path) as database, database.begin() as transaction:
            return io.BytesIO(transaction.get(bytes(self.keys[index])))

    def name(self, index: int) -> str:
        return f"{bytes(self.keys[index]).decode(errors='replace')} in {self.path}"

    def split_keys(self) -> Sequence[str]:
        return [key.decode(errors="replace") for key in self.keys.tolist()]

    def identity(self) -> Iterator[str]:
        yield size_and_time(str(self.path / "data.mdb"))
        yield hashlib.sha256(self.keys.tobytes()).hexdigest()


def read_keys(path: Path) -> np.ndarray:
    """Return all keys of a database, in its order: (n,), bytes."""
    with opening, open_database(path) as database:
        pages = database.info()["last_pgno"] + 1
        if (path / "data.mdb").stat().st_size < pages * database.stat()["psize"]:
            raise UserError(f"{path} is truncated")
        with database.begin() as transaction:
            return np.array(list(transaction.cursor().iternext(values=False)), dtype=np.bytes_)


@contextmanager
def open_database(path: Path) -> Iterator[Any]:
    """Open a database read-only, without a lock file. Raises UserError naming it."""
    lmdb = need("lmdb", str(path))
    try:
        with lmdb.open(str(path), readonly=True, lock=False, readahead=False) as database:
            yield database
    except lmdb.Error as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error
