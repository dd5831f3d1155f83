"""Writing a code file from the indices of all processes."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from torch import Tensor

from utils.codebook.codes.coder import LARGEST_TABLES, Array, Coder, cheapest_tables
from utils.codebook.codes.header import MAGIC, CodesInfo, digest_of, pixel_sum
from utils.distributed import from_first, gather, num_ranks, rank
from utils.errors import UserError
from utils.files import whole_file


class Spool:
    """A file of this process's indices, batch by batch: all of them may not fit in memory."""

    def __init__(self, path: Path, info: CodesInfo) -> None:
        self.path = path
        self.info = info
        self.pixel_sum = 0
        self.file = path.open("wb")

    def add(self, indices: Tensor, images: Tensor) -> None:
        """Append a batch of indices (B, H, W, m) and its reconstructions (B, C, h, w), uint8."""
        self.pixel_sum += pixel_sum(images)
        try:
            self.file.write(indices.cpu().numpy().astype(self.info.dtype).tobytes())
            self.file.flush()  # the first process reads it
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error


def spool_path(path: Path, number: int) -> Path:
    """Spool of process `number` for the code file at path."""
    return path.with_name(f".{path.name}.{number}.tmp")


@contextmanager
def spooled(path: Path, info: CodesInfo) -> Iterator[Spool]:
    """Yield a spool for the code file at path; it is removed when the block ends."""
    spool = Spool(spool_path(path, rank()), info)
    try:
        yield spool
    finally:
        spool.file.close()
        spool.path.unlink(missing_ok=True)


def save_codes(path: Path, spool: Spool, left_out: Sequence[int]) -> dict[str, Any]:
    """Write the code file from the spools of all processes, which call this together.

    Process r holds the batches r, r + num_ranks, …, without the images left out; the file does not
    depend on the number of processes. Returns `file_rate`.
    """
    spools = [spool_path(path, number) for number in range(num_ranks())]
    pixels = sum(gather(spool.pixel_sum))  # also waits until all spools are written
    info = replace(spool.info, left_out=tuple(left_out), pixel_sum=pixels)
    return from_first(lambda: file_rate(path, write_codes(path, info, spools)))


def write_codes(path: Path, info: CodesInfo, spools: Sequence[Path]) -> CodesInfo:
    """Write the code file; returns its header, which now includes the tables."""
    counts = count_codes(info, spools)
    tables, packed = cheapest_tables(counts, info.slots)
    info = replace(info, num_tables=len(tables))
    coder = Coder(tables)
    with whole_file(path) as temporary, temporary.open("w+b") as file:
        header = json.dumps(asdict(info), separators=(",", ":")).encode()
        file.write(MAGIC)
        for part in (header, packed):
            file.write(struct.pack("<I", len(part)) + part)
        for codes in spooled_chunks(info, spools):
            words = coder.encode(codes)
            file.write(struct.pack("<II", len(words), zlib.crc32(codes.tobytes())))
            file.write(words.astype("<u4").tobytes())
        file.write(digest_of(file, file.tell()))
    return info


def spooled_chunks(info: CodesInfo, spools: Sequence[Path]) -> Iterator[Array]:
    """Yield the codes (b, H·W·m) of each chunk; batches were dealt out to the spools in turn."""
    files: list[IO[bytes]] = [path.open("rb") for path in spools]
    try:
        for chunk in range(info.num_chunks):
            parts = [np.empty((0, info.codes_per_image), dtype=info.dtype)]
            for positions in info.batches(chunk):
                file = files[int(positions[0]) // info.batch_size % len(files)]
                codes = np.fromfile(file, info.dtype, len(positions) * info.codes_per_image)
                parts.append(codes.reshape(len(positions), info.codes_per_image))
            yield np.concatenate(parts)
    finally:
        for file in files:
            file.close()


def count_codes(info: CodesInfo, spools: Sequence[Path]) -> Array:
    """Count the uses of each codevector, for as many tables as are allowed: (T, K), int64."""
    num_embedding = info.num_embedding
    num_tables = next(
        (
            number
            for number in (info.codes_per_image, info.slots)
            if number * num_embedding <= LARGEST_TABLES
        ),
        1,
    )
    counts = np.zeros(num_tables * num_embedding, dtype=np.int64)
    offset = np.arange(num_tables) * num_embedding
    for codes in spooled_chunks(info, spools):
        flat = (codes.reshape(-1, num_tables) + offset).ravel()
        counts += np.bincount(flat, minlength=len(counts))
    return counts.reshape(num_tables, num_embedding)


def file_rate(path: Path, info: CodesInfo) -> dict[str, Any]:
    """Size of the whole code file in bytes and bits per pixel, and its tables, as in `Rate`."""
    size = path.stat().st_size
    return {
        "coded_bytes": size,
        "coded_bits_per_pixel": 8 * size / (info.num_coded * info.image_size**2),
        "coded_tables": info.num_tables,
    }
