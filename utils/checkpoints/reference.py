"""Bare state dicts of the reference implementation: parameter names and flags."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from modules import ModelConfig
from utils.errors import UserError, one_line
from utils.flags.arguments import value_problem


def rename(path: Path, content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Translate the parameter names of the reference into ours."""
    renamed = {}
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UserError(f"checkpoint {path} is neither ours nor a state dict")
        name = re.sub(r"(^|\.)_", r"\1", key)
        name = name.replace("vq_vae.embedding.weight", "quantizer.codebook")
        name = name.replace("vq_vae.embed_prob", "quantizer.usage")
        # The reference counts the leading ReLU of a residual block.
        name = re.sub(r"block\.([13])\.", lambda match: f"block.{int(match[1]) - 1}.", name)
        renamed[name] = value
    return renamed


def flags_of_shapes(path: Path, state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the model flags that the shapes of a state dict show."""
    try:
        hidden, in_channels = (
            state_dict["encoder.conv_3.weight"].shape[0],
            state_dict["encoder.conv_1.weight"].shape[1],
        )
        num_embedding, dim = state_dict["quantizer.codebook"].shape
        channels = state_dict["pre_vq_conv.weight"].shape[0]
        blocks = [
            value.shape[0]
            for key, value in state_dict.items()
            if re.search(r"^encoder.*layers\.\d+\.block\.0\.weight", key)
        ]
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"checkpoint {path} is of another architecture: "
            f"{one_line(error)} is missing or misshapen"
        ) from error
    flags: dict[str, Any] = {
        "num_embedding": num_embedding,
        "embedding_dim": dim,
        "hidden_size": hidden,
        "in_channels": in_channels,
        "num_residual_layers": len(blocks),
    }
    if blocks:
        flags["num_residual_hidden"] = blocks[0]
    if channels != dim:
        flags["quantizer"] = "looc"
    elif channels != hidden:
        # One unit per position: CVQ-VAE, or the VQ of the reference, which has no usage average.
        flags["quantizer"] = "cvq" if "quantizer.usage" in state_dict else "vq"
    by_name = {item.name: item for item in fields(ModelConfig)}
    for name, value in flags.items():
        problem = value_problem(ModelConfig, by_name[name], value)
        if problem:
            raise UserError(f"checkpoint {path} is of another architecture: {name}: {problem}")
    return flags
