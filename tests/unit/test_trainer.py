"""Training: seeded, resumable bit for bit, stopped by a loss that is not finite."""

from __future__ import annotations

import errno
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import utils.training.reconstruction
from datasets import BatchLoader, TensorImages
from modules import VQVAE, LooCQuantizer, ModelConfig
from tests.conftest import refusal
from utils.checkpoints.checkpoint import read_checkpoint
from utils.devices import resolve_device, seed_everything
from utils.errors import Stopped, UserError
from utils.training.board import NoBoard
from utils.training.config import SCHEDULES, TrainConfig
from utils.training.losses import MeanSquaredError, QuantizerLoss
from utils.training.meter import Meter
from utils.training.reconstruction import Reconstruction
from utils.training.resume import differing_flags
from utils.training.trainer import Trainer

CPU = torch.device("cpu")
SMALL = ModelConfig(num_embedding=16, hidden_size=8, num_residual_hidden=4)
# Of so many epochs few have figures.
TRAIN = TrainConfig(batch_size=8, num_epochs=1000, max_steps=9, lr=1e-2, log_every=2)


def make(folder: Path, train: TrainConfig = TRAIN, model: ModelConfig = SMALL) -> Trainer:
    images = torch.randint(256, (26, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    training, validation = images.to(torch.uint8).split([20, 6])
    seed_everything(train.seed, CPU)
    losses = {"reconstruction": MeanSquaredError(0.1), "quantizer": QuantizerLoss()}
    return Trainer(
        Reconstruction(VQVAE(model), losses, train),
        BatchLoader(
            TensorImages(training), train.batch_size, device=CPU, shuffle=True, seed=train.seed
        ),
        BatchLoader(TensorImages(validation), train.batch_size, device=CPU),
        train,
        models=folder / "models",
        logs=folder / "logs",
    )


def test_without_a_validation_image_there_is_no_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(tmp_path)
    monkeypatch.setattr(trainer.validation_loader, "epoch", lambda: iter(()))
    message = refusal(trainer.validate)
    assert message == "--skip_bad_images: no validation image can be decoded"


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


def curve(folder: Path, tag: str) -> list[tuple[int, float]]:
    board = EventAccumulator(str(folder / "logs")).Reload()
    return [(event.step, event.value) for event in board.Scalars(tag)]


@pytest.mark.parametrize("stop", [2, 3, 4, 6, 9])
def test_validation_every_few_steps_resumes(stop: int, tmp_path: Path) -> None:
    """Epochs have 3 steps; a signal after step 4 or 6 comes before its validation."""
    config = replace(TRAIN, validate_every=2, save_every="3")
    whole = make(tmp_path / "whole", config)
    whole.fit()
    first = make(tmp_path / "parts", config)
    step = first.train_step

    def stopped(images: torch.Tensor) -> None:
        step(images)
        if first.step == stop:
            first.stop.signal = signal.SIGTERM

    first.train_step = stopped  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        first.fit()
    second = make(tmp_path / "parts", config)
    second.resume(read_checkpoint(tmp_path / "parts" / "models" / "last.pt"))
    second.fit()
    assert same(weights(whole), weights(second))
    curves = [curve(tmp_path / name, "validation/psnr") for name in ("whole", "parts")]
    assert [step for step, _ in curves[0]] == [2, 4, 6, 8, 9]
    assert curves[0] == curves[1]
    best = [read_checkpoint(tmp_path / name / "models" / "best.pt") for name in ("whole", "parts")]
    assert best[0].content["step"] == best[1].content["step"]
    assert best[0].content["step"] == max(curves[0], key=lambda point: point[1])[0]
    last = read_checkpoint(tmp_path / "parts" / "models" / "last.pt").content
    assert (last["step"], last["epoch"], last["batch"], last["validated"]) == (9, 3, 0, 9)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({}, "where the same command goes on"),
        ({"overwrite": True}, "where the same command without --overwrite goes on"),
        ({"resume": "none"}, "where the same command without --resume none goes on"),
    ],
)
def test_an_interrupted_command_says_how_to_go_on(
    flags: dict[str, Any], words: str, tmp_path: Path
) -> None:
    trainer = make(tmp_path, replace(TRAIN, **flags))
    trainer.board = NoBoard()
    trainer.show = lambda: None  # type: ignore[method-assign]
    with pytest.raises(Stopped, match=f"last.pt is {words}"):
        trainer.save_and_stop()


