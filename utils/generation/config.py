"""Flags of generate.py."""

from __future__ import annotations

from dataclasses import dataclass

from modules.options import option
from utils.flags.presets import PRIOR_PRESETS
from utils.training.config import LoopConfig


@dataclass(frozen=True)
class PriorTrainingConfig(LoopConfig):
    """Training of a prior."""

    first_stage: str | None = option(
        None,
        "checkpoint whose codes or latents are modelled, under <output_folder>/models or any path",
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
        f"file of flags, or the name of one in the repository ({', '.join(PRIOR_PRESETS)}); "
        "flags that you give override it",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_dropout != PriorTrainingConfig.label_dropout and not self.class_conditional:
            raise ValueError(f"--label_dropout {self.label_dropout} needs --class_conditional")


@dataclass(frozen=True)
class SampleConfig:
    """Samples that are drawn, and where they are written."""

    output_folder: str = option("output", "folder of models, logs, results and samples")
    model_name: str | None = option(
        None, "a prior's checkpoint, under <output_folder>/models, or the name of one of LooC's own"
    )
    first_stage: str | None = option(
        None, "checkpoint of the first stage (default: where it was in training)"
    )
    num_samples: int | None = option(
        None,
        "images to draw (default: 100, or 8 of each picture with --inpaint or --vary)",
        minimum=1,
        maximum=10**8,
    )
    images: tuple[str, ...] = option(
        (),
        "pictures, and folders of them, that --inpaint, --vary or --interpolate starts from "
        "(default: the first ten test images)",
    )
    inpaint: str | None = option(
        None, "part of each picture to draw anew: left, right, top, bottom, or the white of a mask"
    )
    vary: float | None = option(
        None,
        "share of each picture's positions to draw anew, chosen at random, or of the noise levels "
        "of a diffusion prior to go through (with --interpolate 0.5)",
        above=0,
        maximum=1,
    )
    interpolate: int | None = option(
        None, "images to draw between each picture and the next", minimum=1, maximum=98
    )
    label: int | None = option(
        None,
        "class of the images (default: all classes in turn; of edited pictures none)",
        minimum=0,
        maximum=10**6,
    )
    seed: int = option(42, "seed of the samples", minimum=0, maximum=2**32 - 1)
    batch_size: int = option(64, "images at a time", minimum=1, maximum=2**20)
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    overwrite: bool = option(False, "remove the samples of an earlier run first")

    def __post_init__(self) -> None:
        if self.inpaint == "":
            raise ValueError("--inpaint is empty")
        for name in ("vary", "interpolate"):
            value = getattr(self, name)
            if self.inpaint is not None and value is not None:
                raise ValueError(f"--inpaint {self.inpaint} contradicts --{name} {value}")
        if self.images and self.edit is None:
            raise ValueError("--images needs --inpaint, --vary or --interpolate")
        if self.interpolate is not None and self.num_samples is not None:
            raise ValueError(
                f"--num_samples {self.num_samples} contradicts --interpolate {self.interpolate}, "
                "which draws that many images between two pictures"
            )

    @property
    def edit(self) -> str | None:
        """The flag that says how pictures are edited, if any."""
        names = ("inpaint", "interpolate", "vary")
        return next((name for name in names if getattr(self, name) is not None), None)
