"""Extrapolation-by-interpolation, and the split of channels into units of dimension d."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}  # interpolation over that many axes


def extrapolate(z: Tensor, scale: int) -> Tensor:
    """Upsample by β, move positions to channels c·β² + i·β + j: (B, C, H, W) → (B, C·β², H, W).

    With n = 1 or 3 axes of positions there are C·βⁿ channels, in the same order.
    """
    if scale < 2:
        return z
    axes = z.dim() - 2
    z = F.interpolate(z, scale_factor=scale, mode=MODES[axes], align_corners=False)
    if z.shape[0] and axes == 2:  # pixel_unshuffle does not change the channels of an empty batch
        return F.pixel_unshuffle(z, scale)
    for axis in range(axes):
        z = torch.unflatten(z, 2 + 2 * axis, (-1, scale))  # (B, C, H, β, W, β)
    inner, outer = range(3, 3 + 2 * axes, 2), range(2, 2 + 2 * axes, 2)
    return z.permute(0, 1, *inner, *outer).flatten(1, 1 + axes)


def interpolate_back(z: Tensor, scale: int) -> Tensor:
    """Undo `extrapolate` by average pooling: (B, C·β², H, W) → (B, C, H, W)."""
    if scale < 2:
        return z
    if z.shape[0] and z.dim() == 4:  # the mean over β² channels, faster
        return F.avg_pool2d(F.pixel_shuffle(z, scale), scale)
    return torch.unflatten(z, 1, (-1, enlargement(scale, z.dim() - 2))).mean(2)


def enlargement(scale: int, axes: int) -> int:
    """Channels that `extrapolate` makes of one: βⁿ for n axes. Raises ValueError if undefined."""
    if scale < 2:
        return 1
    if axes not in MODES:
        raise ValueError(f"interpolation_scale {scale} needs 1 to 3 axes of positions, not {axes}")
    return int(scale**axes)


def num_units(channels: int, scale: int, dim: int, axes: int = 2) -> int:
    """m = C·max(β, 1)ⁿ/d for n axes. Raises ValueError if d does not divide the channels."""
    extrapolated = channels * enlargement(scale, axes)
    if extrapolated % dim:
        power = f"{scale}{'⁰¹²³'[axes]}"
        why = f", {channels} times {power} of interpolation_scale" if scale > 1 else ""
        raise ValueError(f"embedding_dim {dim} does not divide the {extrapolated} channels{why}")
    return extrapolated // dim


class Split(NamedTuple):
    """Split of the channels into units, and its inverse."""

    cut: Callable[[Tensor, int], Tensor]  # (B, …, C), d → (B, …, m, d)
    join: Callable[[Tensor], Tensor]  # (B, …, m, d) → (B, …, C)


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
