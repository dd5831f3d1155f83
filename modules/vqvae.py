"""The VQ-VAE: a convolutional encoder and decoder with downsampling factor 4."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from .autoencoder import Autoencoder, NetworkSpec
from .quantizers.spec import Problems

if TYPE_CHECKING:
    from .config import ModelConfig


class ResidualBlock(nn.Module):
    """ReLU, then a branch of conv 3×3, ReLU and conv 1×1 added to it: (B, C, H, W) → same shape.

    The shortcut carries the rectified input, since the reference's first ReLU works in place.
    """

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(channels, inner, 3, padding=1), nn.ReLU(), nn.Conv2d(inner, channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        out: Tensor = x + self.block(x)
        return out


class ResidualStack(nn.Module):
    """Residual blocks, then a ReLU."""

    def __init__(self, channels: int, inner: int, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ResidualBlock(channels, inner) for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return F.relu(x)


class Encoder(nn.Module):
    """Images (B, in_channels, 4H, 4W) → features (B, hidden, H, W)."""

    def __init__(self, in_channels: int, hidden: int, inner: int, num_layers: int) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(in_channels, hidden // 2, 4, stride=2, padding=1)
        self.conv_2 = nn.Conv2d(hidden // 2, hidden, 4, stride=2, padding=1)
        self.conv_3 = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.residual_stack = ResidualStack(hidden, inner, num_layers)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.conv_1(images))
        x = F.relu(self.conv_2(x))
        out: Tensor = self.residual_stack(self.conv_3(x))
        return out


class Decoder(nn.Module):
    """Latents (B, C, H, W) → images (B, out_channels, 4H, 4W)."""

    def __init__(
        self, latent_channels: int, out_channels: int, hidden: int, inner: int, num_layers: int
    ) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(latent_channels, hidden, 3, padding=1)
        self.residual_stack = ResidualStack(hidden, inner, num_layers)
        self.conv_trans_1 = nn.ConvTranspose2d(hidden, hidden // 2, 4, stride=2, padding=1)
        self.conv_trans_2 = nn.ConvTranspose2d(hidden // 2, out_channels, 4, stride=2, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.residual_stack(self.conv_1(latents))
        x = F.relu(self.conv_trans_1(x))
        out: Tensor = self.conv_trans_2(x)
        return out


class VQVAE(Autoencoder):
    """Network of van den Oord et al., arXiv 1711.00937, in the form that CVQ-VAE and LooC train."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        residual = (config.num_residual_hidden, config.num_residual_layers)
        self.encoder = Encoder(config.in_channels, config.hidden_size, *residual)
        self.pre_vq_conv = nn.Conv2d(config.hidden_size, config.channels, 1)
        self.quantizer = config.spec.make(config)
        self.decoder = Decoder(config.channels, config.in_channels, config.hidden_size, *residual)

    @property
    def last_layer(self) -> nn.Parameter:
        weight: nn.Parameter = self.decoder.conv_trans_2.weight
        return weight

    def reconstruct(self, latents: Tensor) -> Tensor:
        images: Tensor = self.decoder(latents)
        return images


def check(config: ModelConfig) -> Problems:
    size = config.hidden_size
    if size % 2:
        yield f"--hidden_size {size} is odd; the first convolution has half as many channels"


SPEC = NetworkSpec(
    "VQ-VAE", VQVAE, frozenset({"num_residual_hidden"}), lambda _: 4, checks=(check,)
)
