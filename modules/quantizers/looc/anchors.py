"""Features that become codevectors: the first codebook, and anchors of dead codevectors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .ranks import AllRanks, from_first_rank, sum_over_ranks
from .search import DISTANCES, blocks, faiss_applies, search
from .usage import count_indices, sums_by_index

if TYPE_CHECKING:
    from .quantizer import LooCQuantizer

KMEANS_ROUNDS = 10


class Anchors(NamedTuple):
    """An anchor and its score for each of k codevectors; the highest score of several wins.

    Where no feature is finite, the score is −∞ and the anchor is the codevector itself.
    """

    scores: Tensor  # (k,)
    vectors: Tensor  # (k, d)


def better_of(one: Anchors, other: Anchors) -> Anchors:
    """Take the anchor with the higher score in each row; the first if they are equal."""
    better = other.scores > one.scores
    return Anchors(
        torch.where(better, other.scores, one.scores),
        torch.where(better[:, None], other.vectors, one.vectors),
    )


def most_similar_anchor(
    quantizer: LooCQuantizer, features: Tensor, codevectors: Tensor, *, gumbel: bool = False
) -> Anchors:
    """Most similar finite feature of the batch; with gumbel, drawn from the softmax of similarity.

    With Gumbel noise added, the argmax is such a draw over all N features, in one pass.
    """
    prepare, similarity_of, _ = DISTANCES[quantizer.distance]
    prepared = prepare(codevectors)
    best = Anchors(features.new_full((len(codevectors),), -torch.inf), codevectors)
    for block in blocks(features, len(codevectors), quantizer.search_memory):
        similarity = similarity_of(prepared, prepare(block))  # (k, n)
        if gumbel:
            similarity = similarity - torch.empty_like(similarity).exponential_().log()
        similarity = similarity.where(similarity.isfinite(), -torch.inf)
        score, position = similarity.max(dim=1)
        best = better_of(best, Anchors(score, block[position]))
    return best


def closest_anchor(quantizer: LooCQuantizer, features: Tensor, codevectors: Tensor) -> Anchors:
    """Most similar feature of the batch, fast: `search` with features and codevectors swapped."""
    distance, memory = quantizer.distance, quantizer.search_memory
    prepare, _, similarity_of_rows = DISTANCES[distance]
    by_faiss = quantizer.search in ("auto", "faiss") and faiss_applies(features)
    backend = "faiss" if by_faiss else "torch"
    if len(features) and features.float().sum().isfinite():
        found = search(codevectors, features, distance, backend, memory, lowest=False)
        closest = features[found]
        scores = similarity_of_rows(prepare(codevectors), prepare(closest))
        if scores.isfinite().all():
            return Anchors(scores, closest)
    return most_similar_anchor(quantizer, features, codevectors)


def pool_anchor(quantizer: LooCQuantizer, _: Tensor, codevectors: Tensor) -> Anchors:
    """Feature drawn uniformly from the pool of past features."""
    scores = codevectors.new_zeros(len(codevectors))
    if not quantizer.pool_size:
        return Anchors(scores, codevectors)
    filled = min(int(quantizer.pool_size), len(quantizer.pool))  # half precision rounds
    drawn = torch.randint(filled, (len(codevectors),), device=codevectors.device)
    return Anchors(scores, quantizer.pool[from_first_rank(drawn)])


def fill_pool(quantizer: LooCQuantizer, features: Tensor) -> None:
    """Add finite features of this batch to the pool; replace a random half of a full pool."""
    all_ranks = AllRanks(features[features.isfinite().all(1)])
    filled, capacity = int(quantizer.pool_size), quantizer.num_embedding
    if filled < capacity:
        slots = torch.arange(filled, min(capacity, filled + all_ranks.total))
    else:
        slots = torch.randperm(capacity)[: min((capacity + 1) // 2, all_ranks.total)]
    drawn = torch.randperm(all_ranks.total)[: len(slots)]
    slots = from_first_rank(slots.to(features.device))
    quantizer.pool[slots] = all_ranks.take(drawn).to(quantizer.pool.dtype)
    quantizer.pool_size.fill_(max(filled, min(capacity, filled + all_ranks.total)))


def sample_features(quantizer: LooCQuantizer, features: Tensor) -> Tensor | None:
    """Draw K finite features, each at most once if there are enough; None if there are none."""
    all_ranks = AllRanks(features[features.isfinite().all(1)])
    if not all_ranks.total:
        return None
    length, total = quantizer.num_embedding, all_ranks.total
    return all_ranks.take(torch.randperm(total).repeat(-(-length // total))[:length])


def kmeans_centres(quantizer: LooCQuantizer, features: Tensor) -> Tensor | None:
    """Cluster the finite features by k-means, starting from `sample_features`."""
    centres = sample_features(quantizer, features)
    if centres is None:
        return None
    features = features[features.isfinite().all(1)]
    settings = (quantizer.distance, quantizer.search, quantizer.search_memory)
    for _ in range(KMEANS_ROUNDS):
        indices = search(features, centres, *settings)
        counts = sum_over_ranks(count_indices(indices, len(centres)))[:, None]
        sums = sum_over_ranks(sums_by_index(features, indices, len(centres)))
        centres = torch.where(counts > 0, sums / counts.clamp_min(1), centres)
    return centres


# Quantiser, features (N, d), k codevectors (k, d) → an anchor of each.
ANCHORS: dict[str, Callable[[LooCQuantizer, Tensor, Tensor], Anchors] | None] = {
    "closest": closest_anchor,
    "random": pool_anchor,
    "probrandom": partial(most_similar_anchor, gumbel=True),
    "none": None,
}
# Quantiser, features (N, d) of the first training batch → codebook (K, d); None is uniform noise.
STARTS: dict[str, Callable[[LooCQuantizer, Tensor], Tensor | None] | None] = {
    "uniform": None,
    "features": sample_features,
    "kmeans": kmeans_centres,
}
