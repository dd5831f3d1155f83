"""LooCQuantizer: forward, encode, decode, and the update of the codebook."""

from __future__ import annotations

import inspect
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from . import usage
from .anchors import ANCHORS, STARTS, Anchors, better_of, fill_pool
from .checks import check_arguments, check_codebook, check_indices, check_latents, check_tensor
from .losses import StraightThrough, contrastive_loss
from .norms import WITH_AVERAGES, LatentNorm
from .passes import combine, match, scales
from .ranks import best_over_ranks, check_equal_on_ranks, sum_over_ranks
from .recomputation import (
    MOST_CALLS,
    PastCall,
    apart_from_selection,
    in_backward,
    past_state,
    remember,
)
from .search import widened
from .state import Described, complete_state, settle, start_value
from .units import SPLITS, enlargement, extrapolate, interpolate_back, num_units

Result = TypeVar("Result")


class Quantized(NamedTuple):
    """Result of a quantiser."""

    latents: Tensor  # (B, C, H, W) or the shape of z, with a straight-through gradient
    loss: Tensor  # scalar
    indices: Tensor  # (B, H, W, m), or the positions and m; int64 in [0, K)


# torch.export.save then takes a model that returns it.
torch.utils._pytree._register_namedtuple(Quantized, serialized_type_name=f"{__name__}.Quantized")


@dataclass
class PendingUpdate:
    """Statistics of the training calls since the last update of the codebook."""

    counts: Tensor  # (K,), int64, matches of each codevector
    sums: Tensor  # (K, d), of the features that matched it; zeros unless the update is "ema"
    candidates: Tensor  # (k,), int64, codevectors that the update may re-initialise
    anchors: Anchors  # best anchors of the candidates so far


def untraced(method: Callable[..., Result]) -> Callable[..., Result]:
    """Decorate a method that torch.compile calls as it is: it changes the state in each call.

    torch.compiler.disable does the same, but imports the compiler at once, which takes seconds.
    """

    def checked(module: nn.Module, z: Tensor) -> Result:
        check_tensor("latents", z)
        if torch._C._functorch.maybe_current_level() is not None:
            raise RuntimeError(
                f"{type(module).__name__} cannot be called within torch.func.grad, vmap, jvp or "
                "another transform of functions: it searches, and writes its state"
            )
        with apart_from_selection():
            return method(module, z)

    excluded: Callable[..., Result] = torch._disable_dynamo(checked)

    @wraps(method)
    def call(module: nn.Module, z: Tensor) -> Result:
        return (excluded if torch.compiler.is_compiling() else checked)(module, z)

    return call


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Compute in the types of the tensors; the device meta knows no autocast."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


