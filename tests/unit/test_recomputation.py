"""Gradient checkpointing around the quantiser; parametrizations and torch.func are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import weight_norm as old_weight_norm
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from modules import LooCPlugin, LooCQuantizer
from modules.quantizers.looc.recomputation import MOST_CALLS


class Host(nn.Module):
    """Small autoencoder around the quantiser."""

    def __init__(self, **setting: Any) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, 8, 1)
        self.quantizer = LooCQuantizer(16, 4, latent_channels=8, **setting)
        self.decoder = nn.Conv2d(8, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        latents, loss, _ = self.quantizer(self.encoder(images))
        error: Tensor = (self.decoder(latents) - images).square().mean() + loss
        return error


# Selective checkpointing keeps the results of these operations.
SELECTED = [torch.ops.aten.convolution.default, torch.ops.aten.addmm.default]
FORMS: dict[str, dict[str, Any]] = {
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "selective": {
        "use_reentrant": False,
        "context_fn": partial(create_selective_checkpoint_contexts, SELECTED),
    },
}


def train(form: str | None, parts: int, setting: dict[str, Any]) -> list[Tensor]:
    """Gradients and state of each step; without a form there is no checkpointing."""
    torch.manual_seed(0)
    host = Host(**setting)
    optimizer = torch.optim.SGD([p for p in host.parameters() if p.requires_grad], lr=0.1)
    seen = []
    for step in range(4):
        host.zero_grad()
        total = torch.zeros(())
        for _ in range(parts):  # all forward passes before the one backward pass
            images = torch.randn(4, 3, 5, 5).mul_(1 + step).requires_grad_()
            if form is None:
                total = total + host(images)
            else:
                total = total + checkpoint(host, images, **FORMS[form])
        total.backward()
        seen += [p.grad.clone() for p in host.parameters() if p.grad is not None]
        optimizer.step()
        seen += [value.clone() for value in host.quantizer.buffers()]
        seen += [p.detach().clone() for p in host.parameters()]
    return seen


SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"codebook_update": "ema", "codebook_start": "features", "latent_norm": "running"},
    {"contras_loss": True, "latent_norm": "batch"},
    {"anchor": "random", "interpolation_scale": 2},
    {"anchor": "probrandom", "distance": "l2", "rate_weight": 0.1, "gradient": "rotation"},
    {"num_passes": 3, "latent_norm": "running"},
)


@pytest.mark.filterwarnings("ignore:a quantiser in training mode")  # reentrant: no_grad at first
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: "-".join(setting) or "paper")
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_gradient_checkpointing_changes_nothing(
    form: str, parts: int, setting: dict[str, Any]
) -> None:
    """Neither the state nor a gradient, and the codebook is updated once for each call."""
    expected = train(None, parts, setting)
    found = train(form, parts, setting)
    # Where parts add up, the reentrant form adds the two gradients of the contrastive codebook in
    # another order.
    close = {"rtol": 1e-5, "atol": 1e-6} if setting.get("contras_loss") else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(found, expected, **close)


def test_a_recomputation_of_a_call_long_ago_is_an_error() -> None:
    host = Host()
    total = torch.zeros(())
    for _ in range(MOST_CALLS + 1):
        total = total + checkpoint(host, torch.randn(2, 3, 4, 4), use_reentrant=False)
    with pytest.raises(RuntimeError, match="not one of the last 8, or had other latents"):
        total.backward()


def test_calls_are_remembered_for_checkpointing_alone() -> None:
    host, images = Host(), torch.randn(2, 3, 4, 4)
    host(images).backward()
    assert not host.quantizer._past_calls
    checkpoint(host, images, use_reentrant=False)
    assert len(host.quantizer._past_calls) == 1
    assert len(copy.deepcopy(host).quantizer._past_calls) == 1
    host.load_state_dict(host.state_dict())
    assert not host.quantizer._past_calls


PARAMETRIZATIONS: tuple[Callable[[nn.Module, str], object], ...] = (
    parametrizations.weight_norm,
    parametrizations.orthogonal,
    old_weight_norm,
    lambda module, name: prune.l1_unstructured(module, name, 0.5),
)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("parametrize", PARAMETRIZATIONS)
@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_a_codebook_that_is_computed_is_refused(
    update: str, parametrize: Callable[[nn.Module, str], object]
) -> None:
    """Not where training writes nothing into it."""

    def train_with(**setting: Any) -> LooCQuantizer:
        quantizer = LooCQuantizer(16, 4, **setting)
        parametrize(quantizer, "codebook")
        quantizer(torch.randn(2, 8, 3, 3)).loss.backward()
        return quantizer

    with pytest.raises(
        RuntimeError, match=r"the codebook is .*, so that its update .* weight_norm"
    ):
        train_with(codebook_update=update)
    trained = train_with(anchor="none").parameters()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


def test_a_functional_call_of_training_is_refused() -> None:
    """It would update a tensor of the caller; in evaluation mode nothing is written."""
    quantizer, z = LooCQuantizer(16, 4), torch.randn(2, 8, 3, 3)
    other = {"codebook": torch.randn(16, 4)}
    with pytest.raises(RuntimeError, match="the codebook is a Tensor, so that its update"):
        functional_call(quantizer, other, (z,))
    found = functional_call(quantizer.eval(), other, (z,)).indices
    quantizer.load_state_dict(other, strict=False)
    assert torch.equal(found, quantizer(z).indices)


def test_transforms_of_functions_are_refused() -> None:
    z = torch.randn(3, 2, 8, 3, 3)
    for module in (LooCQuantizer(16, 4).eval(), LooCPlugin(16, 8)):
        calls = (
            lambda module=module: vmap(module)(z),
            lambda module=module: grad(lambda x: module(x)[1])(z[0]),
            lambda module=module: jvp(module, (z[0],), (z[0],)),
        )
        for call in calls:
            with pytest.raises(RuntimeError, match=r"cannot be called within torch\.func\.grad"):
                call()
    with pytest.raises(RuntimeError, match=r"cannot be called within torch\.func\.grad"):
        vmap(LooCQuantizer(16, 4).encode)(z)
