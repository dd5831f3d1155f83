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

from .library_globals import exact_products, faiss_by_products

log = logging.getLogger("looc.search")
failed_searches: set[tuple[str, str]] = set()  # backends that raised an error, and its text
pauses: dict[tuple[object, ...], tuple[int, int]] = {}  # searches to leave out, out of how many
FIRST_PAUSE = 64  # searches left out after a failure; after each further one twice as many
NUM_VERIFIED = 2**12  # features on which a newly compiled kernel is verified
kernels_right: dict[tuple[object, ...], bool] = {}  # those that have been verified


def widened(vectors: Tensor) -> Tensor:
    """Convert to float32 unless the type is at least as wide."""
    return vectors.to(torch.promote_types(vectors.dtype, torch.float32))


def unit_norm(vectors: Tensor) -> Tensor:
    """Scale each vector to length one: (n, d) → (n, d)."""
    return F.normalize(widened(vectors), dim=1)


def centre_of(vectors: Tensor) -> Tensor:
    """Mean of the vectors, zero where it is not finite: (n, d) → (d,).

    ‖z‖² − 2z·e + ‖e‖² loses all digits far from the origin, unless the mean is subtracted first.
    """
    mean = vectors.detach().mean(0)
    return mean.where(mean.isfinite(), 0)


def negative_squared_l2(features: Tensor, codevectors: Tensor) -> Tensor:
    """−‖z − e‖² of all pairs: (n, d), (k, d) → (n, k)."""
    centre = centre_of(codevectors)
    features, codevectors = features - centre, codevectors - centre
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
        prepare=widened,
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
    lowest: bool = True,
) -> Tensor:
    """Find the most similar codevector of each feature, exactly: (N, d), (K, d) → (N,), int64.

    All backends return a codevector within 1e-6 of the best, and the lowest index of equal ones:
    for "cos" the similarities differ by less than 1e-6, for "l2" the squared distances by less than
    1e-6 of those to the mean of the codebook. Float16 and bfloat16 are searched in float32.

    Backend "auto" is faiss on the CPU if it is installed, else the compiled kernel for low
    dimensions, else torch. While the call is traced, it is torch. A backend that fails is replaced
    by torch, with a warning in the log, and tried again after 64 searches of this codebook's size,
    then after 128, and so on. `memory` is the MiB of similarities that torch holds at a time. The
    penalty (K,), at least 0, is added to the squared distance of each codevector ("l2" only).
    Without `lowest` any of equal codevectors may be found, sooner if there are very many.
    """
    traced = is_traced(features)
    if not traced and not len(features):
        return torch.empty(0, dtype=torch.int64, device=features.device)
    features = widened(features.detach())
    keys = DISTANCES[distance].prepare(codebook.detach())
    if features.dtype != keys.dtype:  # one of them is float64
        features, keys = features.double(), keys.double()
    if distance == "l2":
        centre = centre_of(keys)
        features, keys = features - centre, keys - centre
    if backend == "auto":
        backend = choose_search(features, keys)
    elif backend not in SEARCHES:
        raise ValueError(f"search {backend!r} is none of auto, {', '.join(SEARCHES)}")
    rows = keys  # equal ones are equally near
    if penalty is not None:
        rows = torch.cat((keys, penalty.to(keys.dtype).sqrt()[:, None]), 1)
        if backend == "faiss" and not traced:  # ‖(z, 0) − (e, √penalty)‖² = ‖z − e‖² + penalty
            features, keys, penalty = F.pad(features, (0, 1)), rows, None
    # All backends maximise z·key + offset. The norm of z is the same for all codevectors, so that
    # it cannot change the argmax.
    offset = keys.new_zeros(len(keys)) if distance == "cos" else -keys.square().sum(1) / 2
    if penalty is not None:
        offset = offset - penalty / 2
    if traced:
        return search_traced(features, keys, offset)
    found = search_or_replace(backend, features, keys, offset, memory)
    return first_of_equals(rows, found) if lowest else found


