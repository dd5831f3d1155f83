"""LooC's quantiser for the models of taming-transformers, latent-diffusion and diffusers.

Arguments, results and attributes are those that the models of these projects expect of their
VectorQuantizer2 or VectorQuantizer; docs/plugin.md has a recipe for each. Symbols as in
quantizer.py; c are the channels of the latents.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .quantizer import LooCQuantizer, count_indices

Info = tuple[Tensor, None, Tensor]


class LooCPlugin(nn.Module):
    """A LooCQuantizer called as the quantiser of a VQGAN is.

    Args:
        n_e: codevectors K.
        e_dim: channels c of the latents.
        beta: commitment weight λ, on mean((sg[z_q] − z)²).
        remap: the K' codevectors that are in use, in the order of their new indices: an .npy file
            of them or a tensor (K',). Indices outside are then in [0, re_embed).
        unknown_index: what stands for a codevector that remap lacks: "random", one of the K' drawn
            anew at each call; "extra", the further index K'; or an index.
        sane_index_shape: indices as (B, H, W, m), or (B, H, W) where m is 1, rather than flat.
        legacy: put beta on mean((z_q − sg[z])²) instead, as VQGAN has it by default.
        embedding_dim: dimension d of a codevector; divides c·β².
        interpolation_scale: β; 0 or 1 is off.
        distance: "cos" or "l2", the similarity of the match.
        anchor: "closest", "random", "probrandom" or "none", the re-initialisation rule.
        settings: further keywords of LooCQuantizer: split, first_batch, contras_loss,
            codebook_update, ema_decay, codebook_start, latent_norm, gradient and rate_weight.

    Attributes: the arguments up to legacy; `vq_embed_dim`, which is e_dim; `re_embed`, how many
    indices there are outside; `embedding`; `units`, the m indices of a position; and `quantizer`,
    the LooCQuantizer, whose parameter `quantizer.codebook` is all that is trained. In evaluation
    mode a call writes nothing.

    Raises:
        ValueError: for arguments out of range, or inputs of another shape.
    """

    used: Tensor

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float = 0.25,
        remap: str | os.PathLike[str] | Tensor | None = None,
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
        for name, number, least in (
            ("n_e", n_e, 1),
            ("e_dim", e_dim, 1),
            ("beta", beta, 0),
            ("embedding_dim", embedding_dim, 1),
            ("interpolation_scale", interpolation_scale, 0),
        ):
            if not number >= least:
                raise ValueError(f"{name} {number} is less than {least}")
        extrapolated = e_dim * max(interpolation_scale, 1) ** 2
        if extrapolated % embedding_dim:
            raise ValueError(
                f"embedding_dim {embedding_dim} does not divide {extrapolated}, "
                f"e_dim {e_dim} times the square of interpolation_scale {interpolation_scale}"
            )
        if legacy and beta == 0:
            raise ValueError(f"legacy {legacy} needs beta above 0, not {beta}")
        if legacy and settings.get("contras_loss"):
            raise ValueError(f"contras_loss True does not go with legacy {legacy}")
        if legacy and settings.get("codebook_update") == "ema":
            raise ValueError(
                f"legacy {legacy} puts beta on the codebook's term, "
                "which codebook_update 'ema' lacks"
            )
        self.n_e = n_e
        self.e_dim = self.vq_embed_dim = e_dim
        self.beta = beta
        self.remap = remap
        self.re_embed = n_e
        self.unknown_index = unknown_index
        self.sane_index_shape = sane_index_shape
        self.legacy = legacy
        self.units = extrapolated // embedding_dim
        self.quantizer = LooCQuantizer(
            n_e,
            embedding_dim,
            # beta on the codebook's term is 1/beta on the other, and all of it times beta.
            commitment_cost=1 / beta if legacy else beta,
            interpolation_scale=interpolation_scale,
            distance=distance,
            anchor=anchor,
            latent_channels=e_dim,
            **settings,
        )
        if remap is not None:
            self.register_buffer("used", read_remap(remap, n_e))
            self.re_embed = len(self.used)
            if unknown_index == "extra":
                self.unknown_index = self.re_embed
                self.re_embed += 1
            elif unknown_index != "random" and unknown_index not in range(self.re_embed):
                raise ValueError(
                    f"unknown_index {unknown_index!r} is neither 'random' nor 'extra' "
                    f"nor one of the {self.re_embed} of remap"
                )

    def extra_repr(self) -> str:
        return f"{self.n_e}, {self.e_dim}, beta={self.beta}, legacy={self.legacy}"

    @property
    def embedding(self) -> nn.Embedding:
        """A view of the codebook, for those who read `embedding.weight`, (K, d)."""
        embedding = nn.Embedding(self.n_e, self.quantizer.embedding_dim, device="meta")
        embedding.weight = self.quantizer.codebook
        return embedding

    def forward(
        self,
        z: Tensor,
        temp: float | None = None,
        rescale_logits: bool = False,
        return_logits: bool = False,
    ) -> tuple[Tensor, Tensor, Info]:
        """Quantise z (B, c, H, W) → latents (B, c, H, W), scalar loss, (perplexity, None, indices).

        The perplexity is that of the codevectors used in this call, a scalar; indices are int64,
        (B·H·W·m,) unless `sane_index_shape`. temp, rescale_logits and return_logits are there for
        those who call a Gumbel quantiser alike, and have to be None or 1, False and False.
        """
        for name, value, allowed in (
            ("temp", temp, (None, 1)),
            ("rescale_logits", rescale_logits, (False,)),
            ("return_logits", return_logits, (False,)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} {value} is not {' or '.join(map(str, allowed))}")
        if z.dim() != 4 or z.shape[1] != self.e_dim:
            raise ValueError(f"z of shape {tuple(z.shape)} is not (B, e_dim {self.e_dim}, H, W)")
        latents, loss, indices = self.quantizer(z)
        perplexity = self._perplexity(indices)
        if self.legacy:
            loss = self.beta * loss
        if self.remap is not None:
            indices = self.remap_to_used(indices)
        if not self.sane_index_shape:
            indices = indices.flatten()
        elif self.units == 1:
            indices = indices.squeeze(3)
        return latents, loss, (perplexity, None, indices)

    def get_codebook_entry(self, indices: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """The latents of indices: (n·m,), (b, h·w·m) or (b, h, w, m), or (b, h, w) where m is 1.

        With shape (b, h, w, c) they are (b, c, h, w); without, channels come last, in place of the
        m indices of a position: (n, c), (b, h·w, c) or (b, h, w, c).
        """
        if shape is None:
            positions = self._positions(indices)
            latents = self._decode(indices.reshape(1, -1, 1, self.units))  # (1, c, n, 1)
            return latents[0, :, :, 0].T.reshape(*positions, self.e_dim)
        batch, height, width, channels = shape
        if channels != self.e_dim or indices.numel() != batch * height * width * self.units:
            raise ValueError(
                f"indices of shape {tuple(indices.shape)} and shape {tuple(shape)} do not match: "
                f"e_dim is {self.e_dim}, with {self.units} indices a position"
            )
        return self._decode(indices.reshape(batch, height, width, self.units))

    def embed_code(self, code: Tensor) -> Tensor:
        """The latents (b, c, h, w) of indices (b, h, w, m), or (b, h, w) where m is 1."""
        positions = self._positions(code)
        if len(positions) != 3:
            raise ValueError(f"code of shape {tuple(code.shape)} is not (b, h, w, {self.units})")
        return self._decode(code.reshape(*positions, self.units))

    def remap_to_used(self, indices: Tensor) -> Tensor:
        """Indices in [0, K) to those outside, in [0, re_embed); of any shape."""
        places = indices.new_full((self.n_e,), -1)
        places[self.used] = torch.arange(len(self.used), device=indices.device)
        found = places[indices]
        if self.unknown_index == "random":
            unknown = torch.randint_like(found, self.re_embed)
        else:
            unknown = torch.full_like(found, int(self.unknown_index))
        return torch.where(found < 0, unknown, found)

    def unmap_to_all(self, indices: Tensor) -> Tensor:
        """Indices outside to those in [0, K), the extra one to the first used; of any shape."""
        return self.used[torch.where(indices < len(self.used), indices, 0)]

    def _perplexity(self, indices: Tensor) -> Tensor:
        """exp(−Σ u_k log u_k), u_k the share of codevector k."""
        counts = count_indices(indices.flatten(), self.n_e)
        terms: Tensor = torch.special.entr(counts / counts.sum().clamp_min(1))  # (K,)
        return terms.sum().exp()

    def _positions(self, indices: Tensor) -> tuple[int, ...]:
        """The shape of indices without their units."""
        *positions, last = indices.shape
        if self.units == 1 and len(positions) == 2:
            return (*positions, last)
        if len(positions) == 3 and last == self.units:
            return tuple(positions)
        if len(positions) in (0, 1) and last % self.units == 0:
            return (*positions, last // self.units)
        raise ValueError(
            f"indices of shape {tuple(indices.shape)} are not of {self.units} a position: "
            f"(n·{self.units},), (b, n·{self.units}) or (b, h, w, {self.units})"
        )

    def _decode(self, indices: Tensor) -> Tensor:
        """Indices outside (b, h, w, m) → latents (b, c, h, w)."""
        if self.remap is not None:
            indices = self.unmap_to_all(indices)
        return self.quantizer.decode(indices)


def read_remap(remap: str | os.PathLike[str] | Tensor, n_e: int) -> Tensor:
    """Distinct indices in [0, K), from an .npy file or a tensor: (K',), int64."""
    if isinstance(remap, Tensor):
        name, used = "remap", remap.detach().clone()
    else:
        import numpy as np

        name = f"remap {remap}"
        try:
            with Path(remap).open("rb") as file:
                array = np.lib.format.read_array(file, allow_pickle=False)
            used = torch.from_numpy(array)
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"{name} cannot be read: {error}") from error
    if used.dim() != 1 or not len(used) or used.is_floating_point() or used.is_complex():
        raise ValueError(
            f"{name} of shape {tuple(used.shape)} and {used.dtype} is no list of indices"
        )
    used = used.long()
    if used.min() < 0 or used.max() >= n_e:
        raise ValueError(f"{name} holds {used.min()} … {used.max()}, beyond the {n_e} of n_e")
    distinct = len(set(used.tolist()))
    if distinct < len(used):
        raise ValueError(f"{name} holds {len(used)} indices, only {distinct} distinct")
    return used
