"""Quantisers of vector-quantize-pytorch that learn a codebook.

Training is that of the library, at its own settings except those that have a flag here. Outside
training, latents are the decoding of their indices.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..optional import require
from .looc import Quantized
from .looc.checks import check_indices
from .looc.norms import WITH_AVERAGES, LatentNorm
from .spec import COMMON_FLAGS, Problems, QuantizerSpec, check_position, check_units, units

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
        slots: indices m per position.
        decode: name of its method that decodes indices, (B, N, m) → (B, N, C) or (B, N, m, d).
        codebook: name of its codevectors, (K, d), or (m, K, d) if each slot has its own.
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
        slots: int,
        decode: str = "indices_to_codes",
        codebook: str = "codebook",
        latent_norm: str = "none",
    ) -> None:
        super().__init__()
        self.library = library
        self.num_embedding = num_embedding
        self.embedding_dim = embedding_dim
        self.channels = channels
        self.slots = slots
        self.decode_name = decode
        self.codebook_name = codebook
        self.latent_norm = latent_norm
        if latent_norm in WITH_AVERAGES:
            self._keep_averages((channels // embedding_dim, embedding_dim))
        self.defer_update = False

    @property
    def codebook(self) -> Tensor:
        """All codevectors, (K, d), or (m·K, d) if each slot has its own codebook."""
        codevectors: Tensor = getattr(self.library, self.codebook_name)
        return codevectors.flatten(0, -2)

    def forward(self, z: Tensor) -> Quantized:
        """Quantise z (B, C, H, W); in training mode also learn from it."""
        with torch.autocast(z.device.type, enabled=False):
            positions = self._positions(z, self.training)
            if self.training and positions.isfinite().all():
                quantized, found, *losses = self.library(positions)
                latents = spread(quantized, z.shape[2:])
                loss = sum((loss.sum() for loss in losses), positions.new_zeros(()))
                indices = self._indices(found, z.shape[2:])
            else:
                indices = self.encode(z)
                latents, loss = self._decode(indices), 0 * positions.sum()
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
        return self._indices(found, z.shape[2:])

    def decode(self, indices: Tensor) -> Tensor:
        """Indices (B, H, W, m) → latents (B, C, H, W); others raise ValueError."""
        return self._decode(check_indices(indices, self.num_embedding, self.slots))

    def _decode(self, indices: Tensor) -> Tensor:
        codes = getattr(self.library, self.decode_name)(indices.flatten(1, 2)).flatten(2)
        return spread(codes, indices.shape[1:3])

    def _positions(self, z: Tensor, training: bool = False) -> Tensor:
        """(B, C, H, W) of any float type → (B, H·W, C), float32, normalised."""
        if z.dim() != 4 or z.shape[1] != self.channels:
            raise ValueError(
                f"latents of shape {tuple(z.shape)} are not (B, {self.channels}, H, W)"
            )
        positions = z.float().permute(0, 2, 3, 1).contiguous()
        units = torch.unflatten(positions, -1, (-1, self.embedding_dim))  # (B, H, W, m, d)
        return self._normalise(units, training).flatten(3).flatten(1, 2)

    def _indices(self, found: Tensor, sides: tuple[int, ...]) -> Tensor:
        """(B, H·W) or (B, H·W, m) → (B, H, W, m), int64 in [0, K)."""
        within = found.long().clamp(0, self.num_embedding - 1)  # NaN gives indices out of range
        return torch.unflatten(within if within.dim() == 3 else within[..., None], 1, sides)


def spread(positions: Tensor, sides: tuple[int, ...]) -> Tensor:
    """(B, H·W, C) → (B, C, H, W)."""
    return torch.unflatten(positions, 1, sides).permute(0, 3, 1, 2)


# Makers: one per class of the library


def make(
    config: ModelConfig,
    name: str,
    *,
    decode: str = "indices_to_codes",
    codebook: str = "codebook",
    **settings: Any,
) -> LibraryQuantizer:
    """Make an object of this class of the library, and wrap it."""
    package = require(PACKAGE, f"--quantizer {config.quantizer}")
    return LibraryQuantizer(
        getattr(package, name)(**settings),
        config.num_embedding,
        config.embedding_dim,
        channels=config.channels,
        slots=config.num_slots,
        decode=decode,
        codebook=codebook,
        latent_norm=config.latent_norm,
    )


def make_ema(config: ModelConfig, name: str, **settings: Any) -> LibraryQuantizer:
    """Make a quantiser whose codevectors are running means."""
    return make(
        config,
        name,
        dim=config.channels,
        codebook_size=config.num_embedding,
        decay=config.ema_decay,
        commitment_weight=config.commitment_cost,
        kmeans_init=config.codebook_start == "kmeans",
        threshold_ema_dead_code=config.dead_code_threshold,
        rotation_trick=config.gradient == "rotation",
        use_cosine_sim=config.distance == "cos",
        **settings,
    )


def make_heads(config: ModelConfig, *, separate: bool = False) -> LibraryQuantizer:
    return make_ema(
        config,
        "VectorQuantize",
        decode="get_codes_from_indices",
        codebook_dim=config.embedding_dim,
        heads=units(config),
        separate_codebook_per_head=separate,
    )


def make_residual(config: ModelConfig) -> LibraryQuantizer:
    return make_ema(
        config,
        "ResidualVQ",
        decode="get_output_from_indices",
        codebook="codebooks",
        num_quantizers=config.num_quantizers,
    )


def make_sim(config: ModelConfig) -> LibraryQuantizer:
    return make(
        config,
        "SimVQ",
        dim=config.channels,
        codebook_size=config.num_embedding,
        rotation_trick=config.gradient == "rotation",
        input_to_quantize_commit_loss_weight=config.commitment_cost,
    )


# Specs


def check_start(config: ModelConfig) -> Problems:
    if config.codebook_start == "features":
        needed = "--codebook_start features needs --quantizer looc, cvq or vq"
        yield f"{needed}, not {config.quantizer}, which has uniform and kmeans"


EMA_FLAGS = COMMON_FLAGS | {
    *("commitment_cost", "ema_decay", "codebook_start", "gradient", "dead_code_threshold")
}
FIXED = {"anchor": "none", "distance": "l2", "gradient": "rotation"}
DEFAULTS = FIXED | {"codebook_start": "uniform", "commitment_cost": 1.0}
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
    FIXED,
    checks=(check_position,),
    library=PACKAGE,
)
