"""Gradient checkpointing: a backward pass recomputes training calls, which must not count again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import _unsafe_preserve_version_counter
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

if TYPE_CHECKING:
    from .quantizer import LooCQuantizer

MOST_CALLS = 8  # training calls between the first forward pass and its backward pass
SAMPLE = 256  # latents by which a call is recognised
# State that the match reads.
READ = ("codebook", "usage", "latent_mean", "latent_variance", "residual_power")


class PastCall(NamedTuple):
    """Training call that may be recomputed: some of its latents, and the state that it read."""

    shape: torch.Size
    sample: Tensor  # (SAMPLE,) or fewer
    state: Mapping[str, Tensor]


def remember(quantizer: LooCQuantizer, z: Tensor) -> None:
    """Remember the state of a training call, if gradient checkpointing may recompute it."""
    if not torch.is_grad_enabled() or saves_by_hooks():
        quantizer._past_calls.append(PastCall(z.shape, sample_of(z), state_of(quantizer)))


@contextmanager
def past_state(quantizer: LooCQuantizer, z: Tensor) -> Iterator[None]:
    """Put the state that the training call with latents z read back for a while."""
    sample, found, least = sample_of(z), None, torch.inf
    for call in quantizer._past_calls:
        if call.shape == z.shape:
            difference = float((call.sample - sample).abs().sum())
            if difference <= least:  # the latest of equal ones
                found, least = call, difference
    if found is None or least > 0.01 * float(sample.abs().sum()):
        raise RuntimeError(
            f"a backward pass recomputes a training call with latents {tuple(z.shape)} that is "
            f"not one of the last {MOST_CALLS}, or had other latents"
        )
    now = state_of(quantizer)
    write(quantizer, found.state)
    try:
        yield
    finally:
        write(quantizer, now)


def in_backward() -> bool:
    """Return whether this is part of a backward pass, so that a call is a recomputation."""
    return torch._C._current_graph_task_id() != -1


def saves_by_hooks() -> bool:
    """Return whether autograd passes what it saves to hooks, as gradient checkpointing does.

    True before PyTorch 2.8, where one cannot see it.
    """
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(True) is not None


def apart_from_selection() -> AbstractContextManager[Any]:
    """Hide a call from selective checkpointing, which expects the same operations again.

    A recomputation has others: it reads the past state and updates nothing.
    """
    modes = _get_current_dispatch_mode_stack()
    selective = any(type(mode).__module__ == "torch.utils.checkpoint" for mode in modes)
    return _disable_current_modes() if selective else nullcontext()


def sample_of(z: Tensor) -> Tensor:
    """Latents at regular distances, those that are not finite as 0."""
    flat = z.detach().reshape(-1)
    return flat[:: max(1, len(flat) // SAMPLE)].float().nan_to_num(0, 0, 0)


def state_of(quantizer: LooCQuantizer) -> dict[str, Tensor]:
    """Copy the state that the match reads."""
    values = {name: getattr(quantizer, name, None) for name in READ}
    return {name: value.detach().clone() for name, value in values.items() if value is not None}


@torch.no_grad()
def write(quantizer: LooCQuantizer, state: Mapping[str, Tensor]) -> None:
    """Write a state in place, unseen by autograd, which finds every value as it was saved."""
    with _unsafe_preserve_version_counter(quantizer.codebook):
        for name, value in state.items():
            getattr(quantizer, name).copy_(value)
