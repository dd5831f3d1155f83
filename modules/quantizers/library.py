"""Quantisers of vector-quantize-pytorch that learn a codebook.

Training is that of the library, at its own settings except those that have a flag here. Outside
training, latents are the decoding of their indices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from operator import attrgetter
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .looc import Quantized
from .looc.norms import WITH_AVERAGES, LatentNorm
from .spec import COMMON_FLAGS, QuantizerSpec, check_position, check_units, import_library, units

if TYPE_CHECKING:
    from ..config import ModelConfig

PACKAGE = "vector-quantize-pytorch"


class LibraryQuantizer(LatentNorm):
    """A module of vector-quantize-pytorch that takes (B, N, C).

    Args:
        library: the module; returns latents, indices and, where it has any, losses.
        num_embedding: codevectors K in a codebook.
        embedding_dim: dimension d of a codevector; divides the channels.
        channels: C of the latents.
        codebook: returns the module's codevectors, (K, d), or (m, K, d) if each slot has its own.
        decode: returns the module's latents for its indices, (B, N, m) → (B, N, C).
        latent_norm: as for LooCQuantizer, before the library is called.

    Nothing is learnt from a batch that is not finite; its loss is NaN. In evaluation mode the loss
    is 0, and a call writes nothing. `defer_update` has no effect: a batch cannot be split.
    Latents of another shape raise ValueError.
    """

    def __init__(
        self,
        library: nn.Module,
        num_embedding: int,
        embedding_dim: int,
        *,
        channels: int,
        codebook: Callable[[Any], Tensor],
        decode: Callable[[Any, Tensor], Any],
        latent_norm: str = "none",
    ) -> None:
        super().__init__()
        self.num_embedding = num_embedding
        self.embedding_dim = embedding_dim
        self.channels = channels
        self.codebook_of = codebook
        self.decode_by = decode
        self.latent_norm = latent_norm
        if latent_norm in WITH_AVERAGES:
            self._keep_averages((channels // embedding_dim, embedding_dim))
        self.defer_update = False
        self.library = library

    def extra_repr(self) -> str:
        return f"{self.num_embedding}, {self.embedding_dim}"

    @property
    def codebook(self) -> Tensor:
        """All codevectors, (K, d), or (m·K, d) if each slot has its own codebook."""
        return self.codebook_of(self.library).flatten(0, -2)

    def forward(self, z: Tensor) -> Quantized:
        """Quantise z (B, C, H, W); in training mode also learn from it."""
        with torch.autocast(z.device.type, enabled=False):
            positions = self._positions(z, self.training)
            if self.training and positions.isfinite().all():
                quantized, found, *losses = self.library(positions)
                latents = spread(quantized, z.shape)
                loss = sum((loss.sum() for loss in losses), positions.new_zeros(()))
                indices = self._indices(found, z.shape)
            else:
                indices = self.encode(z)
                latents, loss = self.decode(indices), 0 * positions.sum()
        return Quantized(latents.to(z.dtype), loss, indices)

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        """(B, C, H, W) → indices (B, H, W, m), int64. Writes nothing."""
        # The library would otherwise initialise codebooks outside training too.
        started = {
            name: torch.ones_like(value)
            for name, value in self.library.named_buffers()
            if name.endswith("initted")
        }
        self.library.eval()
        with torch.autocast(z.device.type, enabled=False):
            _, found, *_ = functional_call(self.library, started, (self._positions(z),))
        self.library.train(self.training)
        return self._indices(found, z.shape)

    def decode(self, indices: Tensor) -> Tensor:
        """Indices (B, H, W, m) → latents (B, C, H, W)."""
        quantized = self.decode_by(self.library, indices.flatten(1, 2))  # (B, H·W, C)
        return spread(quantized, (len(indices), self.channels, *indices.shape[1:3]))

    def _positions(self, z: Tensor, training: bool = False) -> Tensor:
        """(B, C, H, W) of any float type → (B, H·W, C), float32, normalised."""
        if z.dim() != 4 or z.shape[1] != self.channels:
            raise ValueError(
                f"latents of shape {tuple(z.shape)} are not (B, {self.channels}, H, W)"
            )
        positions = z.float().permute(0, 2, 3, 1).contiguous()
        slots = self.channels // self.embedding_dim
        parts = positions.view(*positions.shape[:-1], slots, self.embedding_dim)  # (B, H, W, m, d)
        return self._normalise(parts, training).flatten(3).flatten(1, 2)

    def _indices(self, found: Tensor, shape: tuple[int, ...]) -> Tensor:
        """(B, H·W) or (B, H·W, m) → (B, H, W, m), int64 in [0, K), for latents of this shape."""
        batch, _, height, width = shape
        within = found.long().clamp(0, self.num_embedding - 1)  # NaN gives indices out of range
        return within.reshape(batch, height, width, found.shape[2] if found.dim() > 2 else 1)


def spread(positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(B, H·W, C) → (B, C, H, W), the given shape."""
    batch, channels, height, width = shape
    return positions.reshape(batch, height, width, channels).permute(0, 3, 1, 2)