def test_validations_apart_from_epochs_leave_training_as_it_is(tmp_path: Path) -> None:
    ends = []
    for name, every in (("epochs", None), ("steps", 2), ("end", 100)):
        trainer = make(tmp_path / name, replace(TRAIN, validate_every=every, log_every=3))
        trainer.fit()
        ends.append((weights(trainer), [step for step, _ in curve(tmp_path / name, "train/loss")]))
    assert same(ends[0][0], ends[1][0])
    assert same(ends[0][0], ends[2][0])
    assert [steps for _, steps in ends] == [[3, 6, 9], [2, 3, 4, 6, 8, 9], [3, 6, 9]]
    assert [step for step, _ in curve(tmp_path / "end", "validation/psnr")] == [9]


def test_a_checkpoint_of_earlier_versions_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    """It is validated first, as its epoch was not."""
    whole = make(tmp_path / "whole")
    whole.fit()
    make(tmp_path / "parts", replace(TRAIN, max_steps=6)).fit()
    last = read_checkpoint(tmp_path / "parts" / "models" / "last.pt")
    trainer = make(tmp_path / "parts")
    trainer.resume(replace(last, content={**last.content, "epoch": 1, "batch": 3, "validated": 3}))
    validated: list[tuple[int, int]] = []
    validate = trainer.validate

    def noted() -> dict[str, float] | None:
        validated.append((trainer.step, trainer.epoch))
        return validate()

    trainer.validate = noted  # type: ignore[method-assign]
    trainer.fit()
    assert validated == [(6, 2), (9, 3)]
    assert same(weights(whole), weights(trainer))


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ({}, 1500),
        ({"max_steps": 3000}, 3000),
        ({"num_epochs": 2}, 6),
        ({"num_epochs": 2, "max_steps": 9}, 6),
        ({"num_epochs": 2, "max_steps": 5}, 5),
    ],
)
def test_what_is_given_ends_the_run(flags: dict[str, int], steps: int, tmp_path: Path) -> None:
    """A default number of epochs, of 3 steps each, does not end it before --max_steps."""
    assert make(tmp_path, TrainConfig(batch_size=8, **flags)).total_steps == steps  # type: ignore[arg-type]


BEST = replace(SMALL, codebook_update="ema", codebook_start="kmeans", latent_norm="batch")


@pytest.mark.parametrize(
    "model",
    [
        replace(BEST, distance="l2", rate_weight=0.1),
        replace(BEST, anchor="random", gradient="rotation", num_passes=2),
    ],
)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_switches_and_schedules_resume(model: ModelConfig, schedule: str, tmp_path: Path) -> None:
    """Stopped by a signal after 5 of 9 steps."""
    config = replace(TRAIN, schedule=schedule, warmup_steps=3)
    whole = make(tmp_path / "whole", config, model)
    whole.fit()
    first = make(tmp_path / "parts", config, model)
    step = first.train_step

    def stopped(images: torch.Tensor) -> None:
        step(images)
        if first.step == 5:
            first.stop.signal = signal.SIGTERM

    first.train_step = stopped  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        first.fit()
    second = make(tmp_path / "parts", config, model)
    second.resume(read_checkpoint(tmp_path / "parts" / "models" / "last.pt"))
    assert second.step == 5
    second.fit()
    assert same(weights(whole), weights(second))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.45, 0.6, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
        ("wsd", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 0.5]),
    ],
)
def test_the_learning_rate_follows_its_schedule(
    schedule: str, expected: list[float], tmp_path: Path
) -> None:
    config = replace(TRAIN, schedule=schedule, warmup_steps=4, max_steps=10, num_epochs=9)
    trainer = make(tmp_path, config)
    rates = []
    for trainer.step in range(1, 11):
        rates.append(trainer.learning_rate() / config.lr)
    assert rates == pytest.approx(expected)


