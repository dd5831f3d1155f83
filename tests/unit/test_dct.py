"""The DCT network: what it is before any training, and that training reaches all of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from modules import Autoencoder, make_model
from modules.dct import block_dct
from utils.flags.arguments import build_model_config


def network(in_channels: int = 3, **flags: Any) -> Autoencoder:
    known = {"hidden_size": 8, "num_residual_hidden": 4, "latent_channels": 48}
    config = {"model": "dct", "quantizer": "none", **known, **flags}
    return make_model(build_model_config(config, in_channels))


@pytest.mark.parametrize("in_channels", [1, 2, 3])
@pytest.mark.parametrize("side", [2, 4, 8])
def test_the_basis_is_orthonormal_and_ordered(in_channels: int, side: int) -> None:
    basis, spread = block_dct(in_channels, side)
    rows = basis.flatten(1)
    assert rows.shape == (in_channels * side**2, in_channels * side**2)
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), atol=1e-5, rtol=0)
    assert torch.equal(spread, spread.sort(descending=True).values)
    if in_channels != 2:  # the largest is the mean of the block, over all colours
        torch.testing.assert_close(basis[0], torch.full_like(basis[0], len(rows) ** -0.5))


@pytest.mark.parametrize(("in_channels", "side"), [(1, 4), (3, 4), (3, 2)])
def test_a_new_network_with_all_coefficients_loses_nothing(in_channels: int, side: int) -> None:
    model = network(in_channels, block_size=side, latent_channels=in_channels * side**2)
    images = torch.rand(2, in_channels, 16, 24) * 2 - 1
    torch.testing.assert_close(model(images)[0], images, atol=1e-5, rtol=0)


def test_a_new_network_keeps_the_largest_coefficients() -> None:
    model = network(latent_channels=5)
    basis, _ = block_dct(3, 4)
    images = torch.rand(1, 3, 4, 4) * 2 - 1
    kept = basis[:5].flatten(1)
    expected = (kept.T @ (kept @ images.flatten())).view(1, 3, 4, 4)
    torch.testing.assert_close(model(images)[0], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.latents(images).flatten(), kept @ images.flatten())


def test_more_channels_than_coefficients_are_free() -> None:
    model = network(in_channels=1, latent_channels=20)
    images = torch.rand(1, 1, 8, 8) * 2 - 1
    torch.testing.assert_close(model(images)[0], images, atol=1e-5, rtol=0)
    assert model.latents(images)[:, 16:].abs().max() == 0


def test_training_reaches_every_weight() -> None:
    torch.manual_seed(0)
    model = network(quantizer="looc", anchor="closest", embedding_dim=16, num_embedding=8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    before = {name: value.clone() for name, value in model.named_parameters()}
    for _ in range(2):  # the corrections start at 0, which stops gradients in the first step
        optimizer.zero_grad()
        reconstruction, quantized = model(images)
        ((reconstruction - images).square().mean() + quantized.loss).backward()
        optimizer.step()
    same = [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    assert not same
