"""Similarity of features and codevectors, computed in blocks of bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def unit_norm(vectors: Tensor) -> Tensor:
    """Scale each vector to length one: (n, d) → (n, d)."""
    return F.normalize(vectors, dim=1)


def dot_product(features: Tensor, codevectors: Tensor) -> Tensor:
    """z·e of all pairs: (n, d), (k, d) → (n, k)."""
    return features @ codevectors.T


def negative_squared_l2(features: Tensor, codevectors: Tensor) -> Tensor:
    """−‖z − e‖² of all pairs: (n, d), (k, d) → (n, k)."""
    squares = features.square().sum(1, keepdim=True) + codevectors.square().sum(1)
    return 2 * features @ codevectors.T - squares


class Distance(NamedTuple):
    """Similarity of two sets of vectors; both are passed through `prepare` first."""

    prepare: Callable[[Tensor], Tensor]
    similarity: Callable[[Tensor, Tensor], Tensor]  # (n, d), (k, d) → (n, k)
    similarity_of_rows: Callable[[Tensor, Tensor], Tensor]  # (n, d), (n, d) → (n,)


DISTANCES = {
    "cos": Distance(unit_norm, dot_product, lambda one, other: (one * other).sum(1)),
    "l2": Distance(
        lambda vectors: vectors,
        negative_squared_l2,
        lambda one, other: -(one - other).square().sum(1),
    ),
}


def block_elements(device: torch.device, memory: int | None) -> int:
    """Number of float32 values in `memory` MiB; by default 4 MiB on the CPU, 256 MiB on CUDA.

    The default of the CPU is one that its cache holds.
    """
    return (memory or (256 if device.type == "cuda" else 4)) * 2**18


def blocks(
    features: Tensor, num_codevectors: int, memory: int | None
) -> Iterator[tuple[int, Tensor]]:
    """Yield (start, features[start:end]), with as many rows as the memory allows similarities."""
    size = max(1, block_elements(features.device, memory) // max(1, num_codevectors))
    for start in range(0, len(features), size):
        yield start, features[start : start + size]
