"""Digests of weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields

from torch import Tensor

from modules import Autoencoder
from modules.checkpoint import EARLIER_TYPES, SETTINGS


def tensors_digest(tensors: Mapping[str, Tensor], words: str = "") -> str:
    """SHA-256 of words, then of each tensor's name, shape, type and content."""
    digest = hashlib.sha256(words.encode())
    for name, value in tensors.items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def model_digest(model: Autoencoder) -> str:
    """SHA-256 of a model's configuration, without flags at their default, and weights."""
    given = {
        item.name: value
        for item in fields(model.config)
        if (value := getattr(model.config, item.name)) != item.default
    }
    tensors = {
        name: value.to(EARLIER_TYPES.get(name, value.dtype))  # the digest stays as it was
        for name, value in model.state_dict().items()
        if name != SETTINGS
    }
    return tensors_digest(tensors, str(given))
