"""Use of the codevectors: counts and sums of what matches them, moving averages, rates and bits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .search import widened

USAGE_DECAY = 0.99  # γ
SMOOTHING = 0.01  # share of matches that `code_bits` adds, spread evenly over all codevectors
# eps² of float32: a smaller pull is lost in rounding, even towards an anchor 10⁷ times longer.
NEGLIGIBLE_RATE = torch.finfo(torch.float32).eps ** 2
CODEBOOK_UPDATES = ("gradient", "ema")


def count_indices(indices: Tensor, length: int) -> Tensor:
    """Count how often each of 0 … length − 1 occurs: (N,) → (length,), int64. Deterministic."""
    if indices.is_cuda:  # bincount would synchronise with the host
        keys, shards = shard_keys(indices, length)
        ones = torch.ones((), dtype=torch.int64, device=indices.device).expand(len(indices))
        counts = indices.new_zeros(shards * length).scatter_add_(0, keys, ones)
        return counts.view(shards, length).sum(0)
    return torch.bincount(indices, minlength=length)


def sums_by_index(features: Tensor, indices: Tensor, length: int) -> Tensor:
    """Sum the features of each index: (N, d), (N,) → (length, d). Deterministic."""
    keys, shards = shard_keys(indices, length)
    sums = features.new_zeros(shards * length, features.shape[1]).index_add_(0, keys, features)
    return sums.view(shards, length, -1).sum(0) if shards > 1 else sums


def shard_keys(indices: Tensor, length: int) -> tuple[Tensor, int]:
    """Divide each row into shards: (N,) → row of each feature among all shards, their number.

    Deterministic CUDA adds the entries of one row one after another, slowly if there are many.
    """
    shards = num_shards(indices, length)
    if shards == 1:
        return indices, 1
    return indices + length * (torch.arange(len(indices), device=indices.device) % shards), shards


def num_shards(indices: Tensor, length: int) -> int:
    """Number of shards: about one per 16 features of a row, at most 256; 1 on the CPU."""
    return min(256, max(1, len(indices) // (16 * length))) if indices.is_cuda else 1


def average_usage(usage: Tensor, counts: Tensor) -> None:
    """p_k ← γ·p_k + (1 − γ)·n_k/N, in place; unchanged if nothing was matched. (K,), (K,)"""
    total = counts.sum()
    wide = widened(usage)
    share = torch.where(total > 0, counts / total, wide)
    usage.copy_(wide.lerp(share.to(wide.dtype), 1 - USAGE_DECAY))


def average_features(
    codebook: Tensor, ema_count: Tensor, counts: Tensor, sums: Tensor, decay: float
) -> None:
    """c_k ← δ·c_k + (1 − δ)·n_k, then e_k ← e_k + (1 − δ)·n_k/c_k·(mean_k − e_k), in place.

    n_k matches with mean mean_k, decay δ: e_k = s_k/c_k, without storing the running sum s_k of
    van den Oord et al., arXiv 1711.00937, appendix A.1. Shapes (K, d), (K,), (K,), (K, d).
    """
    share = counts * (1 - decay)
    ema_count.mul_(decay).add_(share)
    rate = torch.where(counts > 0, share / ema_count, 0)[:, None].to(sums.dtype)
    mean = sums / counts.clamp_min(1)[:, None]
    codebook.copy_(widened(codebook).lerp(mean, rate))


def reinit_rate(usage: Tensor) -> Tensor:
    """a_k = exp(−10·K·p_k / (1 − γ) − 10⁻³), the pull of codevector k to its anchor. (K,)"""
    return torch.exp(-10 * len(usage) * usage / (1 - USAGE_DECAY) - 1e-3)


def reinit_candidates(usage: Tensor) -> Tensor:
    """Codevectors whose rate may not be negligible after a step: p_k falls by γ at most. (k,)"""
    return (reinit_rate(USAGE_DECAY * usage) > NEGLIGIBLE_RATE).nonzero().squeeze(1)


def num_safe_steps(usage: Tensor) -> int:
    """Number of steps in which there can be no candidates, so that the host need not look."""
    bound = -math.log(NEGLIGIBLE_RATE) * (1 - USAGE_DECAY) / (10 * len(usage))
    least = float((USAGE_DECAY * usage).min())
    return max(0, int(math.log(1.01 * bound / least) / math.log(USAGE_DECAY)))


def code_bits(usage: Tensor) -> Tensor:
    """Bits of each code, −log₂ of its smoothed usage: (K,) → (K,), float32 or wider.

    The running average starts from 0; the share that it lacks to 1, plus SMOOTHING, is spread
    evenly over all codevectors. Bits are thus equal at first, and finite for an unused codevector.
    """
    usage = widened(usage)
    even = (1 - usage.sum()).clamp_min(0) + SMOOTHING
    return -((usage + even / len(usage)) / (1 + SMOOTHING)).log2()
