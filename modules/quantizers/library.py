"""Other quantisers under LooCQuantizer's interface: none at all, and those of a public library.

The library is vector-quantize-pytorch, an optional requirement; it is imported where a peer is
built. In training a peer is what the library makes of it, at the library's own settings but for
those that have a flag here. Outside training, latents are the decoding of their indices.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from modules.quantizers.looc.quantizer import WITH_AVERAGES, LatentNorm, Quantized


def vector_quantize(quantizer: str) -> ModuleType:
    """The library. Raises ValueError where it is not installed."""
    try:
        import vector_quantize_pytorch
    except ImportError as error:
        raise ValueError(
            f"--quantizer {quantizer} needs vector-quantize-pytorch: "
            "pip install vector-quantize-pytorch"
        ) from error
    library: ModuleType = vector_quantize_pytorch
    return library


def need_library(quantizer: str) -> None:
    """Raise ValueError where this quantiser needs the library, and it is not installed."""
    if quantizer in PEERS:
        vector_quantize(quantizer)


class NoQuantizer(LatentNorm):
    """Latents that are not quantised, with no index (m = 0).

    Args:
        channels: C of the latents.
        latent_norm: as LooCQuantizer has it, of all channels together.
    """

    def __init__(self, channels: int, *, latent_norm: str = "none") -> None:
        super().__init__()
        self.latent_norm = latent_norm
        if latent_norm in WITH_AVERAGES:
            self._keep_averages((1, channels))
        self.codebook = torch.empty(0, 0)  # of no codevector
        self.defer_update = False

    def forward(self, z: Tensor) -> Quantized:
        """(B, C, H, W) → itself, normalised, a loss of 0 and indices (B, H, W, 0)."""
        with torch.autocast(z.device.type, enabled=False):
            wide = z.to(torch.promote_types(z.dtype, torch.float32))
            units = wide.permute(0, 2, 3, 1).unsqueeze(-2)  # (B, H, W, 1, C)
            latents = self._normalise(units, self.training).squeeze(-2).permute(0, 3, 1, 2)
        return Quantized(latents.to(z.dtype), z.new_zeros(()), self.encode(z))

    def encode(self, z: Tensor) -> Tensor:
        """(B, C, H, W) → (B, H, W, 0), int64."""
        return torch.empty(len(z), *z.shape[2:], 0, dtype=torch.int64, device=z.device)

    def decode(self, indices: Tensor) -> Tensor:
        """Raises ValueError: latents that are not quantised cannot be told from indices."""
        raise ValueError(
            f"indices of shape {tuple(indices.shape)}: without a quantiser none decode"
        )


class PeerQuantizer(LatentNorm):
    """A quantiser of vector-quantize-pytorch.

    Args:
        kind: one of PEERS.
        num_embedding: codevectors K in a codebook.
        embedding_dim: dimension d of a codevector; divides the channels.
        channels: C of the latents.
        distance: "cos" or "l2", the similarity of the match.
        commitment_cost: commitment weight.
        ema_decay: of the running mean that a codevector is.
        codebook_start: "uniform", the library's random start, or "kmeans" on the first batch.
        gradient: "straight_through" or "rotation", how the latents' gradient reaches z.
        levels: of "fsq".
        num_quantizers: codebooks of "residual-vq", one after another.
        dead_code_threshold: running mean of matches a step below which a codevector whose mean it
            is makes way for a vector of the batch.
        latent_norm: as LooCQuantizer has it, before the library is called.

    Each kind reads those that its builder below names. Nothing is learnt from a batch that is not
    finite, whose loss is then not a number. In evaluation mode the loss is 0, and a call writes
    nothing. `defer_update` has no effect: a batch cannot be passed in parts.

    Raises:
        ValueError: where the library is not installed, or for latents of another shape.
    """

    def __init__(
        self,
        kind: str,
        num_embedding: int,
        embedding_dim: int,
        *,
        channels: int,
        distance: str = "l2",
        commitment_cost: float = 1.0,
        ema_decay: float = 0.8,
        codebook_start: str = "uniform",
        gradient: str = "rotation",
        levels: tuple[int, ...] = (),
        num_quantizers: int = 4,
        dead_code_threshold: int = 0,
        latent_norm: str = "none",
    ) -> None:
        super().__init__()
        self.kind = kind
        self.num_embedding = num_embedding
        self.embedding_dim = embedding_dim
        self.channels = channels
        self.distance = distance
        self.commitment_cost = commitment_cost
        self.ema_decay = ema_decay
        self.codebook_start = codebook_start
        self.gradient = gradient
        self.levels = levels
        self.num_quantizers = num_quantizers
        self.dead_code_threshold = dead_code_threshold
        self.latent_norm = latent_norm
        if latent_norm in WITH_AVERAGES:
            self._keep_averages((channels // embedding_dim, embedding_dim))
        self.defer_update = False
        self.library = PEERS[kind].build(self, vector_quantize(kind))

    def extra_repr(self) -> str:
        return f"{self.kind!r}, {self.num_embedding}, {self.embedding_dim}"

    @property
    def codebook(self) -> Tensor:
        """All codevectors, (K, d); where each slot has a codebook of its own, one after another."""
        return PEERS[self.kind].codebook(self.library).flatten(0, -2)

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
        # The library would start codebooks outside training too.
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
        quantized = PEERS[self.kind].decode(self.library, indices.flatten(1, 2))  # (B, H·W, C)
        return spread(quantized, (len(indices), self.channels, *indices.shape[1:3]))

    def _positions(self, z: Tensor, training: bool = False) -> Tensor:
        """(B, C, H, W) of any float type → (B, H·W, C), float32, normalised."""
        if z.dim() != 4 or z.shape[1] != self.channels:
            raise ValueError(
                f"latents of shape {tuple(z.shape)} are not (B, {self.channels}, H, W)"
            )
        positions = z.float().permute(0, 2, 3, 1).contiguous()
        slots = self.channels // self.embedding_dim
        units = positions.view(*positions.shape[:-1], slots, self.embedding_dim)  # (B, H, W, m, d)
        return self._normalise(units, training).flatten(3).flatten(1, 2)

    def _indices(self, found: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Of a batch of this shape: (B, H·W) or (B, H·W, m) → (B, H, W, m), int64 in [0, K)."""
        batch, _, height, width = shape
        within = found.long().clamp(0, self.num_embedding - 1)  # NaN has levels beyond them
        return within.reshape(batch, height, width, found.shape[2] if found.dim() > 2 else 1)


