"""Time and memory of the training step, against the same network without a quantiser."""

from __future__ import annotations

import io
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from benchmarks.measure import both_thread_counts, interleaved, peak_memory, seeded
from datasets import BatchLoader, open_dataset, pixel_variance, split_validation
from modules import VQVAE, Autoencoder, ModelConfig
from utils.devices import keep_freed_memory
from utils.flags.arguments import build_model_config, with_recipe
from utils.images import to_signed
from utils.tables import Table
from utils.training.config import TrainConfig
from utils.training.losses import MeanSquaredError, QuantizerLoss
from utils.training.reconstruction import Reconstruction
from utils.training.trainer import Trainer

WARM_UP = 20  # steps
LOOC = ModelConfig()
BEST = build_model_config(with_recipe({"recipe": "best"}), in_channels=1)
UNQUANTISED = ModelConfig(quantizer="none", anchor="none")
LIBRARY = build_model_config({"quantizer": "multihead-vq"}, in_channels=1)


def step(
    model: Autoencoder, images: Tensor, optimizer: torch.optim.Optimizer, dtype: torch.dtype
) -> None:
    """Take one step of Adam."""
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        reconstruction, quantized = model(images)
    loss = F.mse_loss(reconstruction.float(), images) / 0.1 + quantized.loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def make(
    config: ModelConfig, images: Tensor, *,
    dtype: torch.dtype = torch.float32, channels_last: bool = False, compiled: bool = False,
) -> Callable[[], None]:  # fmt: skip
    """A step that is ready to run, of a model warmed up on these images."""
    seeded()
    model = VQVAE(config).to(images.device)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    if compiled:
        model.encoder.compile()
        model.decoder.compile()
    run = partial(step, model, images, torch.optim.Adam(model.parameters(), lr=3e-4), dtype)
    for _ in range(WARM_UP):
        run()
    return run


def some_images(count: int) -> Tensor:
    """Real images, (count, 1, 28, 28) in [−1, 1]."""
    images = open_dataset("fashion-mnist-sample", None, "train")
    return to_signed(torch.stack([images[index] for index in range(count)]))


def ways(images: Tensor) -> dict[str, Callable[[], object]]:
    """The step without quantiser, with it, and with the flags that may change its speed."""
    return {
        "no quantiser": make(UNQUANTISED, images),
        "LooC": make(LOOC, images),
        "LooC, --recipe best": make(BEST, images),
        "--quantizer multihead-vq": make(LIBRARY, images),
        "LooC, K = 4096": make(ModelConfig(num_embedding=4096), images),
        "LooC, --channels_last": make(LOOC, images, channels_last=True),
        "LooC, --precision bf16": make(LOOC, images, dtype=torch.bfloat16),
    }


def compiled(images: Tensor) -> dict[str, Callable[[], object]]:
    """The compiled step, whose backward pass has failed on a GPU in another layout."""
    return {"LooC, --compile": make(LOOC, images, channels_last=images.is_cuda, compiled=True)}


def step_table(threads: int) -> Table:
    torch.set_num_threads(threads)
    table = Table(
        f"Training step, 256 images of 28×28, K = 256, d = 4, {threads} thread(s)",
        ["", "seconds", "ratio to no quantiser"],
    )
    images = some_images(256)
    times = interleaved({**ways(images), **compiled(images)}, rounds=9)
    for name, value in times.items():
        table.rows.append([name, value, value.median / times["no quantiser"].median])
    return table


def epoch_table(device: torch.device) -> Table:
    """Cost of main.py's loop over bare steps: loading, meter, progress bar, TensorBoard."""
    torch.set_num_threads(both_thread_counts()[-1])
    training, validation = split_validation(open_dataset("fashion-mnist-sample", None, "train"))
    loader = partial(BatchLoader, batch_size=256, device=device)
    with (
        tempfile.TemporaryDirectory() as folder,
        SummaryWriter(folder) as board,
        tqdm(total=10**6, file=io.StringIO()) as bar,
    ):
        config = TrainConfig(batch_size=256)
        losses = {
            "reconstruction": MeanSquaredError(pixel_variance(training)),
            "quantizer": QuantizerLoss(),
        }
        trainer = Trainer(
            Reconstruction(VQVAE(ModelConfig()).to(device), losses, config),
            loader(training, shuffle=True),
            loader(validation),
            config,
            models=Path(folder),
            logs=Path(folder),
        )
        trainer.board, trainer.bar = board, bar
        batches = [to_signed(images) for images in trainer.train_loader.epoch()]

        def epoch() -> None:
            trainer.batch = 0
            trainer.train_epoch()

        def bare_steps() -> None:
            for images in batches:
                step(trainer.model, images, trainer.optimizer, torch.float32)

        times = interleaved({"epoch": epoch, "bare steps": bare_steps}, rounds=5, slow=60)
    table = Table(
        "An epoch of main.py and its bare steps, 5,400 images of 28×28, batch 256, all threads",
        ["epoch", "bare steps", "ratio"],
    )
    ratio = times["epoch"].median / times["bare steps"].median
    table.rows.append([times["epoch"], times["bare steps"], ratio])
    return table


def memory_table() -> Table:
    """Peak memory of a few steps at batch 1024, each model in its own process."""
    table = Table(
        "Peak memory of training, 1024 images of 28×28, d = 4",
        ["", "peak GB", "above no quantiser, MB"],
    )
    base = peak_in_process("none")
    table.rows.append(["no quantiser", base, 0])
    for num_embedding in (256, 4096, 16384):
        peak = peak_in_process(str(num_embedding))
        table.rows.append([f"LooC, K = {num_embedding}", peak, f"{(peak - base) * 1e3:.0f}"])
    return table


def peak_in_process(what: str) -> float:
    """Median peak memory in GB of three runs of this module with one argument."""
    command = [sys.executable, "-m", "benchmarks.training", what]
    return statistics.median(
        float(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
        for _ in range(3)
    )


def tables(quick: bool) -> Iterator[Table]:
    for threads in both_thread_counts()[-1:] if quick else both_thread_counts():
        yield step_table(threads)
    yield epoch_table(torch.device("cpu"))
    yield memory_table()


def main() -> None:
    keep_freed_memory()
    what = sys.argv[1]
    images = some_images(1024)
    seeded()
    model = VQVAE(UNQUANTISED if what == "none" else ModelConfig(num_embedding=int(what)))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    for _ in range(5):
        step(model, images, optimizer, torch.float32)
    sys.stdout.write(f"{peak_memory()}\n")


if __name__ == "__main__":
    main()
