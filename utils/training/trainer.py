"""Training: the step, its meter, validation, checkpoints and TensorBoard."""

from __future__ import annotations

import errno
import gc
import math
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from modules import Autoencoder, ModelConfig
from modules.options import option
from modules.quantizers.looc.ranks import num_ranks, sum_over_ranks
from modules.quantizers.registry import QUANTIZERS
from utils.checkpoints.checkpoint import Checkpoint, check_tensors, model_content, write_checkpoint
from utils.codebook.plots import draw_all
from utils.codebook.statistics import CodebookStatistics, in_words, use_of
from utils.distributed import (
    gather,
    gather_items,
    gradients_kept,
    rank,
    share_gradients,
    sum_numbers,
)
from utils.errors import Stopped, UserError, one_line, printable
from utils.flags.presets import PRESETS
from utils.flags.recipes import RECIPES
from utils.images import comparison, mean_squared_errors, signed_psnr, to_bytes, to_signed
from utils.logger import log
from utils.training.meter import BadSteps, Meter
from utils.training.objectives import Objective
from utils.training.optimizers import load_optimizer, make_adam
from utils.training.signals import StopRequest

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCHEDULES: dict[str, Callable[[float], float]] = {  # share of the steps done → factor of lr
    "constant": lambda _: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "wsd": lambda done: min(1.0, 5 * (1 - done)),  # warm-up, stable, decay over the last fifth
}
OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
NUM_SHOWN = 16  # validation images in TensorBoard


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained, and where its files go."""

    output_folder: str = option("output", "folder of models, logs and results")
    exp_name: str | None = option(
        None, "name of the experiment (default: <dataset>_<quantizer>_<K>x<d>)"
    )
    batch_size: int = option(1024, "images a step", minimum=1, maximum=2**20)
    num_epochs: int = option(500, "passes over the training images", minimum=1, maximum=10**9)
    max_steps: int | None = option(None, "stop after this many steps", minimum=1, maximum=10**12)
    recipe: str = option(
        "paper", "what the flags that are not given are set to", choices=tuple(RECIPES)
    )
    preset: str | None = option(
        None,
        "file of flags to which those given are added; or, of those that are here, its name: "
        + ", ".join(PRESETS),
    )
    pretrained: str | None = option(
        None,
        "weights that --model vqgan starts from, but for the quantiser: a folder of diffusers' "
        "VQModel or AutoencoderKL, or a checkpoint of taming-transformers or latent-diffusion",
    )
    lr: float = option(3e-4, "learning rate of Adam", above=0, maximum=10)
    betas: str = option("0.9,0.999", "decay of Adam's two averages")
    schedule: str = option(
        "constant",
        "of the learning rate; all but constant end at 0, wsd by falling in the last fifth",
        choices=tuple(SCHEDULES),
    )
    warmup_steps: int = option(
        0, "steps in which the learning rate rises from 0", minimum=0, maximum=10**9
    )
    seed: int = option(42, "seed of all randomness", minimum=0, maximum=2**32 - 1)
    validation: str = option(
        "split",
        "images that choose best.pt: a tenth of the training set, or (the reference's practice) "
        "the test set",
        choices=("split", "test"),
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    precision: str = option(
        "fp32", "of the network in training; the codebook is always fp32", choices=tuple(PRECISIONS)
    )
    compile: bool = option(False, "compile encoder and decoder (torch.compile)")
    channels_last: bool = option(False, "hold images and weights channels last")
    accumulate: int = option(
        1, "parts in which a batch is passed, to save memory", minimum=1, maximum=2**20
    )
    checkpoint_gradients: bool = option(
        False, "hold less of --model vqgan in memory, and compute it again in the backward pass"
    )
    weight_ema: float = option(
        0.0,
        "decay of a running mean of the weights, which is validated and tested in their stead "
        "(0: none)",
        minimum=0,
        maximum=1 - 1e-9,
    )
    grad_clip: float | None = option(
        None, "largest norm of the gradient, the discriminator's left out (0: none)", minimum=0
    )
    max_bad_steps: int = option(
        0,
        "steps in a row whose loss or gradient is not finite that are skipped before the run stops",
        minimum=0,
        maximum=10**9,
    )
    log_every: int = option(20, "steps between two looks at the loss", minimum=1, maximum=10**9)
    save_every: str = option(
        "10m", "write last.pt after so many steps (500) or minutes (10m), besides every epoch"
    )
    resume: str = option(
        "auto",
        "auto (continue last.pt where there is one), none, or the path of another experiment's "
        "checkpoint to begin at",
    )
    overwrite: bool = option(False, "replace an experiment of the same name")

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[1-9]\d{0,8}m?", self.save_every):
            raise ValueError(
                f"--save_every {self.save_every} is neither steps, like 500, nor minutes, like 10m"
            )
        if not re.fullmatch(r"0(\.\d{1,9})?,0(\.\d{1,9})?", self.betas):
            raise ValueError(f"--betas {self.betas} is no pair of numbers below 1, like 0.5,0.9")
        if self.grad_clip == 0:
            object.__setattr__(self, "grad_clip", None)
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"--accumulate {self.accumulate} is more than --batch_size {self.batch_size}"
            )

    @property
    def adam_betas(self) -> tuple[float, float]:
        """--betas as numbers."""
        first, second = map(float, self.betas.split(","))
        return first, second


# What may differ between a run and its continuation.
FREE_TO_CHANGE = (
    *("output_folder", "exp_name", "num_epochs", "max_steps", "device", "accumulate", "recipe"),
    *("preset", "checkpoint_gradients", "weights_dir"),
    *("max_bad_steps", "log_every", "save_every", "resume", "overwrite"),
    *("data_folder", "num_workers", "skip_bad_images", "image_cache"),
)


class Loader(Protocol):
    """This process's share of byte images (b, C, H, W), in an order set by the epoch alone.

    bad_images: the message for each image left out, by its place in the set.
    """

    bad_images: dict[int, str]

    def __len__(self) -> int: ...

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Tensor]: ...


def mixed_precision(config: TrainConfig, device: torch.device) -> torch.autocast:
    """What the network computes in, in training."""
    dtype = PRECISIONS[config.precision]
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def check_parts(model: ModelConfig, accumulate: int) -> None:
    """Raise UserError where the quantiser needs the batch whole, and it comes in parts."""
    if model.spec.parts:
        return
    takers = ", ".join(name for name, spec in QUANTIZERS.items() if spec.parts)
    if accumulate > 1:
        raise UserError(
            f"--accumulate {accumulate} needs --quantizer {takers}, not {model.quantizer}"
        )
    if num_ranks() > 1:
        raise UserError(f"{num_ranks()} processes need --quantizer {takers}, not {model.quantizer}")


class Trainer:
    """One run: a model, its batches, and the files it leaves.

    Under torchrun each process has one; they stay in step, and the first alone writes and logs.

    Args:
        model: on its device.
        train_loader: training batches.
        validation_loader: batches of the images that choose best.pt.
        config: the flags of training.
        objective: what is minimised besides the quantiser's loss.
        models: folder of best.pt, last.pt and previous.pt, the last.pt before it.
        logs: TensorBoard's folder.
        stored: more to keep in every checkpoint.
    """

    def __init__(
        self,
        model: Autoencoder,
        train_loader: Loader,
        validation_loader: Loader,
        config: TrainConfig,
        *,
        objective: Objective,
        models: Path,
        logs: Path,
        stored: Mapping[str, Any],
    ) -> None:
        self.model = model
        check_parts(model.config, config.accumulate)
        self.network = share_gradients(model)
        self.train_loader = train_loader
        self.validation_loader = validation_loader
        self.config = config
        self.objective = objective
        self.models = models
        self.logs = logs
        self.stored = stored
        self.parameters = [value for value in model.parameters() if value.requires_grad]
        self.optimizer = make_adam(self.parameters, config.lr, config.adam_betas)
        self.average = average_of(model, self.average_rate) if config.weight_ema else None
        self.device = next(model.parameters()).device
        # Only fp16 is narrow enough to need its gradients scaled.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.meter = Meter(
            model.config.num_embedding, self.device, model.config.num_codebooks, objective.terms
        )
        self.bad_steps = BadSteps(model, self.device, objective.watched)
        self.memory_format = (
            torch.channels_last if config.channels_last else torch.contiguous_format
        )
        self.step = self.epoch = self.batch = 0  # batch: batches of this epoch already seen
        self.validated = 0  # the step of the last validation
        self.best = -float("inf")
        self.saved_at = time.monotonic()
        steps = config.num_epochs * len(train_loader)
        self.total_steps = min(steps, config.max_steps or steps)
        self.stop = StopRequest()
        self.left_out: set[str] = set()  # messages of bad images that were told

    def fit(self) -> None:
        """Train to the last step; validate and save after every epoch.

        Raises UserError when a loss or gradient is not finite more often than --max_bad_steps
        allows; checkpoints on disk stay as they were. Raises Stopped after a signal, when last.pt
        has been written.
        """
        if self.step >= self.total_steps and self.validated == self.step:
            log.info("nothing is left to train: %d steps are done", self.step)
            return
        with (
            open_board(self.logs, 0 if self.config.overwrite else self.step) as self.board,
            tqdm(
                total=self.total_steps, initial=self.step, unit="step", smoothing=0.1,
                disable=rank() > 0,
            ) as self.bar,
            self.stop,
        ):  # fmt: skip
            self.model.train()
            while self.step < self.total_steps or self.validated < self.step:
                self.train_epoch()
                self.finish_epoch()

    def train_epoch(self) -> None:
        """The rest of this epoch, or as much of it as --max_steps allows."""
        self.clock = time.perf_counter()
        for images in self.train_loader.epoch(self.epoch, start=self.batch):
            if self.step == self.total_steps:
                break
            self.train_step(images)
            self.bar.update()
            if self.step % self.config.log_every == 0:
                self.show()
            stop, due = sum_numbers(bool(self.stop.signal), self.save_is_due())
            if stop:
                self.save_and_stop()
            if due and self.batch < len(self.train_loader):
                self.show()
                self.save("last.pt")

    def train_step(self, images: Tensor) -> None:
        """One step of Adam, on this process's share of a batch: bytes (b, C, H, W).

        loss = objective + quantiser loss, averaged over all images of the batch.
        """
        self.step += 1
        self.batch += 1
        (total,) = sum_numbers(len(images))
        if total == 0:  # none of them could be read
            return
        for optimizer in (self.optimizer, *self.objective.optimizers()):
            optimizer.zero_grad()
        losses: list[Tensor] = []
        # A part without an image in any process would have no mean.
        most = max(gather(len(images))) if self.config.accumulate > 1 else 1
        parts = images.tensor_split(min(self.config.accumulate, most))
        for number, part in enumerate(parts, 1):
            last = number == len(parts)
            self.model.quantizer.defer_update = not last
            with nullcontext() if last else gradients_kept(self.network):
                losses.append(self.backward(part, len(part) / total))
        self.update_weights(sum_over_ranks(torch.stack(losses).sum(0)))
        if self.average is not None:
            self.average.update_parameters(self.model)

    def backward(self, images: Tensor, share: float) -> Tensor:
        """Add the gradients of one part, which is that share of the batch; returns its losses."""
        images = to_signed(images).contiguous(memory_format=self.memory_format)
        with mixed_precision(self.config, self.device):
            reconstruction, quantized = self.network(images)
        reconstruction = reconstruction.to(images.dtype)
        # The mean over no image is not a number.
        mse = F.mse_loss(reconstruction, images) if len(images) else reconstruction.sum()
        at = (share, self.step, self.scaler)
        objective, terms = self.objective.loss(images, reconstruction, mse, *at)
        loss = objective + quantized.loss
        # A loss that is not finite shows in every gradient, and thereby in every process.
        finite = torch.where(loss.detach().isfinite(), 1.0, torch.nan)
        # DistributedDataParallel takes the mean over processes, where the batch wants the sum.
        self.scaler.scale(loss * (finite * (share * num_ranks()))).backward()
        watched, more = self.objective.backward(images, reconstruction.detach(), *at)
        errors = mean_squared_errors(images, reconstruction.detach().clamp(-1, 1))
        known = {
            "loss": loss,
            "reconstruction": mse,
            "quantizer": quantized.loss,
            "psnr": signed_psnr(errors).mean(),
        }
        self.meter.add({**known, **terms, **more}, quantized.indices)
        return torch.cat([torch.stack([mse, quantized.loss]).detach(), watched])

    def update_weights(self, losses: Tensor) -> None:
        """Clip the gradients and take the step, unless a loss or a gradient is not finite."""
        own = self.objective.gradients().to(self.device)
        optimizers = [self.optimizer, *self.objective.optimizers()]
        for optimizer in optimizers:
            self.scaler.unscale_(optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients))
        if self.config.grad_clip is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.config.grad_clip, norms.norm())
        if self.scaler.is_enabled():
            # Gradients too large for fp16 are the scaler's business: it skips the step by itself.
            self.bad_steps.add(self.step, losses)
        else:
            bad = self.bad_steps.add(self.step, torch.cat([losses, own, norms]))
            for optimizer in optimizers:
                optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate()
            self.scaler.step(optimizer)
        self.scaler.update()

    def learning_rate(self) -> float:
        """lr · min(1, step / warm-up steps) · what the schedule makes of the steps before this."""
        config, before = self.config, self.step - 1
        warm_up = min(1.0, self.step / max(1, config.warmup_steps))
        return config.lr * warm_up * SCHEDULES[config.schedule](before / self.total_steps)

    def check_schedule(self, before: Mapping[str, Any]) -> None:
        """Tell where a run with more or fewer steps takes up its schedule elsewhere."""
        steps = min(before["num_epochs"] * len(self.train_loader), before["max_steps"] or math.inf)
        if self.config.schedule != "constant" and steps != self.total_steps:
            log.warning(
                "--schedule %s is now of %d steps, not %d: the learning rate goes on at %.2g",
                *(self.config.schedule, self.total_steps, steps, self.learning_rate()),
            )

    def show(self) -> None:
        """Report the averages since the last look to the bar and to TensorBoard.

        Raises UserError where more steps than allowed were bad.
        """
        self.check_steps()
        scores = self.meter.read()
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        if not scores:
            return
        scores["images_per_second"] = scores.pop("num_images") / seconds
        self.bar.set_postfix_str(
            f"loss {scores['loss']:.4f}, PSNR {scores['psnr']:.2f} dB, "
            f"{in_words(scores)}, {scores['images_per_second']:.0f} images/s"
        )
        self.write_scalars("train", {**scores, "learning_rate": self.learning_rate()})

    def check_steps(self) -> None:
        """Tell of steps that were skipped; raise UserError where there were too many."""
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
        """Which checkpoint is left, in words."""
        last = self.models / "last.pt"
        return f"{last} is the last good one" if last.exists() else "nothing was saved yet"

    def finish_epoch(self) -> None:
        """Validate, save last.pt, and best.pt where this is the best so far."""
        self.show()
        scores = self.validate()
        self.tell_bad_images()
        if scores is None:
            self.save_and_stop()
            return
        if self.batch == len(self.train_loader):
            self.epoch, self.batch = self.epoch + 1, 0
        self.validated = self.step
        merit = self.objective.merit(scores)
        improved = merit > self.best
        self.best = max(self.best, merit)
        distances = "".join(f", {name} {scores[name]:.4f}" for name in self.objective.measures)
        log.info(
            "epoch %d, step %d: validation PSNR %.2f dB%s, %s%s",
            *(self.epoch, self.step, scores["psnr"], distances, in_words(scores)),
            " (best)" if improved else "",
        )
        if improved:
            self.save("best.pt")
        self.save("last.pt")  # after best.pt, of whose score it tells

    def tell_bad_images(self) -> None:
        """Log the images that were left out since the last time."""
        bad = [*self.train_loader.bad_images.values(), *self.validation_loader.bad_images.values()]
        for message in sorted(set(gather_items(bad)) - self.left_out):
            self.left_out.add(message)
            log.warning("left out (%d so far): %s", len(self.left_out), printable(message))

    @torch.no_grad()
    def validate(self) -> dict[str, float] | None:
        """Mean PSNR and more per image, usage and perplexity on the validation images.

        Of the averaged weights, where there are such; changes nothing.
        None where a signal cut it short.
        """
        self.model.eval()
        model, config = self.best_model, self.model.config
        statistics = CodebookStatistics(config.num_embedding, config.num_codebooks)
        names = ("psnr", "reconstruction", *self.objective.measures)
        sums = torch.zeros(len(names), dtype=torch.float64)
        shown = None
        for images in self.validation_loader.epoch():
            if self.stop.signal:
                break
            signed = to_signed(images)
            reconstruction, quantized = model(signed)
            clipped = reconstruction.clamp(-1, 1)
            errors = mean_squared_errors(signed, clipped).double()
            measured = {
                "psnr": signed_psnr(errors),
                "reconstruction": errors,
                **self.objective.distances(signed, clipped),
            }
            sums += torch.stack([measured[name].double().sum() for name in names]).cpu()
            statistics.add(quantized.indices)
            shown = shown or (images[:NUM_SHOWN], to_bytes(reconstruction[:NUM_SHOWN]))
        self.model.train()
        statistics.sum_over_ranks()
        stopped, *totals = sum_numbers(bool(self.stop.signal), *sums.tolist())
        if stopped:
            return None
        if not statistics.num_images:
            raise UserError("--skip_bad_images: no validation image can be decoded")
        means = {name: total / statistics.num_images for name, total in zip(names, totals)}
        scores = {**means, **use_of(statistics.counts)}
        self.write_scalars("validation", scores)
        regular = self.epoch % max(1, self.config.num_epochs // 50) == 0
        if rank() == 0 and shown and (regular or self.step == self.total_steps):
            self.board.add_image("validation/reconstructions", comparison(*shown), self.step)
            self.write_figures(statistics)
            gc.collect()  # figures are cycles of megabytes that Python would leave for long
        return scores

    def write_scalars(self, group: str, scores: Mapping[str, float]) -> None:
        for name, value in scores.items():
            self.board.add_scalar(f"{group}/{name}", value, self.step)

    def write_figures(self, statistics: CodebookStatistics) -> None:
        for name, figure in draw_all(statistics, self.best_model.quantizer.codebook).items():
            self.board.add_figure(f"codebook/{name}", figure, self.step)

    def save_is_due(self) -> bool:
        """Whether --save_every asks for a checkpoint now."""
        number = int(self.config.save_every.rstrip("m"))
        if self.config.save_every.endswith("m"):
            return rank() == 0 and time.monotonic() - self.saved_at > 60 * number
        return self.step % number == 0

    def save_and_stop(self) -> None:
        """Write last.pt, from which the run goes on, and raise Stopped."""
        self.show()
        self.save("last.pt")
        number = self.stop.signal or signal.SIGTERM  # sent to another process
        raise Stopped(
            number,
            f"stopped by {number.name} after step {self.step}; "
            f"{self.models / 'last.pt'} is where the same command goes on",
        )

    def save(self, name: str) -> None:
        """Write a checkpoint from which the run continues bit for bit.

        Raises UserError, and leaves the files as they are, where a weight is not finite.
        """
        if not all(value.isfinite().all() for value in self.model.state_dict().values()):
            raise UserError(
                f"a weight is not finite at step {self.step}; stopped, {self.last_good()} "
                f"(try a --lr below {self.config.lr}, or --grad_clip)"
            )
        state = {
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.step,
            "validated": self.validated,
            "best": self.best,
            "bad_in_a_row": int(self.bad_steps.state[0]),
            **self.objective.state(),
            **({} if self.average is None else {"trained": self.model.state_dict()}),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random_states": gather(random_state(self.device)),
            "train_config": asdict(self.config),
        }
        if rank() == 0:
            previous = self.models / "previous.pt" if name == "last.pt" else None
            content = {**model_content(self.best_model), **self.stored, **state}
            write_checkpoint(self.models / name, content, previous)
        if name == "last.pt":
            self.saved_at = time.monotonic()

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue where the checkpoint stopped. Raises UserError where its state is damaged."""
        state = checkpoint.content
        try:
            self.load_weights(checkpoint)
            self.objective.load(state)
            load_optimizer(self.optimizer, state["optimizer"]["state"])
            self.scaler.load_state_dict(state["scaler"])
            self.step, self.epoch = checkpoint.count("step"), checkpoint.count("epoch")
            self.batch, self.validated = checkpoint.count("batch"), checkpoint.count("validated")
            self.bad_steps.state[0] = checkpoint.count("bad_in_a_row")
            self.best = state["best"]
            if not isinstance(self.best, float) or math.isnan(self.best):
                raise ValueError("best is no number")
            accumulate, states = state["train_config"]["accumulate"], state["random_states"]
            if len(states) == num_ranks():
                restore_random_state(states[rank()], self.device)
            if (len(states), accumulate) != (num_ranks(), self.config.accumulate):
                log.warning(
                    "%s was written by %d processes with --accumulate %d, not %d with %d: "
                    "what follows is not bit for bit what would have followed there",
                    *(checkpoint.path, len(states), accumulate),
                    *(num_ranks(), self.config.accumulate),
                )
            self.check_schedule(state["train_config"])
            if not (0 <= self.batch <= len(self.train_loader) and 0 <= self.epoch <= self.step):
                raise ValueError(f"it stands at batch {self.batch} of epoch {self.epoch}")
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as e:
            reason = f"{type(e).__name__}: {one_line(e)[:200]}"
            raise UserError(f"checkpoint {checkpoint.path} cannot be resumed: {reason}") from e

    def load_weights(self, checkpoint: Checkpoint) -> None:
        """Take up the weights, and their average where there is one."""
        if self.average is None:
            self.model.load_state_dict(checkpoint.state_dict)
            return
        check_tensors(self.model.state_dict(), checkpoint.content["trained"])
        self.model.load_state_dict(checkpoint.content["trained"])
        self.average.module.load_state_dict(checkpoint.state_dict)
        self.average.n_averaged.fill_(checkpoint.count("step"))

    def average_rate(self) -> float:
        """How far the averaged weights follow in this step: more in the first ones, as few are in.

        1 − min(decay, (1 + step) / (10 + step)).
        """
        return 1 - min(self.config.weight_ema, (1 + self.step) / (10 + self.step))

    @property
    def best_model(self) -> Autoencoder:
        """What is validated and tested: the average of the weights, where there is one."""
        if self.average is None:
            return self.model
        return cast(Autoencoder, self.average.module)


