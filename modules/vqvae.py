"""The VQ-VAE: encode, quantise, decode."""

from __future__ import annotations

from torch import Tensor, nn

from modules.autoencoder import Decoder, Encoder
from modules.config import ModelConfig
from modules.model import MAKERS, Autoencoder


class VQVAE(Autoencoder):
    """The network of van den Oord et al., arXiv 1711.00937, as CVQ-VAE and LooC train it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        residual = (config.num_residual_layers, config.num_residual_hidden)
        self.encoder = Encoder(config.in_channels, config.hidden_size, *residual)
        self.pre_vq_conv = nn.Conv2d(config.hidden_size, config.channels, 1)
        self.quantizer = MAKERS[config.quantizer](config)
        self.decoder = Decoder(config.channels, config.in_channels, config.hidden_size, *residual)

    def reconstruct(self, latents: Tensor) -> Tensor:
        images: Tensor = self.decoder(latents)
        return images
