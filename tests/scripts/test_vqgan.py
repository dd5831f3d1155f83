"""VQGAN's network, its discriminator and its losses, held against taming-transformers' own."""

from __future__ import annotations

import json
import runpy
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

import utils.training.reconstruction
from datasets import BatchLoader, TensorImages
from modules import VQGAN, LooCQuantizer, ModelConfig, PatchDiscriminator
from modules.quantizers.registry import QUANTIZERS
from modules.registry import MODELS, make_model
from tests.conftest import ROOT, Outcome, refusal
from utils.checkpoints.checkpoint import load_model, read_checkpoint, save_checkpoint
from utils.devices import seed_everything
from utils.errors import Stopped, UserError
from utils.flags.arguments import build_model_config, resolve
from utils.flags.presets import NETWORK_PRESETS
from utils.images import to_bytes
from utils.training.config import TrainConfig
from utils.training.losses import (
    L1,
    Adversarial,
    Loss,
    MeanSquaredError,
    Perceptual,
    QuantizerLoss,
    Setting,
    build_loss_configs,
    make_losses,
)
from utils.training.losses.adversarial import AdversarialConfig
from utils.training.reconstruction import Reconstruction, check_network
from utils.training.resume import differing_flags
from utils.training.task import Step
from utils.training.trainer import Trainer, flags_of
from utils.weights.download import Unavailable

pytest.importorskip("diffusers")

CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "model": "vqgan",
    "hidden_size": 8,
    "channel_multipliers": "1,2",
    "num_residual_layers": 1,
    "attention_levels": 0,
    "latent_channels": 8,
    "num_embedding": 16,
    "in_channels": 3,
}
SMALL = ModelConfig(**TINY)
SHARED: dict[str, Any] = {
    "hidden_size": 8,
    "latent_channels": 8,
    "num_embedding": 16,
    "in_channels": 3,
}
NETWORKS = {
    "vqgan": SMALL,
    "vqvae": ModelConfig(**SHARED, num_residual_hidden=4),
    "dct": ModelConfig(**SHARED, num_residual_hidden=4, model="dct"),
}
GAN = AdversarialConfig(disc_weight=0.8, disc_start=0, disc_channels=4, disc_layers=2)


