"""The task of a prior of any kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.utils import make_grid

from modules.priors.spec import Noise, Prior
from utils.generation.checkpoints import StoredPrior, read_prior
from utils.training.task import Task

NUM_SHOWN = 16  # samples in TensorBoard


class PriorTask(Task):
    """A prior that is trained on batches of codes or latents and labels (b,).

    Args:
        model: on its device.
        pixels: of an image.
        label_dropout: share of images whose class is hidden, for classifier-free guidance.
        draw: prior, labels (n,) and noise → n images, uint8.
    """

    items = "images"
    name: str  # of the score that is minimised

    def __init__(
        self,
        model: Any,
        pixels: int,
        label_dropout: float,
        draw: Callable[[Prior, Tensor, Noise], Tensor],
    ) -> None:
        self.model, self.pixels, self.label_dropout, self.draw = model, pixels, label_dropout, draw

    def read(self, path: Path) -> StoredPrior:
        return read_prior(path)

    def score(self, scores: Mapping[str, float]) -> float:
        return -scores[self.name]

    @torch.no_grad()
    def pictures(self, model: Any) -> dict[str, Any]:
        device = next(model.parameters()).device
        numbers = torch.arange(NUM_SHOWN, device=device)
        labels = numbers % model.num_classes if model.num_classes else torch.full_like(numbers, -1)
        draws = partial(torch.rand, generator=torch.Generator().manual_seed(0))
        images = self.draw(model, labels, partial(draws, NUM_SHOWN))
        return {"samples": make_grid(images, nrow=4, pad_value=255)}
