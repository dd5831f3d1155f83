"""The training loop: steps, validation, checkpoints and TensorBoard of any task."""

from __future__ import annotations

import gc
import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from modules.quantizers.looc.ranks import num_ranks, sum_over_ranks
from utils.checkpoints.checkpoint import Stored, write_checkpoint
from utils.distributed import (
    gather,
    gather_items,
    gradients_kept,
    rank,
    share_gradients,
    sum_numbers,
)
from utils.errors import Stopped, UserError, one_line, printable
from utils.logger import log, progress
from utils.training.board import open_board
from utils.training.config import PRECISIONS, SCHEDULES, LoopConfig, count_steps
from utils.training.meter import BadSteps, Meter
from utils.training.optimizers import load_optimizer
from utils.training.signals import StopRequest
from utils.training.task import Loader, Step, Task, parts_of, size_of

NUM_PICTURES = 10  # validations of a run that TensorBoard shows pictures of


class Trainer:
    """One run: a task, its batches, and the files that it leaves.

    Under torchrun each process has one; they stay in step, and the first alone writes and logs.

    Args:
        task: its model is on its device.
        train_loader: training batches.
        validation_loader: batches that choose best.pt.
        config: flags of training.
        models: folder of best.pt, last.pt and previous.pt, the last.pt before it.
        logs: TensorBoard's folder.
        configs: more dataclasses of flags, by the name of the entry that checkpoints have of them;
            a resumed run has to have the same.
        stored: more entries of every checkpoint.
    """

    def __init__(
        self,
        task: Task,
        train_loader: Loader,
        validation_loader: Loader,
        config: LoopConfig,
        *,
        models: Path,
        logs: Path,
        configs: Mapping[str, Sequence[Any]] | None = None,
        stored: Mapping[str, Any] | None = None,
    ) -> None:
        self.task = task
        self.model: Any = task.model
        self.network = share_gradients(self.model)
        self.train_loader = train_loader
        self.validation_loader = validation_loader
        self.config = config
        self.models = models
        self.logs = logs
        self.configs = {**(configs or {}), "train_config": (config,)}
        self.stored = dict(stored or {})
        trained = dict(self.model.named_parameters())
        self.named = {name: value for name, value in trained.items() if value.requires_grad}
        self.parameters = list(self.named.values())
        self.optimizer = task.optimizer(self.parameters, config)
        self.average = average_of(self.model, self.average_rate) if config.weight_ema else None
        self.device = next(self.model.parameters()).device
        # Only fp16 is narrow enough to need its gradients scaled.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.meter = Meter(self.device)
        self.bad_steps = BadSteps(self.device)
        self.step = self.epoch = self.batch = 0  # batch: batches of this epoch already seen
        self.validated = 0  # the step of the last validation
        self.best = -float("inf")
        self.saved_at = time.monotonic()
        self.total_steps = count_steps(config.num_epochs, config.max_steps, len(train_loader))
        self.stop = StopRequest()
        self.skipped: set[str] = set()  # messages of bad images that were logged

    def fit(self) -> None:
        """Train to the last step; validate and save after every epoch, or as --validate_every says.

        Raises UserError when a loss or gradient is not finite more often than --max_bad_steps
        allows; checkpoints on disk stay as they were. Raises Stopped after a signal, when last.pt
        has been written.
        """
        if self.step >= self.total_steps and self.validated == self.step:
            log.info("nothing is left to train: %d steps are done", self.step)
            return
        with (
            open_board(self.logs, self.step) as self.board,
            progress(
                self.total_steps, "step", initial=self.step, smoothing=0.1, disable=rank() > 0
            ) as self.bar,
            self.stop,
        ):  # fmt: skip
            self.model.train()
            self.clock = time.perf_counter()
            if self.batch == len(self.train_loader):  # of a checkpoint of an earlier version
                self.epoch, self.batch = self.epoch + 1, 0
            if self.validation_is_due():  # the run was stopped before it
                self.validate_and_save()
            while self.step < self.total_steps:
                self.train_epoch()

    # ------------------------------------------------------------------------------------- steps

    def train_epoch(self) -> None:
        """Train the rest of this epoch, or as much of it as --max_steps allows."""
        for batch in self.train_loader.epoch(self.epoch, start=self.batch):
            self.train_step(batch)
            if self.step % self.config.log_every == 0:
                self.show()
            self.bar.update()
            stop, due = sum_numbers(bool(self.stop.signal), self.save_is_due())
            if stop:
                self.save_and_stop()
            if self.validation_is_due():
                self.validate_and_save()
            elif due:
                self.show()
                self.save("last.pt")
            if self.step == self.total_steps:
                break

    def train_step(self, batch: Any, /) -> None:
        """Take one step on this process's share of a batch; losses are means over all of it."""
        self.step += 1
        self.batch = (self.batch + 1) % len(self.train_loader)
        self.epoch += self.batch == 0
        size = size_of(batch)
        (total,) = sum_numbers(size)
        if total == 0:  # none of them could be read
            return
        for optimizer in (self.optimizer, *self.task.further_optimizers().values()):
            optimizer.zero_grad()
        # A part without an item in any process would have no mean.
        most = max(gather(size)) if self.config.accumulate > 1 else 1
        parts = parts_of(batch, min(self.config.accumulate, most))
        losses: list[Tensor] = []
        for number, part in enumerate(parts, 1):
            last = number == len(parts)
            with nullcontext() if last else gradients_kept(self.network):
                losses.append(self.backward(part, size_of(part) / total, last=last))
        self.update_weights(sum_over_ranks(torch.stack(losses).sum(0)))
        if self.average is not None:
            self.average.update_parameters(self.model)

    def backward(self, part: Any, share: float, *, last: bool = True) -> Tensor:
        """Add the gradients of one part, which is that share of the batch; returns its losses."""
        step = Step(self.step, last, self.forward, lambda loss: self.scaler.scale(loss * share))
        found: dict[str, Tensor] = {}
        for number, losses in enumerate(self.task.losses(part, step)):
            total = sum(losses.values(), torch.zeros((), device=self.device))
            found.update(losses)
            if not total.requires_grad:
                continue
            # A loss that is not finite shows in every gradient, and thereby in every process.
            finite = torch.where(total.detach().isfinite(), 1.0, torch.nan)
            # DistributedDataParallel takes the mean over processes, where the batch wants the sum.
            ranks = num_ranks() if number == 0 else 1
            self.scaler.scale(total * (finite * (share * ranks))).backward()  # type: ignore[no-untyped-call]
        self.loss_names = [f"the {name} loss" for name in found]
        self.meter.add(step.figures or found, size_of(part))
        return torch.stack(list(found.values())).detach()

    def forward(self, *inputs: Any) -> Any:
        """Call the network in the precision of training."""
        with mixed_precision(self.config, self.device):
            return self.network(*inputs)

    def update_weights(self, losses: Tensor) -> None:
        """Clip the gradients and take the step, unless a loss or a gradient is not finite."""
        optimizers: list[torch.optim.Optimizer] = [self.optimizer]
        further_names, further_norms = [], []
        for name, optimizer in self.task.further_optimizers().items():
            norm = sum_gradients(optimizer)
            further_names.append(f"the gradient of the {name}")
            further_norms.append(torch.zeros((), device=self.device) if norm is None else norm)
            if norm is not None:
                optimizers.append(optimizer)
        for optimizer in optimizers:
            self.scaler.unscale_(optimizer)
        gradients = {name: p.grad for name, p in self.named.items() if p.grad is not None}
        norms = torch.stack(torch._foreach_norm(list(gradients.values())))
        if self.config.grad_clip is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.config.grad_clip, norms.norm())
        if self.scaler.is_enabled():
            # Gradients too large for fp16 are the scaler's business: it skips the step by itself.
            self.bad_steps.add(self.step, self.loss_names, losses)
        else:
            names = [
                *self.loss_names, *further_names, *(f"the gradient of {name}" for name in gradients)
            ]  # fmt: skip
            bad = self.bad_steps.add(
                self.step,
                names,
                torch.cat([losses, *(norm[None] for norm in further_norms), norms]),
            )
            for optimizer in optimizers:
                optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate()
            self.scaler.step(optimizer)
        self.scaler.update()

    def learning_rate(self) -> float:
        """lr · min(1, step / warm-up steps) · schedule(share of the steps before this one)."""
        config, before = self.config, self.step - 1
        warm_up = min(1.0, self.step / max(1, config.warmup_steps))
        return config.lr * warm_up * SCHEDULES[config.schedule](before / self.total_steps)

    def show(self) -> None:
        """Report the averages since the last look to the bar and to TensorBoard.

        Raises UserError where more steps than allowed were bad.
        """
        self.check_steps()
        scores = self.meter.read() | self.task.training_scores()
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        if "num_items" not in scores:
            return
        speed = scores.pop("num_items") / seconds
        items = self.task.items
        self.bar.set_postfix_str(f"{self.task.describe(scores)}, {speed:.0f} {items}/s", False)
        scores[f"{items}_per_second"] = speed
        self.write_scalars("train", {**scores, "learning_rate": self.learning_rate()})

    def check_steps(self) -> None:
        """Log steps that were skipped; raise UserError where there were too many."""
        in_a_row, count, step, name = self.bad_steps.read()
        allowed = self.config.max_bad_steps
        if in_a_row > allowed:
            raise UserError(
                f"{name} is not finite at step {step}; stopped, as --max_bad_steps is {allowed}; "
                f"{self.last_good()} (try a --lr below {self.config.lr}, or --grad_clip)"
            )
        if count:
            log.warning(
                "skipped %d step(s); the first: %s is not finite at step %d", count, name, step
            )
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1:
            raise UserError(
                f"at step {self.step} gradients overflow --precision fp16 even unscaled; stopped, "
                f"{self.last_good()} (try bf16)"
            )

    def last_good(self) -> str:
        """The checkpoint that is left, for messages."""
        last = self.models / "last.pt"
        return f"{last} is the last good one" if last.exists() else "nothing was saved yet"

    # -------------------------------------------------------------------------------- validation

    def validation_is_due(self) -> bool:
        """Return whether this step is validated, and has not been yet."""
        if self.validated == self.step:
            return False
        every = self.config.validate_every
        return self.step >= self.total_steps or (self.step % every if every else self.batch) == 0

    def validate_and_save(self) -> None:
        """Validate, save last.pt, and best.pt where this is the best so far."""
        self.show()
        scores = self.validate()
        self.log_skipped()
        if scores is None:
            self.save_and_stop()
            return
        self.validated = self.step
        score = self.task.score(scores)
        improved = score > self.best
        self.best = max(self.best, score)
        log.info(
            "epoch %d, step %d: validation %s%s",
            *(self.epoch, self.step, self.task.describe(scores)),
            " (best)" if improved else "",
        )
        if improved:
            self.save("best.pt")
        self.save("last.pt")  # after best.pt, whose score it holds
        self.clock = time.perf_counter()  # the speed is that of training

    def log_skipped(self) -> None:
        """Log the images that were skipped since the last time."""
        bad = [*self.train_loader.bad_images.values(), *self.validation_loader.bad_images.values()]
        for message in sorted(set(gather_items(bad)) - self.skipped):
            self.skipped.add(message)
            log.warning("left out (%d so far): %s", len(self.skipped), printable(message))

    @torch.no_grad()
    def validate(self) -> dict[str, float] | None:
        """Mean scores over the validation items, of the averaged weights where there are such.

        Changes nothing. None where a signal cut it short.
        """
        self.model.eval()
        self.task.begin_validation()
        names: tuple[str, ...] = ()
        sums, count = torch.zeros(0, dtype=torch.float64), 0
        for batch in self.validation_loader.epoch():
            if self.stop.signal:
                break
            found = self.task.validate(self.best_model, batch)
            stacked = torch.stack([value.double() for value in found.values()]).cpu()
            sums = sums + stacked if names else stacked
            names = tuple(found)
            count += size_of(batch)
        names = max(gather(names), key=len)  # a process may have had no batch
        if not len(sums):
            sums = torch.zeros(len(names), dtype=torch.float64)
        stopped, total, *totals = sum_numbers(bool(self.stop.signal), count, *sums.tolist())
        if stopped:
            self.model.train()
            return None
        if not total:
            raise UserError("--skip_bad_images: no validation image can be decoded")
        means = {name: value / total for name, value in zip(names, totals)}
        scores = {**means, **self.task.validation_scores()}
        self.write_scalars("validation", scores)
        if rank() == 0 and self.pictures_are_due():
            for name, picture in self.task.pictures(self.best_model).items():
                image = isinstance(picture, Tensor)
                write = self.board.add_image if image else self.board.add_figure
                write(name, picture, self.step)
            gc.collect()  # figures are cycles of megabytes that Python would leave for long
        self.model.train()
        return scores

    def pictures_are_due(self) -> bool:
        """Return whether this validation shows pictures: the first and NUM_PICTURES more do."""
        shares = (NUM_PICTURES * step // self.total_steps for step in (self.validated, self.step))
        return self.validated == 0 or len(set(shares)) > 1

    def write_scalars(self, group: str, scores: Mapping[str, float]) -> None:
        for name, value in scores.items():
            self.board.add_scalar(f"{group}/{name}", value, self.step)

    # ------------------------------------------------------------------------------- checkpoints

    def save_is_due(self) -> bool:
        """Return whether --save_every asks for a checkpoint now."""
        number = int(self.config.save_every.rstrip("m"))
        if self.config.save_every.endswith("m"):
            return rank() == 0 and time.monotonic() - self.saved_at > 60 * number
        return self.step % number == 0

    def save_and_stop(self) -> None:
        """Write last.pt, from which the run goes on, and raise Stopped."""
        self.show()
        self.save("last.pt")
        number = self.stop.signal or signal.SIGTERM  # sent to another process
        anew = {"--overwrite": self.config.overwrite, "--resume none": self.config.resume == "none"}
        flags = "".join(f" without {flag}" for flag, given in anew.items() if given)
        raise Stopped(
            number,
            f"stopped by {number.name} after step {self.step}; "
            f"{self.models / 'last.pt'} is where the same command{flags} goes on",
        )

    def save(self, name: str) -> None:
        """Write the model and what it was trained by; in last.pt also the state of the run.

        Raises UserError, and leaves the files as they are, where a weight is not finite.
        """
        if not all(value.isfinite().all() for value in self.model.state_dict().values()):
            raise UserError(
                f"a weight is not finite at step {self.step}; stopped, {self.last_good()} "
                f"(try a --lr below {self.config.lr}, or --grad_clip)"
            )
        content = {
            **self.task.content(self.best_model),
            **{name: flags_of(configs) for name, configs in self.configs.items()},
            **self.stored,
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,  # its score
            **self.task.state(),
            **(self.run_state() if name == "last.pt" else {}),
        }
        if rank() == 0:
            previous = self.models / "previous.pt" if name == "last.pt" else None
            write_checkpoint(self.models / name, content, previous)
        if name == "last.pt":
            self.saved_at = time.monotonic()

    def run_state(self) -> dict[str, Any]:
        """Entries of last.pt from which the run continues bit for bit."""
        return {
            "batch": self.batch,
            "validated": self.validated,
            "bad_in_a_row": int(self.bad_steps.state[0]),
            **({} if self.average is None else {"trained": self.model.state_dict()}),
            **{name: optimizer.state_dict() for name, optimizer in self.optimizers().items()},
            "scaler": self.scaler.state_dict(),
            "random_states": gather(random_state(self.device)),
        }

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """All optimisers by the names of their entries in last.pt."""
        further = self.task.further_optimizers().items()
        return {
            "optimizer": self.optimizer,
            **{f"{name}_optimizer": each for name, each in further},
        }

    def resume(self, stored: Stored) -> None:
        """Continue where the checkpoint stopped. Raises UserError where its state is damaged."""
        content = stored.content
        try:
            self.load_weights(stored)
            self.task.load(content)
            for name, optimizer in self.optimizers().items():
                if content[name]["state"] != {}:  # as before its first step
                    load_optimizer(optimizer, content[name]["state"])
            self.scaler.load_state_dict(content["scaler"])
            self.step, self.epoch = stored.count("step"), stored.count("epoch")
            self.batch, self.validated = stored.count("batch"), stored.count("validated")
            self.bad_steps.state[0] = stored.count("bad_in_a_row")
            self.best = content["best"]
            if not isinstance(self.best, float) or math.isnan(self.best):
                raise ValueError("best is no number")
            accumulate, states = content["train_config"]["accumulate"], content["random_states"]
            if len(states) == num_ranks():
                restore_random_state(states[rank()], self.device)
            if (len(states), accumulate) != (num_ranks(), self.config.accumulate):
                log.warning(
                    "%s was written by %d processes with --accumulate %d, not %d with %d: "
                    "the run continues, but not bit for bit as it would have there",
                    *(stored.path, len(states), accumulate),
                    *(num_ranks(), self.config.accumulate),
                )
            self.check_schedule(content["train_config"])
            if not (0 <= self.batch <= len(self.train_loader) and 0 <= self.epoch <= self.step):
                raise ValueError(f"it stands at batch {self.batch} of epoch {self.epoch}")
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as e:
            reason = f"{type(e).__name__}: {one_line(e)[:200]}"
            raise UserError(f"checkpoint {stored.path} cannot be resumed: {reason}") from e

    def load_weights(self, stored: Stored) -> None:
        """Load the weights, and their average where there is one."""
        if self.average is None:
            self.task.load_weights(self.model, stored.content["model"])
            return
        self.task.load_weights(self.model, stored.content["trained"])
        self.task.load_weights(self.average.module, stored.content["model"])
        self.average.n_averaged.fill_(stored.count("step"))

    def check_schedule(self, before: Mapping[str, Any]) -> None:
        """Warn where another number of steps moves the run to another place of its schedule."""
        epoch = len(self.train_loader)
        steps = count_steps(before["num_epochs"], before["max_steps"], epoch)
        if self.config.schedule != "constant" and steps != self.total_steps:
            log.warning(
                "--schedule %s is now of %d steps, not %d: the learning rate goes on at %.2g",
                *(self.config.schedule, self.total_steps, steps, self.learning_rate()),
            )

    # -------------------------------------------------------------------------- averaged weights

    def average_rate(self) -> float:
        """Rate at which the averaged weights follow: 1 − min(decay, (1 + step) / (10 + step))."""
        return 1 - min(self.config.weight_ema, (1 + self.step) / (10 + self.step))

    @property
    def best_model(self) -> Any:
        """The model that is validated and tested: the averaged one, where there is one."""
        return self.model if self.average is None else self.average.module


def place(config: LoopConfig, device: torch.device) -> str:
    """Name the device, and the precision where it is not fp32."""
    return f"{device}" if config.precision == "fp32" else f"{device} in {config.precision}"


def flags_of(configs: Sequence[Any]) -> dict[str, Any]:
    """The flags of several dataclasses in one dictionary."""
    return {name: value for config in configs for name, value in asdict(config).items()}


def mixed_precision(config: LoopConfig, device: torch.device) -> torch.autocast:
    """Autocast context for training."""
    dtype = PRECISIONS[config.precision]
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def sum_gradients(optimizer: torch.optim.Optimizer) -> Tensor | None:
    """Sum an optimiser's gradients over all processes; returns their norm, None without any."""
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    gradients = [value.grad for value in parameters if value.grad is not None]
    if not gradients:
        return None
    flat = sum_over_ranks(torch.cat([gradient.flatten() for gradient in gradients]))
    nn.utils.vector_to_parameters(flat, gradients)
    norm: Tensor = flat.norm()
    return norm


def average_of(model: nn.Module, rate: Callable[[], float]) -> AveragedModel:
    """A moving average of a model's weights and floating-point buffers, from their first values.

    Buffers are averaged too, because statistics of the latents belong to the weights that made
    them. Counts, of no axes, and buffers of other types are copied.
    """

    def follow(averages: Any, values: Any, _count: Tensor | int) -> None:
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, values, rate())
            for mean, value in zip(averages, values):
                if not mean.dim():
                    mean.copy_(value)
        else:
            torch._foreach_copy_(averages, values)

    average = AveragedModel(model, multi_avg_fn=follow, use_buffers=True)
    average.requires_grad_(False).eval()
    return average


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of PyTorch's generators of this process."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
