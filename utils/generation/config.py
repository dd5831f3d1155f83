"""Flags of generate.py."""

from __future__ import annotations

from dataclasses import dataclass

from modules.options import option
from utils.flags.presets import PRESETS
from utils.training.config import LoopConfig


@dataclass(frozen=True)
class PriorTrainConfig(LoopConfig):
    """Training of a prior."""

    first_stage: str | None = option(
        None, "checkpoint whose codes are modelled, under <output_folder>/models or any path"
    )
    pretrained: str | None = option(
        None, "prior of the same kind and size whose weights training starts from"
    )
    exp_name: str | None = option(
        None, "name of the experiment (default: <experiment of the first stage>_<prior>)"
    )
    batch_size: int = option(64, "images per step", minimum=1, maximum=2**20)
    class_conditional: bool = option(
        False, "model each class, of data sets with labels and of folders of one folder per class"
    )
    lr: float = option(1e-3, "learning rate of Adam", above=0, maximum=10)
    warmup_steps: int = option(
        100, "steps in which the learning rate rises from 0", minimum=0, maximum=10**9
    )
    grad_clip: float | None = option(
        1.0, "largest norm of the model's gradient (0: not clipped)", minimum=0
    )
    label_dropout: float = option(
        0.1,
        "share of images whose class is hidden in training, for --guidance",
        minimum=0,
        maximum=1,
    )
    preset: str | None = option(
        None,
        f"file of flags, or the name of one in the repository ({', '.join(PRESETS)}); "
        "flags that you give override it",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_dropout != PriorTrainConfig.label_dropout and not self.class_conditional:
            raise ValueError(f"--label_dropout {self.label_dropout} needs --class_conditional")


@dataclass(frozen=True)
class SampleConfig:
    """Samples that are drawn, and where they are written."""

    output_folder: str = option("output", "folder of models, logs, results and samples")
    model_name: str | None = option(None, "a prior's checkpoint, under <output_folder>/models")
    first_stage: str | None = option(
        None, "checkpoint of the first stage (default: where it was in training)"
    )
    num_samples: int = option(100, "images to draw", minimum=1, maximum=10**8)
    label: int | None = option(
        None, "class of the images (default: all classes in turn)", minimum=0, maximum=10**6
    )
    temperature: float = option(
        1.0, "divides the logits; 0 takes the most probable code", minimum=0, maximum=100
    )
    top_k: int = option(0, "draw from the most probable codes only (0: all)", minimum=0)
    top_p: float = option(
        1.0, "draw from the most probable codes of this total probability", above=0, maximum=1
    )
    guidance: float = option(
        1.0, "weight of the class in classifier-free guidance (1: none)", minimum=0, maximum=100
    )
    rounds: int = option(12, "rounds of a masked prior", minimum=1, maximum=2**12)
    seed: int = option(42, "seed of the samples", minimum=0, maximum=2**32 - 1)
    batch_size: int = option(64, "images at a time", minimum=1, maximum=2**20)
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    overwrite: bool = option(False, "remove the samples of an earlier run first")