# Makers: one per module of the library


def wrap(
    config: ModelConfig,
    library: nn.Module,
    decode: Callable[[Any, Tensor], Any],
    codebook: str = "codebook",
) -> LibraryQuantizer:
    """Wrap a module; `codebook` is the name of its codevectors."""
    return LibraryQuantizer(
        library,
        config.num_embedding,
        config.embedding_dim,
        channels=config.channels,
        codebook=attrgetter(codebook),
        decode=decode,
        latent_norm=config.latent_norm,
    )


def import_package(config: ModelConfig) -> ModuleType:
    return import_library(PACKAGE, f"--quantizer {config.quantizer}")


def ema_settings(config: ModelConfig) -> dict[str, Any]:
    """Settings of the modules whose codevectors are running means."""
    return {
        "dim": config.channels,
        "codebook_size": config.num_embedding,
        "decay": config.ema_decay,
        "commitment_weight": config.commitment_cost,
        "kmeans_init": config.codebook_start == "kmeans",
        "threshold_ema_dead_code": config.dead_code_threshold,
        "rotation_trick": config.gradient == "rotation",
        "use_cosine_sim": config.distance == "cos",
    }


def decode_heads(library: Any, indices: Tensor) -> Any:
    if library.separate_codebook_per_head:
        return library.get_codes_from_indices(indices)
    return library.codebook[indices].flatten(2)


def make_heads(config: ModelConfig, *, separate: bool = False) -> LibraryQuantizer:
    library = import_package(config).VectorQuantize(
        codebook_dim=config.embedding_dim,
        heads=units(config),
        separate_codebook_per_head=separate,
        **ema_settings(config),
    )
    return wrap(config, library, decode_heads)


def decode_residual(library: Any, indices: Tensor) -> Any:
    return library.get_output_from_indices(indices)


def make_residual(config: ModelConfig) -> LibraryQuantizer:
    library = import_package(config).ResidualVQ(
        num_quantizers=config.num_quantizers, **ema_settings(config)
    )
    return wrap(config, library, decode_residual, "codebooks")


def decode_sim(library: Any, indices: Tensor) -> Any:
    return library.indices_to_codes(indices[..., 0])


def make_sim(config: ModelConfig) -> LibraryQuantizer:
    library = import_package(config).SimVQ(
        config.channels,
        config.num_embedding,
        rotation_trick=config.gradient == "rotation",
        input_to_quantize_commit_loss_weight=config.commitment_cost,
    )
    return wrap(config, library, decode_sim)


# Specs


def check_start(config: ModelConfig) -> None:
    """Check that the library can initialise codevectors in this way."""
    if config.codebook_start == "features":
        raise ValueError(
            f"--codebook_start features needs --quantizer looc, cvq or vq, not {config.quantizer}, "
            "which has uniform and kmeans"
        )


EMA_FLAGS = COMMON_FLAGS | {
    *("commitment_cost", "ema_decay", "codebook_start", "gradient", "dead_code_threshold")
}
DEFAULTS = {
    "anchor": "none",
    "codebook_start": "uniform",
    "commitment_cost": 1.0,
    "distance": "l2",
    "gradient": "rotation",
}
EMA_VQ = QuantizerSpec(
    "VQ by moving averages",
    make_heads,
    EMA_FLAGS,
    DEFAULTS,
    checks=(check_position, check_start),
    library=PACKAGE,
)
COSINE_VQ = replace(EMA_VQ, label="VQ by cosine similarity", implies=DEFAULTS | {"distance": "cos"})
MULTIHEAD_VQ = replace(
    EMA_VQ,
    label="multi-headed VQ",
    reads=EMA_FLAGS | {"distance"},
    checks=(check_units, check_start),
    any_channels=True,
    slots=units,
)
PRODUCT_VQ = replace(
    MULTIHEAD_VQ, label="product VQ", make=partial(make_heads, separate=True), codebooks=units
)
RESIDUAL_VQ = replace(
    EMA_VQ,
    label="residual VQ",
    make=make_residual,
    reads=EMA_FLAGS | {"num_quantizers"},
    slots=lambda config: config.num_quantizers,
    codebooks=lambda config: config.num_quantizers,
)
SIM_VQ = QuantizerSpec(
    "SimVQ",
    make_sim,
    COMMON_FLAGS | {"commitment_cost", "gradient"},
    {"anchor": "none", "distance": "l2", "gradient": "rotation"},
    checks=(check_position,),
    library=PACKAGE,
)
