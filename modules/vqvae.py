"""The VQ-VAE: encode, quantise, decode."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor, nn

from modules.autoencoder import Decoder, Encoder
from modules.config import ModelConfig, parse_levels
from modules.peers import PEERS, NoQuantizer, PeerQuantizer
from modules.quantizer import LooCQuantizer, Quantized

DOWNSAMPLING = 4  # the encoder's two strides
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
    )


MAKERS: dict[str, Callable[[ModelConfig], Quantizer]] = {
    **dict.fromkeys(("looc", "cvq", "vq"), make_looc),
    **dict.fromkeys(PEERS, make_peer),
    "none": lambda _: NoQuantizer(),
}


class VQVAE(nn.Module):
    """An image autoencoder with quantised latents.

    Images are (B, in_channels, height, width) in [−1, 1], height and width multiples of 4; anything
    else raises ValueError, as does a quantiser whose library is not installed.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        residual = (config.num_residual_layers, config.num_residual_hidden)
        self.encoder = Encoder(config.in_channels, config.hidden_size, *residual)
        self.pre_vq_conv = nn.Conv2d(config.hidden_size, config.channels, 1)
        self.quantizer = MAKERS[config.quantizer](config)
        self.decoder = Decoder(config.channels, config.in_channels, config.hidden_size, *residual)

    def forward(self, images: Tensor) -> tuple[Tensor, Quantized]:
        """Images → (reconstruction of the same shape, Quantized)."""
        quantized: Quantized = self.quantizer(self._latents(images))
        return self.decoder(quantized.latents), quantized

    def encode(self, images: Tensor) -> Tensor:
        """Images → indices (B, H, W, m), int64."""
        return self.quantizer.encode(self._latents(images))

    def decode(self, indices: Tensor) -> Tensor:
        """Indices (B, H, W, m) → images (B, in_channels, 4H, 4W)."""
        images: Tensor = self.decoder(self.quantizer.decode(indices))
        return images

    def _latents(self, images: Tensor) -> Tensor:
        """Images → latents before quantisation, (B, C, H, W)."""
        if images.dim() != 4 or images.shape[1] != self.config.in_channels:
            raise ValueError(
                f"images of shape {tuple(images.shape)} are not "
                f"(B, {self.config.in_channels}, height, width)"
            )
        if images.shape[2] % DOWNSAMPLING or images.shape[3] % DOWNSAMPLING:
            raise ValueError(
                f"images of {images.shape[2]}×{images.shape[3]}: height and width must be "
                f"multiples of {DOWNSAMPLING}"
            )
        latents: Tensor = self.pre_vq_conv(self.encoder(images))
        return latents
