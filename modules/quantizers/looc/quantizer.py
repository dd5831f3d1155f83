"""LooC's quantiser: low-dimensional units, one shared codebook. Self-contained: torch only.

Li, Wong, Han, "LooC: Effective Low-Dimensional Codebook for Compositional Vector Quantization",
WACV 2026 (arXiv 2601.00222); the online re-initialisation is that of Zheng and Vedaldi, "Online
Clustered Codebook", ICCV 2023 (arXiv 2307.15139).

Symbols: B images of C channels and H × W positions; K codevectors of dimension d; m units a
position; N = B·H·W·m features; λ commitment weight; γ decay of the usage average. No matrix of
N × K elements ever exists: features are searched by fused kernels or in blocks of bounded memory.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CONTRASTIVE_TEMPERATURE = 0.07
KMEANS_ROUNDS = 10
USAGE_DECAY = 0.99
BATCH_NORM_RATE = 0.1  # of the running averages
EVEN_SHARE = 0.01  # matches, as a share of all, that `code_bits` adds and spreads evenly

log = logging.getLogger("looc.quantizer")
Result = TypeVar("Result")


class Quantized(NamedTuple):
    """What a quantiser returns."""

    latents: Tensor  # (B, C, H, W), the quantised features, with a straight-through gradient
    loss: Tensor  # scalar
    indices: Tensor  # (B, H, W, m), int64 in [0, K)


# ---------------------------------------------------------------------------------- extrapolation


def extrapolate(z: Tensor, scale: int) -> Tensor:
    """Upsample by scale, then move the new positions into channels c·β² + i·β + j.

    (B, C, H, W) → (B, C·β², H, W)
    """
    if scale < 2:
        return z
    if not len(z):  # pixel_unshuffle would leave its channels as they are
        return z.repeat(1, scale**2, 1, 1)
    upsampled = F.interpolate(z, scale_factor=scale, mode="bilinear", align_corners=False)
    return F.pixel_unshuffle(upsampled, scale)


def interpolate_back(z: Tensor, scale: int) -> Tensor:
    """Undo `extrapolate` by average pooling: (B, C·β², H, W) → (B, C, H, W)."""
    if scale < 2:
        return z
    if not len(z):
        return z[:, :: scale**2]
    return F.avg_pool2d(F.pixel_shuffle(z, scale), scale)


# ------------------------------------------------------------------------------------------ split


class Split(NamedTuple):
    """How channels are cut into units, and put back."""

    cut: Callable[[Tensor, int], Tensor]  # (B, H, W, C), d → (B, H, W, m, d)
    join: Callable[[Tensor], Tensor]  # (B, H, W, m, d) → (B, H, W, C)


SPLITS = {
    # Unit s takes channels s·d … s·d + d − 1.
    "fixed": Split(
        cut=lambda z, dim: z.view(*z.shape[:-1], z.shape[-1] // dim, dim),
        join=lambda units: units.flatten(-2),
    ),
    # Unit s takes channels s, s + m, s + 2m, …
    "interval": Split(
        cut=lambda z, dim: z.view(*z.shape[:-1], dim, z.shape[-1] // dim).transpose(-1, -2),
        join=lambda units: units.transpose(-1, -2).flatten(-2),
    ),
}


# -------------------------------------------------------------------------------------- distances


def unit_norm(vectors: Tensor) -> Tensor:
    """Vectors of length one: (n, d) → (n, d)."""
    return F.normalize(vectors, dim=1)


def dot_product(features: Tensor, codevectors: Tensor) -> Tensor:
    """z·e of every pair: (n, d), (k, d) → (n, k)."""
    return features @ codevectors.T


def negative_squared_l2(features: Tensor, codevectors: Tensor) -> Tensor:
    """−‖z − e‖² of every pair: (n, d), (k, d) → (n, k)."""
    squares = features.square().sum(1, keepdim=True) + codevectors.square().sum(1)
    return 2 * features @ codevectors.T - squares


class Distance(NamedTuple):
    """How features and codevectors are compared: prepared each alone, then pair by pair."""

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
    """Float32 similarities that fit a budget in MiB; by default what the device's cache likes."""
    return (memory or (256 if device.type == "cuda" else 4)) * 2**18


