"""Training: seeded, resumable bit for bit, stopped by a loss that is not finite."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from datasets import BatchLoader, TensorImages
from modules import VQVAE, ModelConfig
from utils.checkpoint import read_checkpoint
from utils.devices import resolve_device, seed_everything
from utils.errors import UserError
from utils.trainer import Meter, TrainConfig, Trainer, contradictions

CPU = torch.device("cpu")
SMALL = ModelConfig(num_embedding=16, hidden_size=8, num_residual_hidden=4)
TRAIN = TrainConfig(batch_size=8, num_epochs=3, lr=1e-2, log_every=2)


def make(folder: Path, train: TrainConfig = TRAIN, model: ModelConfig = SMALL) -> Trainer:
    images = torch.randint(256, (26, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    training, validation = images.to(torch.uint8).split([20, 6])
    seed_everything(train.seed, CPU)
    return Trainer(
        VQVAE(model),
        BatchLoader(
            TensorImages(training), train.batch_size, device=CPU, shuffle=True, seed=train.seed
        ),
        BatchLoader(TensorImages(validation), train.batch_size, device=CPU),
        train,
        data_variance=0.1,
        models=folder / "models",
        logs=folder / "logs",
        stored={},
    )


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [value.clone() for value in trainer.model.state_dict().values()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other))


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    runs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        trainer = make(tmp_path / name, replace(TRAIN, seed=seed))
        trainer.fit()
        runs.append(weights(trainer))
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


@pytest.mark.parametrize("anchor", ["closest", "random", "probrandom"])
@pytest.mark.parametrize("stop", [2, 3, 7])
def test_resumed_equals_uninterrupted(anchor: str, stop: int, tmp_path: Path) -> None:
    """Stopped inside an epoch or at its end, 9 steps in all."""
    model = replace(SMALL, anchor=anchor)
    whole = make(tmp_path / "whole", model=model)
    whole.fit()
    first = make(tmp_path / "parts", replace(TRAIN, max_steps=stop), model)
    first.fit()
    second = make(tmp_path / "parts", model=model)
    second.resume(read_checkpoint(tmp_path / "parts" / "models" / "last.pt"))
    assert second.step == stop
    torch.rand(5)  # the random state comes from the checkpoint
    second.resume(read_checkpoint(tmp_path / "parts" / "models" / "last.pt"))
    second.fit()
    assert second.step == whole.step == 9
    assert same(weights(whole), weights(second))


def test_validation_changes_nothing(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    before, random_state = weights(trainer), torch.get_rng_state()
    with SummaryWriter(str(tmp_path)) as trainer.board:
        scores = trainer.validate()
    assert same(before, weights(trainer))
    assert torch.equal(random_state, torch.get_rng_state())
    assert trainer.model.training
    assert scores["psnr"] > 0


def test_best_is_the_best_validation_score(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    scores: list[float] = []
    validate = trainer.validate

    def spoiled() -> dict[str, float]:
        found = {**validate(), "psnr": [20.0, 30.0, 10.0][len(scores)]}
        scores.append(found["psnr"])
        return found

    trainer.validate = spoiled  # type: ignore[method-assign]
    trainer.fit()
    assert read_checkpoint(tmp_path / "models" / "best.pt").content["step"] == 6
    last = read_checkpoint(tmp_path / "models" / "last.pt").content
    assert (last["step"], last["epoch"], last["best"]) == (9, 3, 30.0)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    step = trainer.train_step

    def poisoned(images: torch.Tensor) -> None:
        step(images * float("nan") if trainer.step == 4 else images)

    trainer.train_step = poisoned  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"not finite at step 5; .*last\.pt is the last good one"):
        trainer.fit()
    last = read_checkpoint(tmp_path / "models" / "last.pt")
    assert last.content["step"] == 3
    assert all(torch.isfinite(value).all() for value in last.state_dict.values())


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    """The loss of the last step before a checkpoint was finite, what the step did is not."""
    trainer = make(tmp_path, replace(TRAIN, lr=10.0))
    with torch.no_grad():
        trainer.model.decoder.conv_trans_2.weight.fill_(3e37)
    with pytest.raises(UserError, match=r"not finite at step \d; stopped, nothing was saved yet"):
        trainer.fit()
    assert not (tmp_path / "models").exists()


def test_best_is_written_before_last_tells_its_score(tmp_path: Path) -> None:
    trainer = make(tmp_path, replace(TRAIN, max_steps=1))
    names: list[str] = []
    trainer.save = names.append  # type: ignore[assignment, method-assign]
    trainer.fit()
    assert names == ["best.pt", "last.pt"]


@pytest.mark.parametrize(
    "change",
    [{"batch": -1}, {"batch": 3}, {"epoch": -1}, {"step": float("inf")}, {"optimizer": {}}],
)
def test_a_damaged_state_is_not_resumed(change: dict[str, object], tmp_path: Path) -> None:
    make(tmp_path).fit()
    checkpoint = read_checkpoint(tmp_path / "models" / "last.pt")
    damaged = replace(checkpoint, content={**checkpoint.content, **change})
    with pytest.raises(UserError, match=r"last\.pt cannot be resumed"):
        make(tmp_path).resume(damaged)
    content = {**checkpoint.content}
    content["optimizer"]["state"][0]["exp_avg"] = torch.zeros(1)
    with pytest.raises(UserError, match="misshapen"):
        make(tmp_path).resume(replace(checkpoint, content=content))


def test_the_meter_weighs_images() -> None:
    meter = Meter(4, CPU)
    indices = torch.tensor([0, 0, 1, 3])
    meter.add(1, (torch.tensor(1.0), torch.tensor(4.0), torch.tensor(0.0)), indices[:3, None])
    meter.add(2, (torch.tensor(5.0), torch.tensor(8.0), torch.tensor(4.0)), indices[3:, None])
    scores = meter.read()
    assert scores["loss"] == 2
    assert scores["reconstruction"] == 5
    assert scores["quantizer"] == 1
    assert scores["usage_percent"] == 75
    assert scores["perplexity"] == pytest.approx(2**1.5)
    assert meter.num_images == 0


def test_tensorboard_shows_curves_pictures_and_usage(tmp_path: Path) -> None:
    make(tmp_path).fit()
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    tags = events.Tags()
    for group in ("train", "validation"):
        for name in ("psnr", "usage_percent", "perplexity", "reconstruction"):
            assert f"{group}/{name}" in tags["scalars"]
    assert tags["images"] == ["validation/reconstructions"]
    assert tags["histograms"] == ["validation/usage"]
    assert [event.step for event in events.Scalars("validation/psnr")] == [3, 6, 9]


def test_contradictions_name_flag_and_both_values() -> None:
    other = replace(TRAIN, lr=1.0, num_epochs=9, device="cpu", exp_name="x")
    assert list(contradictions(TRAIN, other)) == ["--lr 1.0 (it has 0.01)"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize("name", ["cuda", "cuda:1", "gpu", "meta"])
def test_a_device_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(UserError, match=f"--device {name}"):
        resolve_device(name)
