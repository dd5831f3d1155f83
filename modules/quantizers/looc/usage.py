"""Usage average p_k of the codevectors, and the rates and bits that follow from it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

USAGE_DECAY = 0.99  # γ
SMOOTHING = 0.01  # share of matches that `code_bits` adds, spread evenly over all codevectors
# eps² of float32: a smaller pull is lost in rounding, even towards an anchor 10⁷ times longer.
NEGLIGIBLE_RATE = torch.finfo(torch.float32).eps ** 2


def average_usage(usage: Tensor, counts: Tensor) -> None:
    """p_k ← γ·p_k + (1 − γ)·n_k/N, in place; unchanged if nothing was matched. (K,), (K,)"""
    total = counts.sum()
    share = torch.where(total > 0, counts / total, usage)
    usage.lerp_(share.to(usage.dtype), 1 - USAGE_DECAY)


def reinit_rate(usage: Tensor) -> Tensor:
    """a_k = exp(−10·K·p_k / (1 − γ) − 10⁻³), the pull of codevector k to its anchor. (K,)"""
    return torch.exp(-10 * len(usage) * usage / (1 - USAGE_DECAY) - 1e-3)


def num_safe_steps(usage: Tensor) -> int:
    """Number of steps for which no rate can exceed NEGLIGIBLE_RATE: p_k falls by γ at most.

    The usage need not be read in these steps, so that they do not synchronise with the device.
    """
    bound = -math.log(NEGLIGIBLE_RATE) * (1 - USAGE_DECAY) / (10 * len(usage))
    least = float(usage.min())
    return max(0, int(math.log(1.01 * bound / least) / math.log(USAGE_DECAY)))


def code_bits(usage: Tensor) -> Tensor:
    """Bits of each code, −log₂ of its smoothed usage: (K,) → (K,), float32 or wider.

    The running average starts from 0; the share that it lacks to 1, plus SMOOTHING, is spread
    evenly over all codevectors. Bits are thus equal at first, and finite for an unused codevector.
    """
    usage = usage.to(torch.promote_types(usage.dtype, torch.float32))
    even = (1 - usage.sum()).clamp_min(0) + SMOOTHING
    return -((usage + even / len(usage)) / (1 + SMOOTHING)).log2()
