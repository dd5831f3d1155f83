"""The loss that the quantiser itself returns: commitment, codebook and contrastive terms."""

from __future__ import annotations

from torch import Tensor

from utils.training.losses.loss import Loss, Seen


class QuantizerLoss(Loss):
    """`Quantized.loss`, weighted by the quantiser."""

    def __call__(self, seen: Seen) -> Tensor:
        return seen.quantized.loss
