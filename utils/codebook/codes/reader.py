"""Reading a code file, chunk by chunk."""

from __future__ import annotations

import lzma
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from modules import Autoencoder
from utils.codebook.codes.coder import FREQUENCIES, LZMA_FILTERS, Array, Coder
from utils.codebook.codes.header import (
    DIGEST_SIZE,
    MAGIC,
    digest_of,
    fingerprint,
    index_shape,
    parse_header,
)
from utils.errors import UserError, one_line
from utils.flags.arguments import check_stored


class CodeFile:
    """A complete code file; its chunks are decoded one at a time."""

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
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError("it is not a code file of this version, or damaged at its beginning")
        if digest_of(file, max(end, 0)) != file.read(DIGEST_SIZE):
            raise ValueError("it is truncated or damaged (checksum)")
        file.seek(len(MAGIC))
        self.info = parse_header(read_part(file, end))
        info = self.info
        size = info.num_tables * info.num_embedding
        unpacker = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=LZMA_FILTERS)
        tables = np.frombuffer(unpacker.decompress(read_part(file, end), size), np.uint8)
        if len(tables) != size or tables.max() >= len(FREQUENCIES):
            raise ValueError("its frequency tables are damaged")
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
        self.coder = Coder(tables.reshape(info.num_tables, info.num_embedding))

    def check_flags(self, flags: Mapping[str, Any]) -> None:
        """Raise UserError if a flag contradicts the file."""
        stored = {
            name: getattr(self.info, name) for name in ("dataset", "image_size", "batch_size")
        }
        check_stored(flags, stored, self.path)

    def check_model(self, model: Autoencoder, checkpoint: Path) -> None:
        """Raise UserError naming both files if the codes are of another model."""
        own, found = self.info.fingerprint, fingerprint(model)
        if own != found:
            raise UserError(
                f"code file {self.path} is of another model than {checkpoint}: "
                f"fingerprint {own[:16]}, that of the checkpoint is {found[:16]}"
            )
        info, config = self.info, model.config
        stored = (info.height, info.width, info.slots, info.channels, info.num_embedding)
        shape = index_shape(config, info.image_size)
        if stored != (*shape, config.in_channels, config.num_embedding):
            raise UserError(
                f"code file {self.path} is refused: its shapes are not those of the model"
            )

    def batches(self, rank: int = 0, num_ranks: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of the set: positions (b,) and indices (b, H, W, m), both int64.

        Chunks are dealt out to the ranks in turn. Raises UserError if one cannot be decoded.
        """
        info = self.info
        for chunk in range(rank, info.num_chunks, num_ranks):
            codes, done = self._decode(chunk), 0
            for positions in info.batches(chunk):
                part = torch.from_numpy(codes[done : done + len(positions)]).long()
                done += len(positions)
                yield (
                    torch.from_numpy(positions),
                    part.view(-1, info.height, info.width, info.slots),
                )

    def _decode(self, chunk: int) -> Array:
        """Decode the codes (b, H·W·m) of a chunk."""
        info = self.info
        try:
            with self.path.open("rb") as file:
                file.seek(self.starts[chunk])
                num_words, checksum = struct.unpack("<II", file.read(8))
                words = np.fromfile(file, "<u4", num_words)
            num_images = len(info.positions(chunk))
            codes = self.coder.decode(words, num_images, info.codes_per_image)
            if zlib.crc32(codes.astype(info.dtype).tobytes()) != checksum:
                raise ValueError("its indices are not those that were saved")
        except (ValueError, AssertionError, struct.error) as error:
            raise UserError(
                f"code file {self.path}: chunk {chunk} cannot be decoded "
                f"(another version of constriction wrote it?): {one_line(error)}"
            ) from error
        return codes


def read_part(file: IO[bytes], end: int) -> bytes:
    """Read a part of the file, which begins with its length. Raises ValueError if it is cut off."""
    length = int.from_bytes(file.read(4), "little")
    if length > end - file.tell():
        raise ValueError("a part reaches beyond its end")
    return file.read(length)
