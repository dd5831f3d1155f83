"""Checks of the arguments of LooCQuantizer and LooCPlugin."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING

from .anchors import ANCHORS
from .distances import DISTANCES
from .gradients import GRADIENTS
from .norms import LATENT_NORMS
from .starts import STARTS
from .units import SPLITS
from .updates import CODEBOOK_UPDATES

if TYPE_CHECKING:
    from .quantizer import LooCQuantizer


def check_arguments(quantizer: LooCQuantizer, latent_channels: int | None) -> None:
    """Raise ValueError for the first argument of the quantiser that is out of range."""
    q = quantizer
    check_choices(
        q,
        distance=DISTANCES,
        anchor=ANCHORS,
        split=SPLITS,
        codebook_update=CODEBOOK_UPDATES,
        codebook_start=STARTS,
        latent_norm=LATENT_NORMS,
        gradient=GRADIENTS,
    )
    check_minima(
        q,
        num_embedding=1,
        embedding_dim=1,
        commitment_cost=0,
        interpolation_scale=0,
        rate_weight=0,
    )
    too_few_channels = latent_channels is not None and latent_channels < 1
    only_signs = q.latent_norm == "unit" and q.embedding_dim == 1
    rate_without_l2 = bool(q.rate_weight) and q.distance != "l2"
    contrast_by_ema = q.contras_loss and q.codebook_update != "gradient"
    check_conditions(
        (too_few_channels, f"latent_channels {latent_channels} is less than 1"),
        (only_signs, "latent_norm 'unit' turns all units of embedding_dim 1 into ±1"),
        (not 0 <= q.ema_decay < 1, f"ema_decay {q.ema_decay} is not in [0, 1)"),
        (q.rate_weight == math.inf, "rate_weight inf is not finite"),
        (rate_without_l2, f"rate_weight {q.rate_weight} needs distance 'l2', not {q.distance!r}"),
        (contrast_by_ema, f"contras_loss has no effect with codebook_update {q.codebook_update!r}"),
    )


def check_choices(owner: object, **choices: Collection[str]) -> None:
    """Raise ValueError for the first attribute that is none of its choices."""
    for name, allowed in choices.items():
        value = getattr(owner, name)
        if value not in allowed:
            raise ValueError(f"{name} {value!r} is none of {', '.join(allowed)}")


def check_minima(owner: object, **minima: float) -> None:
    """Raise ValueError for the first attribute that is less than its minimum, or NaN."""
    for name, minimum in minima.items():
        value = getattr(owner, name)
        if not value >= minimum:
            raise ValueError(f"{name} {value} is less than {minimum}")


def check_conditions(*checks: tuple[bool, str]) -> None:
    """Raise ValueError with the message of the first (wrong, message) that is wrong."""
    for wrong, message in checks:
        if wrong:
            raise ValueError(message)
