"""Statistics of the training calls of a step, and the codebook as a moving average of features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .anchors import Anchors

CODEBOOK_UPDATES = ("gradient", "ema")


@dataclass
class PendingUpdate:
    """Statistics of the training calls since the last update of the codebook."""

    counts: Tensor  # (K,), int64, matches of each codevector
    sums: Tensor  # (K, d), of the features that matched it; (0, d) unless the update is "ema"
    candidates: Tensor  # (k,), int64, codevectors that the update may re-initialise
    anchors: Anchors  # best anchors of the candidates so far


def mask_non_finite(
    features: Tensor, indices: Tensor, loss: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """Set features (N, d) of non-finite length to NaN, and their indices (N,) to `length`.

    Nothing is done if the loss is finite, because then all features are; reading the loss on CUDA
    would synchronise with the host.
    """
    if loss.is_cuda or not loss.isfinite():
        finite = features.square().sum(1).isfinite()
        return features.where(finite[:, None], torch.nan), indices.where(finite, length)
    return features, indices


def average_features(
    codebook: Tensor, ema_count: Tensor, counts: Tensor, sums: Tensor, decay: float
) -> None:
    """c_k ← δ·c_k + (1 − δ)·n_k, then e_k ← e_k + (1 − δ)·n_k/c_k·(mean_k − e_k), in place.

    n_k is the number of matches and mean_k their mean in this step, δ the decay. This is
    e_k = s_k/c_k with a running sum s_k of features, which need not be stored: van den Oord et al.,
    arXiv 1711.00937, appendix A.1. Shapes (K, d), (K,), (K,), (K, d).
    """
    share = counts * (1 - decay)
    ema_count.mul_(decay).add_(share)
    rate = torch.where(counts > 0, share / ema_count, 0)[:, None].to(codebook.dtype)
    codebook.lerp_(sums / counts.clamp_min(1)[:, None], rate)
