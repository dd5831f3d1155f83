"""LooC, CVQ-VAE and plain VQ: three settings of LooCQuantizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .looc import LooCQuantizer
from .spec import COMMON_FLAGS, Problems, QuantizerSpec, check_position, check_units, units

if TYPE_CHECKING:
    from ..config import ModelConfig

FLAGS = COMMON_FLAGS | {
    *("distance", "anchor", "split", "interpolation_scale", "first_batch", "contras_loss"),
    *("commitment_cost", "codebook_update", "ema_decay", "codebook_start", "gradient"),
    *("rate_weight", "num_passes"),
}


def make(config: ModelConfig) -> LooCQuantizer:
    flags = {name: getattr(config, name) for name in FLAGS}  # num_embedding, embedding_dim, …
    return LooCQuantizer(latent_channels=config.channels, **flags)


def check_update(config: ModelConfig) -> Problems:
    update, weight, distance = config.codebook_update, config.rate_weight, config.distance
    if config.contras_loss and update != "gradient":
        yield f"--contras_loss has no effect with --codebook_update {update}, only with gradient"
    if weight and distance != "l2":
        yield f"--rate_weight {weight:g} needs --distance l2, not {distance}"


LOOC = QuantizerSpec(
    "LooC",
    make,
    FLAGS,
    checks=(check_units, check_update),
    any_channels=True,
    slots=lambda config: units(config) * config.num_passes,
    parts=True,
)
CVQ = QuantizerSpec(
    "CVQ-VAE",
    make,
    FLAGS - {"num_passes"},
    checks=(check_position, check_update),
    parts=True,
)
VQ = QuantizerSpec(
    "plain VQ",
    make,
    FLAGS - {"anchor", "num_passes"},
    {"distance": "l2", "anchor": "none"},
    checks=(check_position, check_update),
    parts=True,
)
