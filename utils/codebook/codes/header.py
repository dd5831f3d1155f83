"""The header of a code file: shapes, positions, and the model that decodes it."""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from modules import VQGAN, Autoencoder, LooCQuantizer, ModelConfig
from modules.options import option
from modules.vqgan import num_groups
from utils.codebook.codes.coder import LARGEST_TABLES, need_coder
from utils.errors import UserError
from utils.flags.arguments import value_problem

CHUNK_CODES = 2**22  # codes of a chunk; a chunk is never less than a batch
LARGEST_CHUNK = 2**27  # codes


@dataclass(frozen=True)
class CodesInfo:
    """Header of a code file, and the bounds of its values."""

    fingerprint: str = option("", "fingerprint of the model that decodes")
    dataset: str = option("", "name of the image set")
    image_size: int = option(4, "side of an image in pixels", minimum=4, maximum=8192)
    channels: int = option(1, "channels of an image", minimum=1, maximum=1024)
    num_images: int = option(1, "images, including those left out", minimum=1, maximum=2**40)
    left_out: tuple[int, ...] = option((), "positions of images that could not be decoded")
    batch_size: int = option(1, "images at a time; rounding depends on it", minimum=1)
    chunk_size: int = option(1, "images of the set from one chunk to the next", minimum=1)
    height: int = option(1, "H of the indices (n, H, W, m)", minimum=1, maximum=2048)
    width: int = option(1, "W of the indices", minimum=1, maximum=2048)
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
        if self.chunk_size % self.batch_size or self.codes_per_image % self.num_tables:
            raise ValueError("batches do not fill chunks, or tables do not divide the codes")
        if self.chunk_size * self.codes_per_image > LARGEST_CHUNK:
            raise ValueError(
                f"batch_size {self.batch_size} times {self.codes_per_image} codes per image "
                f"is more than {LARGEST_CHUNK}"
            )
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
        """The smallest type that holds every index."""
        bits = (self.num_embedding - 1).bit_length()
        return np.dtype("u1" if bits <= 8 else "<u2" if bits <= 16 else "<i4")

    def batches(self, chunk: int) -> list[NDArray[np.int64]]:
        """Positions in the set of the images of a chunk, by batch; batches without are absent."""
        start = chunk * self.chunk_size
        whole = np.arange(start, min(start + self.chunk_size, self.num_images))
        left_out = np.array(self.left_out, dtype=np.int64)
        positions = np.setdiff1d(whole, left_out, assume_unique=True)
        starts = np.flatnonzero(np.diff(positions // self.batch_size)) + 1
        return [batch for batch in np.split(positions, starts) if len(batch)]


def codes_info(
    model: Autoencoder, dataset: str, image_size: int, num_images: int, batch_size: int
) -> CodesInfo:
    """The header of a code file of this model, before the images have been seen.

    Raises UserError if there are no codes, too many in a batch, or no entropy coder.
    """
    need_coder("--save_codes")
    if not model.config.num_slots:
        raise UserError(f"--save_codes: --quantizer {model.config.quantizer} leaves no codes")
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


def fingerprint(model: Autoencoder) -> str:
    """SHA-256 of everything that turns indices into images: codebook, decoder, split into units."""
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
    """Sum of the CRC-32 of all images, uint8 (B, C, H, W) on the CPU: the order does not matter."""
    return sum(zlib.crc32(image.contiguous().numpy().tobytes()) for image in images)


def parse_header(text: bytes) -> CodesInfo:
    """Parse a header. Raises ValueError or TypeError if it is damaged."""
    values = json.loads(text)
    if not isinstance(values, dict) or values.keys() != {item.name for item in fields(CodesInfo)}:
        raise ValueError("its header does not hold the values of a code file")
    return CodesInfo(**{**values, "left_out": tuple(values["left_out"])})