class LooCQuantizer(Described, LatentNorm):
    """Compositional vector quantisation with one small shared codebook.

    Latents z are (B, C, H, W), or have any number of axes of positions, also none, and the channels
    at `channel_dim`. The indices have the shape of z without the channels, then m. "(B, …, C)"
    below stands for B, the positions and the channels, wherever these are.

    Args:
        num_embedding: number of codevectors K.
        embedding_dim: dimension d of a codevector; divides C·β². With d = C, without interpolation,
            this is the quantiser of CVQ-VAE; also with anchor "none" and distance "l2", plain VQ.
        commitment_cost: commitment weight λ.
        distance: "cos" or "l2", for the match.
        anchor: "closest", "random", "probrandom" or "none", the re-initialisation rule.
        split: "fixed" (contiguous channels) or "interval" (every m-th channel).
        interpolation_scale: β; 0 or 1 is off. Linear over one axis of positions, bilinear over two,
            trilinear over three, which makes C·βⁿ channels; not defined for other numbers n.
        first_batch: re-initialise in the first training batch only.
        contras_loss: add the contrastive loss in training; needs codebook_update "gradient".
        codebook_update: "gradient" or "ema", a moving average of the features that matched.
        ema_decay: decay of that average, per step.
        codebook_start: "uniform" in ±1/K; "features" or "kmeans", of the first training batch.
        latent_norm: normalisation of the latents to mean square one: "none", "unit" (each unit),
            "layer" (the channels of a position, mean removed), "batch" (each channel over the
            batch, mean removed) or "running" (each channel by its running mean and variance). The
            last two together with interpolation take (B, C, H, W) only.
        latent_channels: channels C of the latents, if no other number is to be accepted; required
            by latent_norm "batch" and "running".
        gradient: "straight_through" or "rotation", the gradient from the latents to z.
        channel_dim: axis of the channels: 1 for (B, C, H, W), −1 for (B, H, W, C), any but 0.
        rate_weight: the match minimises ‖z − e_k‖² + rate_weight·(−log₂ p_k); needs distance "l2".
            Codevectors too expensive to be used stay unused; anchors do not revive them.
            Entropy-constrained vector quantisation: Chou et al., IEEE Trans. ASSP 37 (1989).
        num_passes: R, how often the codebook is matched: first to the units, then R − 1 times to
            what is left of them, scaled to the same mean square. Each position has m·R indices, of
            the first pass first, and the latents are the sums of R codevectors. Needs
            latent_channels. Residual vector quantisation: Juang and Gray, ICASSP 1982.

    Attributes:
        search: a key of SEARCHES or "auto"; results are the same up to rounding.
        search_memory: MiB of similarities in memory at a time, None for the default.
        defer_update: while it is set, training calls only collect statistics. The next call without
            it updates usage and codebook from all of them, so that a batch can be passed in parts.
        config: the arguments above; `from_config` makes a new quantiser of them.

    State: parameter `codebook` (K, d) and the buffers
        usage: (K,), moving average p_k of how often each codevector is used.
        reinitialised: 1 after the first training batch, else 0.
        pool, pool_size: (K, d), past features for anchor "random".
        ema_count: (K,), moving average of matches per step; with codebook_update "ema".
        started: 1 if the codebook was made from features; unless codebook_start is "uniform".
        latent_mean, latent_variance, latent_steps: see `LatentNorm`.
        residual_power: (R,), running mean square of what each pass matches; if R > 1.
        settings: `config`. Loading a state raises RuntimeError where settings of `compared` differ:
            all by which latents have their indices. Those of training may differ.
    A codebook that is loaded without usage counts as used evenly, and a warning says so.

    A call in training mode updates the state, ignoring features that are not finite; in evaluation
    mode it changes nothing. Raises ValueError for arguments out of range, or an input that cannot
    be split into units. Under torch.distributed all processes have to make the same training calls
    (with any number of images each, also none) and write the same codebook: usage and anchors are
    those of all features. The contrastive loss compares the features of its own process.

    In a module of bfloat16 or float16, or under autocast, all is computed in float32; the latents
    have the type of z. Statistics are stored in float32 there too.
    """

    compared = (
        *("num_embedding", "embedding_dim", "distance", "split", "interpolation_scale"),
        *("latent_norm", "latent_channels", "rate_weight", "num_passes"),
    )
    codebook: nn.Parameter
    usage: Tensor
    reinitialised: Tensor
    pool: Tensor
    pool_size: Tensor
    ema_count: Tensor | None
    started: Tensor | None
    residual_power: Tensor | None

    def __init__(
        self,
        num_embedding: int,
        embedding_dim: int,
        *,
        commitment_cost: float = 0.25,
        distance: str = "cos",
        anchor: str = "closest",
        split: str = "fixed",
        interpolation_scale: int = 0,
        first_batch: bool = False,
        contras_loss: bool = False,
        codebook_update: str = "gradient",
        ema_decay: float = 0.8,
        codebook_start: str = "uniform",
        latent_norm: str = "none",
        latent_channels: int | None = None,
        gradient: str = "straight_through",
        rate_weight: float = 0.0,
        channel_dim: int = 1,
        num_passes: int = 1,
    ) -> None:
        super().__init__()
        self.num_embedding = num_embedding
        self.embedding_dim = embedding_dim
        self.commitment_cost = commitment_cost
        self.distance = distance
        self.anchor = anchor
        self.split = split
        self.interpolation_scale = interpolation_scale
        self.first_batch = first_batch
        self.contras_loss = contras_loss
        self.codebook_update = codebook_update
        self.ema_decay = ema_decay
        self.codebook_start = codebook_start
        self.latent_norm = latent_norm
        self.latent_channels = latent_channels
        self.gradient = gradient
        self.rate_weight = rate_weight
        self.channel_dim = channel_dim
        self.num_passes = num_passes
        self.search = "auto"
        self.search_memory: int | None = None
        self.defer_update = False
        self._warned = False
        check_arguments(self)
        units = 0  # m
        if latent_channels is not None:
            units = num_units(latent_channels, interpolation_scale, embedding_dim)

        by_ema, from_data = codebook_update == "ema", STARTS[codebook_start] is not None
        # Not by reset_parameters: loaders of diffusers make torch.nn.init do nothing meanwhile.
        bound = 1 / num_embedding
        start = torch.empty(num_embedding, embedding_dim).uniform_(-bound, bound)
        self.codebook = nn.Parameter(start, requires_grad=not by_ema)
        self.register_buffer("usage", torch.zeros(num_embedding))
        # Averages of buffers, as in torch.optim.swa_utils, fail with other types than floats.
        self.register_buffer("reinitialised", torch.zeros(()))
        self.register_buffer("pool", torch.zeros(num_embedding, embedding_dim))
        self.register_buffer("pool_size", torch.zeros(()))
        self._keep("ema_count", torch.zeros(num_embedding) if by_ema else None)
        self._keep("started", torch.zeros(()) if from_data else None)
        several = num_passes > 1
        self._keep("residual_power", torch.zeros(num_passes) if several else None)
        if latent_norm in WITH_AVERAGES:
            if latent_channels is None:
                raise ValueError(f"latent_norm {latent_norm!r} needs latent_channels")
            self._keep_averages((units, embedding_dim))
        self.register_buffer("settings", self._described().to(self.usage.device))
        self._forget_cached_state()
        self._unseen = self.codebook.is_meta  # until a state is loaded: tensors may be set alone

    @property
    def config(self) -> dict[str, Any]:
        """Arguments from which `from_config` makes a new quantiser."""
        return {name: getattr(self, name) for name in inspect.signature(LooCQuantizer).parameters}

    def reset_parameters(self) -> None:
        """Draw the codebook, and forget all statistics."""
        bound = 1 / self.num_embedding
        nn.init.uniform_(self.codebook, -bound, bound)
        for name, buffer in self.named_buffers(recurse=False):
            nn.init.constant_(buffer, start_value(name))
        self.settings.copy_(self._described())
        self._forget_cached_state()

    def _complete(self, state: dict[str, Any], prefix: str) -> None:
        complete_state(self, state, prefix)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._unseen = self.codebook.is_meta
        self._forget_cached_state()

    def _settle(self, device: torch.device | None = None) -> None:
        devices = (device, self.codebook.device, self.usage.device)
        real = [each for each in devices if each is not None and each.type != "meta"]
        if self._unseen and real:
            settle(self, real[0])

    def _forget_cached_state(self, *_: Any) -> None:
        """Reset everything that is derived from the state, which another may have replaced."""
        self._safe_steps = 0  # steps in which no codevector can need an anchor
        self._start_done = False
        self._pending: PendingUpdate | None = None
        self._past_calls: deque[PastCall] = deque(maxlen=MOST_CALLS)
        self._updates = 0

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; refuse the codebook of FSDP, which sets the pieces in this way."""
        if name == "codebook" and self.training:
            check_codebook(self, value)
        super().__setattr__(name, value)

    @untraced
    def forward(self, z: Tensor) -> Quantized:
        """Quantise z (B, …, C), of any float type; in training mode also update the codebook.

        The loss is λ·mean((sg[z_q] − z)²) + mean((z_q − sg[z])²) over the normalised units, without
        the second term if codebook_update is "ema", plus the contrastive loss if that is on. The
        latents equal `decode(indices)` before the update. Gradient checkpointing recomputes the
        call in a backward pass: it then reads the state of the call and updates nothing.
        """
        recomputed = self.training and in_backward()
        state = past_state(self, z) if recomputed else nullcontext()
        with without_autocast(z.device), state:
            units = self._cut(z, self.training)  # (B, …, m, d)
            features = units.flatten(0, -2)  # (N, d)
            constant = features.detach()
            if self.training and not recomputed:
                check_codebook(self, self._parameters.get("codebook"))
                self._warn_if_frozen(z)
                if not self._start_done:
                    self._start(constant)
            matched = match(self, constant, training=self.training and not recomputed)
            if self.training and not recomputed:
                remember(self, z)
            costs = (self.commitment_cost, float(self.codebook_update == "gradient"))
            quantized, loss = StraightThrough.apply(
                features, self.codebook, matched.indices, scales(self), *costs, self.gradient
            )  # (N, d), scalar
            if self.training:
                if self.contras_loss and len(constant):
                    settings = (self.distance, self.search_memory)
                    loss = loss + contrastive_loss(self.codebook, constant, *settings)
                if not recomputed:
                    self._collect(matched.features, matched.indices.flatten(), loss.detach())
            latents = self._join(quantized.view(units.shape)).to(z.dtype)
        return Quantized(latents, loss, self._by_position(matched.indices, units.shape))

    @untraced
    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        """Compute the indices (B, …, m), int64, of z (B, …, C), as in evaluation mode."""
        with without_autocast(z.device):
            units = self._cut(z)
            matched = match(self, units.flatten(0, -2), training=False)
            return self._by_position(matched.indices, units.shape)

    def decode(self, indices: Tensor) -> Tensor:
        """Compute the latents (B, …, C) of indices (B, …, m), of any integer type.

        With num_passes R, (B, …, m·R), or (B, …, m·r) of the first r passes. Others raise
        ValueError.
        """
        check_tensor("indices", indices)
        scale, dim, axes = self.interpolation_scale, self.embedding_dim, max(0, indices.dim() - 2)
        channels, factor = self.latent_channels, enlargement(scale, axes)
        units = None if channels is None else num_units(channels, scale, dim, axes)
        passes, slots = self.num_passes, units
        if units is not None and passes > 1:
            passes = min(max(1, indices.shape[-1] // units), passes)
            slots = units * passes
        indices = check_indices(indices, self.num_embedding, slots, any_rank=True)
        self._settle(indices.device)
        if indices.shape[-1] * dim % factor:
            shape = f"indices of shape {tuple(indices.shape)}"
            raise ValueError(f"{shape} are not (B, …, m) with m·{dim} a multiple of {factor}")
        by_pass = indices.chunk(passes, indices.dim() - 1)  # each (B, …, m)
        latents = self._join(combine(self.codebook, by_pass, scales(self)))
        return latents.to(self.codebook.dtype)

    def _cut(self, z: Tensor, training: bool = False) -> Tensor:
        """Cut z (B, …, C) into normalised units (B, …, m, d) of float32 or a wider type."""
        check_latents(self, z)
        self._settle(z.device)
        wide = torch.promote_types(self.codebook.dtype, torch.float32)
        channels_second = z.to(wide).movedim(self.channel_dim % z.dim(), 1)
        extrapolated = extrapolate(channels_second, self.interpolation_scale)  # (B, C·β², …)
        rows = extrapolated[..., None].flatten(2)[..., None]  # (B, C·β², H·W, 1)
        # This copy is several times faster than one after the permutation, which is then a view.
        rows = rows.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        units = self._normalise(SPLITS[self.split].cut(rows, self.embedding_dim), training)
        return units.view(z.shape[0], *extrapolated.shape[2:], *units.shape[-2:])

    def _join(self, units: Tensor) -> Tensor:
        """Join units (B, …, m, d) into latents (B, …, C)."""
        joined = SPLITS[self.split].join(units)  # (B, …, C·β²)
        joined = joined.movedim(joined.dim() - 1, 1)  # the ONNX exporter takes no −1 here
        z = interpolate_back(joined, self.interpolation_scale)
        return z.movedim(1, self.channel_dim % z.dim())

    def _by_position(self, indices: Tensor, shape: torch.Size) -> Tensor:
        """Arrange the indices (R, N) of units of this shape, (B, …, m, d): (B, …, R·m)."""
        return torch.cat([of_pass.view(shape[:-1]) for of_pass in indices], len(shape) - 2)

    def _warn_if_frozen(self, z: Tensor) -> None:
        """Warn once where a call updates the codebook although nothing has a gradient.

        A codebook that follows the features never has one; then the features tell.
        """
        by_ema = self.codebook_update == "ema"
        trained = z.requires_grad if by_ema else self.codebook.requires_grad
        moves = by_ema or self.anchor != "none"
        if moves and not self._warned and not (trained and torch.is_grad_enabled()):
            self._warned = True
            warnings.warn(
                "a quantiser in training mode moves its codevectors, also without gradients "
                "(requires_grad_(False), no_grad); call eval() to keep them as they are",
                stacklevel=2,
            )

    @torch.no_grad()
    def _start(self, features: Tensor) -> None:
        """Make the codebook from the features (N, d) of the first training call."""
        if self.latent_norm == "running" and not self.latent_steps:
            return  # no batch was finite yet, so these features are not normalised
        make = STARTS[self.codebook_start]
        if self.started is not None and make is not None and not self.started:
            codebook = make(self, features)
            if codebook is None:
                return
            self.codebook.copy_(codebook)
            self.started.fill_(True)
        self._start_done = True

    @torch.no_grad()
    def _collect(self, features: Tensor, indices: Tensor, loss: Tensor) -> None:
        """Collect the statistics of a training call, then update unless that is deferred."""
        pending, length = self._pending or self._begin_update(), self.num_embedding
        if loss.is_cuda or not loss.isfinite():  # reading the loss on CUDA would synchronise
            finite = features.square().sum(1).isfinite()
            features = features.where(finite[:, None], torch.nan)
            indices = indices.where(finite, length)
        pending.counts += usage.count_indices(indices, length + 1)[:-1]
        if self.codebook_update == "ema":
            pending.sums += usage.sums_by_index(features, indices, length + 1)[:-1]
        propose = ANCHORS[self.anchor]
        if propose is not None and self._may_reinitialise():
            if self.anchor == "random":
                fill_pool(self, features)
            if len(pending.candidates):
                proposed = propose(self, features, widened(self.codebook[pending.candidates]))
                pending.anchors = better_of(pending.anchors, proposed)
        self._pending = pending
        if not self.defer_update:
            self._update(pending)
            self._pending = None

    def _begin_update(self) -> PendingUpdate:
        """Choose the candidates: codevectors whose rate after the update may not be negligible."""
        candidates = torch.empty(0, dtype=torch.int64, device=self.usage.device)
        if self._safe_steps > 0:
            self._safe_steps -= 1
        elif self._may_reinitialise():
            candidates = usage.reinit_candidates(self.usage)
            if not len(candidates):
                self._safe_steps = usage.num_safe_steps(self.usage)
        codevectors = widened(self.codebook[candidates])
        return PendingUpdate(
            counts=torch.zeros_like(self.usage, dtype=torch.int64),
            sums=torch.zeros_like(widened(self.codebook)),
            candidates=candidates,
            anchors=Anchors(codevectors.new_full((len(candidates),), -torch.inf), codevectors),
        )

    def _may_reinitialise(self) -> bool:
        return self.anchor != "none" and not (self.first_batch and bool(self.reinitialised))

    def _update(self, pending: PendingUpdate) -> None:
        """Update usage p_k and codebook: e_k ← (1 − a_k)·e_k + a_k·anchor_k, its last write."""
        self._updates += 1
        if self._updates.bit_count() == 1:  # 1, 2, 4, 8, … updates
            check_equal_on_ranks(self.codebook)
        counts = sum_over_ranks(pending.counts)
        if self.ema_count is not None:
            sums = sum_over_ranks(pending.sums)
            known = self.ema_count.any()  # else they follow from the usage, which is 0 at first
            self.ema_count.copy_(torch.where(known, self.ema_count, self.usage * counts.sum()))
            usage.average_features(self.codebook, self.ema_count, counts, sums, self.ema_decay)
        usage.average_usage(self.usage, counts)
        if self._may_reinitialise():
            self.reinitialised.fill_(True)
        if len(pending.candidates):
            codevectors = widened(self.codebook[pending.candidates])
            target = best_over_ranks(*pending.anchors)
            rate = usage.reinit_rate(self.usage)[pending.candidates, None].to(codevectors.dtype)
            moved = codevectors.lerp(target, rate)
            self.codebook[pending.candidates] = moved.to(self.codebook.dtype)
