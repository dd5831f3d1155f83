"""The header of a code file: shapes, positions, and the model that decodes it."""

from __future__ import annotations

import json
import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from modules import VQGAN, Autoencoder, LooCQuantizer, ModelConfig
from modules.options import option, value_problem
from modules.vqgan import num_groups
from utils.checkpoints.digest import tensors_digest
from utils.codebook.codes.coder import LARGEST_TABLES
from utils.errors import UserError

CHUNK_CODES = 2**22  # codes of a chunk; a chunk is never less than a batch
LARGEST_CHUNK = 2**27  # codes
# Values that begin a header: equal codes are equal bytes in all versions.
FIRST = (
    *("fingerprint", "dataset", "image_size", "channels", "num_images", "left_out"),
    *("batch_size", "chunk_size", "height", "width"),
)


class Batch(NamedTuple):
    """Images that are decoded together."""

    number: int  # of the batch in the set; the ranks take batches in turn
    positions: NDArray[np.int64]  # (b,), in the set
    shape: tuple[int, int, int]  # (H, W, m), of the indices of one image
    size: tuple[int, int]  # height and width of one image in pixels

    @property
    def num_codes(self) -> int:
        return len(self.positions) * math.prod(self.shape)


@dataclass(frozen=True)
class Header(ABC):
    """Header of a code file, and the bounds of its values. Raises ValueError outside of them."""

    magic: ClassVar[bytes]  # begins the file
    fingerprint: str = option("", "fingerprint of the model that decodes")
    channels: int = option(1, "channels of an image", minimum=1, maximum=1024)
    num_images: int = option(1, "images, including those left out", minimum=1, maximum=2**40)
    left_out: tuple[int, ...] = option((), "positions of images that could not be decoded")
    slots: int = option(1, "m of the indices", minimum=1, maximum=2**20)
    num_embedding: int = option(1, "codevectors K", minimum=1, maximum=2**20)
    num_tables: int = option(1, "T: code j of an image has table j mod T", minimum=1)
    pixel_sum: int = option(0, "checksum of the reconstructions", minimum=0)

    def __post_init__(self) -> None:
        for item in fields(self):
            problem = value_problem(item, getattr(self, item.name))
            if problem:
                raise ValueError(f"{item.name}: {problem}")
        places = range(self.num_images)
        left = self.left_out
        if any(type(position) is not int or position not in places for position in left):
            raise ValueError("left_out: not positions of its images")
        if list(left) != sorted(set(left)) or len(left) == len(places):
            raise ValueError("left_out: not ascending, or all images")
        if self.num_tables > 1 and self.num_tables * self.num_embedding > LARGEST_TABLES:
            raise ValueError(f"{self.num_tables} tables of {self.num_embedding} frequencies")
        self.check()
        if self.periods[0] % self.num_tables:
            raise ValueError("tables do not divide the codes")

    @abstractmethod
    def check(self) -> None:
        """Raise ValueError if the values contradict each other."""

    @property
    @abstractmethod
    def periods(self) -> tuple[int, ...]:
        """Numbers of tables that distinguish codes, the largest first: each divides the one before.

        They also divide the codes of an image.
        """

    @property
    @abstractmethod
    def num_pixels(self) -> int:
        """Pixels of all images in the file."""

    @property
    @abstractmethod
    def num_chunks(self) -> int: ...

    @abstractmethod
    def batches(self, chunk: int) -> list[Batch]:
        """The batches of a chunk; those without images are absent."""

    @abstractmethod
    def fits(self, config: ModelConfig) -> bool:
        """Return whether the indices have the shapes that the model decodes."""

    @abstractmethod
    def name(self, position: int) -> str:
        """Return the name of an image's picture without suffix; the number of one left out."""

    @property
    def num_coded(self) -> int:
        """Images in the file."""
        return self.num_images - len(self.left_out)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest type that holds every index."""
        bits = (self.num_embedding - 1).bit_length()
        return np.dtype("u1" if bits <= 8 else "<u2" if bits <= 16 else "<i4")


@dataclass(frozen=True)
class CodesInfo(Header):
    """Header of the codes of a data set, whose square images have one size."""

    magic = b"looc-codes-1\n"
    dataset: str = option("", "name of the image set")
    image_size: int = option(4, "side of an image in pixels", minimum=4, maximum=8192)
    batch_size: int = option(1, "images at a time; rounding depends on it", minimum=1)
    chunk_size: int = option(1, "images of the set from one chunk to the next", minimum=1)
    height: int = option(1, "H of the indices (n, H, W, m)", minimum=1, maximum=2048)
    width: int = option(1, "W of the indices", minimum=1, maximum=2048)

    def check(self) -> None:
        if self.chunk_size % self.batch_size:
            raise ValueError("batches do not fill chunks")
        if self.chunk_size * self.periods[0] > LARGEST_CHUNK:
            raise ValueError(
                f"batch_size {self.batch_size} times {self.periods[0]} codes per image "
                f"is more than {LARGEST_CHUNK}"
            )

    @property
    def periods(self) -> tuple[int, ...]:
        return self.height * self.width * self.slots, self.slots, 1

    @property
    def num_pixels(self) -> int:
        return self.num_coded * self.image_size**2

    @property
    def num_chunks(self) -> int:
        return -(-self.num_images // self.chunk_size)

    def batches(self, chunk: int) -> list[Batch]:
        start = chunk * self.chunk_size
        whole = np.arange(start, min(start + self.chunk_size, self.num_images))
        left_out = np.array(self.left_out, dtype=np.int64)
        positions = np.setdiff1d(whole, left_out, assume_unique=True)
        starts = np.flatnonzero(np.diff(positions // self.batch_size)) + 1
        shape, size = (self.height, self.width, self.slots), (self.image_size, self.image_size)
        return [
            Batch(int(batch[0]) // self.batch_size, batch, shape, size)
            for batch in np.split(positions, starts)
            if len(batch)
        ]

    def fits(self, config: ModelConfig) -> bool:
        return (self.height, self.width, self.slots) == index_shape(config, self.image_size)

    def name(self, position: int) -> str:
        return by_position(position)


@dataclass(frozen=True)
class PriorCodesInfo(CodesInfo):
    """Header of the codes of a data set that are coded by the probabilities of a prior."""

    magic = b"looc-codes-3\n"
    prior_digest: str = option("", "digest of the prior's weights")


@dataclass(frozen=True)
class PicturesInfo(Header):
    """Header of the codes of whole pictures, each with its name and size; a batch is one picture.

    Its sides are padded to multiples of f for the model. It has 1×1 pixels until it has been seen.
    """

    magic = b"looc-codes-2\n"
    downsampling: int = option(1, "f, side of an image / side of its latents", minimum=1)
    pictures: tuple[Any, ...] = option((), "name, width and height of each that is not left out")
    chunk_codes: int = option(
        CHUNK_CODES, "most codes of a chunk of several pictures", minimum=1, maximum=LARGEST_CHUNK
    )

    def check(self) -> None:
        if len(self.pictures) != self.num_coded:
            raise ValueError(f"pictures: {len(self.pictures)} instead of {self.num_coded}")
        for name, width, height in self.pictures:
            if not is_inside(name):
                raise ValueError(f"pictures: {name!r} is not a name below a folder")
            if not type(width) is type(height) is int or min(width, height) < 1:
                raise ValueError(f"pictures: {name} has the size {width!r}×{height!r}")
            codes = math.prod(self.index_shape(height, width))
            if codes > LARGEST_CHUNK:
                raise ValueError(f"pictures: {name} has {codes} codes, more than {LARGEST_CHUNK}")
        if len({name for name, *_ in self.pictures}) < len(self.pictures):
            raise ValueError("pictures: two have one name")

    def index_shape(self, height: int, width: int) -> tuple[int, int, int]:
        factor = self.downsampling
        return -(-height // factor), -(-width // factor), self.slots

    @property
    def periods(self) -> tuple[int, ...]:
        return self.slots, 1

    @property
    def num_pixels(self) -> int:
        return sum(width * height for _, width, height in self.pictures)

    @cached_property
    def positions(self) -> list[int]:
        """Positions of the pictures."""
        return sorted({*range(self.num_images)}.difference(self.left_out))

    @cached_property
    def names(self) -> dict[int, str]:
        """Names by position."""
        return {place: name for place, (name, *_) in zip(self.positions, self.pictures)}

    @cached_property
    def chunks(self) -> list[list[Batch]]:
        """Pictures up to chunk_codes, at least one."""
        chunks: list[list[Batch]] = []
        room = 0
        for position, (_, width, height) in zip(self.positions, self.pictures):
            shape = self.index_shape(height, width)
            batch = Batch(position, np.array([position]), shape, (height, width))
            if batch.num_codes > room:
                chunks.append([])
                room = self.chunk_codes
            chunks[-1].append(batch)
            room -= batch.num_codes
        return chunks

    @property
    def num_chunks(self) -> int:
        return len(self.chunks)

    def batches(self, chunk: int) -> list[Batch]:
        return self.chunks[chunk]

    def fits(self, config: ModelConfig) -> bool:
        return (self.downsampling, self.slots) == (config.downsampling, config.num_slots)

    def name(self, position: int) -> str:
        return self.names.get(position, by_position(position))


KINDS: dict[bytes, type[Header]] = {
    kind.magic: kind for kind in (CodesInfo, PicturesInfo, PriorCodesInfo)
}


def by_position(position: int) -> str:
    """The name of a picture of a data set, without suffix."""
    return f"{position:08d}"


def is_inside(name: object) -> bool:
    """Return whether a name stays below any folder to which it is joined."""
    if not isinstance(name, str) or "\0" in name:
        return False
    return all(part not in ("", ".", "..") for part in name.split("/"))


def codes_info(
    model: Autoencoder, dataset: str, image_size: int, num_images: int, batch_size: int
) -> CodesInfo:
    """The header of the codes of a data set by this model, before the images have been seen.

    Raises UserError if there are no codes, or too many in a batch.
    """
    common = common_values(model, num_images)
    height, width, slots = index_shape(model.config, image_size)
    batch_codes = batch_size * height * width * slots
    try:
        return CodesInfo(
            **common,
            dataset=dataset,
            image_size=image_size,
            batch_size=batch_size,
            chunk_size=batch_size * max(1, CHUNK_CODES // batch_codes),
            height=height,
            width=width,
        )
    except ValueError as error:
        raise UserError(f"--save_codes: {error}") from error


def pictures_info(model: Autoencoder, names: Sequence[str]) -> PicturesInfo:
    """The header of the codes of whole pictures, whose sizes are not known yet."""
    sizeless = tuple((name, 1, 1) for name in names)
    common, factor = common_values(model, len(names)), model.config.downsampling
    try:
        return PicturesInfo(**common, downsampling=factor, pictures=sizeless)
    except ValueError as error:
        raise UserError(f"--save_codes: {error}") from error


def common_values(model: Autoencoder, num_images: int) -> dict[str, Any]:
    """Values that both kinds of header have. Raises UserError if there can be no codes."""
    if not model.config.num_slots:
        raise UserError(f"--save_codes: --quantizer {model.config.quantizer} leaves no codes")
    return {
        "fingerprint": fingerprint(model),
        "channels": model.config.in_channels,
        "num_images": num_images,
        "slots": model.config.num_slots,
        "num_embedding": model.config.num_embedding,
    }


def index_shape(config: ModelConfig, image_size: int) -> tuple[int, int, int]:
    """(H, W, m) of the indices of an image."""
    side = image_size // config.downsampling
    return side, side, config.num_slots


def fingerprint(model: Autoencoder) -> str:
    """SHA-256 of everything that turns indices into images: codebook, decoder, split into units."""
    config, quantizer = model.config, model.quantizer
    words = f"{config.split} {max(config.interpolation_scale, 1)}"
    if isinstance(quantizer, LooCQuantizer):
        weights = {"codebook": quantizer.codebook.detach()}
        if quantizer.residual_power is not None:
            weights["residual_power"] = quantizer.residual_power
    else:
        words += f"{config.quantizer} {config.num_embedding} {config.levels}"
        weights = quantizer.state_dict()
    weights = {**weights, **model.decoder.state_dict()}
    if isinstance(model, VQGAN):
        words += f"{num_groups(config)}"
        weights |= model.post_vq_conv.state_dict(prefix="post_vq_conv.")
    return tensors_digest(weights, words)


def pixel_sum(images: Tensor) -> int:
    """Sum of the CRC-32 of all images, uint8 (B, C, H, W) on the CPU: the order does not matter."""
    return sum(zlib.crc32(image.contiguous().numpy().tobytes()) for image in images)


def header_text(info: Header) -> bytes:
    """The header in JSON."""
    values = asdict(info)
    ordered = {name: values[name] for name in FIRST if name in values} | values
    return json.dumps(ordered, separators=(",", ":")).encode()


def parse_header(text: bytes, kind: type[Header]) -> Header:
    """Parse a header. Raises ValueError or TypeError if it is damaged."""
    values = json.loads(text)
    if not isinstance(values, dict) or values.keys() != {item.name for item in fields(kind)}:
        raise ValueError("its header does not hold the values of a code file")
    for item in fields(kind):
        if str(item.type).startswith("tuple"):
            values[item.name] = tuple(values[item.name])
    return kind(**values)
