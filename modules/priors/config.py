"""A prior's hyper-parameters, each declared once for flags, checkpoint and checks."""

from __future__ import annotations

from dataclasses import dataclass

from ..autoencoder import Autoencoder
from ..options import option
from .registry import PRIORS


@dataclass(frozen=True)
class CodeSpace:
    """Codes of an image: H × W positions of m slots, each one of K codevectors."""

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

    def __str__(self) -> str:
        return f"{self.height}×{self.width}×{self.num_slots} codes of K = {self.num_embedding}"

    @property
    def num_positions(self) -> int:
        """H·W."""
        return self.height * self.width


@dataclass(frozen=True)
class PriorConfig:
    """Everything needed to rebuild a prior of a code space.

    Raises ValueError, naming the flags and both values, if fields contradict each other.
    """

    prior: str = option(
        "transformer",
        "model of the codes: one position after another (transformer), or all positions in a few "
        "rounds (masked)",
        choices=PRIORS,
    )
    width: int = option(256, "channels of the transformer", minimum=2, maximum=2**14)
    layers: int = option(6, "transformer blocks over the positions", minimum=1, maximum=256)
    heads: int = option(4, "attention heads of a block", minimum=1, maximum=256)
    depth_layers: int = option(
        2, "residual MLPs over the slots of a position", minimum=0, maximum=64
    )
    dropout: float = option(0.1, "dropout in training", minimum=0, maximum=0.9)

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"--heads {self.heads} does not divide --width {self.width}")
