"""Interface of a prior, and its spec: how it is configured, made and drawn from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .config import PriorConfig
    from .spaces import Space

Noise: TypeAlias = Callable[..., Tensor]  # sizes → uniform numbers in [0, 1), (B, *sizes)


class Prior(nn.Module):
    """A model of codes or latents, given their class where there are classes.

    Attributes:
        space: of its codes or latents.
        num_classes: 0 for a prior without classes. Label −1 stands for no class.
    """

    space: Space
    num_classes: int

    def draws(self, size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Random numbers (size, …) for a batch of training or validation."""
        del size, generator
        return ()

    def measure(self, batches: Iterable[Tensor]) -> None:
        """Take the statistics of training codes or latents, before the first step."""


@dataclass(frozen=True)
class PriorSpec:
    """A choice of --prior."""

    make: Callable[[PriorConfig, Any, int], Prior]  # configuration, space, number of classes
    sample: Callable[..., Tensor]  # prior, labels (B,), Noise, Sampling → codes or latents
    space: type[Space]  # its codes or latents
    reads: frozenset[str]  # the flags of PriorConfig that it reads
    draws: frozenset[str]  # the settings of Sampling that it reads
    implies: Mapping[str, Any] = field(default_factory=dict)  # its own defaults in training
    checks: Callable[[PriorConfig], Iterator[str]] = lambda _: iter(())  # contradictions