def blocks(
    features: Tensor, num_codevectors: int, memory: int | None
) -> Iterator[tuple[int, Tensor]]:
    """Runs of features whose similarities to all codevectors fit the memory budget."""
    size = max(1, block_elements(features.device, memory) // max(1, num_codevectors))
    for start in range(0, len(features), size):
        yield start, features[start : start + size]


# ----------------------------------------------------------------------------------------- search


def search(
    features: Tensor,
    codebook: Tensor,
    distance: str,
    backend: str = "auto",
    memory: int | None = None,
    penalty: Tensor | None = None,
) -> Tensor:
    """The most similar codevector of each feature, exactly: (N, d), (K, d) → (N,), int64.

    Args:
        features: float32, contiguous.
        codebook: float32, on the same device.
        distance: "cos" or "l2".
        backend: one of SEARCHES, or "auto": faiss where it is installed and the tensors are on the
            CPU, the compiled form for low dimensions, else torch. One that fails is replaced by
            torch, with a line in the log.
        memory: MiB of similarities that torch holds at a time.
        penalty: what a codevector has to be nearer by, (K,), 0 or more, in the units of ‖z − e‖²;
            for "l2" alone.
    """
    if not len(features):
        return torch.empty(0, dtype=torch.int64, device=features.device)
    keys = DISTANCES[distance].prepare(codebook)
    if backend == "auto":
        backend = choose_search(features, keys)
    if penalty is not None and backend == "faiss":  # to it that is a distance in one dimension more
        features, keys = F.pad(features, (0, 1)), torch.cat((keys, penalty.sqrt()[:, None]), 1)
        penalty = None
    # What is the same for all codevectors, like the feature's norm, cannot change the argmax.
    offset = codebook.new_zeros(len(codebook)) if distance == "cos" else -keys.square().sum(1) / 2
    if penalty is not None:
        offset = offset - penalty / 2
    if backend not in failed_searches:
        try:
            return SEARCHES[backend](features, keys, offset, memory)
        except Exception as error:  # compilers fail in ways of their own
            if backend == "torch":
                raise
            failed_searches.add(backend)
            reason = " ".join(str(error).split())[:200]
            log.warning("search by %s failed (%s); using torch instead", backend, reason)
    return search_blocks(features, keys, offset, memory)


failed_searches: set[str] = set()


def choose_search(features: Tensor, keys: Tensor) -> str:
    """The fastest backend for these shapes, as measured (benchmarks/quantizer.py)."""
    if torch.compiler.is_compiling():  # torch.export: nothing else can be part of a graph
        return "torch"
    if for_faiss(features):
        return "faiss"
    worth_compiling = len(features) * len(keys) >= 2**24
    return "compiled" if worth_compiling and features.shape[1] <= 4 else "torch"


def for_faiss(features: Tensor) -> bool:
    """Whether faiss is installed and takes such features."""
    on_cpu = features.device.type == "cpu" and features.dtype == torch.float32
    return on_cpu and faiss_installed()


@lru_cache(maxsize=1)
def faiss_installed() -> bool:
    return importlib.util.find_spec("faiss") is not None


def search_faiss(features: Tensor, keys: Tensor, offset: Tensor, memory: int | None) -> Tensor:
    """By faiss's flat index, which has fused kernels for the nearest of few dimensions."""
    import faiss

    del memory  # faiss holds no similarities
    # Of keys of length one the most similar is the nearest, for which faiss has faster kernels up
    # to 16 dimensions. A codevector of zeros has no length one.
    nearest = bool(offset.any()) or (keys.shape[1] <= 16 and bool(keys.any(1).all()))
    index = (faiss.IndexFlatL2 if nearest else faiss.IndexFlatIP)(keys.shape[1])
    index.add(keys.numpy())

    def nearest_of(part: Tensor) -> Tensor:
        return torch.from_numpy(index.search(part.numpy(), 1)[1][:, 0])

    threads = min(torch.get_num_threads(), 1 + len(features) // 2**13)
    indices = torch.cat(list(faiss_threads(threads).map(nearest_of, features.chunk(threads))))
    return indices.clamp_min_(0)  # of a feature that is not a number faiss finds none, −1


@lru_cache
def faiss_threads(count: int) -> ThreadPoolExecutor:
    """Threads that run faiss on one core each.

    faiss brings an OpenMP of its own, whose idle threads would spin against those of torch.
    """
    import faiss

    # By default fewer than 128,000 numbers are searched pair by pair, ten times as long.
    faiss.cvar.distance_compute_blas_threshold = 1
    return ThreadPoolExecutor(count, "faiss", faiss.omp_set_num_threads, (1,))


if hasattr(os, "register_at_fork"):  # a forked process has none of these threads
    os.register_at_fork(after_in_child=faiss_threads.cache_clear)


def search_compiled(features: Tensor, keys: Tensor, offset: Tensor, memory: int | None) -> Tensor:
    """By one kernel that torch.compile makes of the unrolled dot product and its argmax.

    Features go in runs of one of two lengths, the last one padded, so that shapes never change.
    Raises RuntimeError where a kernel is found to be wrong by the first features it is used for.
    """
    indices = torch.empty(len(features), dtype=torch.int64, device=features.device)
    size = 2**16 if len(features) > 2**13 else 2**13
    for start in range(0, len(features), size):
        part = features[start : start + size]
        padded = F.pad(part, (0, 0, 0, size - len(part)))
        indices[start : start + len(part)] = compiled_argmax()(padded.T, keys, offset)[: len(part)]
        kernel = (size, keys.shape, keys.dtype, keys.device)
        if kernel not in proven_kernels and proves(
            part[:PROOF], keys, offset, indices[start : start + len(part)][:PROOF], memory
        ):
            proven_kernels.add(kernel)
    return indices


proven_kernels: set[tuple[object, ...]] = set()
PROOF = 2**12  # features that a kernel is proven by


def proves(
    features: Tensor, keys: Tensor, offset: Tensor, indices: Tensor, memory: int | None
) -> bool:
    """Whether no codevector has a higher score than the one found, beyond rounding.

    False where a score is not finite, which proves nothing. Raises RuntimeError where one has:
    PyTorch 2.11 makes a kernel for some processors that finds wrong ones at d = 3.
    """
    wrong = RuntimeError(f"the compiled kernel is wrong for {tuple(keys.shape)} codevectors")
    if ((indices < 0) | (indices >= len(keys))).any():
        raise wrong
    lengths = keys.norm(dim=1)
    for start, block in blocks(features, len(keys), memory):
        scores = torch.addmm(offset, block, keys.T)  # (n, K)
        if not scores.isfinite().all():
            return False
        found = indices[start : start + len(block)]
        best, place = scores.max(1)
        short = best - scores.gather(1, found[:, None])[:, 0]
        # What the sums are of, which may be far more than they are.
        length, height = (torch.maximum(of[found], of[place]) for of in (lengths, offset.abs()))
        if (short > 1e-3 * (block.norm(dim=1) * length + height)).any():
            raise wrong
    return True


@lru_cache(maxsize=1)
def compiled_argmax() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    # fullgraph: where compiling fails it raises, rather than run the expression as it stands.
    return torch.compile(unrolled_argmax, fullgraph=True, dynamic=False)


def unrolled_argmax(columns: Tensor, keys: Tensor, offset: Tensor) -> Tensor:
    """argmax over k of offset_k + Σ_j keys_kj · columns_jn: (d, n), (K, d), (K,) → (n,)."""
    scores = offset[:, None]
    for j in range(len(columns)):
        scores = scores + keys[:, j : j + 1] * columns[j]
    return scores.argmax(0)


def search_blocks(features: Tensor, keys: Tensor, offset: Tensor, memory: int | None) -> Tensor:
    """By matrix products, a block of features at a time."""
    indices = torch.empty(len(features), dtype=torch.int64, device=features.device)
    for start, block in blocks(features, len(keys), memory):
        scores = torch.addmm(offset, block, keys.T)  # (n, K)
        indices[start : start + len(block)] = row_argmax(scores)
    return indices


def row_argmax(scores: Tensor, groups: int = 16) -> Tensor:
    """argmax of each row, (n, K) → (n,): first of 16 interleaved groups' maxima, then within it.

    A maximum without its place is several times faster than one with it.
    """
    if scores.shape[1] % groups:
        return scores.argmax(1)
    grouped = scores.view(len(scores), groups, -1)  # (n, 16, K / 16)
    column = grouped.amax(1).argmax(1)  # (n,)
    candidates = grouped.gather(2, column[:, None, None].expand(-1, groups, 1)).squeeze(2)
    return candidates.argmax(1) * grouped.shape[2] + column


Search = Callable[[Tensor, Tensor, Tensor, "int | None"], Tensor]
SEARCHES: dict[str, Search] = {
    "faiss": search_faiss,
    "compiled": search_compiled,
    "torch": search_blocks,
}


# -------------------------------------------------------------------------------- several processes


def num_ranks() -> int:
    """Processes that train together under torch.distributed; 1 without it."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum over all processes, the same on each, of any shape; written in place."""
    if num_ranks() > 1:
        dist.all_reduce(values)
    return values


def from_first_rank(values: Tensor) -> Tensor:
    """The first process's values, of any shape; written in place."""
    if num_ranks() > 1:
        dist.broadcast(values, src=0)
    return values


def best_over_ranks(scores: Tensor, vectors: Tensor) -> Tensor:
    """For each row the vector of the process whose score is highest: (k,), (k, d) → (k, d).

    Among equal scores the first process's, so that each process has the same result.
    """
    if num_ranks() == 1:
        return vectors
    best, ranks = scores.clone(), num_ranks()
    dist.all_reduce(best, dist.ReduceOp.MAX)
    rank = torch.where(scores == best, dist.get_rank(), ranks)
    first = rank.clone()
    dist.all_reduce(first, dist.ReduceOp.MIN)
    return sum_over_ranks(torch.where((rank == first)[:, None], vectors, 0))


class Crowd:
    """The features (N, d) of all processes, numbered in the order of ranks."""

    def __init__(self, features: Tensor) -> None:
        self.features = features
        counts = torch.zeros(num_ranks(), dtype=torch.int64, device=features.device)
        rank = dist.get_rank() if num_ranks() > 1 else 0
        counts[rank] = len(features)
        ends = sum_over_ranks(counts).cumsum(0).tolist()
        self.start, self.total = ends[rank] - len(features), ends[-1]

    def take(self, numbers: Tensor) -> Tensor:
        """The features of these numbers, which the first process draws: (n,) → (n, d)."""
        numbers = from_first_rank(numbers.to(self.features.device))
        own = (numbers >= self.start) & (numbers < self.start + len(self.features))
        sent = self.features.new_zeros(len(numbers), self.features.shape[1])
        sent[own] = self.features[numbers[own] - self.start]  # whoever has it sends it
        return sum_over_ranks(sent)


# --------------------------------------------------------------------------- latents' normalisation


class LatentNorm(nn.Module):
    """What a quantiser inherits to normalise its latents, one of LATENT_NORMS.

    By "batch" or "running" there are buffers: `latent_mean` and `latent_variance` (m, d), running
    averages of what was seen in training, and by "running" the number of steps that they are of.
    """

    latent_norm: str
    latent_mean: Tensor
    latent_steps: Tensor | None
    latent_variance: Tensor

    def _keep_averages(self, shape: tuple[int, int]) -> None:
        """Begin the averages, of units of this shape (m, d)."""
        self.register_buffer("latent_mean", torch.zeros(shape))
        self.register_buffer("latent_variance", torch.ones(shape))
        by_running = self.latent_norm == "running"
        self.register_buffer("latent_steps", torch.tensor(0) if by_running else None)

    def _normalise(self, units: Tensor, training: bool) -> Tensor:
        """Units (B, H, W, m, d) → the same shape; in training the averages take them in."""
        return LATENT_NORMS[self.latent_norm](self, units, training)

    @torch.no_grad()
    def _average_latents(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Keep the running averages of what was seen in training, where that was finite.

        Those of norm "running" begin as the plain mean of the first calls. Its variance is that
        about its own mean: how the means of calls differ, which may be of few images, is part.
        """
        seen = (count > 0) & mean.isfinite().all() & variance.isfinite().all()
        rate: float | Tensor = BATCH_NORM_RATE
        if self.latent_steps is not None:
            self.latent_steps += seen
            rate = (1 / self.latent_steps.to(mean.dtype)).clamp(BATCH_NORM_RATE, 1)
            variance = variance + (1 - rate) * (mean - self.latent_mean).square()
        for average, value in ((self.latent_mean, mean), (self.latent_variance, variance)):
            average.lerp_(torch.where(seen, value, average), rate)


def as_they_are(quantizer: LatentNorm, units: Tensor, training: bool) -> Tensor:
    del quantizer, training
    return units


def unit_length(quantizer: LatentNorm, units: Tensor, training: bool) -> Tensor:
    """Each unit alone to mean square one, which is length √d."""
    del quantizer, training
    return F.normalize(units, dim=-1) * math.sqrt(units.shape[-1])


def layer_norm(quantizer: LatentNorm, units: Tensor, training: bool) -> Tensor:
    """All channels of a position together to mean zero and variance one."""
    del quantizer, training
    return F.layer_norm(units, units.shape[-2:])


def batch_norm(quantizer: LatentNorm, units: Tensor, training: bool) -> Tensor:
    """Each channel to mean zero and variance one over the batch of all processes.

    Outside training by the running averages: Ioffe and Szegedy, arXiv 1502.03167.
    """
    mean, variance = quantizer.latent_mean, quantizer.latent_variance  # (m, d)
    if training:
        mean, variance = batch_statistics(quantizer, units)
    return (units - mean) * (variance + 1e-5).rsqrt()


def running_norm(quantizer: LatentNorm, units: Tensor, training: bool) -> Tensor:
    """Each channel to about mean zero and variance one, by its running averages.

    They are constants to the gradient, and in use in training as after it. A batch's own mean and
    variance, as `batch_norm` takes them, keep from the decoder how bright and how rich in contrast
    that batch is: noise where it is small and its images unlike.
    """
    if training:
        with torch.no_grad():
            batch_statistics(quantizer, units)
    return (units - quantizer.latent_mean) * (quantizer.latent_variance + 1e-5).rsqrt()


def batch_statistics(quantizer: LatentNorm, units: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel over all processes, (m, d); its averages take them in."""
    rows = units.flatten(0, 2)  # (B·H·W, m, d)
    count = sum_over_ranks(torch.full((), len(rows), device=rows.device))
    mean = SumOverRanks.apply(rows.sum(0)) / count.clamp_min(1)
    variance = SumOverRanks.apply((rows - mean).square().sum(0)) / count.clamp_min(1)
    quantizer._average_latents(mean.detach(), variance.detach(), count)
    return mean, variance


class SumOverRanks(torch.autograd.Function):
    """`sum_over_ranks`, the gradient being summed over all processes too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        del ctx
        return sum_over_ranks(values.clone())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        del ctx
        return sum_over_ranks(grad_outputs[0].clone())


# Units (B, H, W, m, d) → the same shape, all of one scale.
LATENT_NORMS: dict[str, Callable[[LatentNorm, Tensor, bool], Tensor]] = {
    "none": as_they_are,
    "unit": unit_length,
    "layer": layer_norm,
    "batch": batch_norm,
    "running": running_norm,
}
WITH_AVERAGES = ("batch", "running")


# ------------------------------------------------------------------------------- codebook's start


def drawn_features(quantizer: LooCQuantizer, features: Tensor) -> Tensor | None:
    """K finite features, each at most once where there are as many: (N, d) → (K, d).

    None where there are none.
    """
    crowd = Crowd(features[features.isfinite().all(1)])
    if not crowd.total:
        return None
    length = quantizer.num_embedding
    return crowd.take(torch.randperm(crowd.total).repeat(-(-length // crowd.total))[:length])


def clustered_features(quantizer: LooCQuantizer, features: Tensor) -> Tensor | None:
    """Centres of the finite features, by k-means from `drawn_features`."""
    centres = drawn_features(quantizer, features)
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
    "features": drawn_features,
    "kmeans": clustered_features,
}


# ---------------------------------------------------------------------------------------- anchors


class Anchors(NamedTuple):
    """Vectors to pull codevectors to; of several proposals the one of the highest score is taken.

    The score is −∞, and the anchor the codevector itself, where no feature is finite.
    """

    scores: Tensor  # (k,)
    vectors: Tensor  # (k, d)


def most_similar_features(
    features: Tensor, codevectors: Tensor, distance: str, memory: int | None, *, gumbel: bool
) -> Anchors:
    """For each codevector the finite feature of the highest similarity: (N, d), (k, d) → (k, d).

    With gumbel, similarities are perturbed by Gumbel noise, which makes the argmax a draw from the
    softmax over all N features (Gumbel-max), in one pass.
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


def better_of(one: Anchors, other: Anchors) -> Anchors:
    """Row by row the anchor of the higher score, among equals the first."""
    better = other.scores > one.scores
    return Anchors(
        torch.where(better, other.scores, one.scores),
        torch.where(better[:, None], other.vectors, one.vectors),
    )


def closest_anchor(quantizer: LooCQuantizer, features: Tensor, codevectors: Tensor) -> Anchors:
    """The most similar feature of the batch: the same search, features and codevectors swapped."""
    distance, memory = quantizer.distance, quantizer.search_memory
    prepare, _, similarity_of_rows = DISTANCES[distance]
    by_faiss = quantizer.search in ("auto", "faiss") and for_faiss(features)
    backend = "faiss" if by_faiss else "torch"
    if len(features):
        closest = features[search(codevectors, features, distance, backend, memory)]
        scores = similarity_of_rows(prepare(codevectors), prepare(closest))
        if scores.isfinite().all():
            return Anchors(scores, closest)
    return most_similar_features(features, codevectors, distance, memory, gumbel=False)


def probable_anchor(quantizer: LooCQuantizer, features: Tensor, codevectors: Tensor) -> Anchors:
    """A feature of the batch, drawn by the softmax of its similarity."""
    distance, memory = quantizer.distance, quantizer.search_memory
    return most_similar_features(features, codevectors, distance, memory, gumbel=True)


def pooled_anchor(quantizer: LooCQuantizer, features: Tensor, codevectors: Tensor) -> Anchors:
    """A feature drawn from the pool of past features."""
    del features
    scores = codevectors.new_zeros(len(codevectors))
    if not quantizer.pool_size:
        return Anchors(scores, codevectors)
    drawn = torch.randint(int(quantizer.pool_size), (len(codevectors),), device=codevectors.device)
    return Anchors(scores, quantizer.pool[from_first_rank(drawn)])


def fill_pool(quantizer: LooCQuantizer, features: Tensor) -> None:
    """Fill the pool with finite features of this batch; once full, replace a random half of it."""
    crowd = Crowd(features[features.isfinite().all(1)])
    filled, capacity = int(quantizer.pool_size), quantizer.num_embedding
    if filled < capacity:
        slots = torch.arange(filled, min(capacity, filled + crowd.total))
    else:
        slots = torch.randperm(capacity)[: min((capacity + 1) // 2, crowd.total)]
    drawn = torch.randperm(crowd.total)[: len(slots)]
    slots = from_first_rank(slots.to(features.device))
    quantizer.pool[slots] = crowd.take(drawn)
    quantizer.pool_size.fill_(max(filled, min(capacity, filled + crowd.total)))


Anchor = Callable[["LooCQuantizer", Tensor, Tensor], Anchors]  # quantiser, (N, d), (k, d)
ANCHORS: dict[str, Anchor | None] = {
    "closest": closest_anchor,
    "random": pooled_anchor,
    "probrandom": probable_anchor,
    "none": None,
}


# Below it (eps² of float32) a pull is lost in rounding, even towards an anchor 10⁷ times longer.
NEGLIGIBLE_RATE = torch.finfo(torch.float32).eps ** 2


def reinit_rate(usage: Tensor) -> Tensor:
    """a_k = exp(−10·K·p_k / (1 − γ) − 10⁻³), the pull of codevector k to its anchor. (K,)"""
    return torch.exp(-10 * len(usage) * usage / (1 - USAGE_DECAY) - 1e-3)


def code_bits(usage: Tensor) -> Tensor:
    """Bits of each code by how often it was used, −log₂ p_k: (K,) → (K,), float32 or wider.

    What the running average of young codebooks lacks to 1, and EVEN_SHARE besides, is spread over
    all codevectors: bits are equal before any use, and finite for one that was never used.
    """
    usage = usage.to(torch.promote_types(usage.dtype, torch.float32))
    even = (1 - usage.sum()).clamp_min(0) + EVEN_SHARE
    return -((usage + even / len(usage)) / (1 + EVEN_SHARE)).log2()


def steps_settled(usage: Tensor) -> int:
    """For how many steps no rate can exceed NEGLIGIBLE_RATE, p_k shrinking by γ a step at most.

    Until then nothing needs to be known of the usage, so that no step waits for the device.
    """
    bound = -math.log(NEGLIGIBLE_RATE) * (1 - USAGE_DECAY) / (10 * len(usage))
    least = float(usage.min())
    return max(0, int(math.log(1.01 * bound / least) / math.log(USAGE_DECAY)))


def unsettle(quantizer: LooCQuantizer, incompatible_keys: Any) -> None:
    """Look at the state anew after another has been loaded."""
    del incompatible_keys
    quantizer._settled_steps = 0
    quantizer._start_seen = False
    quantizer._notes = None


@dataclass
class Notes:
    """What training calls since the last update have seen."""

    counts: Tensor  # (K,), int64, how often each codevector was matched
    sums: Tensor  # (K, d), of the features that matched it; (0, d) unless the update is "ema"
    candidates: Tensor  # (k,), int64, the codevectors that the update may pull
    anchors: Anchors  # of the candidates, the best so far


def finite_matches(
    features: Tensor, indices: Tensor, loss: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """Features (N, d) and indices (N,), with NaN and `length` for those of no finite length."""
    # That the loss is finite tells that all features are; on CUDA, to read it would be to wait.
    if loss.is_cuda or not loss.isfinite():
        finite = features.square().sum(1).isfinite()
        return features.where(finite[:, None], torch.nan), indices.where(finite, length)
    return features, indices


def sums_by_index(features: Tensor, indices: Tensor, length: int) -> Tensor:
    """For each index the sum of its features: (N, d), (N,) → (length, d)."""
    keys, shares = spread(indices, length)
    sums = features.new_zeros(shares * length, features.shape[1]).index_add_(0, keys, features)
    return sums.view(shares, length, -1).sum(0) if shares > 1 else sums


def count_indices(indices: Tensor, length: int) -> Tensor:
    """How often each of 0 … length − 1 occurs: (N,) → (length,), int64."""
    if indices.is_cuda:  # where bincount would make the host wait
        keys, shares = spread(indices, length)
        ones = torch.ones((), dtype=torch.int64, device=indices.device).expand(len(indices))
        counts = indices.new_zeros(shares * length).scatter_add_(0, keys, ones)
        return counts.view(shares, length).sum(0)
    return torch.bincount(indices, minlength=length)


def spread(indices: Tensor, length: int) -> tuple[Tensor, int]:
    """Keys in which an index is another number in each share of the features: (N,) → (N,), shares.

    Deterministic CUDA adds what belongs to one key one by one: where there are many features to a
    codevector, or all collapse onto one, that row shall be shorter.
    """
    shares = num_shares(indices, length)
    if shares == 1:
        return indices, 1
    return indices + length * (torch.arange(len(indices), device=indices.device) % shares), shares


def num_shares(indices: Tensor, length: int) -> int:
    return min(256, max(1, len(indices) // (16 * length))) if indices.is_cuda else 1


# -------------------------------------------------------------------------- gradient and loss

CODEBOOK_UPDATES = ("gradient", "ema")


def rotation(gradient: Tensor, features: Tensor, quantized: Tensor) -> Tensor:
    """As if features had been turned and stretched onto their codevectors: all (N, d).

    z_q = ‖e‖/‖z‖·R·z, R = I − 2rrᵀ + 2êẑᵀ and r = (ẑ + ê)/‖ẑ + ê‖ held constant, so that
    ∂z = ‖e‖/‖z‖·(g − 2r(r·g) + 2ẑ(ê·g)): Fifty et al., "Restructuring Vector Quantization with
    the Rotation Trick", ICLR 2025. Straight through where a feature has no direction.
    """
    length = features.norm(dim=1, keepdim=True)
    z, e = unit_norm(features), unit_norm(quantized)
    r = unit_norm(z + e)
    along = 2 * z * (e * gradient).sum(1, keepdim=True)
    turned = gradient - 2 * r * (r * gradient).sum(1, keepdim=True) + along
    stretched = turned * (quantized.norm(dim=1, keepdim=True) / length.clamp_min(1e-6))
    return torch.where(length > 1e-6, stretched, gradient)


GRADIENTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor] | None] = {
    "straight_through": None,  # as if nothing had been replaced
    "rotation": rotation,
}


class Replace(torch.autograd.Function):
    """Codevectors in place of features, and the loss that draws them together.

    z_q = e[indices]; loss = λ·mean((sg[z_q] − z)²) + κ·mean((z_q − sg[z])²), κ being 0 where
    codevectors are not moved by gradients. With r = z_q − z and n elements, ∂loss/∂z = −2λr/n, to
    which one of GRADIENTS adds that of z_q, and ∂loss/∂e_k = 2κ/n·Σ r over the features of k.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        codebook: Tensor,
        indices: Tensor,
        commitment_cost: float,
        codebook_cost: float,
        gradient: str,
    ) -> tuple[Tensor, Tensor]:
        quantized = codebook.index_select(0, indices)  # (N, d)
        residual = quantized - features
        # The codebook changes before the backward pass, which may need what it was.
        ctx.pass_back = GRADIENTS[gradient]
        ctx.save_for_backward(residual, indices, quantized if ctx.pass_back else None)
        ctx.commitment_cost, ctx.codebook_cost = commitment_cost, codebook_cost
        ctx.num_embedding = len(codebook)
        flat = residual.view(-1)
        if flat.element_size() < 4:  # the sum would overflow float16
            flat = flat.float()
        cost = codebook_cost + commitment_cost
        return quantized, cost * torch.dot(flat, flat) / max(1, flat.numel())

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        grad_quantized, grad_loss = grad_outputs
        residual, indices, quantized = ctx.saved_tensors
        if ctx.pass_back is not None:
            grad_quantized = ctx.pass_back(grad_quantized, quantized - residual, quantized)
        scale = grad_loss * (2 / max(1, residual.numel()))
        grad_features = torch.addcmul(grad_quantized, residual, -ctx.commitment_cost * scale)
        grad_codebook = None
        if ctx.codebook_cost:
            sums = sums_by_index(residual, indices, ctx.num_embedding)
            grad_codebook = sums * (ctx.codebook_cost * scale)
        return grad_features, grad_codebook, None, None, None, None


# ------------------------------------------------------------------------------- contrastive loss


class LateUnitNorm(torch.autograd.Function):
    """`unit_norm` whose gradient takes the codevectors as re-initialisation left them.

    The reference writes the codebook behind autograd's back, between the contrastive loss and the
    backward pass; its gradients are reproduced: (g − (g·e')e'/‖e‖²)/‖e‖, e' the codevector now.
    """

    @staticmethod
    def forward(ctx: Any, codebook: Tensor) -> Tensor:
        ctx.codebook = codebook.detach()  # not save_for_backward: later writes shall be seen
        ctx.norm = codebook.norm(dim=1, keepdim=True).clamp_min(1e-12)
        unit: Tensor = codebook / ctx.norm
        return unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (gradient,) = grad_outputs
        along = (gradient * ctx.codebook).sum(1, keepdim=True) * ctx.codebook
        projected: Tensor = (gradient - along / ctx.norm.square()) / ctx.norm
        return projected


class ContrastiveLoss(torch.autograd.Function):
    """InfoNCE over the features of each codevector, a block of codevectors at a time.

    The positive is the mean similarity of the max(1, ⌊N/K⌋) closest features, the negatives are the
    lower half of all similarities; mean over codevectors. Takes prepared codevectors (K, d) and
    features (N, d); the features are constants. The gradient of a block is taken in the forward
    pass, so that no block outlives its turn.
    """

    @staticmethod
    def forward(
        ctx: Any,
        codevectors: Tensor,
        features: Tensor,
        similarity_of: Callable[[Tensor, Tensor], Tensor],
        memory: int | None,
    ) -> Tensor:
        num_codevectors, num_features = len(codevectors), len(features)
        num_positives = max(1, num_features // num_codevectors)
        per_block = max(1, block_elements(features.device, memory) // num_features)
        gradient = torch.empty_like(codevectors)
        total = codevectors.new_zeros(())
        for start in range(0, num_codevectors, per_block):
            rows = slice(start, start + per_block)
            with torch.enable_grad():
                block = codevectors[rows].detach().requires_grad_()
                similarity = similarity_of(block, features)  # (k, N)
                loss = contrastive_terms(similarity, num_positives).sum() / num_codevectors
                (gradient[rows],) = torch.autograd.grad(loss, block)
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return grad_outputs[0] * gradient, None, None, None


def contrastive_terms(similarity: Tensor, num_positives: int) -> Tensor:
    """Cross-entropy of the positive against the lower half, without a full sort: (k, N) → (k,)."""
    num_negatives = similarity.shape[1] // 2
    positive = similarity.topk(num_positives, dim=1).values.mean(1) / CONTRASTIVE_TEMPERATURE
    if num_negatives == 0:
        return positive - positive
    threshold = similarity.detach().kthvalue(num_negatives, dim=1, keepdim=True).values
    # Values equal to the threshold share what is left of the lower half.
    below, equal = similarity < threshold, similarity == threshold
    share = (num_negatives - below.sum(1, keepdim=True)) / equal.sum(1, keepdim=True)
    weight = torch.where(equal, share, below.to(similarity.dtype))
    negatives = torch.logsumexp(similarity / CONTRASTIVE_TEMPERATURE + weight.log(), dim=1)
    return torch.logaddexp(positive, negatives) - positive


# -------------------------------------------------------------------------------------- quantiser


def untraced(method: Callable[..., Result]) -> Callable[..., Result]:
    """Have torch.compile leave a method of a module as it is, and compile what is around it.

    Its state changes as it goes: to trace it would fail, or have it compiled anew each time.
    torch.compiler.disable does that, but would import the compiler here, which takes seconds.
    """
    apart: Callable[..., Result] = torch._disable_dynamo(method)

    @wraps(method)
    def call(module: nn.Module, z: Tensor) -> Result:
        return (apart if torch.compiler.is_compiling() else method)(module, z)

    return call


class LooCQuantizer(LatentNorm):
    """Compositional vector quantisation with one small shared codebook.

    Args:
        num_embedding: codevectors K.
        embedding_dim: dimension d of a codevector; divides C·β². With d = C and β off this is the
            quantiser of CVQ-VAE, and with anchor "none" and distance "l2" a plain VQ.
        commitment_cost: commitment weight λ.
        distance: "cos" or "l2", the similarity of the match.
        anchor: "closest", "random", "probrandom" or "none", the re-initialisation rule.
        split: "fixed" (contiguous channels) or "interval" (every m-th channel).
        interpolation_scale: β; 0 or 1 is off.
        first_batch: re-initialise on the first training batch only.
        contras_loss: add the contrastive loss in training; needs codebook_update "gradient".
        codebook_update: "gradient", the loss moves codevectors, or "ema", each is the running mean
            of the features that matched it.
        ema_decay: of that mean, for one step.
        codebook_start: "uniform" in ±1/K, "features" of the first training batch, or their centres
            by "kmeans".
        latent_norm: "none"; or, to mean square one, "unit" (each unit alone), "layer" (the channels
            of a position, their mean removed), "batch" (each channel over the batch, likewise) or
            "running" (each channel by its running mean and variance, in training too).
        latent_channels: channels C of the latents, which the last two have to know.
        gradient: "straight_through" or "rotation", how the latents' gradient reaches z.
        rate_weight: squared distance that a bit is worth in the match, which then takes the least
            ‖z − e_k‖² + rate_weight·(−log₂ p_k); needs distance "l2". An anchor has no hold on a
            codevector that its bits keep from use. Entropy-constrained vector quantisation: Chou,
            Lookabaugh and Gray, IEEE Trans. ASSP 37 (1989).

    Attributes `search` (a backend of `search`, or "auto") and `search_memory` (MiB of similarities
    held at a time, None for a default) change speed and memory, not results. While the attribute
    `defer_update` is set, training calls only take note of their features; the next one without it
    updates usage and codebook from all of them, so that a batch may be passed in parts.

    State: parameter `codebook` (K, d); buffers `usage` (K,), the running average p_k of how often
    each codevector was used; `reinitialised`, whether a training batch has passed; `pool` (K, d)
    and `pool_size`, past features, which "random" alone fills; with "ema" `ema_count` (K,), the
    running average of matches a step; with a start from features `started`; with norm "batch"
    or "running" the running `latent_mean` and `latent_variance` (m, d), with "running" besides the
    number of `latent_steps` that they are of. In training mode a call updates them, never from
    features that are not finite; in evaluation mode it writes nothing.

    Where torch.distributed is initialised, the processes have to make training calls together (of
    any number of images each, none included): usage and anchors are then those of all features,
    and every process writes the same codebook. The contrastive loss compares a process's own.

    Raises:
        ValueError: for arguments out of range, or an input that cannot be cut into units.
    """

    codebook: nn.Parameter
    usage: Tensor
    reinitialised: Tensor
    pool: Tensor
    pool_size: Tensor
    ema_count: Tensor | None
    started: Tensor | None

    def __init__(
        self,
        num_embedding: int,
        embedding_dim: int,
        *,
        commitment_cost: float = 0.25,
        distance: str = "cos",
        anchor: str = "closest",
        split: str = "fixed",
        interpolation_scale: int = 0,
        first_batch: bool = False,
        contras_loss: bool = False,
        codebook_update: str = "gradient",
        ema_decay: float = 0.8,
        codebook_start: str = "uniform",
        latent_norm: str = "none",
        latent_channels: int | None = None,
        gradient: str = "straight_through",
        rate_weight: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value, registry in (
            ("distance", distance, DISTANCES),
            ("anchor", anchor, ANCHORS),
            ("split", split, SPLITS),
            ("codebook_update", codebook_update, CODEBOOK_UPDATES),
            ("codebook_start", codebook_start, STARTS),
            ("latent_norm", latent_norm, LATENT_NORMS),
            ("gradient", gradient, GRADIENTS),
        ):
            if value not in registry:
                raise ValueError(f"{name} {value!r} is none of {', '.join(registry)}")
        for name, number, least in (
            ("num_embedding", num_embedding, 1),
            ("embedding_dim", embedding_dim, 1),
            ("commitment_cost", commitment_cost, 0),
            ("interpolation_scale", interpolation_scale, 0),
            ("rate_weight", rate_weight, 0),
        ):
            if not number >= least:
                raise ValueError(f"{name} {number} is less than {least}")
        if latent_channels is not None and latent_channels < 1:
            raise ValueError(f"latent_channels {latent_channels} is less than 1")
        if latent_norm == "unit" and embedding_dim == 1:
            raise ValueError("latent_norm 'unit' makes ±1 of all units of embedding_dim 1")
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay {ema_decay} is not in [0, 1)")
        if rate_weight == math.inf:
            raise ValueError("rate_weight inf is not finite")
        if rate_weight and distance != "l2":
            raise ValueError(f"rate_weight {rate_weight} needs distance 'l2', not {distance!r}")
        if contras_loss and codebook_update != "gradient":
            raise ValueError(f"contras_loss has no effect with codebook_update {codebook_update!r}")
        self.num_embedding = num_embedding
        self.embedding_dim = embedding_dim
        self.commitment_cost = commitment_cost
        self.distance = distance
        self.anchor = anchor
        self.split = split
        self.interpolation_scale = interpolation_scale
        self.first_batch = first_batch
        self.contras_loss = contras_loss
        self.codebook_update = codebook_update
        self.ema_decay = ema_decay
        self.codebook_start = codebook_start
        self.latent_norm = latent_norm
        self.gradient = gradient
        self.rate_weight = rate_weight
        self.search = "auto"
        self.search_memory: int | None = None

        bound = 1 / num_embedding
        self.codebook = nn.Parameter(
            torch.empty(num_embedding, embedding_dim).uniform_(-bound, bound),
            requires_grad=codebook_update == "gradient",
        )
        self.register_buffer("usage", torch.zeros(num_embedding))
        self.register_buffer("reinitialised", torch.tensor(False))
        self.register_buffer("pool", torch.zeros(num_embedding, embedding_dim))
        self.register_buffer("pool_size", torch.tensor(0))
        by_ema = codebook_update == "ema"
        self.register_buffer("ema_count", torch.zeros(num_embedding) if by_ema else None)
        from_data = STARTS[codebook_start] is not None
        self.register_buffer("started", torch.tensor(False) if from_data else None)
        if latent_norm in WITH_AVERAGES:
            self._keep_averages(self._unit_shape(latent_channels))
        self.defer_update = False
        self._settled_steps = 0
        self._start_seen = False
        self._notes: Notes | None = None
        self.register_load_state_dict_post_hook(unsettle)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        return (
            f"{self.num_embedding}, {self.embedding_dim}, distance={self.distance!r}, "
            f"anchor={self.anchor!r}, split={self.split!r}, "
            f"interpolation_scale={self.interpolation_scale}"
        )

    @untraced
    def forward(self, z: Tensor) -> Quantized:
        """Quantise z (B, C, H, W); in training mode also re-initialise unused codevectors.

        The loss is λ·mean((sg[z_q] − z)²) + mean((z_q − sg[z])²), at the extrapolated size, plus
        the contrastive loss where it is on; by "ema" it is the first term alone. z is what it is
        after `latent_norm`. The latents have the values of `decode(indices)`, as the codebook was
        before it was updated, and their gradient reaches z as `gradient` says.
        """
        with torch.autocast(z.device.type, enabled=False):
            units = self._cut(z, self.training)  # (B, H, W, m, d)
            features = units.reshape(-1, self.embedding_dim)  # (N, d)
            constant = features.detach()
            if self.training and not self._start_seen:
                self._start(constant)
            indices = self._search(constant)  # (N,)
            quantized, loss = Replace.apply(
                *(features, self.codebook, indices, self.commitment_cost),
                *(float(self.codebook_update == "gradient"), self.gradient),
            )  # (N, d), scalar
            if self.training:
                if self.contras_loss and len(constant):
                    loss = loss + self._contrastive_loss(constant)
                self._observe(constant, indices, loss.detach())
            latents = self._join(quantized.view(units.shape)).to(z.dtype)
        return Quantized(latents, loss, indices.view(units.shape[:-1]))

    @untraced
    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        """(B, C, H, W) → indices (B, H, W, m), int64. Writes nothing.

        In training mode too, norm "batch" takes its running averages here, as in evaluation.
        """
        with torch.autocast(z.device.type, enabled=False):
            units = self._cut(z)
            features = units.reshape(-1, self.embedding_dim)
            return self._search(features).view(units.shape[:-1])

    def decode(self, indices: Tensor) -> Tensor:
        """Indices (B, H, W, m) → latents (B, C, H, W).

        Raises ValueError where m units cannot be folded back into channels.
        """
        area = max(self.interpolation_scale, 1) ** 2
        if indices.dim() != 4 or indices.shape[-1] * self.embedding_dim % area:
            raise ValueError(
                f"indices of shape {tuple(indices.shape)} are not (B, H, W, m) "
                f"with m·{self.embedding_dim} a multiple of {area}"
            )
        return self._join(F.embedding(indices, self.codebook))

    def _search(self, features: Tensor) -> Tensor:
        codebook, penalty = self.codebook.detach(), None
        if self.rate_weight:
            bits = code_bits(self.usage)
            # Only differences count, and small numbers are more exact.
            penalty = (self.rate_weight * (bits - bits.amin())).to(codebook.dtype)
        return search(features, codebook, self.distance, self.search, self.search_memory, penalty)

    def _cut(self, z: Tensor, training: bool = False) -> Tensor:
        """(B, C, H, W) of any float type → units (B, H, W, m, d), in the codebook's type."""
        if z.dim() != 4:
            raise ValueError(f"latents of shape {tuple(z.shape)} are not (B, C, H, W)")
        extrapolated = extrapolate(z.to(self.codebook.dtype), self.interpolation_scale)
        self._unit_shape(z.shape[1])
        # The permutation after it is then a view: this copy is several times the faster one.
        channels_last = extrapolated.contiguous(memory_format=torch.channels_last)
        units = SPLITS[self.split].cut(channels_last.permute(0, 2, 3, 1), self.embedding_dim)
        if self.latent_norm in WITH_AVERAGES and units.shape[-2:] != self.latent_mean.shape:
            raise ValueError(
                f"latents of {z.shape[1]} channels are cut into {units.shape[-2]} units, "
                f"latent_channels into {len(self.latent_mean)}"
            )
        return self._normalise(units, training)

    def _join(self, units: Tensor) -> Tensor:
        """Units (B, H, W, m, d) → (B, C, H, W)."""
        joined = SPLITS[self.split].join(units).permute(0, 3, 1, 2)
        return interpolate_back(joined, self.interpolation_scale)

    def _contrastive_loss(self, features: Tensor) -> Tensor:
        prepare, similarity_of, _ = DISTANCES[self.distance]
        late = LateUnitNorm.apply if prepare is unit_norm else prepare
        loss: Tensor = ContrastiveLoss.apply(
            late(self.codebook), prepare(features), similarity_of, self.search_memory
        )
        return loss

    def _unit_shape(self, channels: int | None) -> tuple[int, int]:
        """(m, d) of latents of so many channels; raises ValueError where d does not divide them."""
        if channels is None:
            raise ValueError(f"latent_norm {self.latent_norm!r} needs latent_channels")
        extrapolated = channels * max(self.interpolation_scale, 1) ** 2
        if extrapolated % self.embedding_dim:
            raise ValueError(
                f"embedding_dim {self.embedding_dim} does not divide "
                f"the {extrapolated} channels of the latents"
            )
        return extrapolated // self.embedding_dim, self.embedding_dim

    @torch.no_grad()
    def _start(self, features: Tensor) -> None:
        """Make the codebook of the features of the first training batch, or of its first part."""
        if self.latent_norm == "running" and not self.latent_steps:
            return  # no batch was finite: these features are not normalised
        make = STARTS[self.codebook_start]
        if self.started is not None and make is not None and not self.started:
            codebook = make(self, features)
            if codebook is None:
                return
            self.codebook.copy_(codebook)
            self.started.fill_(True)
        self._start_seen = True

    @torch.no_grad()
    def _observe(self, features: Tensor, indices: Tensor, loss: Tensor) -> None:
        """Take note of the features of a training call, and update unless that is deferred."""
        notes = self._notes or self._new_notes()
        features, indices = finite_matches(features, indices, loss, self.num_embedding)
        notes.counts += count_indices(indices, self.num_embedding + 1)[:-1]
        if self.codebook_update == "ema":
            notes.sums += sums_by_index(features, indices, self.num_embedding + 1)[:-1]
        propose = ANCHORS[self.anchor]
        if propose is not None and self._may_reinitialise():
            if self.anchor == "random":
                fill_pool(self, features)
            if len(notes.candidates):
                proposed = propose(self, features, self.codebook[notes.candidates])
                notes.anchors = better_of(notes.anchors, proposed)
        self._notes = notes
        if not self.defer_update:
            self._update(notes)
            self._notes = None

    def _may_reinitialise(self) -> bool:
        return self.anchor != "none" and not (self.first_batch and bool(self.reinitialised))

    def _new_notes(self) -> Notes:
        """Notes of no feature, with the codevectors whose rate may count after the next update."""
        candidates = torch.empty(0, dtype=torch.int64, device=self.usage.device)
        if self._settled_steps > 0:
            self._settled_steps -= 1
        elif self._may_reinitialise():
            least = USAGE_DECAY * self.usage  # that is left if they are not matched now
            candidates = (reinit_rate(least) > NEGLIGIBLE_RATE).nonzero().squeeze(1)
            if not len(candidates):
                self._settled_steps = steps_settled(least)
        codevectors = self.codebook[candidates]
        scores = codevectors.new_full((len(candidates),), -torch.inf)
        return Notes(
            torch.zeros(self.num_embedding, dtype=torch.int64, device=self.usage.device),
            torch.zeros_like(self.codebook) if self.codebook_update == "ema" else codevectors[:0],
            candidates,
            Anchors(scores, codevectors),
        )

    def _update(self, notes: Notes) -> None:
        """p_k ← γ·p_k + (1 − γ)·share_k, then e_k ← (1 − a_k)·e_k + a_k·anchor_k.

        The last writer of the codebook in a step.
        """
        counts = sum_over_ranks(notes.counts)
        if self.ema_count is not None:
            self._follow(counts, sum_over_ranks(notes.sums), self.ema_count)
        total = counts.sum()
        share = torch.where(total > 0, counts / total, self.usage)
        self.usage.lerp_(share.to(self.usage.dtype), 1 - USAGE_DECAY)
        if self._may_reinitialise():
            self.reinitialised.fill_(True)
        if len(notes.candidates):
            codevectors = self.codebook[notes.candidates]
            target = best_over_ranks(*notes.anchors)
            rate = reinit_rate(self.usage)[notes.candidates, None].to(codevectors.dtype)
            self.codebook[notes.candidates] = codevectors.lerp(target, rate)

    def _follow(self, counts: Tensor, sums: Tensor, ema_count: Tensor) -> None:
        """c_k ← δ·c_k + (1 − δ)·n_k, then e_k ← e_k + (1 − δ)·n_k/c_k·(mean_k − e_k).

        That is e_k = s_k/c_k of a running sum s_k of features, which need not be kept; δ the decay,
        n_k and mean_k the matches of this step: van den Oord et al., arXiv 1711.00937, appendix A.
        """
        share = counts * (1 - self.ema_decay)
        ema_count.mul_(self.ema_decay).add_(share)
        rate = torch.where(counts > 0, share / ema_count, 0)[:, None].to(self.codebook.dtype)
        self.codebook.lerp_(sums / counts.clamp_min(1)[:, None], rate)
