"""What all models share: an encoder, a quantiser made as the configuration says, a decoder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from modules.config import ModelConfig, parse_levels
from modules.quantizers.library import PEERS, NoQuantizer, PeerQuantizer
from modules.quantizers.looc.quantizer import LooCQuantizer, Quantized

Quantizer: TypeAlias = LooCQuantizer | PeerQuantizer | NoQuantizer


def make_looc(config: ModelConfig) -> Quantizer:
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


def make_peer(config: ModelConfig) -> Quantizer:
    return PeerQuantizer(
        config.quantizer,
        config.num_embedding,
        config.embedding_dim,
        channels=config.channels,
        distance=config.distance,
        commitment_cost=config.commitment_cost,
        ema_decay=config.ema_decay,
        codebook_start=config.codebook_start,
        gradient=config.gradient,
        levels=parse_levels(config.levels or ""),
        num_quantizers=config.num_quantizers,
        dead_code_threshold=config.dead_code_threshold,
        latent_norm=config.latent_norm,
    )


def make_none(config: ModelConfig) -> Quantizer:
    return NoQuantizer(config.channels, latent_norm=config.latent_norm)


MAKERS: dict[str, Callable[[ModelConfig], Quantizer]] = {
    **dict.fromkeys(("looc", "cvq", "vq"), make_looc),
    **dict.fromkeys(PEERS, make_peer),
    "none": make_none,
}


class Autoencoder(nn.Module, ABC):
    """An image autoencoder with quantised latents.

    Images are (B, in_channels, height, width) in [−1, 1], height and width multiples of the
    configuration's `downsampling` f; anything else raises ValueError, as does a quantiser or a
    network whose library is not installed.
    """

    encoder: Any  # a module, images → (B, ·, H, W), H and W being an f-th of height and width
    pre_vq_conv: nn.Conv2d  # 1×1, → (B, C, H, W)
    quantizer: Quantizer
    decoder: Any  # a module, → images

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def reconstruct(self, latents: Tensor) -> Tensor:
        """Quantised latents (B, C, H, W) → images (B, in_channels, f·H, f·W)."""

    def forward(self, images: Tensor) -> tuple[Tensor, Quantized]:
        """Images → (reconstruction of the same shape, Quantized)."""
        quantized: Quantized = self.quantizer(self._latents(images))
        return self.reconstruct(quantized.latents), quantized

    def compile_parts(self) -> None:
        """Have torch.compile make kernels of encoder and decoder when they are first called."""
        self.encoder.compile()
        self.decoder.compile()

    def encode(self, images: Tensor) -> Tensor:
        """Images → indices (B, H, W, m), int64."""
        return self.quantizer.encode(self._latents(images))

    def decode(self, indices: Tensor) -> Tensor:
        """Indices (B, H, W, m) → images (B, in_channels, f·H, f·W)."""
        return self.reconstruct(self.quantizer.decode(indices))

    def _latents(self, images: Tensor) -> Tensor:
        """Images → latents before quantisation, (B, C, H, W)."""
        if images.dim() != 4 or images.shape[1] != self.config.in_channels:
            raise ValueError(
                f"images of shape {tuple(images.shape)} are not "
                f"(B, {self.config.in_channels}, height, width)"
            )
        factor = self.config.downsampling
        if images.shape[2] % factor or images.shape[3] % factor:
            raise ValueError(
                f"images of {images.shape[2]}×{images.shape[3]}: height and width must be "
                f"multiples of {factor}"
            )
        latents: Tensor = self.pre_vq_conv(of_any_number(self.encoder, images))
        return latents


def of_any_number(network: nn.Module, x: Tensor) -> Tensor:
    """network(x), also of no image, which attention cannot be given: (b, …) → (b, …).

    Among several processes one may have none, and its backward pass has to reach all weights still.
    """
    if len(x):
        result: Tensor = network(x)
        return result
    one = torch.cat([x, x.new_zeros(1, *x.shape[1:])])
    return network(one)[:0]  # type: ignore[no-any-return]
