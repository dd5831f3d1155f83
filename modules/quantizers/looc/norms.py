"""Normalisation of the latents before they are quantised."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ranks import SumOverRanks, sum_over_ranks

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
        self.register_buffer("latent_steps", torch.tensor(0) if by_running else None)

    def _normalise(self, units: Tensor, training: bool) -> Tensor:
        """Normalise units (B, H, W, m, d); in training also update the averages."""
        norm = LATENT_NORMS[self.latent_norm]
        return units if norm is None else norm(self, units, training)

    @torch.no_grad()
    def _average_latents(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Update the running averages, unless the statistics are not finite.

        The averages of "running" are plain means over its first 1/MOMENTUM calls. Its variance is
        taken about the running mean, so that it includes how the means of calls differ, which
        matters when a call has few images.
        """
        seen = (count > 0) & mean.isfinite().all() & variance.isfinite().all()
        rate: float | Tensor = MOMENTUM
        if self.latent_steps is not None:
            self.latent_steps += seen
            rate = (1 / self.latent_steps.to(mean.dtype)).clamp(MOMENTUM, 1)
            variance = variance + (1 - rate) * (mean - self.latent_mean).square()
        for average, value in ((self.latent_mean, mean), (self.latent_variance, variance)):
            average.lerp_(torch.where(seen, value, average), rate)


def rms_norm(quantizer: LatentNorm, units: Tensor, training: bool) -> Tensor:
    """Scale each unit to mean square one, which is length √d."""
    del quantizer, training
    return F.normalize(units, dim=-1) * math.sqrt(units.shape[-1])


def layer_norm(quantizer: LatentNorm, units: Tensor, training: bool) -> Tensor:
    """Normalise all channels of a position together to mean zero and variance one."""
    del quantizer, training
    return F.layer_norm(units, units.shape[-2:])


def batch_norm(quantizer: LatentNorm, units: Tensor, training: bool) -> Tensor:
    """Normalise each channel to mean zero and variance one over the batch of all processes.

    Uses the running averages in evaluation: Ioffe and Szegedy, arXiv 1502.03167.
    """
    mean, variance = quantizer.latent_mean, quantizer.latent_variance  # (m, d)
    if training:
        mean, variance = batch_statistics(quantizer, units)
    return (units - mean) * (variance + EPSILON).rsqrt()


def running_norm(quantizer: LatentNorm, units: Tensor, training: bool) -> Tensor:
    """Normalise each channel by its running averages, in training as in evaluation.

    The averages are constants to the gradient. `batch_norm` divides by the statistics of the batch
    and so hides brightness and contrast of the batch from the decoder, which is noise if batches
    are small and their images differ.
    """
    if training:
        with torch.no_grad():
            batch_statistics(quantizer, units)
    return (units - quantizer.latent_mean) * (quantizer.latent_variance + EPSILON).rsqrt()


def batch_statistics(quantizer: LatentNorm, units: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (m, d) over all processes; also updates the running averages."""
    rows = units.flatten(0, 2)  # (B·H·W, m, d)
    count = sum_over_ranks(torch.full((), len(rows), device=rows.device))
    mean = SumOverRanks.apply(rows.sum(0)) / count.clamp_min(1)
    variance = SumOverRanks.apply((rows - mean).square().sum(0)) / count.clamp_min(1)
    quantizer._average_latents(mean.detach(), variance.detach(), count)
    return mean, variance


# Units (B, H, W, m, d) → the same shape.
LATENT_NORMS: dict[str, Callable[[LatentNorm, Tensor, bool], Tensor] | None] = {
    "none": None,
    "unit": rms_norm,
    "layer": layer_norm,
    "batch": batch_norm,
    "running": running_norm,
}
WITH_AVERAGES = ("batch", "running")