def spread(positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(B, H·W, C) → (B, C, H, W), which the shape is."""
    batch, channels, height, width = shape
    return positions.reshape(batch, height, width, channels).permute(0, 3, 1, 2)


# ----------------------------------------------------------------------------------------- builders


def shared_settings(peer: PeerQuantizer) -> dict[str, Any]:
    """Of the quantisers whose codevectors are running means."""
    return {
        "dim": peer.channels,
        "codebook_size": peer.num_embedding,
        "decay": peer.ema_decay,
        "commitment_weight": peer.commitment_cost,
        "kmeans_init": peer.codebook_start == "kmeans",
        "threshold_ema_dead_code": peer.dead_code_threshold,
        "rotation_trick": peer.gradient == "rotation",
        "use_cosine_sim": peer.distance == "cos",
    }


def build_heads(peer: PeerQuantizer, library: ModuleType, *, separate: bool = False) -> nn.Module:
    heads = peer.channels // peer.embedding_dim
    module: nn.Module = library.VectorQuantize(
        codebook_dim=peer.embedding_dim,
        heads=heads,
        separate_codebook_per_head=separate,
        **shared_settings(peer),
    )
    return module


def build_separate_heads(peer: PeerQuantizer, library: ModuleType) -> nn.Module:
    return build_heads(peer, library, separate=True)


def build_residual(peer: PeerQuantizer, library: ModuleType) -> nn.Module:
    module: nn.Module = library.ResidualVQ(
        num_quantizers=peer.num_quantizers, **shared_settings(peer)
    )
    return module


def build_fsq(peer: PeerQuantizer, library: ModuleType) -> nn.Module:
    with torch.device("cpu"):  # it looks at its levels, which "meta" cannot
        module: nn.Module = library.FSQ(
            list(peer.levels),
            num_codebooks=peer.channels // peer.embedding_dim,
            keep_num_codebooks_dim=True,
        )
    return module


def build_lfq(peer: PeerQuantizer, library: ModuleType) -> nn.Module:
    module: nn.Module = library.LFQ(
        codebook_size=peer.num_embedding,
        num_codebooks=peer.channels // peer.embedding_dim,
        keep_num_codebooks_dim=True,
        commitment_loss_weight=peer.commitment_cost,
    )
    return module


def build_sim(peer: PeerQuantizer, library: ModuleType) -> nn.Module:
    module: nn.Module = library.SimVQ(
        peer.channels,
        peer.num_embedding,
        rotation_trick=peer.gradient == "rotation",
        input_to_quantize_commit_loss_weight=peer.commitment_cost,
    )
    return module


# ----------------------------------------------------------------------------------------- registry


class Peer(NamedTuple):
    """How a quantiser of the library is built and asked."""

    build: Callable[[PeerQuantizer, ModuleType], nn.Module]
    codebook: Callable[[Any], Tensor]  # (K, d), or (m, K, d) where each slot has its own
    decode: Callable[[Any, Tensor], Tensor]  # the library's, (B, N, m) → (B, N, C)


HEADS = Peer(
    build_heads,
    codebook=lambda library: library.codebook,
    decode=lambda library, indices: library.codebook[indices].flatten(2),
)
PEERS: dict[str, Peer] = {
    "ema-vq": HEADS,
    "cosine-vq": HEADS,
    "multihead-vq": HEADS,
    "product-vq": Peer(
        build_separate_heads,
        codebook=lambda library: library.codebook,
        decode=lambda library, indices: library.get_codes_from_indices(indices),
    ),
    "residual-vq": Peer(
        build_residual,
        codebook=lambda library: library.codebooks,
        decode=lambda library, indices: library.get_output_from_indices(indices),
    ),
    "fsq": Peer(
        build_fsq,
        codebook=lambda library: library.implicit_codebook,
        decode=lambda library, indices: library.indices_to_codes(indices),
    ),
    "lfq": Peer(
        build_lfq,
        codebook=lambda library: library.codebook,
        decode=lambda library, indices: library.indices_to_codes(indices),
    ),
    "sim-vq": Peer(
        build_sim,
        codebook=lambda library: library.codebook,
        decode=lambda library, indices: library.indices_to_codes(indices[..., 0]),
    ),
}
