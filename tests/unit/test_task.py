"""The trainer trains any task: a linear regression; and a loss is one file and one line."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from tests.conftest import HANGS, Outcome, refusal
from tests.processes import context
from utils.distributed import num_ranks, rank
from utils.errors import Stopped
from utils.training import losses
from utils.training.config import LoopConfig
from utils.training.losses.loss import Loss, Seen
from utils.training.resume import resume
from utils.training.task import Step, Task
from utils.training.trainer import Trainer

CONFIG = LoopConfig(batch_size=12, num_epochs=3, lr=0.1, log_every=2)  # 5 steps an epoch


class LinearRegression(Task):
    """y = x·w + b, by least squares."""

    items = "points"

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(3, 1)

    def losses(self, batch: tuple[Tensor, Tensor], step: Step) -> Iterator[Mapping[str, Tensor]]:
        x, y = batch
        squares = (step.network(x).float() - y).square()
        loss = squares.sum() / max(1, len(x))  # a process may have no point
        step.report(loss=loss)
        yield {"squares": loss}

    def validate(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"error": (model(batch[0]) - batch[1]).square().sum()}

    def score(self, scores: Mapping[str, float]) -> float:
        return -scores["error"]


class Points:
    """Points of a plane in batches of 12, in another order in every epoch; a Loader."""

    def __init__(self, count: int) -> None:
        self.bad_images: dict[int, str] = {}
        self.x = torch.randn(count, 3, generator=torch.Generator().manual_seed(1))
        self.y = self.x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.3

    def __len__(self) -> int:
        return -(-len(self.x) // 12)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(12)[start:]:
            own = batch.tensor_split(num_ranks())[rank()]
            yield self.x[own], self.y[own]


def make(folder: Path, config: LoopConfig = CONFIG) -> Trainer:
    return Trainer(
        LinearRegression(),
        Points(60),
        Points(24),
        config,
        models=folder / "models",
        logs=folder / "logs",
    )


def fit(folder: Path, config: LoopConfig = CONFIG) -> Trainer:
    """Continue the run of this folder, or begin it, and train to its end."""
    trainer = make(folder, config)
    resume(trainer, lambda _: None)
    trainer.fit()
    return trainer


def weights(trainer: Trainer) -> Tensor:
    return torch.cat([value.detach().flatten() for value in trainer.model.parameters()])


def test_it_is_learnt(tmp_path: Path) -> None:
    trainer = fit(tmp_path, replace(CONFIG, num_epochs=40))
    assert weights(trainer) == pytest.approx([1, -2, 0.5, 0.3], abs=0.01)
    assert trainer.best > -1e-4
    stored = torch.load(tmp_path / "models" / "best.pt", weights_only=True)
    assert stored["model"].keys() == {"weight", "bias"}


def train_and_kill(folder: Path, step: int) -> None:
    """Train in this process, which is killed after a step."""
    trainer = make(folder, replace(CONFIG, save_every="1"))
    save = trainer.save

    def save_and_die(name: str) -> None:
        save(name)
        if trainer.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.save = save_and_die  # type: ignore[method-assign]
    trainer.fit()


@pytest.mark.parametrize("step", [3, 5])
def test_killed_and_resumed_equals_uninterrupted(step: int, tmp_path: Path) -> None:
    """Bit for bit, killed within an epoch or at its end."""
    process = context.Process(target=train_and_kill, args=(tmp_path / "killed", step))
    process.start()
    process.join(HANGS)
    assert process.exitcode == -signal.SIGKILL
    second = fit(tmp_path / "killed")
    assert second.step == 15
    assert torch.equal(weights(second), weights(fit(tmp_path / "whole")))


def test_a_signal_stops_and_other_flags_are_refused(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    step = trainer.train_step

    def stopped(batch: Any) -> None:
        step(batch)
        trainer.stop.signal = signal.SIGTERM

    trainer.train_step = stopped  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        trainer.fit()
    message = refusal(lambda: fit(tmp_path, replace(CONFIG, lr=0.2)))
    assert "--lr 0.2" in message
    assert "0.1" in message
    assert fit(tmp_path).step == 15


def train_in_ranks(number: int, total: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder / 'meet'}", rank=number, world_size=total)
    torch.save(weights(fit(folder / "run")), folder / f"{number}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    processes = [
        context.Process(target=train_in_ranks, args=(number, 2, tmp_path)) for number in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(HANGS)
        assert process.exitcode == 0
    first, second = (torch.load(tmp_path / f"{number}.pt") for number in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, weights(fit(tmp_path / "one")), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("parts", [2, 5])
def test_parts_equal_the_whole_batch(parts: int, tmp_path: Path) -> None:
    whole = weights(fit(tmp_path / "whole"))
    split = weights(fit(tmp_path / "parts", replace(CONFIG, accumulate=parts)))
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-6)


def test_bf16_is_near_fp32(tmp_path: Path) -> None:
    exact = weights(fit(tmp_path / "fp32"))
    rounded = weights(fit(tmp_path / "bf16", replace(CONFIG, precision="bf16")))
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.02)


def test_averaged_weights_are_validated_and_resumed(tmp_path: Path) -> None:
    config = replace(CONFIG, weight_ema=0.9)
    whole = fit(tmp_path / "whole", config)
    fit(tmp_path / "parts", replace(config, max_steps=7))
    resumed = fit(tmp_path / "parts", config)
    for one, other in ((whole.model, resumed.model), (whole.best_model, resumed.best_model)):
        assert torch.equal(one.weight, other.weight)
    assert not torch.equal(whole.best_model.weight, whole.model.weight)
    points = Points(24)
    error = (whole.best_model(points.x) - points.y).square().mean()
    events = EventAccumulator(str(tmp_path / "whole" / "logs")).Reload()
    assert events.Scalars("validation/error")[-1].value == pytest.approx(float(error), rel=1e-4)
    stored = torch.load(tmp_path / "whole" / "models" / "last.pt", weights_only=True)
    assert torch.equal(stored["model"]["weight"], whole.best_model.weight)
    assert torch.equal(stored["trained"]["weight"], whole.model.weight)


def test_tensorboard_has_the_tasks_own_names(tmp_path: Path) -> None:
    fit(tmp_path)
    events = EventAccumulator(str(tmp_path / "logs")).Reload()
    tags = events.Tags()["scalars"]
    train = {"train/loss", "train/points_per_second", "train/learning_rate"}
    assert set(tags) == {*train, "validation/error"}
    assert [event.step for event in events.Scalars("validation/error")] == [5, 10, 15]
    errors = [event.value for event in events.Scalars("validation/error")]
    assert errors[-1] < errors[0]


class SmoothLatents(Loss):
    """Penalty on differences of neighbouring latents: a loss that sees `Quantized`."""

    def __call__(self, seen: Seen) -> Tensor:
        latents = seen.quantized.latents  # (b, C, H, W)
        roughness = latents.diff(dim=3).square().mean()
        seen.step.report(roughness=roughness)
        return 1e3 * roughness


def test_a_loss_is_one_line(
    script: Any, mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Registered, it is minimised and logged by main.py."""
    words = (
        *("main.py", "--dataset", "mnist", "--data_folder", str(mnist), "--device", "cpu"),
        *("--hidden_size", "8", "--num_residual_hidden", "4", "--batch_size", "8"),
        *("--num_epochs", "2", "--log_every", "1", "--seed", "1"),
    )

    def roughness(name: str) -> float:
        outcome: Outcome = script(*words, "--exp_name", name)
        assert outcome.code == 0, outcome.err
        events = EventAccumulator(str(tmp_path / "output" / "logs" / name)).Reload()
        return float(events.Scalars("train/roughness")[-1].value)

    monkeypatch.setitem(losses.LOSSES, "smooth", SmoothLatents)
    smooth = roughness("smooth")
    monkeypatch.setattr(SmoothLatents, "__call__", lambda self, seen: 1e-9 * called(self, seen))
    assert smooth < 0.9 * roughness("rough")


called = SmoothLatents.__call__
