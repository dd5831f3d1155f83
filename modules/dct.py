"""The DCT network: it begins as a transform code, like JPEG, and is then trained."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .autoencoder import Autoencoder, NetworkSpec

if TYPE_CHECKING:
    from .config import ModelConfig

# Orthogonal colour axes of Ohta et al., Computer Graphics and Image Processing 13 (1980), and how
# far photographs spread along each, relative to the first.
COLOURS = (((1.0, 1.0, 1.0), 1.0), ((1.0, 0.0, -1.0), 0.4), ((1.0, -2.0, 1.0), 0.16))


def block_dct(in_channels: int, side: int) -> tuple[Tensor, Tensor]:
    """Orthonormal DCT-II of blocks, of three channels along the colour axes.

    Returns the basis (P, in_channels, side, side), with P = in_channels·side², and the spread (P,)
    of its coefficients in photographs, roughly and in descending order: it falls with frequency.
    """
    places = torch.arange(side)
    waves = torch.cos(math.pi / side * (places + 0.5) * places[:, None]) * math.sqrt(2 / side)
    waves[0] /= math.sqrt(2)
    axes, spreads = torch.eye(in_channels), torch.ones(in_channels)
    if in_channels == len(COLOURS):
        axes = F.normalize(torch.tensor([axis for axis, _ in COLOURS]))
        spreads = torch.tensor([spread for _, spread in COLOURS])
    basis = torch.einsum("pc,ky,lx->pklcyx", axes, waves, waves).flatten(0, 2)
    spread = (spreads[:, None, None] * side / (1 + 8 * (places + places[:, None]))).flatten()
    order = spread.argsort(descending=True, stable=True)
    return basis[order], spread[order]


class ResidualBlock(nn.Module):
    """Add a branch of conv 3×3, ReLU and conv 1×1: (B, C, H, W) → same shape."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(channels, inner, 3, padding=1), nn.ReLU(), nn.Conv2d(inner, channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.block(x)
        return out


class ScaledConv(nn.Conv2d):
    """Convolve 1×1, then multiply each output channel by its scale (C,).

    The weights then have one order of magnitude, which suits the steps of Adam.
    """

    scale: Tensor

    def __init__(self, in_channels: int, scale: Tensor) -> None:
        super().__init__(in_channels, len(scale), 1)
        self.register_buffer("scale", scale[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Encoder(nn.Module):
    """Images (B, in_channels, f·H, f·W) → coefficients over their spread, and features of them.

    Returns (B, P + hidden, H, W), the P coefficients first.
    """

    analysis: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        basis, spread = block_dct(config.in_channels, config.block_size)
        self.stride = config.block_size
        self.register_buffer("analysis", basis / spread[:, None, None, None], persistent=False)
        self.conv_1 = nn.Conv2d(len(basis), config.hidden_size, 3, padding=1)
        self.residual_blocks = residual_blocks(config)

    def forward(self, images: Tensor) -> Tensor:
        coefficients = F.conv2d(images, self.analysis, stride=self.stride)
        return torch.cat([coefficients, self.residual_blocks(self.conv_1(coefficients))], 1)


class Decoder(nn.Module):
    """Latents (B, C, H, W) → images (B, in_channels, f·H, f·W)."""

    synthesis: Tensor
    scale: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        basis, spread = block_dct(config.in_channels, config.block_size)
        self.stride, self.widths = config.block_size, (len(basis), config.hidden_size)
        self.register_buffer("synthesis", basis * spread[:, None, None, None], persistent=False)
        self.register_buffer("scale", latent_scale(config)[:, None, None], persistent=False)
        self.conv_1 = nn.Conv2d(config.channels, sum(self.widths), 3, padding=1)
        self.residual_blocks = residual_blocks(config)
        self.conv_2 = nn.Conv2d(config.hidden_size, len(basis), 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        coefficients, x = self.conv_1(latents / self.scale).split(self.widths, 1)
        coefficients = coefficients + self.conv_2(self.residual_blocks(x))
        return F.conv_transpose2d(coefficients, self.synthesis, stride=self.stride)


class DCTAutoencoder(Autoencoder):
    """Autoencoder that begins as a transform code.

    The latents of a new network are the C coefficients of f×f blocks that are the largest in
    photographs, and its decoder inverts the transform. The convolutions can learn what a fixed map
    of each block cannot do. --latent_norm would make all coefficients equally large.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config)
        self.quantizer = config.spec.make(config)
        self.decoder = Decoder(config)
        coefficients = config.in_channels * config.block_size**2
        self.pre_vq_conv = ScaledConv(coefficients + config.hidden_size, latent_scale(config))
        there, back = self.pre_vq_conv, self.decoder.conv_1
        for start in (*there.parameters(), *self.decoder.conv_2.parameters()):
            nn.init.zeros_(start)
        with torch.no_grad():
            for start in back.parameters():
                start[:coefficients] = 0
            kept = range(min(coefficients, config.channels))
            there.weight[kept, kept] = 1
            back.weight[kept, kept, 1, 1] = 1

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight of the last convolution before the inverse transform, which is fixed.

        The linear part of conv_1 bypasses it, but both add to the same coefficients.
        """
        weight: nn.Parameter = self.decoder.conv_2.weight
        return weight

    def reconstruct(self, latents: Tensor) -> Tensor:
        images: Tensor = self.decoder(latents)
        return images


def latent_scale(config: ModelConfig) -> Tensor:
    """Spread of the C largest coefficients, (C,); further channels have that of the smallest."""
    _, spread = block_dct(config.in_channels, config.block_size)
    return spread[torch.arange(config.channels).clamp_max(len(spread) - 1)]


def residual_blocks(config: ModelConfig) -> nn.Sequential:
    """Residual blocks of an encoder or decoder."""
    return nn.Sequential(
        *(
            ResidualBlock(config.hidden_size, config.num_residual_hidden)
            for _ in range(config.num_residual_layers)
        )
    )


SPEC = NetworkSpec(
    "DCT network",
    DCTAutoencoder,
    frozenset({"num_residual_hidden", "block_size"}),
    lambda config: config.block_size,
)
