"""Losses of pixels: mean squared error and L1."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from utils.images import mean_squared_errors
from utils.training.losses.loss import Loss, Seen, Setting


class MeanSquaredError(Loss):
    """mse / variance of the training pixels in [0, 1], as published for the VQ-VAE."""

    measured = True

    def __init__(self, data_variance: float) -> None:
        self.data_variance = max(data_variance, 1e-6)  # images of one colour have none
        self.weight = 1 / self.data_variance

    @classmethod
    def make(cls, setting: Setting) -> MeanSquaredError:
        return cls(setting.variance())

    def __call__(self, seen: Seen) -> Tensor:
        return seen.mse / self.data_variance

    def distance(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        return mean_squared_errors(images, reconstruction)

    def state(self) -> dict[str, Any]:
        return {"data_variance": self.data_variance}


class L1(Loss):
    """Mean absolute error, as published for the VQGAN."""

    measured = True

    def __call__(self, seen: Seen) -> Tensor:
        l1 = self.distance(seen.images, seen.reconstruction).sum() / max(1, len(seen.images))
        seen.step.report(l1=l1)
        return l1

    def distance(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        return (images - reconstruction).abs().flatten(1).mean(1)
