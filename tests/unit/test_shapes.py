"""Latents of any rank, channels first or last, are quantised as their positions in a (B, C, H, W).

Each property is tried on shapes drawn at random.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modules import LooCPlugin, LooCQuantizer
from modules.quantizers.looc.units import MODES, extrapolate, interpolate_back

SETTINGS: dict[str, dict[str, Any]] = {
    "paper": {},
    "interval": {"split": "interval", "distance": "l2", "anchor": "random"},
    "contrast": {"contras_loss": True, "anchor": "probrandom", "gradient": "rotation"},
    "batch": {"latent_norm": "batch", "codebook_update": "ema", "codebook_start": "features"},
    "running": {"latent_norm": "running", "codebook_start": "kmeans", "latent_channels": 8},
    "layer": {"latent_norm": "layer", "distance": "l2", "rate_weight": 0.1},
    "passes": {"num_passes": 3, "split": "interval", "codebook_update": "ema"},
}
every_setting = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)


def shapes(number: int = 8) -> Iterator[tuple[tuple[int, ...], int]]:
    """Draw a shape of latents with 8 channels, and the axis of these; 0 to 4 axes of positions."""
    draw = random.Random(0)
    for count in range(number):
        positions = [draw.randint(1, 4) for _ in range(count % 5)]
        channel_dim = draw.choice([1, -1, draw.randint(1, 1 + len(positions))])
        shape = [draw.randint(1, 5), *positions]
        shape.insert(len(shape) if channel_dim == -1 else channel_dim, 8)
        yield tuple(shape), channel_dim


def make(channel_dim: int = 1, **setting: Any) -> LooCQuantizer:
    torch.manual_seed(0)
    made = LooCQuantizer(16, 4, **{"latent_channels": 8, **setting}, channel_dim=channel_dim)
    torch.nn.init.normal_(made.codebook)
    return made


def as_images(z: Tensor, channel_dim: int) -> Tensor:
    """The same positions as (B, C, P, 1)."""
    z = z.movedim(channel_dim, 1)
    return z.reshape(len(z), 8, math.prod(z.shape[2:]), 1)


@every_setting
def test_any_rank_equals_two_axes(setting: dict[str, Any]) -> None:
    """Bit for bit: latents, loss, indices, gradients and state, also of a batch in parts."""
    for shape, channel_dim in shapes():
        ours, images = make(channel_dim, **setting), make(**setting)
        generator = torch.Generator().manual_seed(1)
        for step in range(4):
            z = torch.randn(shape, generator=generator)
            weights = torch.randn(shape, generator=generator)
            weights_of_images = as_images(weights, channel_dim)
            results = []
            for quantizer in (ours, images):
                torch.manual_seed(step)
                quantizer.defer_update = step == 1
                quantizer.zero_grad()
                leaf = z.clone().requires_grad_()
                given = as_images(leaf, channel_dim) if quantizer is images else leaf
                latents, loss, indices = quantizer(given)
                onto = weights_of_images if quantizer is images else weights
                (loss + (latents * onto).sum()).backward()
                assert leaf.grad is not None
                results.append([latents, loss, indices, leaf.grad, quantizer.codebook.grad])
            of_ours, of_images = results
            positions = [
                side for axis, side in enumerate(shape) if axis != channel_dim % len(shape)
            ]
            assert of_ours[0].shape == shape
            assert of_ours[2].shape == (*positions, 2 * ours.num_passes)
            of_ours[0] = as_images(of_ours[0], channel_dim)
            of_ours[2] = of_ours[2].view(of_images[2].shape)
            for one, other in zip(of_ours, of_images):
                assert one is other is None or torch.equal(one, other), shape
            for name, value in images.state_dict().items():
                if name != "settings":  # they have the channel_dim
                    assert torch.equal(ours.state_dict()[name], value), (name, shape)
        latents, _, indices = ours.eval()(z)
        assert torch.equal(ours.encode(z), indices)
        assert torch.equal(ours.decode(indices), latents)


@pytest.mark.parametrize("split", ["fixed", "interval"])
@pytest.mark.parametrize("scale", [2, 3])
@pytest.mark.parametrize("axes", MODES)
def test_interpolation_over_one_and_three_axes(axes: int, scale: int, split: str) -> None:
    """Output equals decoding; m = C·βⁿ/d; the gradient passes through both interpolations."""
    for channel_dim in (1, -1):
        quantizer = make(channel_dim, interpolation_scale=scale, split=split).eval()
        first = torch.randn(2, 8, *(3, 4, 2)[:axes])
        z = first.movedim(1, channel_dim).clone().requires_grad_()
        latents, _, indices = quantizer(z)
        assert latents.shape == z.shape
        assert indices.shape == (2, *first.shape[2:], 8 * scale**axes // 4)
        torch.testing.assert_close(quantizer.decode(indices), latents, rtol=0, atol=1e-6)
        assert torch.equal(quantizer.encode(z), indices)
        direction = torch.randn(first.shape)
        moved = direction.movedim(1, channel_dim)
        (gradient,) = torch.autograd.grad((latents * moved).sum(), z)
        smooth = interpolate_back(extrapolate(z.movedim(channel_dim, 1), scale), scale)
        (expected,) = torch.autograd.grad((smooth * direction).sum(), z)
        torch.testing.assert_close(gradient, expected)
        latents, loss, indices = quantizer.train()(z[:0])
        (latents.sum() + loss).backward()
        assert (latents.shape, quantizer.decode(indices).shape) == (z[:0].shape,) * 2


@pytest.mark.parametrize("scale", [2, 3])
def test_interpolation_follows_one_rule(scale: int) -> None:
    """Channel c·β + i is every β-th value from i; a constant axis more repeats what is below it."""
    z = torch.randn(2, 3, 5)
    upsampled = F.interpolate(z, scale_factor=scale, mode="linear", align_corners=False)
    extrapolated = extrapolate(z, scale)
    for channel in range(3 * scale):
        expected = upsampled[:, channel // scale, channel % scale :: scale]
        assert torch.equal(extrapolated[:, channel], expected)
    for lower in (z, torch.randn(2, 3, 4, 5)):
        axes = lower.dim() - 2
        higher = extrapolate(lower.unsqueeze(2), scale).squeeze(2)
        groups = higher.unflatten(1, (3, scale, scale**axes))
        for group in groups.unbind(2):
            torch.testing.assert_close(group.flatten(1, 2), extrapolate(lower, scale))
        torch.testing.assert_close(
            interpolate_back(extrapolate(lower.unsqueeze(2), scale), scale).squeeze(2),
            interpolate_back(extrapolate(lower, scale), scale),
        )


def test_what_does_not_fit_is_named() -> None:
    z = torch.randn(2, 8, 8, 32)
    for quantizer, wrong, message in (
        (LooCQuantizer(64, 4, latent_channels=32), z, r"8 channels at channel_dim 1, not .* 32"),
        (make(-1), z, r"\(2, 8, 8, 32\) have 32 channels at channel_dim -1, not latent_channels 8"),
        (make(3), z[..., 0], r"shape \(2, 8, 8\) have no channels at channel_dim 3"),
        (make(-3), z[..., 0], r"shape \(2, 8, 8\) have no channels at channel_dim -3"),
        (make(), z[0, 0, 0], r"shape \(32,\) have no channels at channel_dim 1"),
        (make(interpolation_scale=2), z[:, :, 0, 0], "scale 2 needs 1 to 3 axes .*, not 0"),
        (make(interpolation_scale=2), z[..., None, None, :1], "scale 2 needs 1 to 3 .*, not 4"),
        (
            make(interpolation_scale=2, latent_norm="running"),
            z[..., 0],
            r"'running' with interpolation_scale 2 is for \(B, C, H, W\), not .* \(2, 8, 8\)",
        ),
    ):
        for call in (quantizer, quantizer.encode):
            with pytest.raises(ValueError, match=message):
                call(wrong)
    for scale, shape, message in (
        (0, (2,), r"shape \(2,\) are not \(B, …, 2\)"),
        (0, (2, 5, 3), r"shape \(2, 5, 3\) are not \(B, …, 2\)"),
        (2, (2, 5, 2), r"shape \(2, 5, 2\) are not \(B, …, 4\)"),
        (2, (2, 4), "scale 2 needs 1 to 3 axes .*, not 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make(interpolation_scale=scale).decode(torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(ValueError, match="channel_dim 0 is the axis of the batch"):
        make(0)


@pytest.mark.parametrize("sane_index_shape", [True, False])
@pytest.mark.parametrize("embedding_dim", [4, 8])
def test_plugin_of_any_rank(embedding_dim: int, sane_index_shape: bool) -> None:
    """Indices as returned decode to the latents, with the shape (b, …, c) and without."""
    units = 8 // embedding_dim
    for shape, channel_dim in shapes():
        torch.manual_seed(0)
        plugin = LooCPlugin(
            *(16, 8),
            sane_index_shape=sane_index_shape,
            embedding_dim=embedding_dim,
            channel_dim=channel_dim,
        ).eval()
        z = torch.randn(shape)
        latents, _, (_, _, indices) = plugin(z)
        last = latents.movedim(channel_dim, -1)
        positions = last.shape[:-1]
        if sane_index_shape:
            assert indices.shape == (positions if units == 1 else (*positions, units))
            if units > 1 or indices.dim() != 4 or indices.shape[-1] > 1:
                assert torch.equal(plugin.embed_code(indices), latents)
            if len(shape) > 2:
                found = plugin.get_codebook_entry(indices)
                assert torch.equal(found.reshape(last.shape), last)
        assert torch.equal(plugin.get_codebook_entry(indices, last.shape), latents)
        flat = plugin.get_codebook_entry(indices.flatten())
        assert torch.equal(flat, last.reshape(-1, 8))


@pytest.mark.parametrize("axes", MODES)
def test_plugin_interpolates_over_any_axes(axes: int) -> None:
    plugin = LooCPlugin(16, 8, interpolation_scale=2).eval()
    latents, _, (_, _, indices) = plugin(torch.randn(2, 8, *(3, 4, 5)[:axes]))
    found = plugin.get_codebook_entry(indices, latents.movedim(1, -1).shape)
    torch.testing.assert_close(found, latents, rtol=0, atol=1e-6)
    code = indices.view(2, *latents.shape[2:], -1)
    torch.testing.assert_close(plugin.embed_code(code), latents, rtol=0, atol=1e-6)
