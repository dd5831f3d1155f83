"""Writing a code file from the indices of all processes, and reading it.

Layout, numbers little-endian: the `magic` of the header's class; length (u32) and text of the
header in JSON; length (u32) and bytes of the frequency tables (LZMA); the chunks, each with the
number of its words (u32), the CRC-32 of its indices (u32) and the words (u32 each) of a range
coder; the SHA-256 of everything before. Codes that a prior has coded have no tables.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from modules import Autoencoder
from utils.codebook.codes.coder import (
    FREQUENCIES,
    LARGEST_TABLES,
    LZMA_FILTERS,
    Array,
    Coder,
    cheapest_tables,
)
from utils.codebook.codes.header import (
    KINDS,
    Batch,
    Header,
    PicturesInfo,
    PriorCodesInfo,
    fingerprint,
    header_text,
    parse_header,
    pixel_sum,
)
from utils.codebook.codes.prior_coder import PriorCoder
from utils.distributed import first_goes_ahead, from_first, gather, gather_items, num_ranks, rank
from utils.errors import UserError, one_line
from utils.files import whole_file

DIGEST_SIZE = 32

# ---------------------------------------------------------------------------------------- writing


class Spool:
    """A file of this process's indices, batch by batch: all of them may not fit in memory."""

    def __init__(self, path: Path, info: Header, prior: PriorCoder | None) -> None:
        self.path = path
        self.info = info
        self.prior = prior
        self.pixel_sum = 0
        self.pictures: dict[int, tuple[str, int, int]] = {}  # position → entry of PicturesInfo
        self.file = path.open("wb")

    def add(self, positions: Sequence[int], indices: Tensor, images: Tensor) -> None:
        """Append a batch of indices (B, H, W, m) and its reconstructions (B, C, h, w), uint8."""
        self.pixel_sum += pixel_sum(images)
        if isinstance(self.info, PicturesInfo):
            height, width = images.shape[2:]
            self.pictures |= {place: (self.info.name(place), width, height) for place in positions}
        try:
            self.file.write(indices.cpu().numpy().astype(self.info.dtype).tobytes())
            self.file.flush()  # the first process reads it
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error


def spool_path(path: Path, number: int) -> Path:
    """Spool of process `number` for the code file at path."""
    return path.with_name(f".{path.name}.{number}.tmp")


@contextmanager
def spooled(path: Path, info: Header, prior: PriorCoder | None = None) -> Iterator[Spool]:
    """Yield a spool for the code file at path; it is removed when the block ends.

    prior codes the indices, whose header is then a PriorCodesInfo.
    """
    spool = Spool(spool_path(path, rank()), info, prior)
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
    info, spools = complete(path, spool, left_out)
    rate: dict[str, Any] = {}
    with first_goes_ahead():  # a prior may take hours
        if rank() == 0:
            rate = file_rate(path, write_codes(path, info, spools, spool.prior))
    return from_first(lambda: rate)


def complete(path: Path, spool: Spool, left_out: Sequence[int]) -> tuple[Header, list[Path]]:
    """The header that is known once all images have been seen, and the spools of all processes."""
    spools = [spool_path(path, number) for number in range(num_ranks())]
    pixels = sum(gather(spool.pixel_sum))  # also waits until all spools are written
    found: dict[str, Any] = {"left_out": tuple(left_out), "pixel_sum": pixels}
    if isinstance(spool.info, PicturesInfo):
        by_position = sorted(gather_items(spool.pictures.items()))
        found["pictures"] = tuple(picture for _, picture in by_position)
    try:
        return replace(spool.info, **found), spools
    except ValueError as error:
        raise UserError(f"--save_codes: {error}") from error


