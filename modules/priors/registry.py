"""The priors by the name of --prior."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from .transformer import CodeTransformer

if TYPE_CHECKING:
    from .config import CodeSpace, PriorConfig

PRIORS: dict[str, Callable[[PriorConfig, CodeSpace, int], CodeTransformer]] = {
    "transformer": CodeTransformer,
    "masked": partial(CodeTransformer, causal=False),
}


def make_prior(config: PriorConfig, space: CodeSpace, num_classes: int) -> CodeTransformer:
    """Make a new prior of that many classes, or 0."""
    return PRIORS[config.prior](config, space, num_classes)
