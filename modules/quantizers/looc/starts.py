"""First codebook: uniform noise, features of the first training batch, or their k-means centres."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .counting import count_indices, sums_by_index
from .ranks import AllRanks, sum_over_ranks
from .search import search

if TYPE_CHECKING:
    from .quantizer import LooCQuantizer

KMEANS_ROUNDS = 10


def sample_features(quantizer: LooCQuantizer, features: Tensor) -> Tensor | None:
    """Draw K finite features, each at most once if there are enough: (N, d) → (K, d).

    None if no feature is finite.
    """
    all_ranks = AllRanks(features[features.isfinite().all(1)])
    if not all_ranks.total:
        return None
    length, total = quantizer.num_embedding, all_ranks.total
    return all_ranks.take(torch.randperm(total).repeat(-(-length // total))[:length])


def kmeans_centres(quantizer: LooCQuantizer, features: Tensor) -> Tensor | None:
    """Cluster the finite features by k-means, starting from `sample_features`: (N, d) → (K, d)."""
    centres = sample_features(quantizer, features)
    if centres is None:
        return None
    features = features[features.isfinite().all(1)]
    for _ in range(KMEANS_ROUNDS):
        indices = search(
            features, centres, quantizer.distance, quantizer.search, quantizer.search_memory
        )
        counts = sum_over_ranks(count_indices(indices, len(centres)))[:, None]
        sums = sum_over_ranks(sums_by_index(features, indices, len(centres)))
        centres = torch.where(counts > 0, sums / counts.clamp_min(1), centres)
    return centres


Start = Callable[["LooCQuantizer", Tensor], "Tensor | None"]
STARTS: dict[str, Start | None] = {
    "uniform": None,
    "features": sample_features,
    "kmeans": kmeans_centres,
}
