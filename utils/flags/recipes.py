"""Named sets of flags: --recipe. A flag that is given overrides its recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modules.config import ModelConfig, implied_flags
from modules.quantizers.registry import QUANTIZER_FLAGS, QUANTIZERS

RECIPES: dict[str, dict[str, Any]] = {
    # As published, and as in the golden files.
    "paper": {},
    # The gain from each entry: docs/results/ablation-fashion-mnist-ingredients-300.md.
    "best": {
        "latent_norm": "batch",
        "distance": "l2",
        "codebook_update": "ema",
        "codebook_start": "features",
        "lr": 2e-3,
        "schedule": "wsd",
        "warmup_steps": 50,
        "grad_clip": 1.0,
    },
}


def with_recipe(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Add the quantiser's own defaults, then the flags of the recipe that the quantiser reads."""
    unread = QUANTIZER_FLAGS - QUANTIZERS[flags.get("quantizer", ModelConfig.quantizer)].reads
    recipe = RECIPES[flags.get("recipe", "paper")]
    own = {name: value for name, value in recipe.items() if name not in unread}
    return {**own, **implied_flags(flags), **flags}
