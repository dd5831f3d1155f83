"""The spaces of priors: codes or latents of square images of one size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from torch import Tensor

from ..autoencoder import Autoencoder
from ..options import option


@dataclass(frozen=True)
class CodeSpace:
    """Codes of an image: H × W positions of m slots, each one of K codevectors."""

    items: ClassVar[str] = "codes"
    dtype: ClassVar[str] = "int64"  # of a batch

    num_embedding: int = option(256, "codevectors K", minimum=1, maximum=2**20, flag=False)
    num_slots: int = option(1, "codes m per position", minimum=1, maximum=2**16, flag=False)
    height: int = option(7, "H", minimum=1, maximum=2048, flag=False)
    width: int = option(7, "W", minimum=1, maximum=2048, flag=False)

    @classmethod
    def of(cls, first_stage: Autoencoder, image_size: int) -> CodeSpace:
        """Codes of square images. Raises ValueError if the first stage has none."""
        config = first_stage.config
        if not config.num_slots:
            raise ValueError(f"--quantizer {config.quantizer} has no codes")
        side = image_size // config.downsampling
        return cls(config.num_embedding, config.num_slots, side, side)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, m)."""
        return self.height, self.width, self.num_slots

    @property
    def stored_dtype(self) -> str:
        """The smallest integer type."""
        bits = (self.num_embedding - 1).bit_length()
        return "u1" if bits <= 8 else "<u2" if bits <= 16 else "<i4"

    def __str__(self) -> str:
        return f"{self.height}×{self.width}×{self.num_slots} codes of K = {self.num_embedding}"

    @property
    def num_positions(self) -> int:
        """H·W."""
        return self.height * self.width

    def encode(self, first_stage: Autoencoder, images: Tensor) -> Tensor:
        """Images → codes (B, H, W, m)."""
        return first_stage.encode(images)

    def decode(self, first_stage: Autoencoder, codes: Tensor) -> Tensor:
        """Codes (B, H, W, m) → images."""
        return first_stage.decode(codes)


@dataclass(frozen=True)
class LatentSpace:
    """Latents of an image before quantisation, (C, H, W)."""

    items: ClassVar[str] = "latents"
    dtype: ClassVar[str] = "float32"
    stored_dtype: ClassVar[str] = "<f2"

    channels: int = option(4, "C", minimum=1, maximum=2**14, flag=False)
    height: int = option(7, "H", minimum=1, maximum=2048, flag=False)
    width: int = option(7, "W", minimum=1, maximum=2048, flag=False)

    @classmethod
    def of(cls, first_stage: Autoencoder, image_size: int) -> LatentSpace:
        """Latents of square images."""
        side = image_size // first_stage.config.downsampling
        return cls(first_stage.config.channels, side, side)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.channels, self.height, self.width

    def __str__(self) -> str:
        return f"{self.height}×{self.width} latents of {self.channels} channels"

    def encode(self, first_stage: Autoencoder, images: Tensor) -> Tensor:
        """Images → latents (B, C, H, W)."""
        return first_stage.latents(images)

    def decode(self, first_stage: Autoencoder, latents: Tensor) -> Tensor:
        """Quantise latents (B, C, H, W) and decode them to images."""
        return first_stage.reconstruct(first_stage.quantizer(latents).latents)


Space: TypeAlias = CodeSpace | LatentSpace
