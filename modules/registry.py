"""The models by the name of --model."""

from __future__ import annotations

from modules.autoencoder import Autoencoder
from modules.config import ModelConfig
from modules.quantizers.library import need_library
from modules.vqgan import VQGAN, need_diffusers
from modules.vqvae import VQVAE

MODELS: dict[str, type[Autoencoder]] = {"vqvae": VQVAE, "vqgan": VQGAN}


def make_model(config: ModelConfig) -> Autoencoder:
    """A new model. Raises ValueError where a library that it needs is not installed."""
    return MODELS[config.model](config)


def need_libraries(config: ModelConfig) -> None:
    """Raise ValueError where the model needs a library that is not installed."""
    need_library(config.quantizer)
    if config.model == "vqgan":
        need_diffusers()
