"""LooC, CVQ-VAE and plain VQ: three settings of LooCQuantizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .looc import LooCQuantizer
from .spec import COMMON_FLAGS, QuantizerSpec, check_position, check_units, units

if TYPE_CHECKING:
    from ..config import ModelConfig

FLAGS = COMMON_FLAGS | {
    *("distance", "anchor", "split", "interpolation_scale", "first_batch", "contras_loss"),
    *("commitment_cost", "codebook_update", "ema_decay", "codebook_start", "gradient"),
    "rate_weight",
}


def make(config: ModelConfig) -> LooCQuantizer:
    return LooCQuantizer(
        config.num_embedding,
        config.embedding_dim,
        commitment_cost=config.commitment_cost,
        distance=config.distance,
        anchor=config.anchor,
        split=config.split,
        interpolation_scale=config.interpolation_scale,
        first_batch=config.first_batch,
        contras_loss=config.contras_loss,
        codebook_update=config.codebook_update,
        ema_decay=config.ema_decay,
        codebook_start=config.codebook_start,
        latent_norm=config.latent_norm,
        latent_channels=config.channels,
        gradient=config.gradient,
        rate_weight=config.rate_weight,
    )


def check_update(config: ModelConfig) -> None:
    """Check what LooCQuantizer would refuse, to name the flags."""
    if config.contras_loss and config.codebook_update != "gradient":
        raise ValueError(
            f"--contras_loss has no effect with --codebook_update {config.codebook_update}, "
            "only with gradient"
        )
    if config.rate_weight and config.distance != "l2":
        raise ValueError(
            f"--rate_weight {config.rate_weight:g} needs --distance l2, not {config.distance}"
        )


LOOC = QuantizerSpec(
    "LooC",
    make,
    FLAGS,
    checks=(check_units, check_update),
    any_channels=True,
    slots=units,
    parts=True,
)
CVQ = QuantizerSpec("CVQ-VAE", make, FLAGS, checks=(check_position, check_update), parts=True)
VQ = QuantizerSpec(
    "plain VQ",
    make,
    FLAGS - {"anchor"},
    {"distance": "l2", "anchor": "none"},
    checks=(check_position, check_update),
    parts=True,
)