def test_a_schedule_of_another_length_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(TRAIN, schedule="linear", max_steps=4)
    make(tmp_path, config).fit()
    longer = make(tmp_path, replace(config, max_steps=8))
    longer.resume(read_checkpoint(tmp_path / "models" / "last.pt"))
    (told,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "--schedule linear is now of 8 steps, not 4" in told
    make(tmp_path, config).resume(read_checkpoint(tmp_path / "models" / "last.pt"))
    assert sum(record.levelname == "WARNING" for record in caplog.records) == 1


def test_validation_changes_nothing(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    before, random_state = weights(trainer), torch.get_rng_state()
    with SummaryWriter(str(tmp_path)) as trainer.board:
        scores = trainer.validate()
    assert same(before, weights(trainer))
    assert torch.equal(random_state, torch.get_rng_state())
    assert trainer.model.training
    assert scores is not None
    assert scores["psnr"] > 0


def test_best_is_the_best_validation_score(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    scores: list[float] = []
    validate = trainer.validate

    def spoiled() -> dict[str, float]:
        found = {**(validate() or {}), "psnr": [20.0, 30.0, 10.0][len(scores)]}
        scores.append(found["psnr"])
        return found

    trainer.validate = spoiled  # type: ignore[method-assign]
    trainer.fit()
    assert read_checkpoint(tmp_path / "models" / "best.pt").content["step"] == 6
    last = read_checkpoint(tmp_path / "models" / "last.pt").content
    assert (last["step"], last["epoch"], last["best"]) == (9, 3, 30.0)


def poison(trainer: Trainer, what: str, steps: tuple[int, ...]) -> None:
    """Make the output of the decoder, or one gradient, not a number at these steps."""

    def spoiled(value: torch.Tensor) -> torch.Tensor:
        return value * float("nan") if trainer.step in steps else value

    if what == "output":
        trainer.model.decoder.register_forward_hook(lambda *arguments: spoiled(arguments[2]))
    else:
        trainer.model.decoder.conv_1.weight.register_hook(spoiled)


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("output", "the reconstruction loss"),
        ("gradient", r"the gradient of decoder\.conv_1\.weight"),
    ],
)
def test_a_bad_step_stops_the_run_and_keeps_the_checkpoint(
    what: str, name: str, tmp_path: Path
) -> None:
    trainer = make(tmp_path)
    poison(trainer, what, (5,))
    with pytest.raises(UserError, match=rf"{name} is not finite at step 5; .*last\.pt is the last"):
        trainer.fit()
    last = read_checkpoint(tmp_path / "models" / "last.pt")
    assert last.content["step"] == 3
    assert all(torch.isfinite(value).all() for value in last.state_dict.values())


@pytest.mark.parametrize("what", ["output", "gradient"])
def test_bad_steps_are_skipped_as_often_as_allowed(
    what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make(tmp_path, replace(TRAIN, max_bad_steps=2))
    poison(trainer, what, (3, 5, 6))
    before: list[torch.Tensor] = []
    step = trainer.train_step

    def watched(images: torch.Tensor) -> None:
        before[:] = [value.detach().clone() for value in trainer.model.decoder.parameters()]
        step(images)
        same_weights = same(before, list(trainer.model.decoder.parameters()))
        assert same_weights == (trainer.step in (3, 5, 6))

    trainer.train_step = watched  # type: ignore[method-assign]
    trainer.fit()
    assert trainer.step == 9
    assert "skipped 1 step(s); the first: " in caplog.text
    assert "skipped 2 step(s); the first: " in caplog.text
    again = make(tmp_path / "again", replace(TRAIN, max_bad_steps=2))
    poison(again, what, (5, 6, 7))
    with pytest.raises(UserError, match=r"not finite at step \d; stopped, as --max_bad_steps is 2"):
        again.fit()


def test_bad_steps_in_a_row_are_counted_across_a_checkpoint(tmp_path: Path) -> None:
    config = replace(TRAIN, max_bad_steps=2)
    first = make(tmp_path, replace(config, max_steps=3))
    poison(first, "gradient", (2, 3))
    first.fit()
    second = make(tmp_path, config)
    second.resume(read_checkpoint(tmp_path / "models" / "last.pt"))
    poison(second, "gradient", (4,))
    with pytest.raises(UserError, match="not finite at step 4"):
        second.fit()


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.fit()
    before = (tmp_path / "models" / "last.pt").read_bytes()
    with torch.no_grad():
        trainer.model.decoder.conv_1.weight[0, 0, 0, 0] = float("inf")
    with pytest.raises(
        UserError, match=r"a weight is not finite at step 9; .*last\.pt is the last"
    ):
        trainer.save("last.pt")
    assert (tmp_path / "models" / "last.pt").read_bytes() == before


def test_a_gradient_is_clipped_to_its_norm(tmp_path: Path) -> None:
    norms = []
    for clip in (None, 0.0, 0.01):
        trainer = make(tmp_path / str(clip), replace(TRAIN, grad_clip=clip, max_steps=1))
        trainer.fit()
        gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))
    assert norms[0] == norms[1] > 0.1
    assert norms[2] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("accumulate", [2, 3, 8])
