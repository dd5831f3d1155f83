"""Translation of the weights of other projects into our names and shapes.

Functions raise ValueError, whose message follows the name of the file, for weights that our models
do not have.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from modules.reference import ANY, Rules, StateDict, count, describe, our_name, take

CONVS: Rules = ((r"^quant_conv\.", "pre_vq_conv."), (r"^post_quant_conv\.", "post_vq_conv."))
DIFFUSERS: Rules = (
    *CONVS,
    # Names of the attention layers in older files.
    (r"\.query\.", ".to_q."),
    (r"\.key\.", ".to_k."),
    (r"\.value\.", ".to_v."),
    (r"\.proj_attn\.", ".to_out.0."),
)
TAMING: Rules = (
    (r"^first_stage_model\.", ""),  # in a whole latent diffusion model
    *CONVS,
    (r"\.(down|up)\.(\d+)\.block\.", r".\1_blocks.\2.resnets."),
    (r"\.(down|up)\.(\d+)\.attn\.", r".\1_blocks.\2.attentions."),
    (r"\.(down|up)\.(\d+)\.(down|up)sample\.", r".\1_blocks.\2.\3samplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
)


def renamed(content: Any, rules: Rules) -> dict[str, Tensor]:
    """Return encoder, decoder and the convolutions between them under our names."""
    if not isinstance(content, Mapping):
        raise ValueError("holds no state dict")
    state_dict = {}
    for name, value in content.items():
        name = our_name(str(name), rules)
        if name.startswith(("encoder.", "decoder.", "pre_vq_conv.", "post_vq_conv.")):
            state_dict[name] = weights(name, value)
    return state_dict


def weights(name: str, value: Any) -> Tensor:
    """Return a tensor as float32, and 1×1 convolutions of attention as linear layers."""
    whole = (
        isinstance(value, Tensor)
        and value.device.type == "cpu"
        and value.layout == torch.strided
        and value.is_floating_point()
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )
    if not whole:
        raise ValueError(f"is damaged: {name} is {describe(value)}")
    tensor: Tensor = value.float()
    if not tensor.isfinite().all():
        raise ValueError(f"is damaged: {name} is not finite")
    linear = ".attentions." in name and tensor.dim() == 4 and tensor.shape[2:] == (1, 1)
    return tensor.flatten(1) if linear else tensor


def mirrored(state_dict: StateDict) -> dict[str, Tensor]:
    """Count the resolutions of the decoder from the smallest instead of the largest."""
    last = count(state_dict, "decoder.up_blocks.") - 1
    return {
        re.sub(r"(?<=^decoder\.up_blocks\.)\d{1,3}", lambda at: str(last - int(at[0])), name): value
        for name, value in state_dict.items()
    }


def with_convs(state_dict: StateDict) -> dict[str, Tensor]:
    """Add missing convolutions before and after the quantiser, as identities.

    If the encoder returns a distribution, in twice the channels, only its mean is kept.
    """
    rows = take(state_dict, "encoder.conv_out.weight", ANY, ANY, 3, 3).shape[0]
    channels = take(state_dict, "decoder.conv_in.weight", ANY, ANY, 3, 3).shape[1]
    if rows not in (channels, 2 * channels):
        found = f"its encoder gives {rows} channels, its decoder takes {channels}"
        raise ValueError(f"is of another architecture: {found}")
    state_dict = dict(state_dict)
    for name, width in (("pre_vq_conv", rows), ("post_vq_conv", channels)):
        if f"{name}.weight" not in state_dict:
            state_dict.update(identity(name, width))
    return mean_alone(state_dict, channels) if rows == 2 * channels else state_dict


def mean_alone(state_dict: StateDict, channels: int) -> dict[str, Tensor]:
    """Merge the mean's half of the 1×1 convolution into the last convolution of the encoder.

    This is exact: W' = Q·W and b' = Q·b + q, where Q and q are the first half of the 1×1's rows.
    """
    both = 2 * channels
    rows = take(state_dict, "pre_vq_conv.weight", both, both, 1, 1)[:channels].flatten(1).double()
    shift = take(state_dict, "pre_vq_conv.bias", both)[:channels].double()
    last = take(state_dict, "encoder.conv_out.weight", both, ANY, 3, 3).double()
    bias = take(state_dict, "encoder.conv_out.bias", both).double()
    return {
        **state_dict,
        "encoder.conv_out.weight": torch.tensordot(rows, last, dims=1).float(),
        "encoder.conv_out.bias": (rows @ bias + shift).float(),
        **identity("pre_vq_conv", channels),
    }


def identity(name: str, channels: int) -> dict[str, Tensor]:
    """Return a 1×1 convolution that is the identity."""
    weight = torch.eye(channels)[:, :, None, None]
    return {f"{name}.weight": weight, f"{name}.bias": torch.zeros(channels)}


def flags_of_shapes(state_dict: StateDict, groups: Any) -> dict[str, Any]:
    """Return the model flags of these weights, given the number of normalisation groups."""
    base, in_channels = take(state_dict, "encoder.conv_in.weight", ANY, ANY, 3, 3).shape[:2]
    out_channels = take(state_dict, "decoder.conv_out.weight", ANY, ANY, 3, 3).shape[0]
    channels, latent_channels = take(state_dict, "post_vq_conv.weight", ANY, ANY, 1, 1).shape[:2]
    take(state_dict, "pre_vq_conv.weight", latent_channels, channels, 1, 1)
    blocks = "encoder.down_blocks."
    levels = [f"{blocks}{level}." for level in range(count(state_dict, blocks))]
    convs = [take(state_dict, f"{at}resnets.0.conv1.weight", ANY, ANY, 3, 3) for at in levels]
    widths = [conv.shape[0] for conv in convs]
    attentive = [at for at, level in enumerate(levels) if count(state_dict, f"{level}attentions.")]
    if not base or widths[:1] != [base] or any(width % base for width in widths):
        raise ValueError(
            f"has {widths} channels at its resolutions, where --model vqgan has multiples of the "
            f"{base} of the first convolution, beginning with once"
        )
    if attentive != list(range(len(levels) - len(attentive), len(levels))):
        raise ValueError(
            f"has attention at resolutions {attentive} of 0 to {len(levels) - 1}, "
            "where --model vqgan has it at the last ones"
        )
    if type(groups) is not int or groups < 1 or base % groups:
        raise ValueError(f"normalises in {groups} groups, which do not divide {base} channels")
    if in_channels != out_channels:
        raise ValueError(f"makes {out_channels}-channel images from {in_channels}-channel ones")
    return {
        "hidden_size": base,
        "channel_multipliers": ",".join(str(width // base) for width in widths),
        "num_residual_layers": count(state_dict, f"{blocks}0.resnets."),
        "attention_levels": len(attentive),
        "norm_groups": groups,
        "z_channels": channels,
        "latent_channels": latent_channels,
        "in_channels": in_channels,
    }