def average_of(model: Autoencoder, rate: Callable[[], float]) -> AveragedModel:
    """A running mean of a model's weights and buffers, beginning with the first.

    Buffers too, as averaged weights do not make the latents of which the model keeps statistics;
    those that are no fractions are the model's.
    """

    def follow(averages: Any, values: Any, _count: Tensor | int) -> None:
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, values, rate())
        else:
            torch._foreach_copy_(averages, values)

    average = AveragedModel(model, multi_avg_fn=follow, use_buffers=True)
    average.requires_grad_(False).eval()
    return average


class NoBoard:
    """Stands for TensorBoard in all processes but the first, and writes nothing."""

    def add_scalar(self, *arguments: Any) -> None: ...

    def add_image(self, *arguments: Any) -> None: ...

    def add_figure(self, *arguments: Any) -> None: ...


@contextmanager
def open_board(folder: Path, step: int) -> Iterator[SummaryWriter | NoBoard]:
    """TensorBoard's writer; what an interrupted run wrote after this step is hidden.

    Raises UserError naming the folder where it cannot be written.
    """
    if rank() > 0:
        yield NoBoard()
        return
    try:
        with SummaryWriter(str(folder), purge_step=step + 1 if step else 0) as board:
            yield board
    except OSError as error:
        if error.filename is not None or error.errno not in OF_DISKS:
            raise
        raise UserError(f"cannot write {folder}: {error.strerror or one_line(error)}") from error


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of PyTorch's generators of this process, which anchors draw from."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def contradictions(stored: Any, current: Any) -> Iterator[str]:
    """Flags of one dataclass that differ between a checkpoint and the command line."""
    for name, value in asdict(current).items():
        before = getattr(stored, name)
        if name == "pretrained" and None not in (before, value):
            continue  # wherever they lie, the weights are now those of the checkpoint
        if name not in FREE_TO_CHANGE and before != value:
            given = f"--{name} {value}" if value is not None else f"no --{name}"
            yield f"{given} (it has {before})"