class Features(nn.Module):
    """Stands for LPIPS: a distance of each pair in the space of a random convolution."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3, generator=generator), False)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        kernel = self.kernel.to(images.dtype)
        distance = nn.functional.conv2d(images, kernel) - nn.functional.conv2d(others, kernel)
        return distance.square().mean((1, 2, 3), keepdim=True)


# ------------------------------------------------------------------------------------ the network


@pytest.mark.parametrize(
    ("multipliers", "factor"), [("1,1,2", 4), ("1,1,2,2", 8), ("1,1,2,2,4", 16)]
)
@pytest.mark.parametrize("quantizer", ["looc", "cvq", "vq"])
def test_images_codes_and_back(multipliers: str, factor: int, quantizer: str) -> None:
    flags = {**TINY, "channel_multipliers": multipliers, "quantizer": quantizer}
    size = {} if quantizer == "looc" else {"embedding_dim": 8}
    config = build_model_config({**flags, **size, "attention_levels": 1, "z_channels": 6}, 3)
    model = VQGAN(config).eval()
    images = torch.rand(2, 3, 2 * factor, 3 * factor) * 2 - 1
    with torch.no_grad():
        reconstruction, quantized = model(images)
        indices = model.encode(images)
    assert reconstruction.shape == images.shape
    assert indices.shape == (2, 2, 3, 2 if quantizer == "looc" else 1)
    assert torch.equal(indices, quantized.indices)
    torch.testing.assert_close(model.decode(indices), reconstruction)
    with pytest.raises(ValueError, match=f"multiples of {factor}"):
        model(images[:, :, :, 1:])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"channel_multipliers": "1,0"}, "--channel_multipliers 1,0 is not a list"),
        ({"attention_levels": 3}, "--attention_levels 3 is more than the 2 of"),
        ({"num_residual_layers": 0}, "--num_residual_layers 0 is less than the 1"),
        ({"norm_groups": 3}, "--norm_groups 3 does not divide --hidden_size 8"),
        ({"num_residual_hidden": 8}, "--num_residual_hidden 8 has no effect with --model vqgan"),
        ({"model": "vqvae"}, "--channel_multipliers 1,2 has no effect with --model vqvae"),
    ],
)
def test_wrong_networks_are_named(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**TINY, **flags})


@pytest.mark.parametrize(
    ("hidden_size", "norm_groups", "expected"),
    [(128, None, 32), (32, None, 8), (36, None, 9), (96, None, 24), (2, None, 1), (32, 32, 32)],
)
def test_normalisations_have_their_groups(
    hidden_size: int, norm_groups: int | None, expected: int
) -> None:
    config = ModelConfig(**{**TINY, "hidden_size": hidden_size, "norm_groups": norm_groups})
    groups = {m.num_groups for m in VQGAN(config).modules() if isinstance(m, nn.GroupNorm)}
    assert groups == {expected}


def test_older_checkpoints_have_the_groups_of_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = VQGAN(replace(SMALL, norm_groups=8)).eval()
    save_checkpoint(tmp_path / "m.pt", model, {})
    content = torch.load(tmp_path / "m.pt", weights_only=True)
    del content["model_config"]["norm_groups"]
    torch.save(content, tmp_path / "m.pt")
    images = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "m.pt")(images)[0], model(images)[0])
    assert read_checkpoint(tmp_path / "m.pt").model_config.norm_groups == 8
    # Where they are those of today, as of 128 channels, the command of then resumes.
    monkeypatch.setattr("modules.checkpoint.default_groups", lambda _: 8)
    assert read_checkpoint(tmp_path / "m.pt").model_config.norm_groups is None


def test_a_flag_that_is_not_given_is_named_so() -> None:
    now, then = ModelConfig(**TINY), replace(ModelConfig(**TINY), norm_groups=2)
    assert differing_flags(then, now) == ["no --norm_groups (it has 2)"]
    assert differing_flags(now, then) == ["--norm_groups 2 (it has none)"]


def test_gradients_computed_again_are_the_same() -> None:
    torch.manual_seed(0)
    model, images = VQGAN(SMALL), torch.rand(2, 3, 16, 16) * 2 - 1
    state = {name: value.clone() for name, value in model.state_dict().items()}
    passes: list[int] = []
    model.encoder.down_blocks[0].resnets[0].register_forward_hook(lambda *_: passes.append(1))
    found = []
    for again in (False, True):
        model.load_state_dict(state)
        if again:
            model.checkpoint_gradients()
        model.zero_grad()
        reconstruction, quantized = model(images)
        (reconstruction.square().mean() + quantized.loss).backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(passes) == 1 + 2
    torch.testing.assert_close(found[0], found[1])


# ------------------------------------------------------------------------------ the discriminator


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_the_discriminator_is_vqgans(num_layers: int) -> None:
    theirs_of = pytest.importorskip("taming.modules.discriminator.model").NLayerDiscriminator
    torch.manual_seed(0)
    theirs = theirs_of(3, ndf=8, n_layers=num_layers).train()
    ours = PatchDiscriminator(3, 8, num_layers)
    values = dict(theirs.named_parameters())
    ours.load_state_dict({key: values[key.replace("layers", "main")] for key in ours.state_dict()})
    images = torch.randn(2, 3, 40, 40)
    torch.testing.assert_close(ours(images), theirs(images))


def test_the_discriminators_start_is_small() -> None:
    torch.manual_seed(0)
    weights = PatchDiscriminator(3).state_dict()
    assert float(weights["layers.2.weight"].std()) == pytest.approx(0.02, rel=0.05)
    assert float(weights["layers.3.weight"].mean()) == pytest.approx(1, abs=0.02)


# ------------------------------------------------------------------------------------- the losses


def vqgan_losses(
    adversary: Adversarial,
    weight: float = 1.0,
    dtype: torch.dtype = torch.float32,
    network: str = "vqgan",
) -> dict[str, Loss]:
    pixels: dict[str, Loss] = {"l1": L1()}
    return {
        **(pixels if network == "vqgan" else {"reconstruction": MeanSquaredError(0.25)}),
        "perceptual": Perceptual(Features(), weight, dtype),
        "adversarial": adversary,
        "quantizer": QuantizerLoss(),
    }


@pytest.mark.parametrize("step", [3, 4])
def test_losses_and_gradients_are_vqgans(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch, before and after --disc_start 3, compared with the published loss in full."""
    theirs_of = pytest.importorskip("taming.modules.losses.vqperceptual")
    monkeypatch.setattr(theirs_of, "LPIPS", Features)
    torch.manual_seed(0)
    model = VQGAN(SMALL)
    config = replace(GAN, disc_start=3, disc_weight=0.6)
    ours = Adversarial(config, model)
    task = Reconstruction(model, vqgan_losses(ours, 0.7), TrainConfig())
    theirs = theirs_of.VQLPIPSWithDiscriminator(
        disc_start=4, disc_num_layers=2, disc_ndf=4, disc_weight=0.6, perceptual_weight=0.7,
        codebook_weight=0.0,
    ).train()  # fmt: skip
    state = {key.replace("layers", "main"): v for key, v in ours.discriminator.state_dict().items()}
    theirs.discriminator.load_state_dict(state, strict=False)
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    reconstruction, quantized = model(images)
    no_loss = quantized._replace(loss=torch.zeros(()))
    none = torch.zeros(1)
    expected, log = theirs(
        none, images, reconstruction, 0, step, last_layer=model.last_layer, split="train"
    )
    part = Step(step, True, lambda _: (reconstruction, no_loss), lambda loss: loss)
    losses = task.losses(to_bytes(images), part)
    monkeypatch.setattr(utils.training.reconstruction, "to_signed", lambda _: images)
    loss, terms = sum(next(losses).values(), torch.zeros(())), part.figures
    torch.testing.assert_close(loss, expected)
    if step > 3:
        torch.testing.assert_close(terms["adaptive_weight"], log["train/d_weight"] / 0.6)
        torch.testing.assert_close(terms["adversarial"], log["train/g_loss"])
        assert terms["adaptive_weight"] > 0
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = [
        torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        for value in (loss, expected)
    ]
    torch.testing.assert_close(gradients[0], gradients[1])

    judged, log = theirs(none, images, reconstruction, 1, step, last_layer=None, split="train")
    own = next(losses)["discriminator"]
    torch.testing.assert_close(own, judged)
    if step > 3:
        torch.autograd.backward(own)
    judged.backward()
    for one, other in zip(ours.discriminator.parameters(), theirs.discriminator.parameters()):
        if step > 3:
            torch.testing.assert_close(one.grad, other.grad)
        else:
            assert one.grad is None
    assert (terms["logits_real"] == 0) == (step <= 3)


