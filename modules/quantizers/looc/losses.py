"""Losses and gradients: straight-through or rotation, commitment, contrastive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from .passes import combine
from .search import DISTANCES, block_elements, unit_norm, widened
from .usage import sums_by_index

TEMPERATURE = 0.07  # of the contrastive loss


def rotation(gradient: Tensor, features: Tensor, quantized: Tensor) -> Tensor:
    """Gradient as if each feature had been rotated and scaled onto its codevector: all (N, d).

    z_q = ‖e‖/‖z‖·R·z with R = I − 2rrᵀ + 2êẑᵀ and r = (ẑ + ê)/‖ẑ + ê‖ held constant, hence
    ∂z = ‖e‖/‖z‖·(g − 2r(r·g) + 2ẑ(ê·g)): Fifty et al., "Restructuring Vector Quantization with
    the Rotation Trick", ICLR 2025. Straight-through for a feature of length zero.
    """
    length = features.norm(dim=1, keepdim=True)
    z, e = unit_norm(features), unit_norm(quantized)
    r = unit_norm(z + e)
    along = 2 * z * (e * gradient).sum(1, keepdim=True)
    turned = gradient - 2 * r * (r * gradient).sum(1, keepdim=True) + along
    stretched = turned * (quantized.norm(dim=1, keepdim=True) / length.clamp_min(1e-6))
    return torch.where(length > 1e-6, stretched, gradient)


# Gradient at z_q, z, z_q → gradient at z; None passes it on unchanged.
GRADIENTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor] | None] = {
    "straight_through": None,
    "rotation": rotation,
}


class StraightThrough(torch.autograd.Function):
    """Replace features by their codevectors; return them (N, d) and the loss (scalar).

    z_q = Σ_r s_r·e[indices_r] over R passes, s_1 = 1; loss = λ·mean((sg[z_q] − z)²) +
    κ·mean((z_q − sg[z])²), κ = codebook_cost.
    With δ = z_q − z and n = N·d elements, ∂loss/∂e_k = 2κ/n·Σ s_r·δ over the matches of k, and
    ∂loss/∂z = −2λδ/n, to which the gradient of z_q is added by one of GRADIENTS.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        codebook: Tensor,
        indices: Tensor,
        scales: Tensor,
        commitment_cost: float,
        codebook_cost: float,
        gradient: str,
    ) -> tuple[Tensor, Tensor]:
        quantized = combine(codebook, indices, scales)  # (N, d)
        residual = quantized - features
        # The codebook is updated before the backward pass, so the codevectors are kept.
        ctx.pass_back = GRADIENTS[gradient]
        ctx.save_for_backward(residual, indices, scales, quantized if ctx.pass_back else None)
        ctx.commitment_cost, ctx.codebook_cost = commitment_cost, codebook_cost
        ctx.num_embedding = len(codebook)
        flat = residual.view(-1)
        cost = codebook_cost + commitment_cost
        return quantized, cost * torch.dot(flat, flat) / max(1, flat.numel())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_quantized, grad_loss = grad_outputs
        residual, indices, scales, quantized = ctx.saved_tensors
        if ctx.pass_back is not None:
            grad_quantized = ctx.pass_back(grad_quantized, quantized - residual, quantized)
        scale = grad_loss * (2 / max(1, residual.numel()))
        grad_features = torch.addcmul(grad_quantized, residual, -ctx.commitment_cost * scale)
        grad_codebook = None
        if ctx.codebook_cost:
            grad_codebook = sums_by_index(residual, indices[0], ctx.num_embedding)
            for number in range(1, len(indices)):
                share = sums_by_index(residual, indices[number], ctx.num_embedding)
                grad_codebook += scales[number] * share
            grad_codebook *= ctx.codebook_cost * scale
        return grad_features, grad_codebook, None, None, None, None, None


def contrastive_loss(
    codebook: Tensor, features: Tensor, distance: str, memory: int | None
) -> Tensor:
    """Mean of `contrastive_terms`, with max(1, ⌊N/K⌋) positives: (K, d), (N, d), N ≥ 1 → scalar.

    It draws each codevector to its closest features and away from the far half. The gradient, to
    the codebook only, is computed at once, so that one block of codevectors is in memory.
    """
    prepare, similarity_of, _ = DISTANCES[distance]
    keys = UnitNormAtBackward.apply(codebook) if prepare is unit_norm else prepare(codebook)
    features, num_positives = prepare(features), max(1, len(features) // len(keys))
    gradient, total = torch.empty_like(keys), keys.new_zeros(())
    per_block = max(1, block_elements(features.device, memory) // len(features))
    for start in range(0, len(keys), per_block):
        rows = slice(start, start + per_block)
        # Gradient checkpointing would recompute the whole forward pass for this gradient.
        with torch.enable_grad(), saved_tensors_hooks(Tensor.detach, Tensor.detach):
            block = keys[rows].detach().requires_grad_()
            similarity = similarity_of(block, features)  # (k, N)
            loss = contrastive_terms(similarity, num_positives).sum() / len(keys)
        (gradient[rows],) = torch.autograd.grad(loss, block)
        total += loss.detach()
    return total + ((keys - keys.detach()) * gradient).sum()  # total, with this gradient


def contrastive_terms(similarity: Tensor, num_positives: int) -> Tensor:
    """InfoNCE of each codevector, without a full sort: similarities (k, N) → (k,).

    The positive is the mean of the highest similarities; the negatives are the lower half of all.
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


class UnitNormAtBackward(torch.autograd.Function):
    """`unit_norm` with the gradient of the reference code: (g − (g·e')e'/‖e‖²)/‖e‖.

    e' is the codevector after the update: the reference writes the codebook without autograd's
    knowledge, after the contrastive loss and before the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, codebook: Tensor) -> Tensor:
        wide = widened(codebook)
        norm = wide.norm(dim=1, keepdim=True).clamp_min(1e-12)
        ctx.codebook, ctx.norm = codebook.detach(), norm  # saved tensors must not be written later
        unit: Tensor = wide / norm
        return unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (gradient,) = grad_outputs
        along = (gradient * ctx.codebook).sum(1, keepdim=True) * ctx.codebook
        projected: Tensor = (gradient - along / ctx.norm.square()) / ctx.norm
        return projected
