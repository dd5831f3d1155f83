"""The interface of a loss: one named term of what an autoencoder minimises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from modules import Autoencoder, Quantized
from utils.training.task import Step


@dataclass
class Seen:
    """One part of a batch, as a loss sees it. Images are (b, C, h, w) in [−1, 1]; b may be 0."""

    images: Tensor
    reconstruction: Tensor  # same shape
    quantized: Quantized
    step: Step
    total: Tensor = field(default_factory=lambda: torch.zeros(()))  # sum of the losses before

    @cached_property
    def mse(self) -> Tensor:
        """Mean squared error, a scalar; 0 for no image, with a gradient."""
        if len(self.images):
            return F.mse_loss(self.reconstruction, self.images)
        return self.reconstruction.sum()


@dataclass(frozen=True)
class Setting:
    """Everything that the losses of a run are made from."""

    model: Autoencoder
    flags: Mapping[str, Any]  # of the model's losses, with its own defaults
    variance: Callable[[], float]  # of the training pixels in [0, 1]
    betas: tuple[float, float] = (0.9, 0.999)  # of further optimisers
    dtype: torch.dtype = torch.float32  # of further networks under autocast
    start: Mapping[str, Any] = field(default_factory=dict)  # weights that `Loss.load` takes


class Loss(ABC):
    """One term of what is minimised, with everything that it trains and remembers besides.

    Class attributes:
        config: dataclass of its flags.
        switch: the flag without which the others have no effect.
        measured: whether validation measures its `distance` of each image. best.pt is chosen by
            the weighted sum of these, or by PSNR where the mean squared error is the only one.
    """

    config: ClassVar[type | None] = None
    switch: ClassVar[str | None] = None
    measured: ClassVar[bool] = False
    weight: float = 1.0

    @classmethod
    def check(cls, config: Any, image_size: int) -> None:
        """Raise UserError where the images are too small for it."""
        del config, image_size

    @classmethod
    def make(cls, setting: Setting) -> Loss | None:
        """Make the loss of a run; None where its flags turn it off."""
        del setting
        return cls()

    @abstractmethod
    def __call__(self, seen: Seen) -> Tensor:
        """The weighted mean over the images of a part of a batch, a scalar."""

    def distance(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        """The unweighted loss of each image, (b,), for losses that validation measures."""
        raise NotImplementedError

    def own_loss(self, seen: Seen) -> Tensor | None:
        """Loss of the network that this loss trains itself, a scalar; None: it trains none."""
        del seen
        return None

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Optimiser of that network, by the network's name."""
        return {}

    def state(self) -> dict[str, Any]:
        """Entries of a checkpoint; the trainer adds the optimisers."""
        return {}

    def load(self, content: Mapping[str, Any]) -> None:
        """Restore `state` from a checkpoint. Raises ValueError where it is damaged."""
        del content
