"""Measure time and memory of the training step of --model vqgan.

python -m benchmarks.vqgan --preset ffhq-256 --batch_size 2 writes
docs/results/vqgan-step-<preset>.md. Each row is its own process, on random images.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import torch

from benchmarks.measure import SEED, median_seconds, peak_memory
from datasets import BatchLoader, TensorImages
from datasets.config import DataConfig
from modules import ModelConfig, make_model
from utils.devices import keep_freed_memory, resolve_device, seed_everything
from utils.errors import run
from utils.files import writable_folder
from utils.flags.arguments import Parser, build, build_model_config, parse_flags, resolve
from utils.flags.presets import NETWORK_PRESETS
from utils.images import to_signed
from utils.tables import Table, machine, machine_line, write_page
from utils.training.config import PRECISIONS, TrainConfig
from utils.training.losses import Setting, build_loss_configs, loss_configs, make_losses
from utils.training.reconstruction import Reconstruction, prepare
from utils.training.trainer import Trainer, flags_of

GROUPS = (ModelConfig, DataConfig, TrainConfig, *loss_configs())
VARIANTS = {  # flags added to the preset's
    "before --disc_start": "",
    "after --disc_start": "--disc_start 0",
    "the same, --checkpoint_gradients": "--disc_start 0 --checkpoint_gradients",
}


def main() -> None:
    if sys.argv[1:2] == ["measure"]:
        sys.stdout.write(json.dumps(measure(int(sys.argv[2]), sys.argv[3:])) + "\n")
        return
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--preset", choices=NETWORK_PRESETS, default="photos-64")
    parser.add_argument("--batch_size", type=int, default=None, help="(default: the preset's)")
    parser.add_argument("--steps", type=int, default=5, help="steps to time (default: 5)")
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="fp32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--docs", type=Path, default=Path("docs/results"), help="folder of pages")
    arguments = parser.parse_args()
    docs = writable_folder(arguments.docs, "--docs")
    names = ("preset", "device", "precision", "batch_size")
    given = {name: getattr(arguments, name) for name in names}
    words = [f"--{name}={value}" for name, value in given.items() if value is not None]
    table = Table(
        f"Training step, --preset {arguments.preset}",
        [
            *("", "images", "step, s", "images/s", "its quantiser, s", "share, %"),
            *("one reconstruction, s", "peak GB"),
        ],
    )
    for name, added in VARIANTS.items():
        found = measured(arguments.steps, [*words, *shlex.split(added)])
        step, quantiser = found["step"], found["quantiser"]
        speed, share = found["images"] / step, 100 * quantiser / step
        rest = (found["reconstruction"], found["peak_gb"])
        table.rows.append([name, found["images"], step, speed, quantiser, share, *rest])
        sys.stdout.write(f"{name}: {found}\n")
    write_page(
        docs / f"vqgan-step-{arguments.preset}.md",
        f"The training step of --preset {arguments.preset}",
        f"Made by `python -m benchmarks.vqgan {' '.join(sys.argv[1:])}`: random images, medians.",
        f"{machine_line(machine())}.",
        table,
    )


def measured(steps: int, words: list[str]) -> dict[str, Any]:
    """Run `measure` in its own process."""
    command = [sys.executable, "-m", "benchmarks.vqgan", "measure", str(steps), *words]
    result = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def measure(steps: int, words: list[str]) -> dict[str, Any]:
    """Measure median seconds of a step of main.py's loop and of its parts, and peak memory."""
    flags, _ = resolve(parse_flags(None, *GROUPS, argv=words), *GROUPS)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(flags, Path(folder))
        images = next(iter(trainer.train_loader.epoch()))
        step = median_seconds(lambda: trainer.train_step(images), steps)
    peak = torch.cuda.max_memory_allocated() / 1e9 if images.is_cuda else peak_memory()
    model = trainer.model
    side = flags["image_size"] // model.config.downsampling
    z = torch.randn(len(images), model.config.channels, side, side, device=images.device)

    def quantise() -> None:
        quantized = model.quantizer(z.requires_grad_())
        torch.autograd.backward(quantized.latents.sum() + quantized.loss)

    quantiser = median_seconds(quantise, 5)
    with torch.no_grad():
        one = to_signed(images[:1])
        reconstruction = median_seconds(lambda: model.eval()(one), steps)
    return {
        "images": len(images),
        "step": step,
        "quantiser": quantiser,
        "reconstruction": reconstruction,
        "peak_gb": peak,
    }


def make_trainer(flags: Mapping[str, Any], folder: Path) -> Trainer:
    """Make the trainer of these flags, on one batch of random images."""
    config, size = build(TrainConfig, flags), flags["image_size"]
    device, model_config = resolve_device(config.device), build_model_config(flags, 3)
    seed_everything(SEED, device)
    model = prepare(make_model(model_config), config, size, device)
    losses = flags_of(build_loss_configs(flags, model_config, size))
    setting = Setting(
        model, losses, variance=Mock(), betas=config.adam_betas, dtype=PRECISIONS[config.precision]
    )
    task = Reconstruction(model, make_losses(setting), config)
    images = torch.randint(256, (config.batch_size, 3, size, size), dtype=torch.uint8)
    loader = BatchLoader(TensorImages(images), config.batch_size, device=device)
    model.train()
    return Trainer(task, loader, loader, config, models=folder, logs=folder)


if __name__ == "__main__":
    run(main)
