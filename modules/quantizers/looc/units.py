"""Extrapolation-by-interpolation, and the split of channels into units of dimension d."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


def extrapolate(z: Tensor, scale: int) -> Tensor:
    """Upsample by β, move positions to channels c·β² + i·β + j: (B, C, H, W) → (B, C·β², H, W)."""
    if scale < 2:
        return z
    if not len(z):  # pixel_unshuffle does not change the channels of an empty batch
        return z.repeat(1, scale**2, 1, 1)
    upsampled = F.interpolate(z, scale_factor=scale, mode="bilinear", align_corners=False)
    return F.pixel_unshuffle(upsampled, scale)


def interpolate_back(z: Tensor, scale: int) -> Tensor:
    """Undo `extrapolate` by average pooling: (B, C·β², H, W) → (B, C, H, W)."""
    if scale < 2:
        return z
    if not len(z):
        return z[:, :: scale**2]
    return F.avg_pool2d(F.pixel_shuffle(z, scale), scale)


def num_units(channels: int, scale: int, dim: int) -> int:
    """m = C·max(β, 1)²/d. Raises ValueError if d does not divide the channels."""
    extrapolated = channels * max(scale, 1) ** 2
    if extrapolated % dim:
        why = f", {channels} times {scale}² of interpolation_scale" if scale > 1 else ""
        raise ValueError(f"embedding_dim {dim} does not divide the {extrapolated} channels{why}")
    return extrapolated // dim


class Split(NamedTuple):
    """Split of the channels into units, and its inverse."""

    cut: Callable[[Tensor, int], Tensor]  # (B, H, W, C), d → (B, H, W, m, d)
    join: Callable[[Tensor], Tensor]  # (B, H, W, m, d) → (B, H, W, C)


SPLITS = {
    # Unit s has channels s·d … s·d + d − 1.
    "fixed": Split(
        cut=lambda z, dim: z.view(*z.shape[:-1], z.shape[-1] // dim, dim),
        join=lambda units: units.flatten(-2),
    ),
    # Unit s has channels s, s + m, s + 2m, …
    "interval": Split(
        cut=lambda z, dim: z.view(*z.shape[:-1], dim, z.shape[-1] // dim).transpose(-1, -2),
        join=lambda units: units.transpose(-1, -2).flatten(-2),
    ),
}
