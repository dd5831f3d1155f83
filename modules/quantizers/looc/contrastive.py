"""Contrastive loss: draws each codevector to its closest features and away from the far half."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .distances import DISTANCES, block_elements, unit_norm

TEMPERATURE = 0.07


def contrastive_loss(
    codebook: Tensor, features: Tensor, distance: str, memory: int | None
) -> Tensor:
    """Mean over codevectors of `contrastive_terms`: (K, d), (N, d) → scalar; N is at least 1.

    The features are constants to the gradient.
    """
    prepare, similarity_of, _ = DISTANCES[distance]
    keys = UnitNormAtBackward.apply(codebook) if prepare is unit_norm else prepare(codebook)
    loss: Tensor = ContrastiveLoss.apply(keys, prepare(features), similarity_of, memory)
    return loss


def contrastive_terms(similarity: Tensor, num_positives: int) -> Tensor:
    """InfoNCE of each codevector, without a full sort: similarities (k, N) → (k,).

    The positive is the mean of the `num_positives` highest similarities; the negatives are the
    lower half of all similarities.
    """
    num_negatives = similarity.shape[1] // 2
    positive = similarity.topk(num_positives, dim=1).values.mean(1) / TEMPERATURE
    if num_negatives == 0:
        return positive - positive
    threshold = similarity.detach().kthvalue(num_negatives, dim=1, keepdim=True).values
    # Values equal to the threshold share the places that are left in the lower half.
    below, equal = similarity < threshold, similarity == threshold
    share = (num_negatives - below.sum(1, keepdim=True)) / equal.sum(1, keepdim=True)
    weight = torch.where(equal, share, below.to(similarity.dtype))
    negatives = torch.logsumexp(similarity / TEMPERATURE + weight.log(), dim=1)
    return torch.logaddexp(positive, negatives) - positive


class ContrastiveLoss(torch.autograd.Function):
    """`contrastive_loss` of prepared codevectors and features, a block of codevectors at a time.

    There are max(1, ⌊N/K⌋) positives. The gradient of a block is computed in the forward pass, so
    that only one block is in memory.
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


class UnitNormAtBackward(torch.autograd.Function):
    """`unit_norm` whose backward pass reads the codebook as the update left it.

    The reference code writes the codebook without autograd's knowledge, after the contrastive loss
    and before the backward pass. This reproduces its gradients: (g − (g·e')e'/‖e‖²)/‖e‖, where e'
    is the codevector after the update.
    """

    @staticmethod
    def forward(ctx: Any, codebook: Tensor) -> Tensor:
        ctx.codebook = codebook.detach()  # save_for_backward would refuse the later write
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