def test_grey_images_are_shown_to_lpips_in_colour() -> None:
    model = VQGAN(replace(SMALL, in_channels=1))
    losses = vqgan_losses(Adversarial(GAN, model))
    images, others = torch.rand(2, 2, 1, 16, 16)
    colour = Features()(images.repeat(1, 3, 1, 1), others.repeat(1, 3, 1, 1)).flatten()
    torch.testing.assert_close(losses["perceptual"].distance(images, others), colour)
    l1 = (images - others).abs().mean((1, 2, 3))
    torch.testing.assert_close(losses["l1"].distance(images, others), l1)


@pytest.mark.parametrize(("network", "expected"), [("vqgan", -0.5), ("vqvae", -0.8)])
def test_the_score_is_the_weighted_sum(network: str, expected: float) -> None:
    model = make_model(NETWORKS[network])
    losses = vqgan_losses(Adversarial(GAN, model), 2.0, network=network)
    scores = {"psnr": 30, "l1": 0.1, "reconstruction": 0.1, "perceptual": 0.2}
    assert Reconstruction(model, losses, TrainConfig()).score(scores) == pytest.approx(expected)
    del losses["perceptual"]
    expected = -0.1 if network == "vqgan" else 30
    assert Reconstruction(model, losses, TrainConfig()).score(scores) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("network", "flags", "names"),
    [
        ("vqvae", {}, ["reconstruction", "quantizer"]),
        ("dct", {}, ["reconstruction", "quantizer"]),
        ("dct", {"disc_weight": 0.5}, ["reconstruction", "adversarial", "quantizer"]),
        ("vqgan", {"perceptual_weight": 0}, ["l1", "adversarial", "quantizer"]),
        ("vqgan", {"perceptual_weight": 0, "disc_weight": 0}, ["l1", "quantizer"]),
    ],
)
def test_a_network_has_its_losses(network: str, flags: dict[str, Any], names: list[str]) -> None:
    config = NETWORKS[network]
    own = flags_of(build_loss_configs(flags, config, 32))
    losses = make_losses(Setting(make_model(config), own, variance=lambda: 0.25))
    assert list(losses) == names


