"""Normalisation of the latents before they are quantised."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ranks import SumOverRanks, sum_over_ranks
from .recomputation import in_backward
from .search import widened

MOMENTUM = 0.1  # of the running averages, as in torch.nn.BatchNorm2d
EPSILON = 1e-5  # added to variances


class LatentNorm(nn.Module):
    """Base class of a quantiser that normalises its latents by one of LATENT_NORMS.

    Buffers, with "batch" and "running": `latent_mean` and `latent_variance` (m, d), running
    averages over training; with "running" also `latent_steps`, the number of averaged steps.
    """

    latent_norm: str
    latent_mean: Tensor
    latent_steps: Tensor | None
    latent_variance: Tensor

    def _keep_averages(self, shape: tuple[int, int]) -> None:
        """Register the buffers, for units of shape (m, d)."""
        self.register_buffer("latent_mean", torch.zeros(shape))
        self.register_buffer("latent_variance", torch.ones(shape))
        by_running = self.latent_norm == "running"
        self._keep("latent_steps", torch.zeros(()) if by_running else None)

    def _keep(self, name: str, value: Tensor | None) -> None:
        """Register a buffer, or set None, which torch.export miscounts among the buffers."""
        if value is None:
            setattr(self, name, None)
        else:
            self.register_buffer(name, value)

    def reset_parameters(self) -> None:
        """Set the averages to what they are in a new module."""
        for name, start in (("latent_mean", 0), ("latent_variance", 1), ("latent_steps", 0)):
            if getattr(self, name, None) is not None:
                nn.init.constant_(getattr(self, name), start)

    def _normalise(self, units: Tensor, training: bool) -> Tensor:
        """Normalise units (B, H, W, m, d); in training also update the averages."""
        return LATENT_NORMS[self.latent_norm](self, units, training)


def batch_norm(quantizer: LatentNorm, units: Tensor, training: bool) -> Tensor:
    """Normalise each channel over the batch; in evaluation, by the running averages."""
    mean, variance = widened(quantizer.latent_mean), widened(quantizer.latent_variance)  # (m, d)
    if training:
        mean, variance = batch_statistics(quantizer, units)
    return (units - mean) * (variance + EPSILON).rsqrt()


def running_norm(quantizer: LatentNorm, units: Tensor, training: bool) -> Tensor:
    """Normalise each channel by its running averages, in training too, without gradient to them.

    `batch_norm` hides brightness and contrast of the batch from the decoder, which is noise if
    batches are small and their images differ.
    """
    if training and not in_backward():
        with torch.no_grad():
            batch_statistics(quantizer, units)
    mean, variance = widened(quantizer.latent_mean), widened(quantizer.latent_variance)
    return (units - mean) * (variance + EPSILON).rsqrt()


def batch_statistics(quantizer: LatentNorm, units: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (m, d) over all processes; if finite, they update the running averages.

    The averages of "running" are plain means over its first 1/MOMENTUM calls. Its variance is taken
    about the running mean, to include how the means of calls differ: a call may have few images.
    """
    rows = units.flatten(0, 2)  # (B·H·W, m, d)
    count = sum_over_ranks(torch.full((), len(rows), device=rows.device))
    mean = SumOverRanks.apply(rows.sum(0)) / count.clamp_min(1)
    variance = spread = SumOverRanks.apply((rows - mean).square().sum(0)) / count.clamp_min(1)
    if in_backward():
        return mean, variance
    with torch.no_grad():
        seen = (count > 0) & mean.isfinite().all() & variance.isfinite().all()
        rate: float | Tensor = MOMENTUM
        if quantizer.latent_steps is not None:
            quantizer.latent_steps += seen
            rate = (1 / quantizer.latent_steps.to(mean.dtype)).clamp(MOMENTUM, 1)
            spread = variance + (1 - rate) * (mean - quantizer.latent_mean).square()
        for average, value in ((quantizer.latent_mean, mean), (quantizer.latent_variance, spread)):
            average.copy_(widened(average).lerp(torch.where(seen, value, average), rate))
    return mean, variance


# Quantiser, units (B, H, W, m, d), in training? → units of the same shape.
LATENT_NORMS: dict[str, Callable[[LatentNorm, Tensor, bool], Tensor]] = {
    "none": lambda _, units, __: units,
    # Each unit to mean square one, which is length √d.
    "unit": lambda _, units, __: F.normalize(units, dim=-1) * math.sqrt(units.shape[-1]),
    # All channels of a position together to mean zero and variance one.
    "layer": lambda _, units, __: F.layer_norm(units, [int(side) for side in units.shape[-2:]]),
    "batch": batch_norm,
    "running": running_norm,
}
WITH_AVERAGES = ("batch", "running")
