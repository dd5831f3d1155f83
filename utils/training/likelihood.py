"""The task of a prior over codes: their likelihood."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modules.priors.transformer import CodeTransformer
from utils.codebook.statistics import CodebookStatistics
from utils.training.prior import PriorTask
from utils.training.task import Step


class Likelihood(PriorTask):
    """A prior that is trained on batches of codes (b, H, W, m) and labels (b,).

    A causal prior minimises the negative log-likelihood, which is exact; a masked one that of
    positions which are masked at random, a share of cos(π/2 · u) of them, u uniform in [0, 1).
    Scores are bits per pixel.
    """

    model: CodeTransformer

    def __init__(self, model: CodeTransformer, *settings: Any) -> None:
        super().__init__(model, *settings)
        # What a masked prior minimises is no bound of the rate.
        self.name = "bits_per_pixel" if model.causal else "masked_bits_per_pixel"
        self.begin_validation()

    def losses(self, batch: Any, step: Step) -> Iterator[Mapping[str, Tensor]]:
        codes, labels = batch
        if self.model.num_classes:
            hidden = torch.rand(len(labels), device=labels.device) < self.label_dropout
            labels = labels.masked_fill(hidden, -1)
        if self.model.causal:
            nats = step.network(codes, labels).flatten(1)
            per_image = nats.sum(1)
        else:
            masked = random_masks(codes.shape[:3], torch.rand(len(codes)), None).to(codes.device)
            nats = step.network(codes, labels, masked)
            per_image = masked_nats(nats, masked)
        # A process may have no image; the loss is that of one code, whatever the image size.
        mean = per_image.sum() / max(1, len(codes))
        step.report(**{self.name: mean / (math.log(2) * self.pixels)})
        yield {"likelihood": mean / math.prod(self.model.space.shape)}

    def begin_validation(self) -> None:
        self.statistics = CodebookStatistics(self.model.space.num_embedding)

    @torch.no_grad()
    def validate(self, model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        codes, labels = batch
        self.statistics.add(codes)
        if self.model.causal:
            per_image = model(codes, labels).flatten(1).double().sum(1)
        else:  # the same masks in every validation
            generator = torch.Generator().manual_seed(len(codes))
            shares = (torch.arange(len(codes)) + 0.5) / len(codes)
            masked = random_masks(codes.shape[:3], shares, generator).to(codes.device)
            per_image = masked_nats(model(codes, labels, masked).double(), masked)
        return {self.name: per_image.sum() / (math.log(2) * self.pixels)}

    def validation_scores(self) -> dict[str, float]:
        self.statistics.sum_over_ranks()
        entropy = self.statistics.rate(self.pixels).entropy_bits_per_pixel_by_slot
        return {"entropy_bits_per_pixel_by_slot": entropy or 0.0}

    def describe(self, scores: Mapping[str, float]) -> str:
        line = f"{scores[self.name]:.4f} {self.name.replace('_', ' ')}"
        entropy = scores.get("entropy_bits_per_pixel_by_slot")
        return line if entropy is None else f"{line}, entropy of the codes {entropy:.4f}"


def random_masks(
    shape: tuple[int, ...], draws: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Masks (b, H, W), bool, of a share cos(π/2 · u) of the positions, and at least one.

    draws: u, (b,), in [0, 1). generator: of the choice of the positions; None for torch's own.
    """
    size, length = shape[0], math.prod(shape[1:])
    counts = (length * (math.pi / 2 * draws).cos()).ceil().clamp_min(1)
    order = torch.rand(size, length, generator=generator).argsort(1).argsort(1)
    return (order < counts[:, None]).view(shape)


def masked_nats(nats: Tensor, masked: Tensor) -> Tensor:
    """Mean of nats (b, H, W, m) over the masked positions, times H·W·m: (b,)."""
    total = (nats * masked[..., None]).flatten(1).sum(1)
    return total / masked.flatten(1).sum(1) * math.prod(masked.shape[1:])
