"""Flags that are set together: --recipe. A flag that is given overrides its recipe's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modules.config import QUANTIZERS, ModelConfig

RECIPES: dict[str, dict[str, Any]] = {
    # As published, and as the golden files have it.
    "paper": {},
    # The best found so far; what each entry brings is in docs/ablations.md.
    "best": {
        "codebook_update": "ema",
        "codebook_start": "features",
        "latent_norm": "batch",
        "distance": "l2",
        "lr": 1e-3,
        "schedule": "cosine",
    },
}


def with_recipe(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags given, and those of their recipe that the quantiser does not imply otherwise."""
    implied = QUANTIZERS[flags.get("quantizer", ModelConfig.quantizer)]
    return {**RECIPES[flags.get("recipe", "paper")], **implied, **flags}