@pytest.mark.parametrize(
    ("flags", "size", "message"),
    [
        ({}, 30, "--image_size 30 is not a multiple of 4, which --model vqgan needs"),
        ({"disc_layers": 4}, 32, "--disc_layers 4 needs images of 48×48 or more, not --image_size"),
        ({"disc_layers": 1}, 12, "--perceptual_weight 1.0 needs images of 16×16 or more"),
    ],
)
def test_images_too_small_are_named(flags: dict[str, Any], size: int, message: str) -> None:
    config = replace(SMALL, channel_multipliers="1,1,2")

    def check() -> None:
        check_network(config, TrainConfig(), size)
        build_loss_configs(flags, config, size)

    assert message in refusal(check)


def test_flags_without_effect_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value, switch in (
        ("disc_start", 5, "disc_weight"),
        ("weights_dir", "w", "perceptual_weight"),
    ):
        told = f"--{name} {value} has no effect without --{switch}"
        with pytest.raises(UserError, match=told):
            build_loss_configs({name: value}, ModelConfig(), 28)
        build_loss_configs({name: value, switch: 0.0}, ModelConfig(), 28)
    own = replace(MODELS["vqgan"], losses=frozenset({"l1", "adversarial"}))
    monkeypatch.setitem(MODELS, "vqgan", own)
    with pytest.raises(UserError, match=r"--disc_weight 0\.5 has no effect with --model vqvae"):
        build_loss_configs({"disc_weight": 0.5}, ModelConfig(), 28)
    with pytest.raises(UserError, match="--checkpoint_gradients True has no effect with --model"):
        check_network(ModelConfig(), TrainConfig(checkpoint_gradients=True), 28)


# -------------------------------------------------------------------------------------- training

# Of so many epochs few have figures.
TRAIN = TrainConfig(
    batch_size=8, num_epochs=1000, max_steps=9, lr=1e-3, log_every=2, weight_ema=0.9
)
ADVERSARY = replace(GAN, disc_start=4)
LOGGED = (
    *("l1", "perceptual", "adversarial", "adaptive_weight"),
    *("discriminator", "logits_real", "logits_fake"),
)


