"""Parts of an exported folder of diffusers: LooC's autoencoder, and a UNet for latents of any side.

`generate.py export` copies this file into the folder. It needs the package looc, or a checkout of
this repository on Python's path.
"""
# mypy: allow-untyped-calls, allow-untyped-decorators, disable-error-code="attr-defined, misc"

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from torch import Tensor


class LooCAutoencoder(ModelMixin, ConfigMixin):
    """Autoencoder of latents (B, C, H, W) of mean 0 and variance 1 per channel.

    The quantiser belongs to `decode`, as in diffusers' VQModel.

    Args:
        model: fields of ModelConfig.
        scaling_factor: read by LDMPipeline, which divides latents by it.
    """

    @register_to_config
    def __init__(self, model: dict[str, Any], scaling_factor: float = 1.0) -> None:  # noqa: ARG002
        super().__init__()
        looc = import_module("looc" if find_spec("looc") else "modules")
        self.autoencoder = looc.make_model(looc.ModelConfig(**model))
        shape = self.autoencoder.config.channels, 1, 1
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))

    @classmethod
    def from_pretrained(cls, *where: Any, **options: Any) -> LooCAutoencoder:
        """Load it with all buffers in memory, which diffusers' own way leaves out."""
        loaded: LooCAutoencoder = super().from_pretrained(
            *where, **{**options, "low_cpu_mem_usage": False}
        )
        return loaded

    def encode(self, images: Tensor) -> VQEncoderOutput:
        """Images in [−1, 1] → latents before quantisation."""
        return VQEncoderOutput(latents=(self.autoencoder.latents(images) - self.mean) / self.std)

    def decode(self, latents: Tensor) -> DecoderOutput:
        """Latents → images in [−1, 1], about."""
        quantized = self.autoencoder.quantizer(latents * self.std + self.mean)
        return DecoderOutput(sample=self.autoencoder.reconstruct(quantized.latents))


class PaddedUNet(UNet2DModel):
    """UNet2DModel of latents whose sides it cannot halve often enough: pads them with zeros."""

    def forward(self, sample: Tensor, *others: Any, **options: Any) -> Any:
        height, width = sample.shape[2:]
        unit = 2 ** (len(self.config.block_out_channels) - 1)
        padded = F.pad(sample, (0, -width % unit, 0, -height % unit))
        found = super().forward(padded, *others, **options)
        return type(found)(sample=found.sample[..., :height, :width])
