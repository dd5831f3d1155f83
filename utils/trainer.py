"""Training: the step, its meter, validation, checkpoints and TensorBoard."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from modules import VQVAE
from modules.config import option
from modules.quantizer import count_indices
from utils.checkpoint import Checkpoint, save_checkpoint
from utils.codebook import CodebookStatistics, perplexity, usage
from utils.errors import UserError, one_line
from utils.images import comparison, mean_squared_errors, psnr, to_bytes, to_signed
from utils.logger import log

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIGNED_PEAK = 2.0  # the width of [−1, 1]
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
    lr: float = option(3e-4, "learning rate of Adam", above=0, maximum=10)
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
    log_every: int = option(20, "steps between two looks at the loss", minimum=1, maximum=10**9)
    resume: str = option("auto", "auto (continue last.pt where there is one), none, or a path")
    overwrite: bool = option(False, "replace an experiment of the same name")


# What may differ between a run and its continuation.
FREE_TO_CHANGE = (
    *("output_folder", "exp_name", "num_epochs", "max_steps", "device", "log_every"),
    *("resume", "overwrite", "data_folder", "num_workers"),
)


class Loader(Protocol):
    """Batches of byte images (b, C, H, W), in an order that depends on the epoch alone."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Tensor]: ...


class Meter:
    """Averages over images since the last look, kept on the device so that no step waits."""

    def __init__(self, num_embedding: int, device: torch.device) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)
        self.counts = torch.zeros(num_embedding, dtype=torch.int64, device=device)
        self.first_bad_step = torch.zeros((), dtype=torch.int64, device=device)
        self.num_images = 0

    def add(self, step: int, terms: tuple[Tensor, Tensor, Tensor], indices: Tensor) -> None:
        """Take (loss, mse, quantiser loss) and the indices of one batch."""
        values = torch.stack([term.detach() for term in terms])
        self.sums += values * len(indices)
        self.counts += count_indices(indices.flatten(), len(self.counts))
        bad = ~values.isfinite().all() & (self.first_bad_step == 0)
        self.first_bad_step += bad * step
        self.num_images += len(indices)

    def read(self) -> dict[str, float]:
        """The averages, which start anew. Raises FloatingPointError(step) for a loss not finite."""
        if self.first_bad_step:
            raise FloatingPointError(int(self.first_bad_step))
        loss, mse, quantizer = (self.sums / max(1, self.num_images)).tolist()
        scores = {
            "loss": loss,
            "reconstruction": mse,
            "quantizer": quantizer,
            "psnr": float(psnr(torch.tensor(max(mse, 1e-12)), SIGNED_PEAK)),
            "usage_percent": 100 * usage(self.counts),
            "perplexity": perplexity(self.counts),
        }
        self.sums.zero_()
        self.counts.zero_()
        self.num_images = 0
        return scores