def make(
    folder: Path,
    train: TrainConfig = TRAIN,
    gan: AdversarialConfig = ADVERSARY,
    network: str = "vqgan",
    **model_flags: Any,
) -> Trainer:
    images = torch.randint(256, (26, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    training, validation = images.to(torch.uint8).split([20, 6])
    seed_everything(train.seed, CPU)
    model = make_model(replace(NETWORKS[network], **model_flags))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(train.precision, torch.float32)
    adversary = Adversarial(gan, model, betas=train.adam_betas, dtype=dtype)
    return Trainer(
        Reconstruction(model, vqgan_losses(adversary, dtype=dtype, network=network), train),
        BatchLoader(TensorImages(training), 8, device=CPU, shuffle=True, seed=train.seed),
        BatchLoader(TensorImages(validation), 8, device=CPU),
        train,
        models=folder / "models",
        logs=folder / "logs",
    )


def adversary_of(trainer: Trainer) -> Adversarial:
    assert isinstance(trainer.task, Reconstruction)
    found = trainer.task.terms["adversarial"]
    assert isinstance(found, Adversarial)
    return found


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """All that a run trains: the weights, their average and the discriminator."""
    found = {**trainer.model.state_dict(), **adversary_of(trainer).discriminator.state_dict()}
    if trainer.average is not None:
        found |= trainer.average.state_dict()
    return {name: value.clone() for name, value in found.items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("network", "stop"), [("vqgan", 2), ("vqgan", 4), ("vqgan", 7), ("vqvae", 7), ("dct", 7)]
)
def test_resumed_equals_uninterrupted(network: str, stop: int, tmp_path: Path) -> None:
    """Before the discriminator takes part, at its start, and after; 9 steps in all."""
    start = everything(make(tmp_path / "start", network=network))
    whole = make(tmp_path / "whole", network=network)
    whole.fit()
    first = make(tmp_path / "parts", network=network)
    step = first.train_step

    def stopped(images: Tensor) -> None:
        step(images)
        if first.step == stop:
            first.stop.signal = signal.SIGTERM

    first.train_step = stopped  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        first.fit()
    second = make(tmp_path / "parts", network=network)
    second.resume(read_checkpoint(tmp_path / "parts" / "models" / "last.pt"))
    assert second.step == stop
    second.fit()
    end = everything(whole)
    assert equal(end, everything(second))
    last = whole.model.last_layer
    assert not any(torch.equal(start[name], end[name]) for name in end if "conv_in.weight" in name)
    assert not any(torch.equal(start[name], last) for name in start if "decoder" in name)
    assert not torch.equal(start["layers.0.weight"], end["layers.0.weight"])


def test_the_discriminator_waits_for_its_start(tmp_path: Path) -> None:
    trainer = make(tmp_path, replace(TRAIN, max_steps=4))
    before = everything(trainer)
    trainer.fit()
    after = everything(trainer)
    assert all(torch.equal(before[name], after[name]) for name in after if "layers." in name)
    longer = make(tmp_path, replace(TRAIN, max_steps=6))
    longer.resume(read_checkpoint(tmp_path / "models" / "last.pt"))
    longer.fit()
    assert not torch.equal(before["layers.0.weight"], everything(longer)["layers.0.weight"])


@pytest.mark.parametrize("name", ["decoder.conv_out.weight", "quantizer.latent_mean"])
def test_the_average_is_validated_and_stored(name: str, tmp_path: Path) -> None:
    """By hand: e ← e + (1 − min(0.9, (1 + n) / (10 + n)))·(w − e), from the first step's w on."""
    trainer = make(tmp_path, latent_norm="running")
    step = trainer.train_step
    averages: list[Tensor] = []

    def followed(images: Tensor) -> None:
        step(images)
        weight = trainer.model.state_dict()[name].clone()
        rate = 1 - min(0.9, (1 + trainer.step) / (10 + trainer.step))
        averages.append(weight if not averages else averages[-1] + rate * (weight - averages[-1]))

    trainer.train_step = followed  # type: ignore[method-assign]
    trainer.fit()
    last = read_checkpoint(tmp_path / "models" / "last.pt")
    torch.testing.assert_close(last.state_dict[name], averages[-1])
    trained = last.content["trained"][name]
    assert torch.equal(trained, trainer.model.state_dict()[name])
    assert not torch.equal(trained, averages[-1])
    model = load_model(tmp_path / "models" / "last.pt")
    steps = (each.state_dict()["quantizer.latent_steps"] for each in (model, trainer.model))
    assert torch.equal(*steps)
    images = torch.cat(list(trainer.validation_loader.epoch())).float() / 127.5 - 1
    with torch.no_grad():
        reconstruction = model(images)[0].clamp(-1, 1)
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    l1 = events.Scalars("validation/l1")[-1].value
    assert l1 == pytest.approx(float((images - reconstruction).abs().mean()), rel=1e-5)


def test_curves_tell_of_every_term(tmp_path: Path) -> None:
    make(tmp_path).fit()
    tags = EventAccumulator(str(tmp_path / "logs")).Reload().Tags()["scalars"]
    for name in (*LOGGED, "loss", "psnr", "usage_percent", "learning_rate"):
        assert f"train/{name}" in tags
    for name in ("psnr", "l1", "perceptual"):
        assert f"validation/{name}" in tags


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains(precision: str, tmp_path: Path) -> None:
    trainer = make(tmp_path, replace(TRAIN, precision=precision), replace(GAN, disc_start=2))
    logits: list[torch.dtype] = []
    adversary_of(trainer).discriminator.register_forward_hook(
        lambda *arguments: logits.append(arguments[2].dtype)
    )
    before = everything(trainer)
    trainer.fit()
    assert trainer.step == 9
    assert set(logits) == {adversary_of(trainer).dtype}
    after = everything(trainer)
    assert all(value.isfinite().all() for value in after.values())
    for name in ("encoder.conv_in.weight", "decoder.conv_out.weight", "layers.0.weight"):
        assert not torch.equal(before[name], after[name])


def test_the_discriminator_learns_by_its_own_loss_alone(tmp_path: Path) -> None:
    """Its gradients after the step's backward passes are those of the hinge loss, no other's."""
    first, second = (make(tmp_path / name, replace(TRAIN, weight_ema=0), GAN) for name in "ab")
    images = next(iter(first.train_loader.epoch()))
    first.step = 1
    first.backward(images, 1.0)
    signed = images.float() / 127.5 - 1
    reconstruction = second.model(signed)[0].detach()
    judge = adversary_of(second).discriminator
    loss = (1 - judge(signed)).relu().mean() / 2 + (1 + judge(reconstruction)).relu().mean() / 2
    torch.autograd.backward(loss)
    for one, other in zip(
        adversary_of(first).discriminator.parameters(),
        adversary_of(second).discriminator.parameters(),
    ):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("culprit", ["discriminator", "decoder"])
def test_a_bad_gradient_anywhere_changes_no_weight(culprit: str, tmp_path: Path) -> None:
    trainer = make(tmp_path, replace(TRAIN, weight_ema=0, max_bad_steps=1), GAN)
    networks = {
        "discriminator": adversary_of(trainer).discriminator.layers[0].weight,
        "decoder": trainer.model.decoder.conv_in.weight,
    }
    networks[culprit].register_hook(
        lambda gradient: gradient * (float("nan") if trainer.step == 3 else 1.0)
    )
    states = []
    step = trainer.train_step

    def watched(images: Tensor) -> None:
        step(images)
        states.append([weight.detach().clone() for weight in networks.values()])

    trainer.train_step = watched  # type: ignore[method-assign]
    trainer.fit()
    for before, bad, after in zip(*states[1:4]):
        assert torch.equal(before, bad)
        assert not torch.equal(bad, after)


def test_parts_equal_the_batch_until_the_discriminator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        utils.training.reconstruction, "to_signed", lambda images: images.double() / 127.5 - 1
    )
    ends = []
    for parts in (1, 3):
        trainer = make(tmp_path / str(parts), replace(TRAIN, accumulate=parts, max_steps=4))
        trainer.model.double()
        trainer.best_model.double()
        assert isinstance(trainer.model.quantizer, LooCQuantizer)
        trainer.model.quantizer.search = "torch"
        trainer.fit()
        ends.append(trainer.model.state_dict())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-6)


