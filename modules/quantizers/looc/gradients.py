"""Replacement of features by codevectors: its loss, and the gradient that passes through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .counting import sums_by_index
from .distances import unit_norm


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

    z_q = e[indices]; loss = λ·mean((sg[z_q] − z)²) + κ·mean((z_q − sg[z])²), where κ is 1, or 0 if
    the gradient does not move the codebook. With r = z_q − z and n = N·d elements,
    ∂loss/∂z = −2λr/n, to which the gradient of z_q is added by one of GRADIENTS, and
    ∂loss/∂e_k = 2κ/n·Σ r over the features of k.
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
        # The codebook is updated before the backward pass, so the codevectors are kept.
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
