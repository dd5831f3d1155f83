"""The models by the name of --model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import dct, vqgan, vqvae
from .autoencoder import Autoencoder, NetworkSpec

if TYPE_CHECKING:
    from .config import ModelConfig

MODELS: dict[str, NetworkSpec] = {
    "vqvae": vqvae.SPEC,
    "vqgan": vqgan.SPEC,
    "dct": dct.SPEC,
}
NETWORK_FLAGS = frozenset[str]().union(*(spec.reads for spec in MODELS.values()))


def make_model(config: ModelConfig) -> Autoencoder:
    """Make a new model. Raises ValueError if a library that it needs is not installed."""
    return config.network.make(config)
