"""Distances, and search for the most similar codevector of each feature, without N × K matrix."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger("looc.search")
failed_searches: set[str] = set()  # backends that raised an error in this process
NUM_VERIFIED = 2**12  # features on which a newly compiled kernel is verified
verified_kernels: set[tuple[object, ...]] = set()


def unit_norm(vectors: Tensor) -> Tensor:
    """Scale each vector to length one: (n, d) → (n, d)."""
    return F.normalize(vectors, dim=1)


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
    "cos": Distance(
        prepare=unit_norm,
        similarity=lambda features, codevectors: features @ codevectors.T,
        similarity_of_rows=lambda one, other: (one * other).sum(1),
    ),
    "l2": Distance(
        prepare=lambda vectors: vectors,
        similarity=negative_squared_l2,
        similarity_of_rows=lambda one, other: -(one - other).square().sum(1),
    ),
}


def block_elements(device: torch.device, memory: int | None) -> int:
    """Number of float32 values in `memory` MiB; the default of the CPU is one its cache holds."""
    return (memory or (256 if device.type == "cuda" else 4)) * 2**18


def blocks(rows: Tensor, columns: int, memory: int | None) -> tuple[Tensor, ...]:
    """Split rows (n, …) so that the similarities of a block to all columns fit in the memory."""
    size = max(1, block_elements(rows.device, memory) // max(1, columns))
    return torch.split(rows, size) if len(rows) else ()


def search(
    features: Tensor,
    codebook: Tensor,
    distance: str,
    backend: str = "auto",
    memory: int | None = None,
    penalty: Tensor | None = None,
) -> Tensor:
    """Find the most similar codevector of each feature, exactly: (N, d), (K, d) → (N,), int64.

    Backend "auto" is faiss on the CPU if it is installed, else the compiled kernel for low
    dimensions, else torch. A backend that fails is replaced by torch for the rest of the process,
    with a warning in the log. `memory` is the MiB of similarities that torch holds at a time. The
    penalty (K,), at least 0, is added to the squared distance of each codevector ("l2" only).
    """
    if not len(features):
        return torch.empty(0, dtype=torch.int64, device=features.device)
    keys = DISTANCES[distance].prepare(codebook)
    if backend == "auto":
        backend = choose_search(features, keys)
    if penalty is not None and backend == "faiss":  # ‖(z, 0) − (e, √penalty)‖² = ‖z − e‖² + penalty
        features, keys = F.pad(features, (0, 1)), torch.cat((keys, penalty.sqrt()[:, None]), 1)
        penalty = None
    # All backends maximise z·key + offset. The norm of z is the same for all codevectors, so that
    # it cannot change the argmax.
    offset = codebook.new_zeros(len(codebook)) if distance == "cos" else -keys.square().sum(1) / 2
    if penalty is not None:
        offset = offset - penalty / 2
    if backend not in failed_searches:
        try:
            return SEARCHES[backend](features, keys, offset, memory)
        except Exception as error:  # compilers raise errors of many types
            if backend == "torch":
                raise
            failed_searches.add(backend)
            reason = " ".join(str(error).split())[:200]
            log.warning("search by %s failed (%s); using torch instead", backend, reason)
    return search_blocks(features, keys, offset, memory)


def choose_search(features: Tensor, keys: Tensor) -> str:
    """Return the fastest backend for these shapes, as measured by benchmarks/quantizer.py."""
    if torch.compiler.is_compiling():  # torch.export can trace no other backend
        return "torch"
    if faiss_applies(features):
        return "faiss"
    worth_compiling = len(features) * len(keys) >= 2**24
    return "compiled" if worth_compiling and features.shape[1] <= 4 else "torch"


def faiss_applies(features: Tensor) -> bool:
    """Return whether faiss is installed and accepts these features."""
    return features.is_cpu and features.dtype == torch.float32 and faiss_installed()


@lru_cache(maxsize=1)
def faiss_installed() -> bool:
    return importlib.util.find_spec("faiss") is not None


def search_faiss(features: Tensor, keys: Tensor, offset: Tensor, _: int | None) -> Tensor:
    """Search with a flat index of faiss, which has fused kernels for low dimensions."""
    import faiss

    # Among keys of length one the most similar is also the nearest, and faiss finds the nearest
    # faster up to 16 dimensions. A codevector of zeros cannot be scaled to length one.
    nearest = bool(offset.any()) or (keys.shape[1] <= 16 and bool(keys.any(1).all()))
    index = (faiss.IndexFlatL2 if nearest else faiss.IndexFlatIP)(keys.shape[1])
    index.add(keys.numpy())

    def search_part(part: Tensor) -> Tensor:
        return torch.from_numpy(index.search(part.numpy(), 1)[1][:, 0])

    threads = min(torch.get_num_threads(), 1 + len(features) // 2**13)
    indices = torch.cat(list(faiss_threads(threads).map(search_part, features.chunk(threads))))
    return indices.clamp_min_(0)  # faiss returns −1 for a NaN feature


@lru_cache
def faiss_threads(count: int) -> ThreadPoolExecutor:
    """Make threads with one core of faiss each: idle threads of its OpenMP would slow torch."""
    import faiss

    # By default faiss computes fewer than 128,000 distances one by one, ten times as slowly.
    faiss.cvar.distance_compute_blas_threshold = 1
    return ThreadPoolExecutor(count, "faiss", faiss.omp_set_num_threads, (1,))


if hasattr(os, "register_at_fork"):  # a forked process does not inherit the threads
    os.register_at_fork(after_in_child=faiss_threads.cache_clear)


def search_compiled(features: Tensor, keys: Tensor, offset: Tensor, memory: int | None) -> Tensor:
    """Search with one kernel that torch.compile makes of the unrolled dot product and its argmax.

    Features are searched in blocks of one of two lengths, the last block padded, so that shapes
    never change. Raises RuntimeError if a kernel returns wrong indices when it is first used.
    """
    size = 2**16 if len(features) > 2**13 else 2**13
    kernel = (size, keys.shape, keys.dtype, keys.device)
    found = []
    for part in torch.split(features, size):
        padded = F.pad(part, (0, 0, 0, size - len(part)))
        found.append(compiled_argmax()(padded.T, keys, offset)[: len(part)])
        if kernel not in verified_kernels:
            few = slice(NUM_VERIFIED)
            if verify_indices(part[few], keys, offset, found[-1][few], memory):
                verified_kernels.add(kernel)
    return torch.cat(found)


def verify_indices(
    features: Tensor, keys: Tensor, offset: Tensor, indices: Tensor, memory: int | None
) -> bool:
    """Return whether no codevector scores higher, up to rounding; False if scores are not finite.

    Raises RuntimeError if an index is wrong: on some processors PyTorch 2.11 compiles a wrong
    kernel for d = 3.
    """
    wrong = RuntimeError(f"the compiled kernel is wrong for {tuple(keys.shape)} codevectors")
    if ((indices < 0) | (indices >= len(keys))).any():
        raise wrong
    lengths = keys.norm(dim=1)
    for block, found in zip(*(blocks(x, len(keys), memory) for x in (features, indices))):
        scores = torch.addmm(offset, block, keys.T)  # (n, K)
        if not scores.isfinite().all():
            return False
        best, place = scores.max(1)
        short = best - scores.gather(1, found[:, None])[:, 0]
        # The rounding error is relative to the summands, which may be much larger than the score.
        length, height = (torch.maximum(x[found], x[place]) for x in (lengths, offset.abs()))
        if (short > 1e-3 * (block.norm(dim=1) * length + height)).any():
            raise wrong
    return True


@lru_cache(maxsize=1)
def compiled_argmax() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    # fullgraph: raise an error if compiling fails, instead of running the slow expression.
    return torch.compile(unrolled_argmax, fullgraph=True, dynamic=False)


def unrolled_argmax(columns: Tensor, keys: Tensor, offset: Tensor) -> Tensor:
    """argmax over k of offset_k + Σ_j keys_kj · columns_jn: (d, n), (K, d), (K,) → (n,)."""
    scores = offset[:, None]
    for j in range(len(columns)):
        scores = scores + keys[:, j : j + 1] * columns[j]
    return scores.argmax(0)


def search_blocks(features: Tensor, keys: Tensor, offset: Tensor, memory: int | None) -> Tensor:
    """Search with matrix products, a block of features at a time."""
    parts = blocks(features, len(keys), memory)
    return torch.cat([row_argmax(torch.addmm(offset, part, keys.T)) for part in parts])


def row_argmax(scores: Tensor, groups: int = 16) -> Tensor:
    """argmax of each row, (n, K) → (n,): over the maxima of 16 interleaved groups, then within one.

    A maximum without its position is several times faster than one with it.
    """
    if scores.shape[1] % groups:
        return scores.argmax(1)
    grouped = scores.view(len(scores), groups, -1)  # (n, 16, K / 16)
    column = grouped.amax(1).argmax(1)  # (n,)
    candidates = grouped.gather(2, column[:, None, None].expand(-1, groups, 1)).squeeze(2)
    return candidates.argmax(1) * grouped.shape[2] + column


SEARCHES: dict[str, Callable[[Tensor, Tensor, Tensor, int | None], Tensor]] = {
    "faiss": search_faiss,
    "compiled": search_compiled,
    "torch": search_blocks,
}
