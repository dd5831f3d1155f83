"""LooCPlugin with the arguments and results of further projects' quantisers.

Each class stands for one published quantiser: its arguments by name and order, its results, and the
methods that the models of that project call. All keywords of LooCPlugin are taken too. Arguments
without a meaning for LooC may be given with their published default alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .quantizers.looc import LooCPlugin


def without_meaning(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Take the arguments of `defaults` out of those given; ValueError if one is not its default."""
    for name, default in defaults.items():
        value = given.get(name, default)
        if isinstance(value, Tensor) or value != default:
            shown = "a tensor" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"{name} {shown} has no meaning with LooC, only {default!r}")
    return {name: value for name, value in given.items() if name not in defaults}


class Adapter(LooCPlugin):
    """Base of the adapters: LooCPlugin that refuses what has no meaning."""

    unused: ClassVar[Mapping[str, Any]] = {}  # arguments without a meaning, and their defaults
    renamed: ClassVar[Mapping[str, str]] = {}  # LooCPlugin's arguments that have another name here
    own: ClassVar[tuple[str, ...]] = ()  # arguments that LooCPlugin does not have

    def __init__(self, n_e: int, e_dim: int, beta: float = 0.25, **settings: Any) -> None:
        super().__init__(n_e, e_dim, beta, **without_meaning(settings, self.unused))

    @property
    def config(self) -> dict[str, Any]:
        """Arguments from which `from_config` makes a new quantiser of this class."""
        shared = {self.renamed.get(name, name): value for name, value in super().config.items()}
        return {**shared, **{name: getattr(self, name) for name in self.own}}

    def two_terms(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Divide a loss into the codebook's and the commitment term.

        The values are those of both; the first has the gradient of both, the second none.
        """
        codebook_cost = float(self.quantizer.codebook_update == "gradient")
        share = self.beta / (self.beta + codebook_cost) if self.beta else 0
        commitment = share * loss.detach()
        return loss - commitment, commitment


class LucidrainsQuantizer(Adapter):
    """`VectorQuantize` of vector-quantize-pytorch, also in muse-maskgit-pytorch.

    A call returns (quantized, indices, loss); indices have the shape of the positions, and m if it
    is not 1. ema_update False trains the codebook by its gradient; rotation_trick None is False.
    """

    unused: ClassVar[Mapping[str, Any]] = {
        **{"codebook_dim": None, "heads": 1, "separate_codebook_per_head": False, "eps": 1e-5},
        **{"freeze_codebook": False, "kmeans_iters": 10, "sync_kmeans": True},
        **{"layernorm_after_project_in": False, "threshold_ema_dead_code": 0},
        **{"commitment_use_cross_entropy_loss": False, "orthogonal_reg_weight": 0.0},
        **{"orthogonal_reg_active_codes_only": False, "orthogonal_reg_max_codes": None},
        **{"codebook_diversity_loss_weight": 0.0, "codebook_diversity_temperature": 100.0},
        **{"stochastic_sample_codes": False, "sample_codebook_temp": 1.0},
        **{"straight_through": False, "directional_reparam": False},
        **{"directional_reparam_variance": 5e-3, "sync_codebook": None},
        **{"sync_affine_param": False, "vq_bridge": None, "manual_ema_update": False},
        **{"learnable_codebook": None, "in_place_codebook_optimizer": None},
        **{"manual_in_place_optimizer_update": False, "affine_param": False},
        **{"affine_param_batch_decay": 0.99, "affine_param_codebook_decay": 0.9},
        **{"sync_update_v": 0.0, "return_zeros_for_masked_padding": True},
        "route_gradients_to_input": True,
    }
    renamed: ClassVar[Mapping[str, str]] = {
        **{"n_e": "codebook_size", "e_dim": "dim", "beta": "commitment_weight"}
    }
    unused_in_calls: ClassVar[Mapping[str, Any]] = {
        **{"indices": None, "mask": None, "lens": None, "topk": None, "ema_update": None},
        **{"sample_codebook_temp": None, "freeze_codebook": None, "return_loss_breakdown": False},
        **{"codebook_transform_fn": None, "ema_update_weight": None, "accum_ema_update": False},
    }

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        decay: float = 0.8,
        kmeans_init: bool = False,
        use_cosine_sim: bool = False,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
        commitment_weight: float = 1.0,
        rotation_trick: bool | None = None,
        ema_update: bool | None = None,
        **settings: Any,
    ) -> None:
        first = accept_image_fmap or accept_3d_fmap or not channel_last
        understood = {
            "ema_decay": decay,
            "codebook_start": "kmeans" if kmeans_init else "uniform",
            "distance": "cos" if use_cosine_sim else "l2",
            "channel_dim": 1 if first else -1,
            "gradient": "rotation" if rotation_trick else "straight_through",
            "codebook_update": "gradient" if ema_update is False else "ema",
            "sane_index_shape": True,
        }
        super().__init__(codebook_size, dim, commitment_weight, **{**understood, **settings})
        self.dim, self.codebook_size = dim, codebook_size

    @property
    def codebook(self) -> nn.Parameter:
        """All codevectors (K, d)."""
        return self.quantizer.codebook

    def forward(  # type: ignore[override]
        self, x: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise x → latents in its shape, indices, scalar loss."""
        if unknown := without_meaning(options, self.unused_in_calls):
            raise TypeError(f"a call takes no argument {next(iter(unknown))}")
        latents, loss, (_, _, indices) = super().forward(x)
        return latents, indices, loss

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """Get the latents, in the shape of x, of indices as a call returns them."""
        return self.embed_code(indices)

    get_codes_from_indices = get_output_from_indices  # there is no projection between them

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Get the latents (b, n, c) of indices (b, n·m), as muse-maskgit decodes."""
        return self.get_codebook_entry(indices)


class SgmQuantizer(Adapter):
    """`VectorQuantizer` of Stability AI's generative-models, a regulariser of its autoencoders.

    A call returns (latents, {loss_key: loss, "min_encoding_indices": indices}), and with
    log_perplexity "perplexity" and "cluster_usage", the number of codevectors used by the call.
    """

    unused: ClassVar[Mapping[str, Any]] = {"embedding_weight_norm": False}
    own = ("log_perplexity", "loss_key")

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float = 0.25,
        remap: Any = None,
        unknown_index: int | str = "random",
        sane_index_shape: bool = False,
        log_perplexity: bool = False,
        embedding_weight_norm: bool = False,
        loss_key: str = "loss/vq",
        **settings: Any,
    ) -> None:
        settings |= {"remap": remap, "unknown_index": unknown_index}
        settings |= {"embedding_weight_norm": embedding_weight_norm}
        self.log_perplexity, self.loss_key = log_perplexity, loss_key
        super().__init__(n_e, e_dim, beta, sane_index_shape=sane_index_shape, **settings)

    def forward(self, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:  # type: ignore[override]
        """Quantise z → latents in its shape, dictionary."""
        latents, loss, (perplexity, _, indices) = super().forward(z)
        log = {self.loss_key: loss, "min_encoding_indices": indices}
        if self.log_perplexity:
            log |= {"perplexity": perplexity, "cluster_usage": used(indices)}
        return latents, log

    def get_trainable_parameters(self) -> Iterator[nn.Parameter]:
        """All parameters, for the optimiser of the autoencoder."""
        yield from self.parameters()


class TiTokQuantizer(Adapter):
    """`VectorQuantizer` of TiTok (1d-tokenizer).

    A call returns (latents, dictionary of losses and "min_encoding_indices", (b, h, w) or
    (b, h, w, m)). use_l2_norm normalises the units and matches them by their direction.
    """

    unused: ClassVar[Mapping[str, Any]] = {"clustering_vq": False, "contras_loss": False}
    renamed: ClassVar[Mapping[str, str]] = {
        **{"n_e": "codebook_size", "e_dim": "token_size", "beta": "commitment_cost"}
    }

    def __init__(
        self,
        codebook_size: int = 1024,
        token_size: int = 256,
        commitment_cost: float = 0.25,
        use_l2_norm: bool = False,
        clustering_vq: bool = False,
        **settings: Any,
    ) -> None:
        settings = {**by_direction(use_l2_norm), "sane_index_shape": True, **settings}
        settings["clustering_vq"] = clustering_vq
        super().__init__(codebook_size, token_size, commitment_cost, **settings)
        self.codebook_size, self.token_size = codebook_size, token_size

    def forward(self, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:  # type: ignore[override]
        """Quantise z → latents in its shape, dictionary."""
        latents, loss, (_, _, indices) = super().forward(z)
        of_codebook, commitment = self.two_terms(loss)
        return latents, {
            "quantizer_loss": loss,
            "commitment_loss": commitment,
            "codebook_loss": of_codebook.detach(),
            "min_encoding_indices": indices,
        }


class LlamaGenQuantizer(Adapter):
    """`VectorQuantizer` of LlamaGen.

    A call returns (latents, losses, (perplexity, None, flat indices)). The four losses are the
    codebook's term with the gradient of both, the value of the commitment term, 0 for the entropy,
    and the share of the codevectors that the call used (0 unless show_usage). Their sum, which
    LlamaGen takes of the first three, is the loss. l2_norm: see TiTokQuantizer.
    """

    unused: ClassVar[Mapping[str, Any]] = {"entropy_loss_ratio": 0.0, "contras_loss": False}
    own = ("entropy_loss_ratio", "l2_norm", "show_usage")

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float,
        entropy_loss_ratio: float,
        l2_norm: bool,
        show_usage: bool,
        **settings: Any,
    ) -> None:
        settings = {**by_direction(l2_norm), **settings, "entropy_loss_ratio": entropy_loss_ratio}
        self.entropy_loss_ratio, self.l2_norm = entropy_loss_ratio, l2_norm
        self.show_usage = show_usage
        super().__init__(n_e, e_dim, beta, **settings)

    def forward(  # type: ignore[override]
        self, z: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, float | Tensor], tuple[Tensor, None, Tensor]]:
        """Quantise z → latents in its shape, four losses, (perplexity, None, indices)."""
        latents, loss, info = super().forward(z)
        usage = used(info[2]) / self.re_embed if self.show_usage else 0
        return latents, (*self.two_terms(loss), torch.zeros_like(loss), usage), info

    def get_codebook_entry(
        self, indices: Tensor, shape: Sequence[int] | None = None, channel_first: bool = True
    ) -> Tensor:
        """Get the latents of indices, with shape (b, c, h, w), or (b, h, w, c), if given."""
        if shape is None:
            return super().get_codebook_entry(indices)
        last = (shape[0], *shape[2:], shape[1]) if channel_first else tuple(shape)
        latents = super().get_codebook_entry(indices, last)
        return latents.movedim(self.quantizer.channel_dim, 1 if channel_first else -1)


class LossBreakdown(NamedTuple):
    """Losses by the names that SEED-Voken's Open-MAGVIT2 reads."""

    per_sample_entropy: Tensor  # 0: each unit matches one codevector
    codebook_entropy: Tensor  # of the call's matches, in nats
    commitment: Tensor  # the whole loss of the quantiser


class SeedVokenQuantizer(Adapter):
    """`VectorQuantizer2` of SEED-Voken's IBQ, and the breakdown of losses of its Open-MAGVIT2.

    l2_normalize matches by direction, as distance "cos". With return_loss_breakdown a call returns
    ((latents, 0, info), LossBreakdown): that model adds the commitment itself.
    """

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float,
        remap: Any = None,
        unknown_index: int | str = "random",
        sane_index_shape: bool = False,
        legacy: bool = True,
        l2_normalize: bool = False,
        **settings: Any,
    ) -> None:
        settings = {"distance": "cos" if l2_normalize else "l2", **settings, "legacy": legacy}
        settings |= {"remap": remap, "unknown_index": unknown_index}
        super().__init__(n_e, e_dim, beta, sane_index_shape=sane_index_shape, **settings)

    def forward(
        self,
        z: Tensor,
        temp: float | None = None,
        rescale_logits: bool = False,
        return_logits: bool = False,
        return_loss_breakdown: bool = False,
    ) -> tuple[Any, ...]:
        """Quantise z → latents, scalar loss, (perplexity, None, indices); or see the class."""
        latents, loss, info = super().forward(z, temp, rescale_logits, return_logits)
        if not return_loss_breakdown:
            return latents, loss, info
        zero = torch.zeros_like(loss)
        return (latents, zero, info), LossBreakdown(zero, info[0].log(), loss)


class UnitPermuter(nn.Module):
    """Permuter of taming-transformers over positions, which keeps the m units of each together."""

    def __init__(self, permuter: nn.Module, units: int) -> None:
        super().__init__()
        self.permuter = permuter
        self.units = units

    def forward(self, tokens: Tensor, reverse: bool = False) -> Tensor:
        """Permute tokens (b, n·m)."""
        permuted: Tensor = self.permuter(tokens.reshape(len(tokens), -1, self.units), reverse)
        return permuted.flatten(1)


def by_direction(l2_norm: bool) -> dict[str, str]:
    """Settings for latents and codevectors that other projects normalise, or do not."""
    return {"distance": "cos", "latent_norm": "unit"} if l2_norm else {"distance": "l2"}


def used(indices: Tensor) -> Tensor:
    """Number of different indices, a scalar."""
    return torch.tensor(len(torch.unique(indices)), device=indices.device)
