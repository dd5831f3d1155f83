"""Latent diffusion: its training target and its samplers against diffusers' own."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from commands import train
from datasets.codes import StoredCodes
from datasets.config import DataConfig
from modules import ModelConfig, make_model
from modules.checkpoint import stored_flags
from modules.priors.config import PriorConfig
from modules.priors.sampling import Known, Sampling
from modules.priors.spaces import LatentSpace
from utils.flags.arguments import build, build_model_config, with_preset, with_recipe
from utils.flags.presets import PRIOR_PRESETS
from utils.generation.config import PriorTrainingConfig
from utils.training.config import TrainConfig
from utils.training.losses import loss_configs

diffusers = pytest.importorskip("diffusers")


def make(side: int = 8, num_classes: int = 0, channels: int = 8, **flags: Any) -> Any:
    torch.manual_seed(0)
    config = PriorConfig(
        prior="diffusion", unet_channels=channels, unet_blocks=1, unet_head_channels=4, **flags
    )
    model: Any = config.spec.make(config, LatentSpace(3, side, side), num_classes)
    model.measure([4 * torch.randn(50, 3, side, side) + 1])
    return model.eval()


def sample(
    model: Any, labels: Tensor, seed: int = 0, known: Known | None = None, **how: Any
) -> Tensor:
    generators = [torch.Generator().manual_seed(seed + number) for number in range(len(labels))]

    def noise(*sizes: int) -> Tensor:
        draws = [torch.rand(sizes, generator=each, dtype=torch.float64) for each in generators]
        return torch.stack(draws)

    spec = PriorConfig(prior="diffusion").spec
    return spec.sample(model, labels, noise, Sampling(**{"sampling_steps": 5, **how}), known)


@cache
def trained() -> tuple[Any, Tensor]:
    """A prior that has seen one image only, and this image, (1, 3, 4, 4)."""
    model, image = make(4, channels=32), torch.randn(1, 3, 4, 4)
    model.measure([image])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for number in range(300):
        noise, levels, _ = model.draws(32, torch.Generator().manual_seed(number))
        loss = model(image.expand(32, -1, -1, -1), torch.full((32,), -1), noise, levels).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, image


def test_latents_are_scaled_by_their_statistics() -> None:
    latents = torch.randn(50, 3, 8, 8) * torch.tensor([1.0, 5, 0])[:, None, None] + 2
    model = make()
    model.measure(latents.split(7))
    assert torch.allclose(model.mean.flatten(), latents.mean((0, 2, 3)), atol=1e-5)
    assert model.std.flatten()[:2].tolist() == pytest.approx(
        latents.std((0, 2, 3), correction=0)[:2].tolist()
    )
    assert model.std[2] == 1


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_training_target_is_that_of_diffusers(kind: str) -> None:
    model, latents = make(prediction_type=kind), torch.randn(4, 3, 8, 8)
    noise, levels, _ = model.draws(4, torch.Generator().manual_seed(1))
    schedule = diffusers.DDPMScheduler(
        beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear"
    )
    scaled = (latents - model.mean) / model.std
    noisy = schedule.add_noise(scaled, noise, levels)
    target = noise if kind == "epsilon" else schedule.get_velocity(scaled, noise, levels)
    expected = (model.unet(noisy, levels).sample - target).square().mean((1, 2, 3))
    found = model(latents, torch.full((4,), -1), noise, levels)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_one_ddim_step_is_that_of_the_paper(kind: str) -> None:
    """From noise x to (x − √(1 − ᾱ) ε) / √ᾱ, equation 9 of Song et al., or √ᾱ x − √(1 − ᾱ) v."""
    model, labels = make(prediction_type=kind), torch.full((2,), -1)
    uniform = torch.stack(
        [
            torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
            for n in range(2)
        ]
    )
    x = torch.special.ndtri(uniform).float()
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000).square()
    alpha = (1 - betas).cumprod(0)[-1]
    found = model.unet(x, torch.tensor(999)).sample
    if kind == "epsilon":
        expected = (x - (1 - alpha).sqrt() * found) / alpha.sqrt()
    else:
        expected = alpha.sqrt() * x - (1 - alpha).sqrt() * found
    expected = expected * model.std + model.mean
    assert torch.allclose(sample(model, labels, sampling_steps=1), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm-solver++"])
@pytest.mark.parametrize("side", [7, 8])
def test_a_sample_does_not_depend_on_its_batch(sampler: str, side: int) -> None:
    model = make(side)
    together = sample(model, torch.full((3,), -1), sampler=sampler)
    alone = sample(model, torch.full((1,), -1), sampler=sampler)
    assert together.shape == (3, 3, side, side)
    assert torch.allclose(together[:1], alone, rtol=1e-4, atol=1e-3)
    assert not torch.allclose(together[1], together[0], atol=0.1)


def test_guidance_of_one_is_none_and_more_changes_the_sample() -> None:
    model, labels = make(num_classes=2), torch.arange(2)
    plain, one, more = (sample(model, labels, guidance=g) for g in (1.0, 1 + 1e-9, 4.0))
    assert torch.allclose(plain, one, atol=1e-4)
    assert not torch.allclose(plain, more, atol=1e-3)


def test_a_prior_that_was_saved_before_the_flag_predicts_the_noise() -> None:
    stored = {"prior_config": {"prior": "diffusion", "unet_blocks": 1}}
    assert stored_flags(stored, "prior_config", PriorConfig).prediction_type == "epsilon"
    assert stored_flags({"prior_config": {}}, "prior_config", PriorConfig) == PriorConfig()


def test_an_empty_batch_reaches_all_weights() -> None:
    model = make(num_classes=2)
    noise, levels, _ = model.draws(0, torch.Generator())
    loss = model(torch.zeros(0, 3, 8, 8), torch.zeros(0, dtype=torch.int64), noise, levels)
    loss.sum().backward()
    assert all(value.grad is not None and not value.grad.any() for value in model.parameters())


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm-solver++"])
def test_a_prior_that_has_seen_one_image_reproduces_it(sampler: str) -> None:
    model, image = trained()
    found = sample(model, torch.full((2,), -1), sampler=sampler, sampling_steps=20)
    assert (found - image).abs().mean() < 0.2


def test_colours_are_in_range_after_a_short_training() -> None:
    """A prior that predicts the noise draws plain colours ten times as far apart as it has seen."""
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.measure([torch.randn(256, 3, 1, 1).expand(-1, -1, 8, 8)])
    for number in range(50):
        generator = torch.Generator().manual_seed(number)
        colours = torch.randn(32, 3, 1, 1, generator=generator).expand(-1, -1, 8, 8)
        noise, levels, _ = model.draws(32, generator)
        loss = model(colours, torch.full((32,), -1), noise, levels).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    drawn = sample(model, torch.full((32,), -1), sampling_steps=10)
    assert 0.3 < drawn.mean((2, 3)).std() < 1.3
    assert drawn.std() < 1.5


def test_given_latents_are_kept_where_the_mask_says() -> None:
    """The rest is drawn to fit, whatever the batch."""
    (model, image), labels = trained(), torch.full((3,), -1)
    mask = torch.arange(16).view(4, 4) % 4 < 2
    known = Known(torch.cat([image, image + 1, image]), mask)
    found = sample(model, labels, known=known)
    assert torch.allclose(found[..., mask], known.items[..., mask], atol=1e-5)
    assert (found[0] - image).abs().mean() < 0.2
    one = sample(model, labels[:1], known=Known(image, mask))
    assert torch.allclose(one, found[:1], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm-solver++"])
def test_a_small_share_of_the_noise_levels_changes_little(sampler: str) -> None:
    model, labels = make(), torch.full((2,), -1)
    given, nothing = 4 * torch.randn(2, 3, 8, 8) + 1, torch.zeros(8, 8, dtype=torch.bool)

    def change(share: float) -> float:
        known = Known(given, nothing, share)
        found = sample(model, labels, known=known, sampler=sampler, sampling_steps=20)
        return float((found - given).abs().mean())

    assert change(0.05) < change(0.3) < change(1.0)
    known = Known(given, nothing)
    assert torch.equal(sample(model, labels, known=known), sample(model, labels))


def test_statistics_are_those_of_a_bounded_number_of_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("datasets.codes.MEASURED", 4)
    monkeypatch.setattr("datasets.codes.TOGETHER", 3)
    images: Any = range(10)
    space, options = LatentSpace(1, 1, 1), {"flipped": False, "batch_size": 1, "num_workers": 0}
    codes = StoredCodes(torch.nn.Identity(), images, space, Path(), **options)  # type: ignore[arg-type]
    codes.shards = [np.arange(10, dtype=np.float16).reshape(10, 1, 1, 1)]
    assert [batch.flatten().tolist() for batch in codes.batches()] == [[0, 2, 5], [7]]


PUBLISHED = {  # preset → weights of the UNet of latent-diffusion by channels of its latents
    # The number of channels matters for the first and the last convolution alone.
    "ldm-lsun-bedroom": {3: 274_056_163, 4: 274_060_196},
    "ldm-lsun-church": {3: 294_963_459, 4: 294_966_916},
}


@pytest.mark.parametrize("name", PRIOR_PRESETS)
def test_presets_have_as_many_weights_as_published(name: str) -> None:
    flags = with_preset({"preset": name}, *train.GROUPS)
    config = build(PriorConfig, flags)
    assert build(PriorTrainingConfig, flags).num_validation == 10_000
    network = with_recipe(with_preset({"preset": "lsun-256"}, ModelConfig, DataConfig, TrainConfig,
                                      *loss_configs()))  # fmt: skip
    assert flags["image_size"] == network["image_size"]
    with torch.device("meta"):
        first_stage = make_model(build_model_config(network, 3))
        space = LatentSpace.of(first_stage, flags["image_size"])
        assert space == LatentSpace(3, 64, 64)
        for channels, expected in PUBLISHED[name].items():
            prior = config.spec.make(config, replace(space, channels=channels), 0)
            assert sum(weight.numel() for weight in prior.parameters()) == expected


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({"layers": 3}, "--layers 3 has no effect with --prior diffusion"),
        ({"unet_multipliers": "1,x"}, "--unet_multipliers 1,x is not a list"),
        ({"unet_attention": "3"}, "--unet_attention 3 is not among 1,2 of --unet_multipliers 1,2"),
        ({"unet_head_channels": 48}, "--unet_head_channels 48 does not divide the 128 channels"),
    ],
)
def test_contradictions_are_told(flags: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        PriorConfig(prior="diffusion", **flags)
    with pytest.raises(ValueError, match="--unet_blocks 3 has no effect with --prior masked"):
        PriorConfig(prior="masked", unet_blocks=3)
