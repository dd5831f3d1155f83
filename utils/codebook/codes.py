"""Code files: the indices of a whole image set, entropy-coded, with the model of their frequencies.

Layout, numbers little-endian: MAGIC; length (u32) and text of a JSON header; length (u32) and bytes
of the frequency tables (LZMA); the chunks, each the number of its words (u32), the CRC-32 of its
indices (u32) and the words (u32 each) of a range coder; the SHA-256 of everything before.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modules import VQGAN, Autoencoder, LooCQuantizer, ModelConfig
from modules.options import option
from modules.vqgan import num_groups
from utils.distributed import from_first, gather, num_ranks, rank
from utils.errors import UserError, one_line
from utils.files import whole_file
from utils.flags.arguments import check_stored, value_problem

Array: TypeAlias = NDArray[Any]

MAGIC = b"looc-codes-1\n"
DIGEST_SIZE = 32
CHUNK_CODES = 2**22  # coded at a time, but never less than a batch
LARGEST_CHUNK = 2**27  # codes
LARGEST_TABLES = 2**23  # frequencies in all tables, unless one alone is larger
LZMA_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6}]

# A frequency is stored as one byte, in floating point with two bits after the leading one.
FREQUENCIES = np.array([*range(4), *((4 + c % 4) << (c // 4) for c in range(120))], dtype=float)


# ------------------------------------------------------------------------------------------ header


@dataclass(frozen=True)
class CodesInfo:
    """What a code file says about itself, and its bounds."""

    fingerprint: str = option("", "of the model that decodes, see `fingerprint`")
    dataset: str = option("", "name of the image set")
    image_size: int = option(4, "side of an image in pixels", minimum=4, maximum=8192)
    channels: int = option(1, "of an image", minimum=1, maximum=1024)
    num_images: int = option(1, "of the set, with those left out", minimum=1, maximum=2**40)
    left_out: tuple[int, ...] = option((), "positions of images that could not be decoded")
    batch_size: int = option(1, "images at a time, on which rounding hangs", minimum=1)
    chunk_size: int = option(1, "images of the set from one chunk to the next", minimum=1)
    height: int = option(1, "H of the indices (n, H, W, m)", minimum=1, maximum=2048)
    width: int = option(1, "W of them", minimum=1, maximum=2048)
    slots: int = option(1, "m of them", minimum=1, maximum=2**20)
    num_embedding: int = option(1, "codevectors K", minimum=1, maximum=2**20)
    num_tables: int = option(1, "T: code j of an image has table j mod T", minimum=1)
    pixel_sum: int = option(0, "of the reconstructions, see `pixel_sum`", minimum=0)

    def __post_init__(self) -> None:
        if self.chunk_size % self.batch_size:
            raise ValueError(f"chunks of {self.chunk_size} images, batches of {self.batch_size}")
        if self.chunk_size * self.codes_per_image > LARGEST_CHUNK:
            raise ValueError(
                f"batch_size {self.batch_size} times {self.codes_per_image} codes per image "
                f"is more than {LARGEST_CHUNK}"
            )
        if self.codes_per_image % self.num_tables:
            raise ValueError(f"{self.num_tables} tables for {self.codes_per_image} codes per image")
        if self.num_tables > 1 and self.num_tables * self.num_embedding > LARGEST_TABLES:
            raise ValueError(f"{self.num_tables} tables of {self.num_embedding} frequencies")

    @property
    def codes_per_image(self) -> int:
        return self.height * self.width * self.slots

    @property
    def num_coded(self) -> int:
        """Images in the file."""
        return self.num_images - len(self.left_out)

    @property
    def num_chunks(self) -> int:
        return -(-self.num_images // self.chunk_size)

    @property
    def dtype(self) -> np.dtype[Any]:
        return index_dtype(self.num_embedding)

    def positions(self, chunk: int) -> NDArray[np.int64]:
        """Where in the set the images of a chunk are, (b,)."""
        start = chunk * self.chunk_size
        whole = np.arange(start, min(start + self.chunk_size, self.num_images))
        return np.setdiff1d(whole, np.array(self.left_out, dtype=np.int64), assume_unique=True)

    def batches(self, chunk: int) -> list[NDArray[np.int64]]:
        """`positions`, batch by batch; a batch of which no image is left is absent."""
        positions = self.positions(chunk)
        starts = np.flatnonzero(np.diff(positions // self.batch_size)) + 1
        return [batch for batch in np.split(positions, starts) if len(batch)]


def codes_info(
    model: Autoencoder, dataset: str, image_size: int, num_images: int, batch_size: int
) -> CodesInfo:
    """The header of a code file of this model, before the images have been seen.

    Raises UserError if no code file can be written: there are no codes, a batch has too many, or
    the entropy coder is not installed.
    """
    need_coder("--save_codes")
    if not model.config.num_slots:
        raise UserError(
            f"--save_codes: --quantizer {model.config.quantizer} leaves no codes to save"
        )
    height, width, slots = index_shape(model.config, image_size)
    batch_codes = batch_size * height * width * slots
    try:
        return CodesInfo(
            fingerprint=fingerprint(model),
            dataset=dataset,
            image_size=image_size,
            channels=model.config.in_channels,
            num_images=num_images,
            batch_size=batch_size,
            chunk_size=batch_size * max(1, CHUNK_CODES // batch_codes),
            height=height,
            width=width,
            slots=slots,
            num_embedding=model.config.num_embedding,
        )
    except ValueError as error:
        raise UserError(f"--save_codes: {error}") from error


def index_shape(config: ModelConfig, image_size: int) -> tuple[int, int, int]:
    """(H, W, m) of the indices of an image."""
    side = image_size // config.downsampling
    return side, side, config.num_slots


def index_dtype(num_embedding: int) -> np.dtype[Any]:
    """The smallest type that holds every index."""
    return np.dtype("u1" if num_embedding <= 2**8 else "<u2" if num_embedding <= 2**16 else "<i4")


def fingerprint(model: Autoencoder) -> str:
    """SHA-256 of what makes images of indices: the codebook, the decoder, how units are joined."""
    config, quantizer = model.config, model.quantizer
    digest = hashlib.sha256(f"{config.split} {max(config.interpolation_scale, 1)}".encode())
    if isinstance(quantizer, LooCQuantizer):
        weights = {"codebook": quantizer.codebook.detach()}
    else:
        digest.update(f"{config.quantizer} {config.num_embedding} {config.levels}".encode())
        weights = quantizer.state_dict()
    weights = {**weights, **model.decoder.state_dict()}
    if isinstance(model, VQGAN):
        digest.update(f"{num_groups(config)}".encode())
        weights |= model.post_vq_conv.state_dict(prefix="post_vq_conv.")
    for name, value in weights.items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def pixel_sum(images: Tensor) -> int:
    """The sum of the CRC-32 of every image, uint8 (B, C, H, W) on the CPU, in whatever order."""
    return sum(zlib.crc32(image.contiguous().numpy().tobytes()) for image in images)


# ------------------------------------------------------------------------------------------ coding


class Coder:
    """A range coder with fixed tables of frequencies.

    tables (T, K), uint8, index FREQUENCIES; code j of an image has table j mod T. The models are
    made from these numbers alone, by one and the same arithmetic on every machine.
    """

    def __init__(self, tables: Array) -> None:
        from constriction import stream  # type: ignore[import-untyped]

        self.queue = stream.queue
        self.models = [
            # The library takes no fewer than two symbols.
            stream.model.Categorical(np.append(FREQUENCIES[row], 0.0), perfect=False)
            for row in tables
        ]

    def encode(self, codes: Array) -> Array:
        """Codes (n, c) → the words, uint32."""
        encoder = self.queue.RangeEncoder()
        num_tables = len(self.models)
        by_table = codes.astype(np.int32).reshape(len(codes), -1, num_tables).transpose(2, 0, 1)
        for symbols, model in zip(by_table, self.models):
            encoder.encode(symbols.ravel(), model)
        words: Array = encoder.get_compressed()
        return words

    def decode(self, words: Array, num_images: int, codes_per_image: int) -> Array:
        """The words → codes (num_images, codes_per_image), int32.

        Raises ValueError or AssertionError for words that `encode` cannot have made, if it notices.
        """
        decoder = self.queue.RangeDecoder(words.astype(np.uint32))
        num_tables = len(self.models)
        per_table = codes_per_image // num_tables
        codes = np.empty((num_images, per_table, num_tables), dtype=np.int32)
        for table, model in enumerate(self.models):
            symbols = decoder.decode(model, num_images * per_table)
            codes[:, :, table] = symbols.reshape(num_images, per_table)
        return codes.reshape(num_images, codes_per_image)


def need_coder(flag: str) -> None:
    """Raise UserError naming the flag where the entropy coder is not installed."""
    try:
        Coder(np.ones((1, 1), dtype=np.uint8))
    except ImportError as error:
        raise UserError(
            f"{flag}: constriction is not installed (pip install constriction)"
        ) from error


def cheapest_tables(counts: Array, slots: int) -> tuple[Array, bytes]:
    """The tables of frequencies that make the smallest file, (T, K) uint8, and their bytes.

    Of counts (T', K), with T' 1, m or H·W·m: one table for all codes, one for each unit slot, or
    one for each slot at each position, as far as the counts tell them apart.
    """
    cheapest, least = (counts, b""), np.inf
    for num_tables in sorted({1, slots, len(counts)}):
        if len(counts) % num_tables == 0:
            merged = counts.reshape(-1, num_tables, counts.shape[1]).sum(0)  # (T, K)
            tables = nearest_frequencies(merged)
            packed = lzma.compress(tables.tobytes(), lzma.FORMAT_RAW, filters=LZMA_FILTERS)
            size = 8 * len(packed) + coded_bits(merged, tables)
            if size < least:
                cheapest, least = (tables, packed), size
    return cheapest


def nearest_frequencies(counts: Array) -> Array:
    """Counts of any shape → where in FREQUENCIES the nearest is, uint8; 0 for 0 alone."""
    borders = (FREQUENCIES[1:] + FREQUENCIES[:-1]) / 2
    return np.searchsorted(borders, counts, side="right").astype(np.uint8)


def coded_bits(counts: Array, tables: Array) -> float:
    """−Σ count·log2 p, with the p of the tables, in bits: (T, K) twice."""
    used = counts > 0
    frequencies = FREQUENCIES[tables]
    share = frequencies / frequencies.sum(1, keepdims=True)
    return float(-(counts[used] * np.log2(share[used])).sum())


# ----------------------------------------------------------------------------------------- writing


class Spool:
    """This process's indices, batch by batch, in a file: the whole set may not fit the memory."""

    def __init__(self, path: Path, info: CodesInfo) -> None:
        self.path = path
        self.info = info
        self.pixel_sum = 0
        self.file = path.open("wb")

    def add(self, indices: Tensor, images: Tensor) -> None:
        """Append a batch's indices (B, H, W, m); images (B, C, h, w) are uint8, made of them."""
        self.pixel_sum += pixel_sum(images)
        try:
            self.file.write(indices.cpu().numpy().astype(self.info.dtype).tobytes())
            self.file.flush()  # the first process will read it
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error


def spool_path(path: Path, number: int) -> Path:
    """Where process `number` keeps its indices until the code file at path is written."""
    return path.with_name(f".{path.name}.{number}.tmp")


@contextmanager
def spooled(path: Path, info: CodesInfo) -> Iterator[Spool]:
    """A spool for the code file that will be at path; it is gone when the block ends."""
    spool = Spool(spool_path(path, rank()), info)
    try:
        yield spool
    finally:
        spool.file.close()
        spool.path.unlink(missing_ok=True)


def save_codes(path: Path, spool: Spool, left_out: Sequence[int]) -> dict[str, Any]:
    """Write the code file from the spools of all processes, which call this together.

    Process r holds the batches r, r + num_ranks, …, without the images left out; the file is the
    same for any number of processes. Returns `file_rate`.
    """
    spools = [spool_path(path, number) for number in range(num_ranks())]
    pixels = sum(gather(spool.pixel_sum))  # when all have it, all spools are written
    info = replace(spool.info, left_out=tuple(left_out), pixel_sum=pixels)
    return from_first(lambda: file_rate(path, write_codes(path, info, spools)))


def write_codes(path: Path, info: CodesInfo, spools: Sequence[Path]) -> CodesInfo:
    """Write the code file; returns what it says about itself, which now knows its tables."""
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
    """The codes (b, H·W·m) of each chunk, from batches dealt out to the spools in turn."""
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
    """How often each codevector was used, by the finest tables that are allowed: (T, K), int64."""
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
    """Size of a code file, of everything in it, in bytes and in bits per pixel; its tables."""
    size = path.stat().st_size
    return {
        "coded_bytes": size,
        "coded_bits_per_pixel": 8 * size / (info.num_coded * info.image_size**2),
        "coded_tables": info.num_tables,
    }


# ----------------------------------------------------------------------------------------- reading


class CodeFile:
    """A code file that is whole; its chunks are decoded one at a time."""

    def __init__(self, path: Path) -> None:
        """Raises UserError, one line naming the file, where it is missing, damaged or foreign."""
        self.path = path
        if not path.is_file():
            reason = "is no file" if path.exists() else "does not exist"
            raise UserError(f"code file {path} {reason}")
        try:
            with path.open("rb") as file:
                self._read(file)
        except (ValueError, TypeError, RecursionError, lzma.LZMAError) as error:
            raise UserError(f"code file {path} is refused: {one_line(error)}") from error

    def _read(self, file: IO[bytes]) -> None:
        end = os.fstat(file.fileno()).st_size - DIGEST_SIZE
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError("it is no code file of this version, or damaged at its beginning")
        if digest_of(file, max(end, 0)) != file.read(DIGEST_SIZE):
            raise ValueError("it is truncated or damaged (checksum)")
        file.seek(len(MAGIC))
        self.info = parse_header(read_part(file, end))
        info = self.info
        size = info.num_tables * info.num_embedding
        unpacker = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=LZMA_FILTERS)
        tables = np.frombuffer(unpacker.decompress(read_part(file, end), size), np.uint8)
        if len(tables) != size or tables.max() >= len(FREQUENCIES):
            raise ValueError("its tables of frequencies are damaged")
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
            raise ValueError("there is more in it than its images")
        self.coder = Coder(tables.reshape(info.num_tables, info.num_embedding))

    def check_flags(self, flags: Mapping[str, Any]) -> None:
        """Raise UserError where a flag that was given contradicts what the file was made with."""
        stored = {
            name: getattr(self.info, name) for name in ("dataset", "image_size", "batch_size")
        }
        check_stored(flags, stored, self.path)

    def check_model(self, model: Autoencoder, checkpoint: Path) -> None:
        """Raise UserError naming both files where the codes are not of this model."""
        own, found = self.info.fingerprint, fingerprint(model)
        if own != found:
            raise UserError(
                f"code file {self.path} is of another model than {checkpoint}: "
                f"fingerprint {own[:16]}, that of the checkpoint is {found[:16]}"
            )
        info, config = self.info, model.config
        told = (info.height, info.width, info.slots, info.channels, info.num_embedding)
        shape = index_shape(config, info.image_size)
        if told != (*shape, config.in_channels, config.num_embedding):
            raise UserError(f"code file {self.path} is refused: its shapes are not the model's")

    def batches(self, rank: int = 0, num_ranks: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """The set's batches, as (positions (b,), indices (b, H, W, m)), both int64.

        Chunks are dealt out to the ranks in turn. Raises UserError where they cannot be decoded.
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
        """The codes (b, H·W·m) of a chunk."""
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


def parse_header(text: bytes) -> CodesInfo:
    """The header. Raises ValueError or TypeError where it is not one."""
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError("its header is no table")
    values["left_out"] = tuple(values.get("left_out", ()))
    for item in fields(CodesInfo):
        problem = value_problem(CodesInfo, item, values.get(item.name))
        if problem:
            raise ValueError(f"{item.name} of its header: {problem}")
    info = CodesInfo(**values)
    ordered = sorted(set(info.left_out))
    if list(info.left_out) != ordered or any(type(position) is not int for position in ordered):
        raise ValueError("left_out of its header: no ascending positions")
    if ordered and not (ordered[0] >= 0 and ordered[-1] < info.num_images > len(ordered)):
        raise ValueError("left_out of its header: beyond the images")
    return info


def read_part(file: IO[bytes], end: int) -> bytes:
    """A part of the file with its length before it. Raises ValueError where it is not all there."""
    length = int.from_bytes(file.read(4), "little")
    if length > end - file.tell():
        raise ValueError("a part reaches beyond its end")
    return file.read(length)


def digest_of(file: IO[bytes], length: int) -> bytes:
    """SHA-256 of the first bytes of a file, which is left standing after them."""
    digest = hashlib.sha256()
    file.seek(0)
    while length > 0:
        block = file.read(min(length, 2**20))
        if not block:
            break
        digest.update(block)
        length -= len(block)
    return digest.digest()