def write_codes(
    path: Path, info: Header, spools: Sequence[Path], prior: PriorCoder | None = None
) -> Header:
    """Write the code file; returns its header, which now includes the tables."""
    coder: Coder | PriorCoder
    if prior is None:
        tables, packed = cheapest_tables(count_codes(info, spools), info.slots)
        info, coder = replace(info, num_tables=len(tables)), Coder(tables)
    else:
        packed, coder = b"", prior
    with whole_file(path) as temporary, temporary.open("w+b") as file:
        file.write(info.magic)
        for part in (header_text(info), packed):
            file.write(struct.pack("<I", len(part)) + part)
        for codes in spooled_chunks(info, spools):
            words = coder.encode(codes)
            file.write(struct.pack("<II", len(words), zlib.crc32(codes.tobytes())))
            file.write(words.astype("<u4").tobytes())
        file.write(digest_of(file, file.tell()))
    return info


def spooled_chunks(info: Header, spools: Sequence[Path]) -> Iterator[Array]:
    """Yield the codes of each chunk, flat; batches were dealt out to the spools in turn."""
    with ExitStack() as opened:
        files = [opened.enter_context(path.open("rb")) for path in spools]
        for chunk in range(info.num_chunks):
            parts = [np.empty(0, dtype=info.dtype)]
            for batch in info.batches(chunk):
                file = files[batch.number % len(files)]
                parts.append(np.fromfile(file, info.dtype, batch.num_codes))
            yield np.concatenate(parts)


def count_codes(info: Header, spools: Sequence[Path]) -> Array:
    """Count the uses of each codevector, for as many tables as are allowed: (T, K), int64."""
    size = info.num_embedding
    num_tables = next(n for n in info.periods if n == 1 or n * size <= LARGEST_TABLES)
    counts = np.zeros(num_tables * size, dtype=np.int64)
    offset = np.arange(num_tables) * size
    for codes in spooled_chunks(info, spools):
        flat = (codes.reshape(-1, num_tables) + offset).ravel()
        counts += np.bincount(flat, minlength=len(counts))
    return counts.reshape(num_tables, size)


def file_rate(path: Path, info: Header) -> dict[str, Any]:
    """Size of the whole code file in bytes and bits per pixel, and its tables, as in `Rate`."""
    size = path.stat().st_size
    return {
        "coded_bytes": size,
        "coded_bits_per_pixel": 8 * size / info.num_pixels,
        "coded_tables": None if isinstance(info, PriorCodesInfo) else info.num_tables,
    }


# ---------------------------------------------------------------------------------------- reading


