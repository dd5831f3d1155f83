"""The task of latent diffusion: to predict the noise in latents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modules.priors.diffusion import LatentDiffusion
from utils.training.prior import PriorTask
from utils.training.task import Step


class Denoising(PriorTask):
    """A diffusion prior that is trained on batches with the random numbers of its `draws`.

    Validation has the same noise every time.
    """

    model: LatentDiffusion
    name = "denoising_loss"

    def losses(self, batch: Any, step: Step) -> Iterator[Mapping[str, Tensor]]:
        latents, labels, noise, levels, uniform = batch
        labels = labels.masked_fill(uniform < self.label_dropout, -1)
        per_image = step.network(latents, labels, noise, levels)
        # A process may have no image.
        yield {self.name: per_image.sum() / max(1, len(latents))}

    @torch.no_grad()
    def validate(self, model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        latents, labels, noise, levels, _ = batch
        return {self.name: model(latents, labels, noise, levels).double().sum()}

    def describe(self, scores: Mapping[str, float]) -> str:
        return f"{scores[self.name]:.4f} denoising loss"
