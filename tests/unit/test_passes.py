"""Passes of one codebook over what earlier passes have left (num_passes)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from modules import LooCPlugin, LooCQuantizer

PASSES = 3
settings = pytest.mark.parametrize(
    "setting",
    [
        {"distance": "l2"},
        {"distance": "l2", "latent_norm": "running", "codebook_update": "ema"},
        {"distance": "l2", "rate_weight": 0.05, "latent_norm": "unit"},
        {"distance": "cos", "split": "interval", "anchor": "random"},
        {"distance": "l2", "interpolation_scale": 2, "latent_norm": "batch"},
    ],
    ids=lambda setting: "-".join(map(str, setting.values())),
)


def trained(passes: int = PASSES, steps: int = 30, **setting: Any) -> LooCQuantizer:
    """Make a quantiser that has seen some batches."""
    torch.manual_seed(0)
    quantizer = LooCQuantizer(
        16, 2, latent_channels=4, codebook_start="features", num_passes=passes, **setting
    )
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.01)
    for _ in range(steps):
        quantizer(latents().requires_grad_()).loss.backward()
        if quantizer.codebook.grad is not None:
            optimizer.step()
            optimizer.zero_grad()
    return quantizer.eval()


def latents(images: int = 8) -> Tensor:
    return 3 * torch.randn(images, 4, 5, 6) + 1


@settings
def test_each_pass_brings_the_latents_closer(setting: dict[str, Any]) -> None:
    """`decode` takes the indices of the first passes too; those of all give the latents."""
    quantizer, z = trained(**setting), latents()
    found = quantizer(z)
    assert torch.equal(found.indices, quantizer.encode(z))
    assert torch.equal(found.latents, quantizer.decode(found.indices))
    units = found.indices.shape[-1] // PASSES
    assert found.indices.shape == (8, 5, 6, PASSES * units)
    if "interpolation_scale" in setting or setting["distance"] == "cos":
        return  # the error of the units is not that of the latents, or not what is minimised
    wanted = quantizer._join(quantizer._cut(z))
    quantizer.requires_grad_(False)
    errors = [
        float((quantizer.decode(found.indices[..., : units * passes]) - wanted).square().mean())
        for passes in range(1, PASSES + 1)
    ]
    assert errors[2] < 0.8 * errors[1] < 0.64 * errors[0]


@settings
def test_the_first_pass_is_that_of_a_quantiser_of_one(setting: dict[str, Any]) -> None:
    quantizer, z = trained(**setting), latents()
    state = quantizer.state_dict()
    del state["residual_power"], state["settings"]
    one = trained(1, 0, **setting)
    one.load_state_dict(state)
    indices = one.encode(z)
    assert torch.equal(indices, quantizer.encode(z)[..., : indices.shape[-1]])
    assert torch.equal(one.decode(indices), quantizer.decode(indices))


@pytest.mark.parametrize("distance", ["l2", "cos"])
def test_passes_match_what_is_left(distance: str) -> None:
    """Against the definition, written out with all distances."""
    quantizer = trained(distance=distance, rate_weight=0)
    codebook, power = quantizer.codebook.detach(), quantizer.residual_power
    assert power is not None
    left = quantizer._cut(z := latents()).flatten(0, -2)
    expected = []
    for number in range(PASSES):
        scale = (power[number] / power[0]).sqrt()
        if distance == "cos":
            nearest = torch.cosine_similarity(left[:, None], codebook[None], dim=-1).argmax(1)
        else:
            nearest = torch.cdist(left / scale, codebook).argmin(1)
        expected.append(nearest.view(8, 5, 6, 2))
        left = left - scale * codebook[nearest]
    agreement = (quantizer.encode(z) == torch.cat(expected, -1)).float().mean()
    assert agreement > 0.999  # two distances may round to the same


def test_power_is_the_mean_square_of_what_is_left() -> None:
    """The first call sets it; then it is a running average."""
    quantizer = LooCQuantizer(16, 2, latent_channels=4, num_passes=2, anchor="none", distance="l2")
    z = [latents() for _ in range(2)]
    squares = []
    for batch in z:
        found = quantizer(batch.requires_grad_())
        first = quantizer.decode(found.indices[..., :2])
        squares.append(torch.stack([batch.square().mean(), (batch - first).square().mean()]))
    expected = squares[0].lerp(squares[1], 0.1)
    torch.testing.assert_close(quantizer.residual_power, expected.detach())
    before = quantizer.residual_power.clone()  # type: ignore[union-attr]
    quantizer(torch.full_like(z[0], torch.nan))
    assert torch.equal(quantizer.residual_power, before)  # type: ignore[arg-type]


def test_gradients_are_those_of_the_definition() -> None:
    """Autograd differentiates the sum of all passes; the latents pass their gradient on once."""
    quantizer = trained(commitment_cost=0.5).train()
    quantizer.anchor = "none"
    z, weight = latents().requires_grad_(), latents()
    latent, loss, indices = quantizer(z)
    ((latent * weight).sum() + loss).backward()
    codebook = quantizer.codebook.detach().clone().requires_grad_()
    inputs = z.detach().clone().requires_grad_()
    power = quantizer.residual_power
    assert power is not None
    scale = (power / power[0]).sqrt()
    units = inputs.permute(0, 2, 3, 1).unflatten(-1, (2, 2))
    total = sum(
        scale[number] * codebook[indices[..., 2 * number : 2 * number + 2]]
        for number in range(PASSES)
    )
    assert isinstance(total, Tensor)
    expected = 0.5 * (total.detach() - units).square().mean()
    expected = expected + (total - units.detach()).square().mean()
    through = (units * weight.permute(0, 2, 3, 1).unflatten(-1, (2, 2))).sum()
    (expected + through).backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(quantizer.codebook.grad, codebook.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(z.grad, inputs.grad)


def test_wrong_numbers_of_indices_and_passes_are_refused() -> None:
    quantizer = trained()
    for slots in (1, 5, 8):
        with pytest.raises(ValueError, match=rf"\(1, 2, 2, {slots}\) are not \(B, H, W, "):
            quantizer.decode(torch.zeros(1, 2, 2, slots, dtype=torch.int64))
    with pytest.raises(ValueError, match="num_passes 2 needs latent_channels"):
        LooCQuantizer(16, 2, num_passes=2)
    with pytest.raises(ValueError, match="num_passes 0 is less than 1"):
        LooCQuantizer(16, 2, num_passes=0)


def test_the_plugin_hands_on_all_indices() -> None:
    plugin = LooCPlugin(16, 8, embedding_dim=4, num_passes=2).eval()
    z = torch.randn(2, 8, 3, 5)
    found, _, (_, _, indices) = plugin(z)
    assert plugin.units == 4
    assert indices.shape == (2 * 3 * 5 * 4,)
    assert torch.equal(plugin.get_codebook_entry(indices, (2, 3, 5, 8)), found)
    again = LooCPlugin.from_config(plugin.config)
    again.load_state_dict(plugin.state_dict())
    assert torch.equal(again.eval()(z)[0], found)
