"""Base class of all models: an encoder, a quantiser, a decoder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .quantizers.looc import Quantized
from .quantizers.spec import Problems, Quantizer

if TYPE_CHECKING:
    from .config import ModelConfig


@dataclass(frozen=True)
class NetworkSpec:
    """A choice of --model."""

    label: str  # its name in reports
    make: Callable[[ModelConfig], Autoencoder]
    reads: frozenset[str]  # the flags that it alone reads
    downsampling: Callable[[ModelConfig], int]  # f, side of an image / side of its latents
    checks: Sequence[Callable[[ModelConfig], Problems]] = ()
    library: str | None = None  # the optional package that it needs
    losses: frozenset[str] = frozenset({"reconstruction"})  # of those that not all networks have
    implies: Mapping[str, Any] = field(default_factory=dict)  # its own defaults of losses' flags


class Autoencoder(nn.Module, ABC):
    """Image autoencoder with quantised latents.

    Images are (B, in_channels, height, width) in [−1, 1], height and width multiples of the
    configuration's `downsampling` f. Anything else raises ValueError, and so does a quantiser or
    network whose library is not installed.
    """

    encoder: Any  # a module, images → (B, ·, H, W), with H = height / f and W = width / f
    pre_vq_conv: nn.Conv2d  # 1×1, → (B, C, H, W)
    quantizer: Quantizer
    decoder: Any  # a module, → images

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    @property
    @abstractmethod
    def last_layer(self) -> nn.Parameter:
        """The weight of the decoder's last convolution, whose gradients balance the losses."""

    @abstractmethod
    def reconstruct(self, latents: Tensor) -> Tensor:
        """Quantised latents (B, C, H, W) → images (B, in_channels, f·H, f·W)."""

    def forward(self, images: Tensor) -> tuple[Tensor, Quantized]:
        """Images → (reconstruction of the same shape, Quantized)."""
        quantized: Quantized = self.quantizer(self.latents(images))
        return self.reconstruct(quantized.latents), quantized

    def compile_parts(self) -> None:
        """Compile encoder and decoder (torch.compile) on their first call.

        The decoder's convolutions stay as they are, since gradients of the last one are also needed
        alone.
        """
        self.encoder.compile()
        for part in self.decoder.children():
            if any(True for _ in part.children()):
                part.compile()

    def encode(self, images: Tensor) -> Tensor:
        """Images → indices (B, H, W, m), int64."""
        return self.quantizer.encode(self.latents(images))

    def decode(self, indices: Tensor) -> Tensor:
        """Indices (B, H, W, m) → images (B, in_channels, f·H, f·W)."""
        if indices.dim() != 4:
            shape, slots = tuple(indices.shape), self.config.num_slots
            raise ValueError(f"indices of shape {shape} are not (B, H, W, {slots})")
        return self.reconstruct(self.quantizer.decode(indices))

    def latents(self, images: Tensor) -> Tensor:
        """Images → latents before quantisation, (B, C, H, W)."""
        shape, channels = tuple(images.shape), self.config.in_channels
        if len(shape) != 4 or shape[1] != channels:
            raise ValueError(f"images of shape {shape} are not (B, {channels}, height, width)")
        factor = self.config.downsampling
        if shape[2] % factor or shape[3] % factor:
            sides = f"images of {shape[2]}×{shape[3]}: height and width"
            raise ValueError(f"{sides} must be multiples of {factor}")
        latents: Tensor = self.pre_vq_conv(apply(self.encoder, images))
        return latents


def apply(network: nn.Module, x: Tensor) -> Tensor:
    """Return network(x), also for an empty batch, which attention refuses: (b, …) → (b, …).

    One of several processes may have no image; its backward pass still has to reach all weights.
    """
    if len(x):
        result: Tensor = network(x)
        return result
    one = torch.cat([x, x.new_zeros(1, *x.shape[1:])])
    return network(one)[:0]  # type: ignore[no-any-return]
