"""No quantiser: the latents pass unchanged, as an upper bound of quality."""

from __future__ import annotations

import torch
from torch import Tensor

from .looc import Quantized
from .looc.norms import WITH_AVERAGES, LatentNorm
from .spec import QuantizerSpec


class NoQuantizer(LatentNorm):
    """Latents that are normalised but not quantised, without indices (m = 0).

    Args:
        channels: C of the latents.
        latent_norm: as for LooCQuantizer, over all channels together.
    """

    def __init__(self, channels: int, *, latent_norm: str = "none") -> None:
        super().__init__()
        self.latent_norm = latent_norm
        if latent_norm in WITH_AVERAGES:
            self._keep_averages((1, channels))
        self.codebook = torch.empty(0, 0)
        self.defer_update = False

    def forward(self, z: Tensor) -> Quantized:
        """(B, C, H, W) → itself, normalised, a loss of 0 and indices (B, H, W, 0)."""
        with torch.autocast(z.device.type, enabled=False):
            wide = z.to(torch.promote_types(z.dtype, torch.float32))
            units = wide.permute(0, 2, 3, 1).unsqueeze(-2)  # (B, H, W, 1, C)
            latents = self._normalise(units, self.training).squeeze(-2).permute(0, 3, 1, 2)
        return Quantized(latents.to(z.dtype), z.new_zeros(()), self.encode(z))

    def encode(self, z: Tensor) -> Tensor:
        """(B, C, H, W) → (B, H, W, 0), int64."""
        return torch.empty(len(z), *z.shape[2:], 0, dtype=torch.int64, device=z.device)

    def decode(self, indices: Tensor) -> Tensor:
        """Raise ValueError: without a quantiser there are no indices to decode."""
        raise ValueError(f"indices of shape {tuple(indices.shape)} without a quantiser")


NONE = QuantizerSpec(
    "an autoencoder without quantiser",
    lambda config: NoQuantizer(config.channels, latent_norm=config.latent_norm),
    frozenset({"latent_norm"}),
    {"anchor": "none"},
    any_channels=True,
    slots=lambda _: 0,
    codebooks=lambda _: 0,
    parts=True,
)