class CodeFile:
    """A complete code file; its chunks are decoded one at a time."""

    coder: Coder | PriorCoder | None

    def __init__(self, path: Path) -> None:
        """Raises UserError naming the file if it is missing, damaged or something else."""
        self.path = path
        if not path.is_file():
            reason = "is not a file" if path.exists() else "does not exist"
            raise UserError(f"code file {path} {reason}")
        try:
            with path.open("rb") as file:
                self._read(file)
        except (ValueError, TypeError, RecursionError, lzma.LZMAError) as error:
            raise UserError(f"code file {path} is refused: {one_line(error)}") from error

    def _read(self, file: IO[bytes]) -> None:
        end = os.fstat(file.fileno()).st_size - DIGEST_SIZE
        kind = KINDS.get(file.readline(32))
        if kind is None:
            raise ValueError("it is not a code file of this version, or damaged at its beginning")
        if digest_of(file, end) != file.read(DIGEST_SIZE):
            raise ValueError("it is truncated or damaged (checksum)")
        file.seek(len(kind.magic))
        self.info = info = parse_header(read_part(file, end), kind)
        packed = read_part(file, end)
        # A prior comes later, by `use_prior`.
        self.coder = None if isinstance(info, PriorCodesInfo) else Coder(tables_of(info, packed))
        if info.num_chunks > (end - file.tell()) // 8:
            raise ValueError(f"it is too short for {info.num_coded} images")
        self.starts = []
        for _ in range(info.num_chunks):
            self.starts.append(file.tell())
            (num_words,) = struct.unpack("<I4x", file.read(8))
            file.seek(4 * num_words, os.SEEK_CUR)
            if file.tell() > end:
                raise ValueError("a chunk reaches beyond its end")
        if file.tell() != end:
            raise ValueError("it holds more than its images")

    def check_model(self, model: Autoencoder, checkpoint: Path) -> None:
        """Raise UserError naming both files if the codes are of another model."""
        info, config, found = self.info, model.config, fingerprint(model)
        if info.fingerprint != found:
            raise UserError(
                f"code file {self.path} is of another model than {checkpoint}: "
                f"fingerprint {info.fingerprint[:16]}, that of the checkpoint is {found[:16]}"
            )
        values = (info.channels, info.num_embedding)
        if values != (config.in_channels, config.num_embedding) or not info.fits(config):
            raise UserError(f"code file {self.path} is refused: its shapes do not fit the model")

    def use_prior(self, prior: PriorCoder | None) -> None:
        """Decode by a prior. Raises UserError if it is not the one that coded the file, or none."""
        digest = self.info.prior_digest if isinstance(self.info, PriorCodesInfo) else None
        if prior is not None and digest is None:
            raise UserError(f"--prior has no effect: code file {self.path} was coded without")
        if digest is not None and (prior is None or prior.digest != digest):
            given = "that is missing" if prior is None else f"not {prior.digest[:16]}"
            raise UserError(
                f"code file {self.path} was coded by the --prior of digest {digest[:16]}, {given}"
            )
        self.coder = prior or self.coder

    def rate(self) -> dict[str, Any]:
        """`file_rate` of this file."""
        return file_rate(self.path, self.info)

    def batches(self, rank: int = 0, num_ranks: int = 1) -> Iterator[tuple[Batch, Tensor]]:
        """Yield the batches of the set with their indices (b, H, W, m), int64.

        Chunks are dealt out to the ranks in turn. Raises UserError if one cannot be decoded.
        """
        for chunk in range(rank, self.info.num_chunks, num_ranks):
            batches = self.info.batches(chunk)
            codes = torch.from_numpy(self._decode(chunk, batches)).long()
            parts = torch.split(codes, [batch.num_codes for batch in batches])
            for batch, part in zip(batches, parts):
                yield batch, part.view(len(batch.positions), *batch.shape)

    def _decode(self, chunk: int, batches: Sequence[Batch]) -> Array:
        """Decode the codes of a chunk, flat."""
        assert self.coder is not None, "use_prior comes first"
        prior = isinstance(self.coder, PriorCoder)
        writer = "kind of machine" if prior else "version of constriction"
        try:
            with self.path.open("rb") as file:
                file.seek(self.starts[chunk])
                num_words, checksum = struct.unpack("<II", file.read(8))
                words = np.fromfile(file, "<u4", num_words)
            codes = self.coder.decode(words, sum(batch.num_codes for batch in batches))
            if zlib.crc32(codes.astype(self.info.dtype).tobytes()) != checksum:
                raise ValueError("its indices are not those that were saved")
        except (ValueError, AssertionError, struct.error) as error:
            raise UserError(
                f"code file {self.path}: chunk {chunk} cannot be decoded "
                f"(another {writer} wrote it?): {one_line(error)}"
            ) from error
        return codes


def tables_of(info: Header, packed: bytes) -> Array:
    """Unpack the frequency tables (T, K) of a file. Raises ValueError if they are damaged."""
    size = info.num_tables * info.num_embedding
    unpacker = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=LZMA_FILTERS)
    tables = np.frombuffer(unpacker.decompress(packed, size), np.uint8)
    if len(tables) != size or tables.max() >= len(FREQUENCIES):
        raise ValueError("its frequency tables are damaged")
    return tables.reshape(info.num_tables, info.num_embedding)


def read_part(file: IO[bytes], end: int) -> bytes:
    """Read a part of the file, which begins with its length. Raises ValueError if it is cut off."""
    length = int.from_bytes(file.read(4), "little")
    if length > end - file.tell():
        raise ValueError("a part reaches beyond its end")
    return file.read(length)


def digest_of(file: IO[bytes], length: int) -> bytes:
    """SHA-256 of the first bytes of a file; the file's position is then after them."""
    digest = hashlib.sha256()
    file.seek(0)
    while length > 0 and (block := file.read(min(length, 2**20))):
        digest.update(block)
        length -= len(block)
    return digest.digest()
