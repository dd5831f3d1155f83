"""The interface between the trainer and what it trains.

A task owns a model and says what is minimised, how it is validated and what a checkpoint holds of
it. The trainer owns the loop: steps, parts of a batch, processes, precision, clipping, schedules,
averaged weights, signals, checkpoints, TensorBoard.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from modules.checkpoint import check_tensors
from modules.quantizers.looc.ranks import sum_over_ranks
from utils.checkpoints.checkpoint import Stored, read_stored
from utils.training.config import LoopConfig
from utils.training.optimizers import make_adam


class Loader(Protocol):
    """This process's batches, in an order that the number of the epoch decides.

    bad_images: the message for each image that was skipped, by its position in the set.
    """

    bad_images: dict[int, str]

    def __len__(self) -> int: ...

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Any]: ...


@dataclass(frozen=True)
class Step:
    """One part of a training step, as the trainer presents it to a task."""

    number: int  # of the step; the first is 1
    last: bool  # whether this is the last part of the batch
    network: Callable[..., Any]  # the model, in the precision of training, for all processes
    scaled: Callable[[Tensor], Tensor]  # loss of this part → its share of the batch's, scaled
    figures: dict[str, Tensor] = field(default_factory=dict)

    def report(self, **figures: Tensor) -> None:
        """Average these scalars over the batches until the next log entry.

        If a task reports nothing, its losses are averaged.
        """
        self.figures.update({name: value.detach() for name, value in figures.items()})

    def gradients(self, losses: Sequence[Tensor], parameter: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of losses by a parameter over all processes: (n, numel), and their scale."""
        gradients = [
            torch.autograd.grad(self.scaled(loss), parameter, retain_graph=True)[0].flatten()
            for loss in losses
        ]
        unit = self.scaled(losses[0].detach().new_tensor(1.0))
        flat = sum_over_ranks(torch.cat([*gradients, unit[None]]))
        return flat[:-1].view(len(losses), -1), flat[-1]


class Task(ABC):
    """Something to train.

    Attributes:
        model: the module that is optimised, averaged, validated and stored.
        items: the name of what batches hold, for the progress bar.
    """

    model: nn.Module
    items = "items"

    @abstractmethod
    def losses(self, batch: Any, step: Step) -> Iterator[Mapping[str, Tensor]]:
        """Yield named losses, scalars and means over the batch, whose sum is minimised.

        The first mapping trains the model. Each further one trains the next of
        `further_optimizers`, and is computed after the backward pass of the one before. Names are
        the same in every step; a loss without a gradient is skipped in the backward pass.
        """

    def begin_validation(self) -> None:  # noqa: B027, most tasks keep nothing of it
        """Forget the batches of the last validation."""

    @abstractmethod
    def validate(self, model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        """Sums over the items of a batch, by name; model is `self.model` or its average."""

    @abstractmethod
    def score(self, scores: Mapping[str, float]) -> float:
        """Score of a validation that selects best.pt: the highest is kept."""

    def optimizer(self, parameters: list[nn.Parameter], config: LoopConfig) -> torch.optim.Adam:
        """Optimiser of the model."""
        return make_adam(parameters, config.lr, config.adam_betas)

    def further_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Optimisers of further modules, by the name of the module."""
        return {}

    def training_scores(self) -> dict[str, float]:
        """More scores of the training batches since the last call, over all processes."""
        return {}

    def validation_scores(self) -> dict[str, float]:
        """More scores of the batches of this validation, over all processes."""
        return {}

    def pictures(self, model: nn.Module) -> dict[str, Any]:
        """Images (C, height, width) and figures of the last validation, for TensorBoard."""
        del model
        return {}

    def describe(self, scores: Mapping[str, float]) -> str:
        """One line about scores of training or validation."""
        return ", ".join(f"{name} {value:.4g}" for name, value in scores.items())

    def content(self, model: nn.Module) -> dict[str, Any]:
        """Entries of a checkpoint from which the model is rebuilt."""
        return {"model": model.state_dict()}

    def read(self, path: Path) -> Stored:
        """Open a checkpoint of this task. Raises UserError where it cannot be opened."""
        return read_stored(path)

    def state(self) -> dict[str, Any]:
        """More entries of a checkpoint, from which training continues; without the optimisers."""
        return {}

    def load(self, content: Mapping[str, Any]) -> None:
        """Restore `state` from the content of a checkpoint. Raises ValueError if damaged."""
        del content

    def load_weights(self, model: nn.Module, weights: Any) -> None:
        """Load stored weights. Raises ValueError where they do not fit or are not finite."""
        check_tensors(model.state_dict(), weights)
        model.load_state_dict(weights)


def size_of(batch: Any) -> int:
    """Items in a batch."""
    return len(batch if isinstance(batch, Tensor) else batch[0])


def parts_of(batch: Any, count: int) -> list[Any]:
    """A batch in so many parts of nearly equal size."""
    if isinstance(batch, Tensor):
        return list(batch.tensor_split(count))
    return list(zip(*(tensor.tensor_split(count) for tensor in batch)))
