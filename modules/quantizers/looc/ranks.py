"""Sums, broadcasts and draws over the processes that train together under torch.distributed."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

DRIFT = 1e-4  # difference of codebooks that is not rounding, relative to the largest value


def num_ranks() -> int:
    """Number of processes; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum over all processes, in place, any shape; every process gets the same result."""
    if num_ranks() > 1:
        dist.all_reduce(values)
    return values


class SumOverRanks(torch.autograd.Function):
    """`sum_over_ranks` out of place; its gradient is also summed over all processes."""

    @staticmethod
    def forward(_: Any, values: Tensor) -> Tensor:
        return sum_over_ranks(values.clone())

    @staticmethod
    @once_differentiable
    def backward(_: Any, *grad_outputs: Tensor) -> Tensor:
        return sum_over_ranks(grad_outputs[0].clone())


def from_first_rank(values: Tensor) -> Tensor:
    """Copy the values of the first process to all, in place, any shape."""
    if num_ranks() > 1:
        dist.broadcast(values, src=0)
    return values


def best_over_ranks(scores: Tensor, vectors: Tensor) -> Tensor:
    """Take each row from the first process with the highest score: (k,), (k, d) → (k, d)."""
    if num_ranks() == 1:
        return vectors
    best = scores.clone()
    dist.all_reduce(best, dist.ReduceOp.MAX)
    rank = torch.where(scores == best, dist.get_rank(), num_ranks())
    first = rank.clone()
    dist.all_reduce(first, dist.ReduceOp.MIN)
    return sum_over_ranks(torch.where((rank == first)[:, None], vectors, 0))


def check_equal_on_ranks(codebook: Tensor) -> None:
    """Raise RuntimeError if the codebooks of the processes differ by more than rounding."""
    if num_ranks() == 1:
        return
    least, most = codebook.detach().clone(), codebook.detach().clone()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    difference, size = float((most - least).max()), float(torch.maximum(most, -least).max())
    if difference > DRIFT * size:
        raise RuntimeError(
            f"the codebooks of the processes differ by up to {difference:.2g}: start all from one "
            "seed, and average the codebook's gradient over the processes as "
            "DistributedDataParallel does, or use codebook_update 'ema', which needs no gradient"
        )


class AllRanks:
    """The features (N, d) of all processes as one list of length `total`, in the order of ranks."""

    def __init__(self, features: Tensor) -> None:
        self.features = features
        counts = torch.zeros(num_ranks(), dtype=torch.int64, device=features.device)
        rank = dist.get_rank() if num_ranks() > 1 else 0
        counts[rank] = len(features)
        ends = sum_over_ranks(counts).cumsum(0).tolist()
        self.start, self.total = ends[rank] - len(features), ends[-1]

    def take(self, positions: Tensor) -> Tensor:
        """Get the features at the positions that the first process asks for: (n,) → (n, d)."""
        positions = from_first_rank(positions.to(self.features.device))
        own = (positions >= self.start) & (positions < self.start + len(self.features))
        sent = self.features.new_zeros(len(positions), self.features.shape[1])
        sent[own] = self.features[positions[own] - self.start]
        return sum_over_ranks(sent)