def search_or_replace(
    backend: str, features: Tensor, keys: Tensor, offset: Tensor, memory: int | None
) -> Tensor:
    """Search by the backend, or by torch if it fails or failed lately with these codevectors."""
    circumstances = (backend, keys.shape, keys.dtype, keys.device)
    left, pause = pauses.get(circumstances, (0, FIRST_PAUSE // 2))
    if left:
        pauses[circumstances] = (left - 1, pause)
        return search_blocks(features, keys, offset, memory)
    try:
        found = SEARCHES[backend](features, keys, offset, memory)
    except Exception as error:  # compilers raise errors of many types
        if backend == "torch":
            raise
        pauses[circumstances] = (2 * pause, 2 * pause)
        reason = " ".join(str(error).split())[:200]
        if (backend, reason) not in failed_searches:
            failed_searches.add((backend, reason))
            log.warning("search by %s failed (%s); using torch instead", backend, reason)
        return search_blocks(features, keys, offset, memory)
    pauses.pop(circumstances, None)
    return found


def first_of_equals(rows: Tensor, indices: Tensor) -> Tensor:
    """Replace the index of a row that occurs several times by its lowest: (K, d), (N,) → (N,).

    Backends may round the scores of equal codevectors differently: at the end of a block, say.
    """
    bits = (rows + 0.0).view(torch.int32).long()  # −0 becomes 0
    codes = (bits * torch.full_like(bits, 0x5851F42D4C957F2D).cumprod(1)).sum(1)  # a hash
    ordered, order = codes.sort(stable=True)
    new = F.pad(ordered[1:] != ordered[:-1], (1, 0), value=True)
    if not rows.is_cuda and new.all():  # on CUDA it would synchronise
        return indices
    positions = torch.arange(len(rows), device=rows.device)
    first = torch.empty_like(order)
    first[order] = order[positions.where(new, 0).cummax(0).values]
    return first.where((rows[first] == rows).all(1), positions)[indices]


def is_traced(tensor: Tensor) -> bool:
    """Return whether the values must not be read: a call is traced, or its tensors are fake."""
    recorded = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    traced = recorded or torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[no-untyped-call]
    return traced or type(tensor) is not Tensor or tensor.is_meta


def choose_search(features: Tensor, keys: Tensor) -> str:
    """Return the fastest backend for these shapes, as measured by benchmarks/quantizer.py."""
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

    features, keys = features.contiguous(), keys.contiguous()
    # Among keys of length one the most similar is also the nearest, and faiss finds the nearest
    # faster up to 16 dimensions. A codevector of zeros cannot be scaled to length one.
    by_angle = not offset.any()
    nearest = not by_angle or (keys.shape[1] <= 16 and bool(keys.any(1).all()))
    index = (faiss.IndexFlatL2 if nearest else faiss.IndexFlatIP)(keys.shape[1])
    index.add(keys.numpy())

    def search_part(part: Tensor) -> Tensor:
        if not (by_angle and nearest):
            return torch.from_numpy(index.search(part.numpy(), 1)[1][:, 0])
        part = part.clone()
        faiss.normalize_L2(part.numpy())  # ‖z‖² + 1 − 2z·e is exact to rounding at ‖z‖ = 1 only
        found = torch.from_numpy(index.search(part.numpy(), 1)[1][:, 0])
        zeros = (part[:, 0] == 0).nonzero().squeeze(1)  # equally similar to all, up to rounding
        found[zeros[~part[zeros].any(1)]] = 0
        return found

    threads = min(torch.get_num_threads(), 1 + len(features) // 2**13)
    with faiss_by_products(faiss):
        found = torch.cat(list(faiss_threads(threads).map(search_part, features.chunk(threads))))
    return found.clamp_min_(0)  # faiss returns −1 for a NaN feature


@lru_cache
def faiss_threads(count: int) -> ThreadPoolExecutor:
    """Make threads with one core of faiss each: idle threads of its OpenMP would slow torch."""
    import faiss

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
        if kernel not in kernels_right:
            few = slice(NUM_VERIFIED)
            right = verify_indices(part[few], keys, offset, found[-1][few], memory)
            if right is not None:
                kernels_right[kernel] = right
        if not kernels_right.get(kernel, True):
            # On some processors PyTorch 2.11 compiles a wrong kernel for d = 3.
            raise RuntimeError(f"the compiled kernel is wrong for {tuple(keys.shape)} codevectors")
    return torch.cat(found)


def verify_indices(
    features: Tensor, keys: Tensor, offset: Tensor, indices: Tensor, memory: int | None
) -> bool | None:
    """Return whether no codevector scores higher, up to rounding; None if scores are not finite."""
    if ((indices < 0) | (indices >= len(keys))).any():
        return False
    lengths = keys.norm(dim=1)
    for block, found in zip(*(blocks(x, len(keys), memory) for x in (features, indices))):
        with exact_products(block.device):
            scores = torch.addmm(offset, block, keys.T)  # (n, K)
        if not scores.isfinite().all():
            return None
        best, place = scores.max(1)
        short = best - scores.gather(1, found[:, None])[:, 0]
        # The rounding error is relative to the summands, which may be much larger than the score.
        length, height = (torch.maximum(x[found], x[place]) for x in (lengths, offset.abs()))
        if (short > 1e-3 * (block.norm(dim=1) * length + height)).any():
            return False
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
    with exact_products(features.device):
        return torch.cat([row_argmax(torch.addmm(offset, part, keys.T)) for part in parts])


def row_argmax(scores: Tensor, groups: int = 16) -> Tensor:
    """argmax of each row, (n, K) → (n,): the lowest of equals; any for a row with a NaN.

    A maximum without its position is several times faster than one with it: it is found first, then
    its position among bytes, or within one of 16 groups.
    """
    if scores.shape[1] < 512:
        return (scores == scores.amax(1, keepdim=True)).byte().argmax(1)
    if scores.shape[1] % groups:
        return scores.argmax(1)
    grouped = scores.view(len(scores), groups, -1)  # (n, 16, K / 16)
    group = grouped.amax(2).argmax(1)  # (n,)
    within = grouped.gather(1, group[:, None, None].expand(-1, 1, grouped.shape[2])).squeeze(1)
    return group * grouped.shape[2] + within.argmax(1)


def search_traced(features: Tensor, keys: Tensor, offset: Tensor) -> Tensor:
    """Search a block of codevectors at a time: the number of features is free in a trace."""
    size = max(256, -(-len(keys) // 16))
    best = found = torch.empty(0)
    for start in range(0, len(keys), size):
        part = slice(start, start + size)
        score, place = torch.addmm(offset[part], features, keys[part].T).max(1)
        place = place + start
        if start:
            place = torch.where(score > best, place, found)
            score = torch.maximum(score, best)
        best, found = score, place
    return found


SEARCHES: dict[str, Callable[[Tensor, Tensor, Tensor, int | None], Tensor]] = {
    "faiss": search_faiss,
    "compiled": search_compiled,
    "torch": search_blocks,
}
