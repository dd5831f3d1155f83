"""Named sets of flags: --recipe. A flag that is given overrides its recipe."""

from __future__ import annotations

from typing import Any

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