class Trainer:
    """One run: a model, its batches, and the files it leaves.

    Args:
        model: on its device.
        train_loader: training batches.
        validation_loader: batches of the images that choose best.pt.
        config: the flags of training.
        data_variance: variance of the training pixels in [0, 1], the scale of the reconstruction
            loss.
        models: folder of best.pt and last.pt.
        logs: TensorBoard's folder.
        stored: more to keep in every checkpoint.
    """

    def __init__(
        self,
        model: VQVAE,
        train_loader: Loader,
        validation_loader: Loader,
        config: TrainConfig,
        *,
        data_variance: float,
        models: Path,
        logs: Path,
        stored: Mapping[str, Any],
    ) -> None:
        self.model = model
        self.train_loader = train_loader
        self.validation_loader = validation_loader
        self.config = config
        self.data_variance = max(data_variance, 1e-6)  # images of one colour have none
        self.models = models
        self.logs = logs
        self.stored = stored
        self.optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
        self.device = next(model.parameters()).device
        # Only fp16 is narrow enough to need its gradients scaled.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.meter = Meter(model.config.num_embedding, self.device)
        self.memory_format = (
            torch.channels_last if config.channels_last else torch.contiguous_format
        )
        self.step = self.epoch = self.batch = 0  # batch: batches of this epoch already seen
        self.best = -float("inf")
        steps = config.num_epochs * len(train_loader)
        self.total_steps = min(steps, config.max_steps or steps)

    def fit(self) -> None:
        """Train to the last step; validate and save after every epoch.

        Raises UserError when the loss is no longer finite; checkpoints on disk stay as they were.
        """
        if self.step >= self.total_steps:
            log.info("nothing is left to train: %d steps are done", self.step)
            return
        with (
            SummaryWriter(str(self.logs), purge_step=self.step) as self.board,
            tqdm(total=self.total_steps, initial=self.step, unit="step", smoothing=0.1) as self.bar,
        ):
            self.model.train()
            try:
                while self.step < self.total_steps:
                    self.train_epoch()
                    self.finish_epoch()
            except FloatingPointError as error:
                last = self.models / "last.pt"
                kept = f"{last} is the last good one" if last.exists() else "nothing was saved yet"
                raise UserError(
                    f"the loss or a weight is not finite at step {error}; stopped, {kept} "
                    f"(try a --lr below {self.config.lr})"
                ) from error

    def train_epoch(self) -> None:
        """The rest of this epoch, or as much of it as --max_steps allows."""
        self.clock = time.perf_counter()
        for images in self.train_loader.epoch(self.epoch, start=self.batch):
            self.train_step(to_signed(images).contiguous(memory_format=self.memory_format))
            if self.step % self.config.log_every == 0:
                self.show()
            if self.step == self.total_steps:
                break

    def train_step(self, images: Tensor) -> None:
        """loss = mse / data_variance + quantiser loss; images (b, C, H, W) in [−1, 1]."""
        dtype = PRECISIONS[self.config.precision]
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            reconstruction, quantized = self.model(images)
        mse = F.mse_loss(reconstruction.float(), images)
        loss = mse / self.data_variance + quantized.loss
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        self.batch += 1
        self.meter.add(self.step, (loss, mse, quantized.loss), quantized.indices)
        self.bar.update()

    def show(self) -> None:
        """Report the averages since the last look to the bar and to TensorBoard."""
        num_images = self.meter.num_images
        if num_images == 0:
            return
        scores = self.meter.read()
        now = time.perf_counter()
        scores["images_per_second"] = num_images / (now - self.clock)
        self.clock = now
        self.bar.set_postfix_str(
            f"loss {scores['loss']:.4f}, PSNR {scores['psnr']:.2f} dB, "
            f"usage {scores['usage_percent']:.0f} %, {scores['images_per_second']:.0f} images/s"
        )
        self.write_scalars("train", scores)

    def finish_epoch(self) -> None:
        """Validate, save last.pt, and best.pt where this is the best so far."""
        self.show()
        self.check_weights()
        scores = self.validate()
        if self.batch == len(self.train_loader):
            self.epoch, self.batch = self.epoch + 1, 0
        improved = scores["psnr"] > self.best
        self.best = max(self.best, scores["psnr"])
        log.info(
            "epoch %d, step %d: validation PSNR %.2f dB, usage %.0f %%%s",
            *(self.epoch, self.step, scores["psnr"], scores["usage_percent"]),
            " (best)" if improved else "",
        )
        if improved:
            self.save("best.pt")
        self.save("last.pt")  # after best.pt, of whose score it tells

    def check_weights(self) -> None:
        """The last step's loss was finite; raise FloatingPointError if its outcome is not."""
        if not all(value.isfinite().all() for value in self.model.state_dict().values()):
            raise FloatingPointError(self.step)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean PSNR per image, usage and perplexity on the validation images; changes nothing."""
        self.model.eval()
        statistics = CodebookStatistics(self.model.config.num_embedding)
        errors = []
        shown = None
        for images in self.validation_loader.epoch():
            signed = to_signed(images)
            reconstruction, quantized = self.model(signed)
            errors.append(mean_squared_errors(signed, reconstruction.clamp(-1, 1)))
            statistics.add(quantized.indices)
            shown = shown or (images[:NUM_SHOWN], to_bytes(reconstruction[:NUM_SHOWN]))
        self.model.train()
        mse = torch.cat(errors).double()
        scores = {
            "psnr": float(psnr(mse.clamp_min(1e-12), SIGNED_PEAK).mean()),
            "reconstruction": float(mse.mean()),
            "usage_percent": 100 * usage(statistics.counts),
            "perplexity": perplexity(statistics.counts),
        }
        self.write_scalars("validation", scores)
        regular = self.epoch % max(1, self.config.num_epochs // 50) == 0
        if shown and (regular or self.step == self.total_steps):
            self.board.add_image("validation/reconstructions", comparison(*shown), self.step)
            frequency = statistics.counts / statistics.counts.sum()
            self.board.add_histogram("validation/usage", frequency, self.step)
        return scores

    def write_scalars(self, group: str, scores: Mapping[str, float]) -> None:
        for name, value in scores.items():
            self.board.add_scalar(f"{group}/{name}", value, self.step)

    def save(self, name: str) -> None:
        """Write a checkpoint from which the run continues bit for bit."""
        state = {
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.step,
            "best": self.best,
            "data_variance": self.data_variance,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random_state": random_state(),
            "train_config": asdict(self.config),
        }
        save_checkpoint(self.models / name, self.model, {**self.stored, **state})

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue where the checkpoint stopped. Raises UserError where its state is damaged."""
        state = checkpoint.content
        try:
            self.model.load_state_dict(checkpoint.state_dict)
            load_optimizer(self.optimizer, state["optimizer"]["state"])
            self.scaler.load_state_dict(state["scaler"])
            self.step, self.epoch = int(state["step"]), int(state["epoch"])
            self.batch, self.best = int(state["batch"]), float(state["best"])
            restore_random_state(state["random_state"])
            if not (0 <= self.batch < len(self.train_loader) and 0 <= self.epoch <= self.step):
                raise ValueError(f"it stands at batch {self.batch} of epoch {self.epoch}")
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as e:
            reason = f"{type(e).__name__}: {one_line(e)}"
            raise UserError(f"checkpoint {checkpoint.path} cannot be resumed: {reason}") from e


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[int, Any]) -> None:
    """Load Adam's averages; settings stay those of the flags. Raises ValueError if misshapen."""
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    for index, parameter in enumerate(parameters):
        for name in ("exp_avg", "exp_avg_sq"):
            if state[index][name].shape != parameter.shape:
                raise ValueError(f"{name} of parameter {index} is misshapen")
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def random_state() -> dict[str, Any]:
    """The state of PyTorch's generators, which anchors draw from."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def restore_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def contradictions(stored: Any, current: Any) -> Iterator[str]:
    """Flags of one dataclass that differ between a checkpoint and the command line."""
    for name, value in asdict(current).items():
        before = getattr(stored, name)
        if name not in FREE_TO_CHANGE and before != value:
            yield f"--{name} {value} (it has {before})"