def test_a_bad_step_leaves_the_discriminator_alone(tmp_path: Path) -> None:
    trainer = make(tmp_path, replace(TRAIN, max_bad_steps=3, weight_ema=0), GAN)
    trainer.model.decoder.register_forward_hook(
        lambda *arguments: arguments[2] * (float("nan") if trainer.step in (2, 3) else 1.0)
    )
    states = []
    step = trainer.train_step

    def watched(images: Tensor) -> None:
        step(images)
        states.append(everything(trainer)["layers.0.weight"])

    trainer.train_step = watched  # type: ignore[method-assign]
    trainer.fit()
    assert torch.equal(states[0], states[2])
    assert not torch.equal(states[2], states[3])


@pytest.fixture(scope="module")
def checkpoint_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a run."""
    folder = tmp_path_factory.mktemp("run")
    make(folder, replace(TRAIN, max_steps=1), GAN).fit()
    return folder / "models" / "last.pt"


@pytest.mark.parametrize(
    "change",
    [
        {"discriminator": {}},
        {"discriminator": 3},
        {"discriminator_optimizer": {"state": {0: 1}}},
        {"trained": None},
    ],
)
def test_a_damaged_state_is_not_resumed(
    change: dict[str, Any], checkpoint_file: Path, tmp_path: Path
) -> None:
    checkpoint = read_checkpoint(checkpoint_file)
    damaged = replace(checkpoint, content={**checkpoint.content, **change})
    with pytest.raises(UserError, match=r"last\.pt cannot be resumed: "):
        make(tmp_path, gan=GAN).resume(damaged)


# -------------------------------------------------------------------------------------- as a user

Script = Callable[..., Outcome]
WORDS = (
    *("--model", "vqgan", "--dataset", "folder", "--data_folder", "pictures", "--image_size", "32"),
    *("--hidden_size", "8", "--channel_multipliers", "1,2,2", "--num_residual_layers", "1"),
    *("--num_embedding", "16", "--perceptual_weight", "0", "--disc_channels", "4"),
    *("--disc_layers", "2", "--disc_start", "2", "--num_workers", "0", "--batch_size", "4"),
    *("--exp_name", "e", "--weight_ema", "0.5", "--checkpoint_gradients", "--betas", "0.5,0.9"),
)


def write_pictures(folder: Path) -> None:
    random = np.random.default_rng(0)
    folder.mkdir()
    for number in range(14):
        pixels = random.integers(256, size=(40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


def test_train_test_evaluate(script: Script, tmp_path: Path) -> None:
    """The three scripts, codes to a file and back, and a run that goes on as it was."""
    write_pictures(tmp_path / "pictures")
    outcome = script("main.py", *WORDS, "--max_steps", "5")
    assert outcome.code == 0, outcome.err
    assert ", l1 0." in outcome.err
    stored = read_checkpoint(tmp_path / "output/models/e/last.pt").content
    for name in ("optimizer", "discriminator_optimizer"):
        assert stored[name]["param_groups"][0]["betas"] == (0.5, 0.9)
    words = ("--model_name", "e/best.pt", "--num_workers", "0")
    outcome = script("test.py", *words, "--save_codes")
    assert outcome.code == 0, outcome.err
    results = tmp_path / "output/results/e/best/pictures"
    analysis = json.loads((results / "analysis.json").read_text())
    assert analysis["rate"]["codes_per_image"] == 8 * 8 * 2
    assert analysis["model"]["model"] == "vqgan"
    pictures = {path.name: path.read_bytes() for path in (results / "rec").iterdir()}
    outcome = script("test.py", *words[:2], "--from_codes", str(results / "codes.looc"))
    assert outcome.code == 0, outcome.err
    assert "bit for bit" in outcome.out
    decoded = results.with_name("pictures-codes") / "rec"
    assert {path.name: path.read_bytes() for path in decoded.iterdir()} == pictures
    folders = ("--gt_path", str(results / "original"), "-g_path", str(results / "rec"))
    outcome = script("evaluation.py", *folders, "--metrics", "l1", "psnr", "--num_workers", "0")
    assert outcome.code == 0, outcome.err
    report = (results / "report.html").read_text()
    assert "best validation L1 + LPIPS" in report
    outcome = script("main.py", *WORDS, "--max_steps", "5")
    assert "nothing is left to train: 5 steps are done" in outcome.err
    outcome = script("main.py", *WORDS, "--max_steps", "5", "--disc_weight", "0.5")
    assert outcome.code == 2
    assert "--disc_weight 0.5 (it has 0.8)" in outcome.err
    outcome = script("main.py", *WORDS, "--max_steps", "7")
    assert "resumed" in outcome.err


PRESET_CODES = {  # per image
    "ffhq-256": 16_384,
    "imagenet-256": 16_384,
    "imagenet-256-f16": 256,
    "imagenet-256-f8": 1_024,
    "lsun-256": 12_288,
    "photos-64": 2_048,
    "photos": 6_144,
    "photos-small": 3_072,
}


@pytest.mark.parametrize("name", NETWORK_PRESETS)
def test_presets_are_whole(name: str) -> None:
    """Every preset is a model that can be built, with flags that suit its images."""
    groups = runpy.run_path(str(ROOT / "main.py"), run_name="main")["GROUPS"]
    flags, _ = resolve({"preset": name, "lr": 0.5}, *groups)
    assert flags["lr"] == 0.5
    config = build_model_config(flags, 3)
    with torch.device("meta"):
        model = make_model(config)
    side = flags["image_size"]
    assert config.model == "dct" or int(name.split("-")[1]) == side
    assert config.codes_per_image(side) == PRESET_CODES[name]
    build_loss_configs(flags, config, side)
    assert TrainConfig(**{k: v for k, v in flags.items() if hasattr(TrainConfig, k)}).lr == 0.5
    factor = config.downsampling
    with torch.device("meta"):
        assert model.encoder(torch.zeros(1, 3, side, side)).shape[2:] == (side // factor,) * 2


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_preset_takes_any_quantiser(quantizer: str) -> None:
    groups = runpy.run_path(str(ROOT / "main.py"), run_name="main")["GROUPS"]
    own = build_model_config(resolve({"preset": "photos-64"}, *groups)[0], 3)
    flags, _ = resolve({"preset": "photos-64", "quantizer": quantizer}, *groups)
    config = build_model_config(flags, 3)
    assert (config.quantizer, config.hidden_size) == (quantizer, 32)
    assert config.num_embedding == 256
    if quantizer == "looc":
        assert config == own
        assert config.latent_norm == "running"
    else:
        assert config.latent_norm == "none"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("--help", "--preset x.txt: error: argument --help is unknown"),
        ("--exp_name a#b --nonsense", "argument --nonsense is unknown"),
        ("--nonsense 1", "--preset x.txt: error: argument --nonsense is unknown"),
        ("--lr high", "--preset x.txt: error: argument --lr: 'high' is not a number"),
        ("--lr '1", "--preset x.txt cannot be read: No closing quotation"),
        ("--preset photos-64", "--preset x.txt names another preset, photos-64"),
        (None, "--preset x.txt is unknown; choose from ffhq-256"),
    ],
)
def test_a_wrong_preset_is_named(
    content: str | None, message: str, script: Script, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "x.txt").write_text(f"# mine\n{content}\n")
    assert "--preset no/x.txt does not exist\n" in script("main.py", "--preset", "no/x.txt").err
    outcome = script("main.py", "--preset", "x.txt")
    assert outcome.code == 2
    assert message in outcome.err, outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


def test_one_line_where_the_weights_of_lpips_are_missing(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any) -> Path:
        raise Unavailable("there is no network")

    monkeypatch.setattr("utils.evaluation.networks.download_usual", unreachable)
    write_pictures(tmp_path / "pictures")
    outcome = script("main.py", *WORDS, "--perceptual_weight", "1", "--weights_dir", "nowhere")
    assert outcome.code == 2
    (line,) = outcome.err.strip().splitlines()
    assert line.startswith("main.py: error: vgg16-397923af.pth is not in nowhere")
    assert line.endswith("with --weights_dir, or go without: --perceptual_weight 0")


def test_one_line_where_diffusers_is_missing(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pictures(tmp_path / "pictures")
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    outcome = script("main.py", *WORDS)
    assert outcome.code == 2
    assert "--model vqgan needs diffusers: pip install diffusers" in outcome.err