def test_a_batch_in_parts_equals_the_whole_batch(
    accumulate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, gradients, usage and closest anchors are those of the effective batch.

    In float64 and with few codevectors, else rounding would decide between such of one direction.
    """
    monkeypatch.setattr(
        utils.training.reconstruction, "to_signed", lambda images: images.double() / 127.5 - 1
    )
    ends = []
    for parts in (1, accumulate):
        few = replace(SMALL, num_embedding=4)
        trainer = make(tmp_path / str(parts), replace(TRAIN, accumulate=parts), few)
        quantizer = trainer.model.double().quantizer
        assert isinstance(quantizer, LooCQuantizer)
        quantizer.search = "torch"
        trainer.fit()
        ends.append([*weights(trainer), torch.tensor(trainer.best)])
    for one, other in zip(*ends):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ({"save_every": "0"}, "--save_every 0 is neither"),
        ({"save_every": "10h"}, "--save_every 10h is neither"),
        ({"accumulate": 9}, "--accumulate 9 is more than --batch_size 8"),
    ],
)
def test_wrong_settings_are_named(flag: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TRAIN, **flag)


def test_last_is_saved_every_so_many_steps_and_the_one_before_kept(tmp_path: Path) -> None:
    trainer = make(tmp_path, replace(TRAIN, save_every="2", max_steps=6))
    saved: list[tuple[str, int]] = []
    save = trainer.save

    def noted(name: str) -> None:
        saved.append((name, trainer.step))
        save(name)

    trainer.save = noted  # type: ignore[method-assign]
    trainer.fit()
    assert [step for name, step in saved if name == "last.pt"] == [2, 3, 4, 6]
    previous = read_checkpoint(tmp_path / "models" / "previous.pt")
    assert previous.content["step"] == 4


def test_minutes_count_from_the_last_checkpoint(tmp_path: Path) -> None:
    trainer = make(tmp_path, replace(TRAIN, save_every="2m"))
    assert not trainer.save_is_due()
    trainer.saved_at -= 121
    assert trainer.save_is_due()


def test_best_is_written_before_last_tells_its_score(tmp_path: Path) -> None:
    trainer = make(tmp_path, replace(TRAIN, max_steps=1))
    names: list[str] = []
    trainer.save = names.append  # type: ignore[assignment, method-assign]
    trainer.fit()
    assert names == ["best.pt", "last.pt"]


@pytest.fixture(scope="module")
def checkpoint_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a run."""
    folder = tmp_path_factory.mktemp("run")
    make(folder).fit()
    return folder / "models" / "last.pt"


@pytest.mark.parametrize(
    "change",
    [
        *({"batch": -1}, {"batch": 4}, {"epoch": -1}, {"step": float("inf")}, {"step": 2**63}),
        *({"validated": torch.zeros(2)}, {"best": float("nan")}, {"best": "high"}),
        *({"optimizer": {}}, {"optimizer": {"state": []}}, {"optimizer": {"state": {0: 1}}}),
    ],
)
def test_a_damaged_state_is_not_resumed(
    change: dict[str, object], checkpoint_file: Path, tmp_path: Path
) -> None:
    checkpoint = read_checkpoint(checkpoint_file)
    damaged = replace(checkpoint, content={**checkpoint.content, **change})
    with pytest.raises(UserError, match=r"last\.pt (cannot be resumed|is damaged): "):
        make(tmp_path).resume(damaged)
    content = {**checkpoint.content}
    averages = content["optimizer"]["state"][0]
    for name, spoiled, message in (
        ("exp_avg", torch.zeros(1), "misshapen"),
        ("exp_avg_sq", averages["exp_avg_sq"].to_sparse(), "misshapen"),
        ("exp_avg_sq", averages["exp_avg_sq"] - 1, "negative"),
        ("exp_avg", averages["exp_avg"] + float("inf"), "not finite"),
        ("step", torch.zeros(3), "misshapen"),
    ):
        content["optimizer"]["state"][0] = {**averages, name: spoiled}
        with pytest.raises(UserError, match=message):
            make(tmp_path).resume(replace(checkpoint, content=content))


def test_averages_that_share_memory_are_resumed_apart(tmp_path: Path) -> None:
    make(tmp_path, replace(TRAIN, max_steps=3)).fit()
    checkpoint = read_checkpoint(tmp_path / "models" / "last.pt")
    entry = checkpoint.content["optimizer"]["state"][0]
    entry["exp_avg_sq"] = torch.ones(1, 1, 1, 1).expand(entry["exp_avg"].shape)
    trainer = make(tmp_path)
    trainer.resume(checkpoint)
    trainer.fit()
    assert trainer.step == 9


def test_no_more_parts_than_images(tmp_path: Path) -> None:
    trainer = make(tmp_path, replace(TRAIN, batch_size=2**20, accumulate=2**20, max_steps=1))
    passes: list[int] = []
    trainer.model.encoder.register_forward_hook(lambda *_: passes.append(1))
    trainer.fit()
    assert len(passes) == 20 + 1  # and one of validation


def test_the_meter_weighs_images() -> None:
    meter = Meter(CPU)
    names = ("loss", "reconstruction", "quantizer", "psnr")
    meter.add(dict(zip(names, torch.tensor([1.0, 4.0, 0.0, 20.0]))), 3)
    meter.add(dict(zip(names, torch.tensor([5.0, 8.0, 4.0, 28.0]))), 1)
    meter.add(dict(zip(names, torch.tensor([1.0, 4.0, torch.nan, 20.0]))), 0)
    scores = meter.read()
    assert scores == {"loss": 2, "reconstruction": 5, "quantizer": 1, "psnr": 22, "num_items": 4}
    assert meter.read() == {}


def test_the_task_counts_codevectors(tmp_path: Path) -> None:
    task = make(tmp_path, model=replace(SMALL, num_embedding=4)).task
    assert isinstance(task, Reconstruction)
    for indices in (torch.tensor([0, 0, 1]), torch.tensor([3])):
        task._count(indices[:, None])
    scores = task.training_scores()
    assert scores == {"usage_percent": 75, "perplexity": pytest.approx(2**1.5)}
    assert task.training_scores()["usage_percent"] == 0


@pytest.mark.usefixtures("draw_figures")
def test_tensorboard_shows_curves_pictures_and_usage(tmp_path: Path) -> None:
    make(tmp_path).fit()
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    tags = events.Tags()
    for group in ("train", "validation"):
        for name in ("psnr", "usage_percent", "perplexity", "reconstruction"):
            assert f"{group}/{name}" in tags["scalars"]
    pictures = [f"codebook/{name}" for name in ("codebook", "slots", "usage")]
    assert sorted(tags["images"]) == [*pictures, "validation/reconstructions"]
    assert [event.step for event in events.Scalars("validation/psnr")] == [3, 6, 9]


def test_a_full_disk_is_told_with_tensorboards_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    message = refusal(make(tmp_path).fit)
    assert message == f"cannot write {tmp_path / 'logs'}: No space left on device"


def test_a_resumed_run_keeps_its_curves(tmp_path: Path) -> None:
    """Those of the step that it goes on from, too, and of training and validation one measure."""
    make(tmp_path, replace(TRAIN, max_steps=6, log_every=3)).fit()
    second = make(tmp_path, replace(TRAIN, log_every=3))
    second.resume(read_checkpoint(tmp_path / "models" / "last.pt"))
    second.fit()
    board = EventAccumulator(str(tmp_path / "logs")).Reload()
    for tag in ("train/psnr", "validation/psnr"):
        assert [event.step for event in board.Scalars(tag)] == [3, 6, 9]


def test_training_and_validation_have_one_psnr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean over images of each one's, of what can be shown of it."""
    trainer = make(tmp_path, model=ModelConfig(quantizer="none", anchor="none", hidden_size=8))
    trainer.model.decoder.register_forward_hook(lambda *of: of[2] + 1)  # beyond 1 in part
    images = next(iter(trainer.train_loader.epoch()))
    trainer.backward(images, 1.0)
    trained = trainer.meter.read()["psnr"]
    monkeypatch.setattr(trainer.validation_loader, "epoch", lambda: iter([images]))
    trainer.board = NoBoard()
    validated = trainer.validate()
    assert validated is not None
    assert validated["psnr"] == pytest.approx(trained, rel=1e-6)


def test_contradictions_name_flag_and_both_values() -> None:
    other = replace(TRAIN, lr=1.0, num_epochs=9, device="cpu", exp_name="x")
    assert differing_flags(TRAIN, other) == ["--lr 1.0 (it has 0.01)"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize("name", ["cuda", "cuda:1", "gpu", "meta"])
def test_a_device_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(UserError, match=f"--device {name}"):
        resolve_device(name)


def test_best_has_no_state_of_the_run(tmp_path: Path) -> None:
    """It is for testing and --pretrained; last.pt is three times as large."""
    trainer = make(tmp_path, replace(TRAIN, weight_ema=0.9, max_steps=3))
    trainer.fit()
    best, last = (read_checkpoint(tmp_path / f"models/{name}.pt") for name in ("best", "last"))
    assert best.content.keys() < last.content.keys()
    own = {"trained", "optimizer", "scaler", "random_states", "batch"}
    assert own < last.content.keys() - best.content.keys()
    assert best.count("step") == 3
    assert best.content["best"] == last.content["best"]  # the report and compare show it
