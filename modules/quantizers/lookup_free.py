"""FSQ and LFQ of vector-quantize-pytorch, whose codebooks are fixed: a grid, not learnt vectors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..options import parse_numbers
from .library import PACKAGE, LibraryQuantizer, make
from .spec import COMMON_FLAGS, LARGEST_CODEBOOK, Problems, QuantizerSpec, check_units, units

if TYPE_CHECKING:
    from ..config import ModelConfig

LEAST_LEVEL, LARGEST_LEVEL = 3, 16  # per dimension of FSQ, when derived from K and d


# Finite scalar quantisation


def even_levels(product: int, count: int, largest: int = LARGEST_LEVEL) -> tuple[int, ...] | None:
    """Return `count` levels of this product, falling and as even as possible, or None."""
    if not count:
        return () if product == 1 else None
    found = []
    for level in range(LEAST_LEVEL, min(largest, product) + 1):
        rest = even_levels(product // level, count - 1, level) if product % level == 0 else None
        if rest is not None:
            found.append((level, *rest))
    return min(found, key=sum, default=None)


def derive_levels(flags: Mapping[str, Any], defaults: type[ModelConfig]) -> dict[str, Any]:
    """Derive K and d from the levels if these are given, else levels from K and d.

    With neither levels nor d given, d is near its default and divides the channels.
    """
    if flags.get("levels") is not None:
        levels = parse_numbers(flags["levels"])
        return {"num_embedding": math.prod(levels), "embedding_dim": len(levels)} if levels else {}
    channels = flags.get("latent_channels") or flags.get("hidden_size", defaults.hidden_size)
    near = sorted(range(1, 13), key=lambda dim: abs(dim - defaults.embedding_dim))
    dims = sorted(near, key=lambda dim: channels % dim > 0)
    for dim in [flags["embedding_dim"]] if "embedding_dim" in flags else dims:
        chosen = even_levels(flags.get("num_embedding", defaults.num_embedding), dim)
        if chosen is not None:
            return {"levels": ",".join(map(str, chosen)), "embedding_dim": dim}
    return {}


def check_levels(config: ModelConfig) -> Problems:
    size, dim, given = config.num_embedding, config.embedding_dim, f"--levels {config.levels}"
    if config.levels is None:
        range_ = f"{dim} levels from {LEAST_LEVEL} to {LARGEST_LEVEL}"
        yield f"--num_embedding {size} is not a product of {range_}; give --levels"
    levels = parse_numbers(config.levels or "")
    if min(levels, default=0) < LEAST_LEVEL:
        numbers = f"up to 12 numbers of at least {LEAST_LEVEL}"
        yield f"{given} is not a list of {numbers}, like 8,5,5,5"
    product = math.prod(levels)
    if product > LARGEST_CODEBOOK:
        yield f"{given} makes {product} codevectors, more than {LARGEST_CODEBOOK}"
    if product != size:
        yield f"{given} makes {product} codevectors, not --num_embedding {size}"
    if len(levels) != dim:
        yield f"{given} has {len(levels)} dimensions, not --embedding_dim {dim}"


def make_fsq(config: ModelConfig) -> LibraryQuantizer:
    with torch.device("cpu"):  # its constructor reads values, which device "meta" does not have
        return make(
            config,
            "FSQ",
            codebook="implicit_codebook",
            levels=parse_numbers(config.levels or ""),
            num_codebooks=units(config),
            keep_num_codebooks_dim=True,
        )


FSQ = QuantizerSpec(
    "FSQ",
    make_fsq,
    COMMON_FLAGS | {"levels"},
    {"anchor": "none"},
    derive_levels,
    checks=(check_levels, check_units),
    any_channels=True,
    slots=units,
    parts=True,
    library=PACKAGE,
)

# Lookup-free quantisation


def derive_bits(flags: Mapping[str, Any], defaults: type[ModelConfig]) -> dict[str, Any]:
    """Derive K or d, whichever is not given, from K = 2^d."""
    dim = flags.get("embedding_dim")
    if dim is None:
        num_embedding = flags.get("num_embedding", defaults.num_embedding)
        return {"embedding_dim": max(1, num_embedding.bit_length() - 1)}
    return {"num_embedding": 2**dim} if 2**dim <= LARGEST_CODEBOOK else {}


def check_bits(config: ModelConfig) -> Problems:
    size, dim = config.num_embedding, config.embedding_dim
    if size != 2**dim:
        power = f"2 to the power of --embedding_dim {dim}"
        yield f"--num_embedding {size} is not {power}, as --quantizer lfq needs it"


def make_lfq(config: ModelConfig) -> LibraryQuantizer:
    return make(
        config,
        "LFQ",
        codebook_size=config.num_embedding,
        num_codebooks=units(config),
        keep_num_codebooks_dim=True,
        commitment_loss_weight=config.commitment_cost,
    )


LFQ = QuantizerSpec(
    "LFQ",
    make_lfq,
    COMMON_FLAGS | {"commitment_cost"},
    {"anchor": "none", "commitment_cost": 0.0},
    derive_bits,
    checks=(check_bits, check_units),
    any_channels=True,
    slots=units,
    library=PACKAGE,
)
