"""State dicts of the reference implementation, which has no configuration, under our names.

Functions raise ValueError, whose message follows the name of the file, for weights that our models
do not have.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .config import ModelConfig
from .options import value_problem

StateDict: TypeAlias = Mapping[str, Tensor]
Rules: TypeAlias = tuple[tuple[str, str], ...]
ANY = -1  # any size

REFERENCE: Rules = (
    (r"(^|\.)_", r"\1"),
    (r"vq_vae\.embedding\.weight", "quantizer.codebook"),
    (r"vq_vae\.embed_prob", "quantizer.usage"),
    # The reference counts the leading ReLU of a residual block.
    (r"block\.1\.", "block.0."),
    (r"block\.3\.", "block.2."),
)


def from_reference(content: Mapping[Any, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a state dict of the reference implementation under our names, and its model flags."""
    if not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        raise ValueError("is neither ours nor a state dict")
    state_dict = {our_name(name, REFERENCE): value for name, value in content.items()}
    num_embedding, dim = take(state_dict, "quantizer.codebook", ANY, ANY).shape
    hidden = take(state_dict, "encoder.conv_3.weight", ANY, ANY, 3, 3).shape[0]
    channels = take(state_dict, "pre_vq_conv.weight", ANY, ANY, 1, 1).shape[0]
    blocks = "encoder.residual_stack.layers."
    flags = {
        "num_embedding": num_embedding,
        "embedding_dim": dim,
        "hidden_size": hidden,
        "in_channels": take(state_dict, "encoder.conv_1.weight", ANY, ANY, 4, 4).shape[1],
        "num_residual_layers": count(state_dict, blocks),
    }
    if flags["num_residual_layers"]:
        first = take(state_dict, f"{blocks}0.block.0.weight", ANY, ANY, 3, 3)
        flags["num_residual_hidden"] = first.shape[0]
    for item in fields(ModelConfig):
        problem = value_problem(item, flags[item.name]) if item.name in flags else None
        if problem:
            raise ValueError(f"is of another architecture: {item.name}: {problem}")
    if channels != dim:
        return state_dict, {**flags, "quantizer": "looc"}
    if channels == hidden:
        return state_dict, flags
    # One unit per position: CVQ-VAE, or the VQ of the reference, which has no usage average.
    return state_dict, {**flags, "quantizer": "cvq" if "quantizer.usage" in state_dict else "vq"}


def our_name(name: str, rules: Rules) -> str:
    """Return our name of a parameter."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def count(state_dict: StateDict, prefix: str) -> int:
    """Return the length of a list of layers, from the highest number after this prefix."""
    found = (re.match(rf"{re.escape(prefix)}(\d{{1,3}})\.", name) for name in state_dict)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def take(state_dict: StateDict, name: str, *shape: int) -> Tensor:
    """Return the tensor of this name. Raises ValueError if it does not have this shape."""
    value = state_dict.get(name)
    fits = value is not None and value.dim() == len(shape)
    if value is None or not fits or any(a not in (ANY, b) for a, b in zip(shape, value.shape)):
        wanted = ", ".join("any" if side == ANY else str(side) for side in shape)
        raise ValueError(f"is of another architecture: {name} is {describe(value)}, not ({wanted})")
    return value


def describe(value: Any) -> str:
    """Describe the shape of a tensor, and a type that is not float32; else return "nothing"."""
    if not isinstance(value, Tensor):
        return "nothing"
    kind = "" if value.dtype == torch.float32 else f" {value.dtype}"
    return f"{tuple(value.shape)}{kind}{'' if value.layout == torch.strided else ' sparse'}"
