"""Flags of training: those of any run, and those that only autoencoders have."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from modules.options import option
from utils.devices import has_amx
from utils.flags.presets import NETWORK_PRESETS
from utils.flags.recipes import RECIPES

NUM_EPOCHS = 500
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCHEDULES: dict[str, Callable[[float], float]] = {  # share of the steps done → factor of lr
    "constant": lambda _: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "wsd": lambda done: min(1.0, 5 * (1 - done)),  # warm-up, stable, decay over the last fifth
}


@dataclass(frozen=True)
class LoopConfig:
    """Settings of one run of the trainer, whatever it trains."""

    output_folder: str = option("output", "folder of models, logs and results")
    exp_name: str | None = option(
        None, "name of the experiment (default: <dataset>_<quantizer>_<K>x<d>)"
    )
    batch_size: int = option(1024, "images per step", minimum=1, maximum=2**20)
    num_epochs: int | None = option(
        None,
        f"passes over the training images (default: {NUM_EPOCHS} without --max_steps)",
        minimum=1,
        maximum=10**9,
    )
    max_steps: int | None = option(
        None,
        "training steps; if --num_epochs is given too, the shorter of the two",
        minimum=1,
        maximum=10**12,
    )
    lr: float = option(3e-4, "learning rate of Adam", above=0, maximum=10)
    betas: str = option("0.9,0.999", "decay rates of Adam's two moments")
    schedule: str = option(
        "constant",
        "learning rate schedule; all but constant end at 0, wsd decays in the last fifth",
        choices=tuple(SCHEDULES),
    )
    warmup_steps: int = option(
        0, "steps in which the learning rate rises from 0", minimum=0, maximum=10**9
    )
    seed: int = option(42, "seed of all randomness", minimum=0, maximum=2**32 - 1)
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    precision: str = option(
        "fp32",
        "precision of the network in training; the codebook is always fp32 (auto: bf16 on a "
        "processor with AMX, else fp32)",
        choices=(*PRECISIONS, "auto"),
    )
    accumulate: int = option(
        1,
        "parts that a batch is split into, to save memory; gradients are accumulated",
        minimum=1,
        maximum=2**20,
    )
    weight_ema: float = option(
        0.0,
        "decay of a moving average of the weights, which is validated and tested instead of them "
        "(0: none)",
        minimum=0,
        maximum=1 - 1e-9,
    )
    grad_clip: float | None = option(
        None, "largest norm of the model's gradient (0, the default: not clipped)", minimum=0
    )
    max_bad_steps: int = option(
        0,
        "skip up to this many steps in a row whose loss or gradient is not finite",
        minimum=0,
        maximum=10**9,
    )
    log_every: int = option(20, "steps between two log entries", minimum=1, maximum=10**9)
    validate_every: int | None = option(
        None,
        "steps between two validations (default: those of an epoch); the last step has one too",
        minimum=1,
        maximum=10**12,
    )
    num_validation: int | None = option(
        None, "at most this many validation images, evenly spread (default: all)", minimum=1
    )
    save_every: str = option(
        "10m", "write last.pt every so many steps (500) or minutes (10m), and with every validation"
    )
    resume: str = option(
        "auto",
        "auto (continue from last.pt if it exists), none, or the last.pt of another experiment, "
        "which this one continues with the same flags",
    )
    overwrite: bool = option(False, "replace an experiment of the same name")

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[1-9]\d{0,8}m?", self.save_every):
            raise ValueError(
                f"--save_every {self.save_every} is neither steps, like 500, nor minutes, like 10m"
            )
        if not re.fullmatch(r"0(\.\d{1,9})?,0(\.\d{1,9})?", self.betas):
            raise ValueError(f"--betas {self.betas} is no pair of numbers below 1, like 0.5,0.9")
        if self.num_epochs is None and self.max_steps is None:
            object.__setattr__(self, "num_epochs", NUM_EPOCHS)
        if self.precision == "auto":
            on_cpu = self.device == "cpu" or not torch.cuda.is_available()
            object.__setattr__(self, "precision", "bf16" if on_cpu and has_amx() else "fp32")
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


def count_steps(num_epochs: int | None, max_steps: int | None, epoch: int) -> int:
    """Return the steps of a run whose epochs have so many: the shorter of what is given."""
    return min(end for end in (num_epochs and num_epochs * epoch, max_steps) if end)


@dataclass(frozen=True)
class TrainConfig(LoopConfig):
    """Training of an autoencoder."""

    recipe: str = option(
        "paper",
        "settings of the flags that you do not give: as published (paper), or recommended (best)",
        choices=tuple(RECIPES),
    )
    preset: str | None = option(
        None,
        f"file of flags, or the name of one in the repository ({', '.join(NETWORK_PRESETS)}); "
        "flags that you give override it",
    )
    pretrained: str | None = option(
        None,
        "weights to start from: a checkpoint of this repository or the name of a model that comes "
        "with it, which also gives the model flags, or a state dict of the reference; or, without "
        "the quantiser, a folder of diffusers' VQModel or AutoencoderKL, or a checkpoint of "
        "taming-transformers or latent-diffusion",
    )
    new_quantizer: bool = option(
        False, "start with a new quantiser instead of that of --pretrained"
    )
    validation: str = option(
        "split",
        "images that choose best.pt: a tenth of the training set (split), or the test set, as the "
        "reference does",
        choices=("split", "test"),
    )
    compile: bool = option(False, "compile encoder and decoder (torch.compile)")
    channels_last: bool = option(False, "store images and weights channels last")
    checkpoint_gradients: bool = option(
        False, "save memory with --model vqgan: recompute activations in the backward pass"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.new_quantizer and self.pretrained is None:
            raise ValueError("--new_quantizer needs --pretrained, whose quantiser it replaces")


# What may differ between a run and its continuation.
FREE_TO_CHANGE = (
    *("output_folder", "exp_name", "num_epochs", "max_steps", "device", "accumulate", "recipe"),
    *("preset", "checkpoint_gradients", "weights_dir"),
    *("max_bad_steps", "log_every", "validate_every", "save_every", "resume", "overwrite"),
    *("data_folder", "num_workers", "skip_bad_images", "image_cache"),
)
