"""Checks of the arguments of LooCQuantizer and LooCPlugin, and of indices."""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Integral, Real
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .anchors import ANCHORS, STARTS
from .losses import GRADIENTS
from .norms import LATENT_NORMS, WITH_AVERAGES
from .search import DISTANCES, is_traced
from .units import SPLITS, num_units
from .usage import CODEBOOK_UPDATES

if TYPE_CHECKING:
    from .quantizer import LooCQuantizer

KINDS = {Integral: "an integer", Real: "a number", bool: "True or False"}
CHOICES: dict[str, Collection[str]] = {
    "distance": DISTANCES,
    "anchor": ANCHORS,
    "split": SPLITS,
    "codebook_update": CODEBOOK_UPDATES,
    "codebook_start": STARTS,
    "latent_norm": LATENT_NORMS,
    "gradient": GRADIENTS,
}


def check_arguments(q: LooCQuantizer) -> None:
    """Raise ValueError for the first argument of the quantiser that is out of range."""
    for name, choices in CHOICES.items():
        if getattr(q, name) not in tuple(choices):
            raise ValueError(f"{name} {getattr(q, name)!r} is none of {', '.join(choices)}")
    check_kinds(q, Integral, "num_embedding", "embedding_dim", "interpolation_scale", "channel_dim")
    check_kinds(q, Real, "commitment_cost", "ema_decay", "rate_weight")
    check_kinds(q, bool, "first_batch", "contras_loss")
    check_minima(q, num_embedding=1, embedding_dim=1, interpolation_scale=0, commitment_cost=0)
    check_minima(q, num_passes=1)
    if q.channel_dim == 0:
        raise ValueError("channel_dim 0 is the axis of the batch")
    if q.latent_channels is not None:
        check_kinds(q, Integral, "latent_channels")
        check_minima(q, latent_channels=1)
    if q.num_passes > 1 and q.latent_channels is None:
        raise ValueError(f"num_passes {q.num_passes} needs latent_channels")
    only_signs = q.latent_norm == "unit" and q.embedding_dim == 1
    rate_without_l2 = q.rate_weight and q.distance != "l2"
    contrast_by_ema = q.contras_loss and q.codebook_update != "gradient"
    for wrong, message in (
        (only_signs, "latent_norm 'unit' turns all units of embedding_dim 1 into ±1"),
        (not 0 <= q.ema_decay < 1, f"ema_decay {q.ema_decay} is not in [0, 1)"),
        (not 0 <= q.rate_weight < math.inf, f"rate_weight {q.rate_weight} is not in [0, ∞)"),
        (rate_without_l2, f"rate_weight {q.rate_weight} needs distance 'l2', not {q.distance!r}"),
        (contrast_by_ema, f"contras_loss has no effect with codebook_update {q.codebook_update!r}"),
    ):
        if wrong:
            raise ValueError(message)


def check_codebook(q: LooCQuantizer, stored: Tensor | None) -> None:
    """Raise RuntimeError if training writes into the codebook, but it is not stored as it is.

    FSDP and parametrizations replace the parameter by a tensor that they compute for each call.
    """
    written = (q.codebook_update, q.anchor, q.codebook_start) != ("gradient", "none", "uniform")
    if written and type(stored) is not nn.Parameter:
        found = "not a parameter" if stored is None else f"a {type(stored).__name__}"
        raise RuntimeError(
            f"the codebook is {found}, so that its update would be lost: leave the quantiser out "
            "of FSDP (ignored_params or ignored_states; codebook_update 'ema') and of "
            "parametrizations such as weight_norm"
        )


def check_kinds(owner: object, kind: type, *names: str) -> None:
    """Raise ValueError for the first attribute that is not of one of KINDS."""
    for name in names:
        value = getattr(owner, name)
        if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
            raise ValueError(f"{name} {value!r} is not {KINDS[kind]}")


def check_tensor(name: str, value: object) -> None:
    """Raise TypeError for an argument that is not a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} have to be a tensor, not {type(value).__name__}")


def check_minima(owner: object, **minima: float) -> None:
    """Raise ValueError for the first attribute that is less than its minimum, or not finite."""
    for name, minimum in minima.items():
        if not getattr(owner, name) >= minimum:
            raise ValueError(f"{name} {getattr(owner, name)} is less than {minimum}")
        if getattr(owner, name) == math.inf:
            raise ValueError(f"{name} inf is not finite")


def check_latents(q: LooCQuantizer, z: Tensor) -> None:
    """Raise ValueError unless z has its channels at channel_dim, and can be cut into units."""
    if not z.is_floating_point():
        raise ValueError(f"latents of {z.dtype} are not floating-point numbers")
    shape, at = tuple(z.shape), f"at channel_dim {q.channel_dim}"
    if not -z.dim() < q.channel_dim < z.dim():
        raise ValueError(f"latents of shape {shape} have no channels {at}")
    channels, settings = shape[q.channel_dim], (q.interpolation_scale, q.embedding_dim)
    if q.latent_channels not in (None, channels):
        wanted = f"latent_channels {q.latent_channels}"
        raise ValueError(f"latents of shape {shape} have {channels} channels {at}, not {wanted}")
    units = num_units(channels, *settings, z.dim() - 2)
    if q.latent_norm in WITH_AVERAGES and units != len(q.latent_mean):
        norm = f"latent_norm {q.latent_norm!r} with interpolation_scale {q.interpolation_scale}"
        raise ValueError(f"{norm} is for (B, C, H, W), not latents of shape {shape}")


def check_indices(
    indices: Tensor, num_embedding: int, units: int | None = None, *, any_rank: bool = False
) -> Tensor:
    """Return the indices as int64; raise ValueError unless they are (B, H, W, m) and in [0, K).

    units: m, None if any number will do. any_rank: (B, …, m) will do. Compiled code skips the
    range, which reads values.
    """
    shape = tuple(indices.shape)
    right_rank = len(shape) == 4 or (any_rank and len(shape) > 1)
    if not right_rank or units not in (None, shape[-1]):
        last = "m" if units is None else units
        positions = "…" if any_rank and len(shape) != 4 else "H, W"
        raise ValueError(f"indices of shape {shape} are not (B, {positions}, {last})")
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise ValueError(f"indices of {indices.dtype} are not integers")
    indices = indices.long()
    if not is_traced(indices) and indices.numel():
        least, most = (int(value) for value in torch.aminmax(indices))
        if least < 0 or most >= num_embedding:
            raise ValueError(
                f"indices of shape {shape} are {least} … {most}, not in [0, {num_embedding})"
            )
    return indices
