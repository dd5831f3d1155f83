"""Anchors: the features that dead codevectors are pulled to (online re-initialisation)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .distances import DISTANCES, blocks
from .ranks import AllRanks, from_first_rank
from .search import faiss_applies, search

if TYPE_CHECKING:
    from .quantizer import LooCQuantizer


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


def most_similar_features(
    features: Tensor, codevectors: Tensor, distance: str, memory: int | None, *, gumbel: bool
) -> Anchors:
    """Find the most similar finite feature of each codevector: (N, d), (k, d) → k anchors.

    With gumbel, Gumbel noise is added to the similarities. The argmax is then a draw from the
    softmax over all N features (Gumbel-max trick), in one pass.
    """
    prepare, similarity_of, _ = DISTANCES[distance]
    prepared = prepare(codevectors)
    best = Anchors(features.new_full((len(codevectors),), -torch.inf), codevectors)
    for _, block in blocks(features, len(codevectors), memory):
        similarity = similarity_of(prepared, prepare(block))  # (k, n)
        if gumbel:
            similarity = similarity - torch.empty_like(similarity).exponential_().log()
        similarity = similarity.where(similarity.isfinite(), -torch.inf)
        score, position = similarity.max(dim=1)
        best = better_of(best, Anchors(score, block[position]))
    return best


def closest_anchor(quantizer: LooCQuantizer, features: Tensor, codevectors: Tensor) -> Anchors:
    """Most similar feature of the batch: `search` with features and codevectors swapped."""
    distance, memory = quantizer.distance, quantizer.search_memory
    prepare, _, similarity_of_rows = DISTANCES[distance]
    by_faiss = quantizer.search in ("auto", "faiss") and faiss_applies(features)
    backend = "faiss" if by_faiss else "torch"
    if len(features):
        closest = features[search(codevectors, features, distance, backend, memory)]
        scores = similarity_of_rows(prepare(codevectors), prepare(closest))
        if scores.isfinite().all():
            return Anchors(scores, closest)
    return most_similar_features(features, codevectors, distance, memory, gumbel=False)


def softmax_anchor(quantizer: LooCQuantizer, features: Tensor, codevectors: Tensor) -> Anchors:
    """Feature of the batch, drawn with probability softmax of its similarity."""
    distance, memory = quantizer.distance, quantizer.search_memory
    return most_similar_features(features, codevectors, distance, memory, gumbel=True)


def pool_anchor(quantizer: LooCQuantizer, features: Tensor, codevectors: Tensor) -> Anchors:
    """Feature drawn uniformly from the pool of past features."""
    del features
    scores = codevectors.new_zeros(len(codevectors))
    if not quantizer.pool_size:
        return Anchors(scores, codevectors)
    drawn = torch.randint(int(quantizer.pool_size), (len(codevectors),), device=codevectors.device)
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
    quantizer.pool[slots] = all_ranks.take(drawn)
    quantizer.pool_size.fill_(max(filled, min(capacity, filled + all_ranks.total)))


Anchor = Callable[["LooCQuantizer", Tensor, Tensor], Anchors]  # quantiser, (N, d), (k, d)
ANCHORS: dict[str, Anchor | None] = {
    "closest": closest_anchor,
    "random": pool_anchor,
    "probrandom": softmax_anchor,
    "none": None,
}
