"""Counts and sums of features per codevector, deterministic and fast on CUDA too.

Deterministic CUDA adds all entries of one row one after another. Where many features belong to one
codevector, each row is therefore divided into several shards, which are added up at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor


def count_indices(indices: Tensor, length: int) -> Tensor:
    """Count how often each of 0 … length − 1 occurs: (N,) → (length,), int64."""
    if indices.is_cuda:  # bincount would synchronise with the host
        keys, shards = shard_keys(indices, length)
        ones = torch.ones((), dtype=torch.int64, device=indices.device).expand(len(indices))
        counts = indices.new_zeros(shards * length).scatter_add_(0, keys, ones)
        return counts.view(shards, length).sum(0)
    return torch.bincount(indices, minlength=length)


def sums_by_index(features: Tensor, indices: Tensor, length: int) -> Tensor:
    """Sum the features of each index: (N, d), (N,) → (length, d)."""
    keys, shards = shard_keys(indices, length)
    sums = features.new_zeros(shards * length, features.shape[1]).index_add_(0, keys, features)
    return sums.view(shards, length, -1).sum(0) if shards > 1 else sums


def shard_keys(indices: Tensor, length: int) -> tuple[Tensor, int]:
    """Row of each feature among all shards, and the number of shards: (N,) → (N,), int."""
    shards = num_shards(indices, length)
    if shards == 1:
        return indices, 1
    return indices + length * (torch.arange(len(indices), device=indices.device) % shards), shards


def num_shards(indices: Tensor, length: int) -> int:
    """Number of shards: about one per 16 features of a row, at most 256; 1 on the CPU."""
    return min(256, max(1, len(indices) // (16 * length))) if indices.is_cuda else 1
