"""Interface of a quantiser, and its spec: how it is configured, checked and made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from torch import Tensor

from .looc import Quantized

if TYPE_CHECKING:
    from ..config import ModelConfig

LARGEST_CODEBOOK = 2**20
Problems: TypeAlias = Iterator[str]  # lines that each name flags that contradict


class Quantizer(Protocol):
    """A module between encoder and decoder; in training mode a call also learns from its input."""

    defer_update: bool  # if set, training calls only collect statistics; the next one uses them

    @property
    def codebook(self) -> Tensor:
        """All codevectors, (K, d), or (m·K, d) if each slot has its own codebook."""

    def __call__(self, z: Tensor) -> Quantized:
        """Quantise latents z (B, C, H, W)."""

    def encode(self, z: Tensor) -> Tensor:
        """Latents (B, C, H, W) → indices (B, H, W, m), int64. Writes nothing."""

    def decode(self, indices: Tensor) -> Tensor:
        """Indices (B, H, W, m) → latents (B, C, H, W)."""

    def state_dict(self) -> dict[str, Any]:
        """Parameters and buffers by name."""

    def named_buffers(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Buffers by name."""


@dataclass(frozen=True)
class QuantizerSpec:
    """A choice of --quantizer."""

    label: str  # its name in reports
    make: Callable[[ModelConfig], Quantizer]
    reads: frozenset[str]  # the flags that it reads
    implies: Mapping[str, Any] = field(default_factory=dict)  # its own defaults
    # Further defaults, from the flags given and the declared defaults.
    derive: Callable[[Mapping[str, Any], type[ModelConfig]], dict[str, Any]] = lambda *_: {}
    checks: Sequence[Callable[[ModelConfig], Problems]] = ()
    any_channels: bool = False  # takes latents of any number of channels, not d only
    slots: Callable[[ModelConfig], int] = lambda _: 1  # indices m per position
    codebooks: Callable[[ModelConfig], int] = lambda _: 1  # 1 if shared, m if each slot has its own
    parts: bool = False  # a batch may be split over several calls or processes
    library: str | None = None  # the optional package that it needs


# Flags and checks that several quantisers share

COMMON_FLAGS = frozenset({"num_embedding", "embedding_dim", "latent_norm"})


def units(config: ModelConfig) -> int:
    """m = C·max(β,1)²/d."""
    return config.channels * max(config.interpolation_scale, 1) ** 2 // config.embedding_dim


def check_units(config: ModelConfig) -> Problems:
    scale, dim, channels = max(config.interpolation_scale, 1), config.embedding_dim, config.channels
    if channels * scale**2 % dim:
        flag = "--hidden_size" if config.latent_channels is None else "--latent_channels"
        times = f" times {scale}² of --interpolation_scale" if scale > 1 else ""
        yield f"--embedding_dim {dim} does not divide the {channels} channels of {flag}{times}"


def check_position(config: ModelConfig) -> Problems:
    scale, dim, quantizer = config.interpolation_scale, config.embedding_dim, config.quantizer
    if config.channels != dim:
        wanted = f"--embedding_dim {dim}, the channels of --quantizer {quantizer}"
        yield f"--latent_channels {config.latent_channels} is not {wanted}"
    if scale > 1:
        yield f"--interpolation_scale {scale} needs --quantizer looc, not {quantizer}"
