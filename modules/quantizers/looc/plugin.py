"""LooCPlugin: LooCQuantizer in the models of taming-transformers, latent-diffusion and diffusers.

Arguments, results and attributes are those of VectorQuantizer2 or VectorQuantizer in these
projects; docs/plugin.md has a recipe for each. c is the number of channels of the latents.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_indices, check_kinds, check_minima, check_tensor
from .quantizer import LooCQuantizer
from .state import Described
from .units import num_units
from .usage import count_indices


class LooCPlugin(Described):
    """LooCQuantizer with the interface of a VQGAN's quantiser.

    Args:
        n_e: number of codevectors K.
        e_dim: channels c of the latents.
        beta: commitment weight λ, of mean((sg[z_q] − z)²).
        remap: the K' codevectors in use, in the order of their new indices: a tensor (K',), a list,
            an array or an .npy file. Indices outside this module are then in [0, re_embed).
        unknown_index: new index of a codevector not in remap: "random" (drawn in each call from
            the K'), "extra" (the additional index K'), or an index.
        sane_index_shape: return indices as (B, …, m), or (B, …) if m is 1, instead of flat.
        legacy: put beta on mean((z_q − sg[z])²) instead, the default of VQGAN.
        embedding_dim, interpolation_scale, distance, anchor: as in LooCQuantizer.
        settings: other keywords of LooCQuantizer: split, first_batch, contras_loss,
            codebook_update, ema_decay, codebook_start, latent_norm, gradient, rate_weight,
            channel_dim and num_passes.

    Attributes:
        n_e, e_dim (also as vq_embed_dim), beta, remap, sane_index_shape, legacy: the arguments.
        re_embed: number of indices outside this module.
        unknown_index: "random" or an index.
        units: number m·R of indices per position of latents (B, c, H, W).
        embedding: the codebook as an nn.Embedding.
        quantizer: the LooCQuantizer. `quantizer.codebook` is the only parameter.
        config: the arguments, with remap as a list; `from_config` makes a new plug-in of them.

    A call in evaluation mode changes nothing. Raises ValueError for arguments out of range, or
    inputs of a wrong shape.
    """

    compared = ("unknown_index",)  # and, by the quantiser, its settings
    used: Tensor

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float = 0.25,
        remap: str | os.PathLike[str] | Tensor | Sequence[int] | None = None,
        unknown_index: int | str = "random",
        sane_index_shape: bool = False,
        legacy: bool = False,
        *,
        embedding_dim: int = 4,
        interpolation_scale: int = 0,
        distance: str = "cos",
        anchor: str = "closest",
        **settings: Any,
    ) -> None:
        super().__init__()
        self.n_e = self.re_embed = n_e
        self.e_dim = self.vq_embed_dim = e_dim
        self.beta = beta
        self.remap = remap
        self.unknown_index = unknown_index
        self.sane_index_shape = sane_index_shape
        self.legacy = legacy
        check_kinds(self, Integral, "n_e", "e_dim")
        check_kinds(self, Real, "beta")
        check_kinds(self, bool, "sane_index_shape", "legacy")
        check_minima(self, n_e=1, e_dim=1, beta=0)
        if legacy and beta == 0:
            raise ValueError(f"legacy {legacy} needs beta above 0, not {beta}")
        for name, value in (("contras_loss", True), ("codebook_update", "ema")):
            if legacy and settings.get(name) == value:
                raise ValueError(f"{name} {value} does not go with legacy {legacy}")
        ours = {"num_embedding": "n_e", "latent_channels": "e_dim", "commitment_cost": "beta"}
        for name in settings.keys() & ours.keys():
            value = f"{ours[name]} {getattr(self, ours[name])}"
            raise TypeError(f"{name} {settings[name]!r} is given as {value} here: leave it out")
        self.quantizer = LooCQuantizer(
            n_e,
            embedding_dim,
            # legacy: 1/beta on the commitment term; `forward` then multiplies both terms by beta.
            commitment_cost=1 / beta if legacy else beta,
            interpolation_scale=interpolation_scale,
            distance=distance,
            anchor=anchor,
            latent_channels=e_dim,
            **settings,
        )
        units = num_units(e_dim, interpolation_scale, embedding_dim)
        self.units = units * self.quantizer.num_passes
        if remap is not None:
            self.register_buffer("used", read_remap(remap, n_e))
            self.re_embed = len(self.used) + (unknown_index == "extra")
            if unknown_index == "extra":
                self.unknown_index = len(self.used)
            elif unknown_index != "random" and unknown_index not in range(self.re_embed):
                raise ValueError(
                    f"unknown_index {unknown_index!r} is neither 'random' nor 'extra' "
                    f"nor one of the {self.re_embed} indices of remap"
                )

        self.register_buffer("settings", self._described().to(self.quantizer.settings.device))

    @property
    def config(self) -> dict[str, Any]:
        """Arguments from which `LooCPlugin.from_config` makes a new plug-in."""
        mapped = self.remap is not None
        unknown = "extra" if mapped and self.re_embed > len(self.used) else self.unknown_index
        further = self.quantizer.config
        for name in ("num_embedding", "latent_channels", "commitment_cost"):
            del further[name]
        return {
            **{"n_e": self.n_e, "e_dim": self.e_dim, "beta": self.beta},
            "remap": self.used.tolist() if mapped else None,
            "unknown_index": unknown if mapped else "random",
            **{"sane_index_shape": self.sane_index_shape, "legacy": self.legacy},
            **further,
        }

    def reset_parameters(self) -> None:
        """Reset the quantiser, and read remap again."""
        self.quantizer.reset_parameters()
        if self.remap is not None:
            self.used.copy_(read_remap(self.remap, self.n_e))
        self.settings.copy_(self._described())

    @property
    def embedding(self) -> nn.Embedding:
        """View of the codebook, for code that reads `embedding.weight`, (K, d)."""
        embedding = nn.Embedding(self.n_e, self.quantizer.embedding_dim, device="meta")
        embedding.weight = self.quantizer.codebook
        return embedding

    def forward(
        self,
        z: Tensor,
        temp: float | None = None,
        rescale_logits: bool = False,
        return_logits: bool = False,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, None, Tensor]]:
        """Quantise z (B, c, H, W) → latents (B, c, H, W), scalar loss, (perplexity, None, indices).

        z may have any number of axes of positions, and c at channel_dim, as in LooCQuantizer. The
        perplexity is that of this call, a scalar; indices are int64, (B·H·W·m,) unless
        `sane_index_shape`. temp, rescale_logits and return_logits are for a Gumbel quantiser only.
        """
        if temp not in (None, 1) or rescale_logits or return_logits:
            raise ValueError(
                f"temp {temp}, rescale_logits {rescale_logits}, return_logits {return_logits}: "
                "they have to be None or 1, False and False"
            )
        latents, loss, indices = self.quantizer(z)
        share = count_indices(indices.flatten(), self.n_e) / max(1, indices.numel())  # u_k, (K,)
        perplexity = torch.special.entr(share).sum().exp()  # exp(−Σ u_k log u_k)
        if self.legacy:
            loss = self.beta * loss
        if self.remap is not None:
            indices = self.remap_to_used(indices)
        if not self.sane_index_shape:
            indices = indices.flatten()
        elif indices.shape[-1] == 1:
            indices = indices.squeeze(-1)
        return latents, loss, (perplexity, None, indices)

    def get_codebook_entry(self, indices: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Get the latents of indices (n·m,), (b, h·w·m), (b, …, m), or (b, …) if m is 1.

        With shape (b, h, w, c), or (b, …, c), the latents have the shape of z. Without it, channels
        come last, in place of the m indices of a position: (n, c), (b, h·w, c) or (b, …, c); with
        interpolation the indices are then taken for those of two axes, h and w.
        """
        check_tensor("indices", indices)
        if shape is None:
            positions = self._positions(indices)
            latents = self._decode(indices.reshape(-1, 1, 1, self.units))  # (n, c, 1, 1)
            return latents.reshape(*positions, self.e_dim)
        *sides, channels = shape
        settings = (self.quantizer.interpolation_scale, self.quantizer.embedding_dim)
        units = num_units(self.e_dim, *settings, len(sides) - 1) * self.quantizer.num_passes
        if channels != self.e_dim or indices.numel() != math.prod(sides) * units:
            raise ValueError(
                f"indices of shape {tuple(indices.shape)} and shape {tuple(shape)} do not match: "
                f"e_dim is {self.e_dim}, with {units} indices per position"
            )
        return self._decode(indices.reshape(*sides, units))

    def embed_code(self, code: Tensor) -> Tensor:
        """Get the latents, in the shape of z, of indices (b, …, m), or (b, …) if m is 1."""
        check_tensor("indices", code)
        with_units = self.units > 1 or (code.dim() == 4 and code.shape[-1] == 1)
        return self._decode(code if with_units else code[..., None])

    def remap_to_used(self, indices: Tensor) -> Tensor:
        """Map indices in [0, K) to [0, re_embed), any shape."""
        indices = indices.long()
        places = indices.new_full((self.n_e,), -1)
        places[self.used] = torch.arange(len(self.used), device=indices.device)
        found = places[indices]
        if self.unknown_index == "random":
            unknown = torch.randint_like(found, self.re_embed)
        else:
            unknown = torch.full_like(found, int(self.unknown_index))
        return torch.where(found < 0, unknown, found)

    def unmap_to_all(self, indices: Tensor) -> Tensor:
        """Map indices in [0, re_embed) to [0, K), any shape; the extra one to the first in use."""
        return self.used[torch.where(indices < len(self.used), indices, 0).long()]

    def _positions(self, indices: Tensor) -> tuple[int, ...]:
        """Shape of the positions: that of the indices without the units."""
        *positions, last = indices.shape or (1,)
        if self.units == 1 and not (len(positions) == 3 and last == 1):
            return tuple(indices.shape)
        if len(positions) > 1 and last == self.units:
            return tuple(positions)
        if len(positions) < 2 and last % self.units == 0:
            return (*positions, last // self.units)
        raise ValueError(
            f"indices of shape {tuple(indices.shape)} are not {self.units} per position: "
            f"(n·{self.units},), (b, n·{self.units}) or (b, …, {self.units})"
        )

    def _decode(self, indices: Tensor) -> Tensor:
        """Decode indices (b, …, m) in [0, re_embed) to latents in the shape of z."""
        if self.remap is not None:
            indices = self.unmap_to_all(check_indices(indices, self.re_embed, any_rank=True))
        return self.quantizer.decode(indices)


def read_remap(remap: str | os.PathLike[str] | Tensor | Sequence[int], n_e: int) -> Tensor:
    """Read distinct indices in [0, K) from a tensor, a list, an array or an .npy file: (K',)."""
    name = f"remap {remap}" if isinstance(remap, str | os.PathLike) else "remap"
    try:
        if isinstance(remap, Tensor):
            used = remap.detach().clone()
        elif isinstance(remap, str | os.PathLike):
            import numpy as np

            with Path(remap).open("rb") as file:
                used = torch.from_numpy(np.lib.format.read_array(file, allow_pickle=False))
        else:
            used = torch.tensor(remap, device="cpu")
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{name} cannot be read: {error}") from error
    if used.dim() != 1 or not len(used) or used.is_floating_point() or used.is_complex():
        raise ValueError(
            f"{name} of shape {tuple(used.shape)} and {used.dtype} is not a list of indices"
        )
    used = used.long()
    if used.min() < 0 or used.max() >= n_e:
        raise ValueError(f"{name} has indices {used.min()} … {used.max()}, not all below n_e {n_e}")
    if (distinct := len(set(used.tolist()))) < len(used):
        raise ValueError(f"{name} has {len(used)} indices, only {distinct} of them distinct")
    return used
