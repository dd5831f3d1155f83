"""Passes of one codebook: each is matched to what the passes before it have left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import usage
from .norms import MOMENTUM
from .ranks import sum_over_ranks
from .search import search, widened

if TYPE_CHECKING:
    from .quantizer import LooCQuantizer

SMALLEST = 1e-12  # least mean square that is divided by


class Matched(NamedTuple):
    """Features that were matched in R passes, and the codevectors that were found."""

    features: Tensor  # (R·N, d), what was left before each pass, divided by its scale
    indices: Tensor  # (R, N), int64


def match(quantizer: LooCQuantizer, features: Tensor, *, training: bool) -> Matched:
    """Match features (N, d) in R passes; in training also average the power of what is left.

    Pass r finds the codevectors of ρ_r/s_r, with ρ_1 = z and ρ_{r+1} = ρ_r − s_r·e. This is
    residual vector quantisation (Juang and Gray, ICASSP 1982) with a single codebook.
    """
    codebook, penalty = quantizer.codebook.detach(), None
    if quantizer.rate_weight:
        bits = usage.code_bits(quantizer.usage)
        # Only differences matter, and small numbers are more exact.
        penalty = quantizer.rate_weight * (bits - bits.amin(0))
    settings = (quantizer.distance, quantizer.search, quantizer.search_memory)
    power = quantizer.residual_power
    if power is None:
        return Matched(features, search(features, codebook, *settings, penalty)[None])
    left, scaled, found = features, [], []
    for number in range(quantizer.num_passes):
        if training:
            average_power(power, number, left)
        scale = scales(quantizer)[number]
        costs = None if penalty is None else penalty / scale.square()
        scaled.append(left / scale)
        found.append(search(scaled[-1], codebook, *settings, costs))
        left = left - scale * widened(F.embedding(found[-1], codebook))
    return Matched(torch.cat(scaled), torch.stack(found))


def combine(codebook: Tensor, indices: Tensor | Sequence[Tensor], scales: Tensor) -> Tensor:
    """Sum the codevectors of r passes: (K, d), r times (…), (R,) → Σ s_r·e, (…, d)."""
    total = widened(F.embedding(indices[0], codebook))  # s_1 = 1
    for number in range(1, len(indices)):
        total = total + scales[number] * widened(F.embedding(indices[number], codebook))
    return total


def scales(quantizer: LooCQuantizer) -> Tensor:
    """Scales s_r of the passes, (R,): root mean square of what is left, relative to the first."""
    power = quantizer.residual_power
    if power is None:
        return torch.ones(1)
    relative = power[1:] / power[0].clamp_min(SMALLEST)
    return torch.cat([torch.ones_like(power[:1]), relative.clamp_min(SMALLEST).sqrt()])


def average_power(power: Tensor, number: int, left: Tensor) -> None:
    """Average the mean square of what is left (N, d) before a pass, of all processes, if finite."""
    square = left.square()
    total, count = sum_over_ranks(torch.stack([square.sum(), square.new_tensor(square.numel())]))
    value, old = (total / count).to(power.dtype), power[number]
    rate = torch.where(old == 0, 1, MOMENTUM)  # 0 before the first training call
    power[number] = torch.where(value.isfinite(), old.lerp(value, rate.to(power.dtype)), old)
