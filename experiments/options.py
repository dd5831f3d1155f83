"""Setups, and the settings of the command line of compare and ablations."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from datasets import DATASETS, ImageSet
from datasets.config import DataConfig
from datasets.splits import opener
from experiments.children import Flags
from modules import ModelConfig
from modules.options import option, unknown_name
from modules.quantizers.looc.norms import LATENT_NORMS
from modules.registry import MODELS
from utils.errors import UserError
from utils.files import writable_folder
from utils.flags.arguments import build, with_recipe
from utils.flags.recipes import RECIPES
from utils.logger import log
from utils.training.config import FREE_TO_CHANGE, PRECISIONS, TrainConfig
from utils.training.reconstruction import check_network
from utils.weights.registry import METRIC_WEIGHTS, WEIGHTS, find, weights_folder

PIXEL_METRICS = ("l1", "ssim", "psnr")
LRS = (RECIPES["best"]["lr"],)
SAMPLED = 32  # images of a set in its fingerprint
# The library's options against unused codevectors.
ALIVE: Flags = {"codebook_start": "kmeans", "dead_code_threshold": 2}
# As many latent channels as the whole network has, so that every ablation's d divides them.
TINY: Flags = {
    **{"hidden_size": 16, "num_residual_hidden": 8, "num_residual_layers": 1},
    "latent_channels": ModelConfig.hidden_size,
}


@dataclass(frozen=True)
class Contender:
    """A model to measure: its name, the family whose curve it lies on, and its flags of main.py."""

    name: str
    family: str
    flags: Flags


@dataclass(frozen=True)
class Setup:
    """Images and budget shared by all contenders."""

    title: str  # of the images
    flags: Flags
    lrs: tuple[float, ...]  # default of --lrs; none: those of the recipes
    steps: tuple[int, ...] = (1000,)  # default of --steps
    latent_norms: tuple[str, ...] = ()  # default of --latent_norms; none: those of the contenders
    data_folder: str | None = None
    missing: str = ""  # what to do if the data folder does not exist


@dataclass(frozen=True)
class SharedConfig:
    """Flags of main.py that all contenders share, instead of the suite's."""

    model: str = option(ModelConfig.model, "network", choices=MODELS)
    batch_size: int = option(None, "images per step (default: the suite's)", minimum=1)
    precision: str = option(
        TrainConfig.precision, "precision of the network in training", choices=tuple(PRECISIONS)
    )


@dataclass(frozen=True)
class Settings:
    """A setup, and the options of compare and ablations. `settings_of` fills those without default.

    Without learning rates a contender has that of its recipe.
    """

    setup: Setup
    steps: tuple[int, ...] = option(
        None, "training steps; each of several has its own runs and page (default: the suite's)",
        minimum=1,
    )  # fmt: skip
    seeds: tuple[int, ...] = option((42,), "seeds of the runs", minimum=0)
    within: float | None = option(
        *(None, "further seeds only where PSNR is within so many dB of the best other family"),
        minimum=0,
    )
    latent_norms: tuple[str, ...] = option(
        *(None, "normalisations to choose from by validation PSNR (default: the suite's)"),
        choices=LATENT_NORMS,
    )
    lrs: tuple[float, ...] = option(
        *(None, "learning rates to choose from by validation PSNR (default: the suite's)"),
        above=0,
        maximum=10,
    )
    budget: float | None = option(
        *(
            None,
            "hours after which to stop; the same command goes on (0: only say what is left)",
        ),
        minimum=0,
    )
    jobs: int = option(1, "runs at a time", minimum=1)
    threads: int = option(None, "threads per job (default: cores / jobs)", minimum=1)
    output: Path = option(None, "folder of the runs (default: output/compare or output/ablations)")
    docs: Path = option(None, "folder of the pages (default: docs in --output)")
    weights_dir: str | None = option(None, "folder of LPIPS's weights (default: torch hub's)")
    num_test: int | None = option(None, "pairs to measure LPIPS on (default: all)", minimum=1)
    only: tuple[str, ...] = option(
        (), "run these contenders or families; * stands for any characters"
    )
    keep: bool = option(False, "keep rows and seeds of the existing page whose flags are the same")
    data_folder: str | None = None
    data: Flags = field(default_factory=dict)  # flags of data set and network that were given
    images: str = ""  # their numbers and fingerprint

    @property
    def flags(self) -> Flags:
        """The flags of main.py shared by all contenders: those that decide the result."""
        decisive = {k: value for k, value in self.data.items() if k not in FREE_TO_CHANGE}
        return {**self.setup.flags, **decisive, "max_steps": self.max_steps}

    @property
    def max_steps(self) -> int:
        """The steps of the first length."""
        return self.steps[0]

    def lengths(self) -> list[Settings]:
        """The settings of each length alone, the shortest one first."""
        return [replace(self, steps=(steps,)) for steps in sorted(set(self.steps))]

    @property
    def free_flags(self) -> Flags:
        """The other flags of main.py: where images are, and how they are read."""
        free = {k: value for k, value in self.data.items() if k in FREE_TO_CHANGE}
        return {"data_folder": self.data_folder, "num_workers": self.threads, **free}

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics to measure: LPIPS only if its weights are there."""
        weights = WEIGHTS[METRIC_WEIGHTS["lpips"]]
        has_lpips = find(weights, weights_folder(self.weights_dir)) is not None
        return (*PIXEL_METRICS, "lpips") if has_lpips else PIXEL_METRICS


SETUPS = {
    "smoke": Setup(
        "Fashion-MNIST's sample, 1,000 test images of 28×28, a tiny network",
        {"dataset": "fashion-mnist-sample", **TINY, "batch_size": 32},
        steps=(60,),
        lrs=(3e-3,),
    ),
    "sample": Setup(
        "Fashion-MNIST's sample, 1,000 test images of 28×28",
        {"dataset": "fashion-mnist-sample", "batch_size": 64},
        lrs=LRS,
    ),
    "fashion-mnist": Setup(
        "Fashion-MNIST, 10,000 test images of 28×28",
        {"dataset": "fashion-mnist", "batch_size": 64},
        lrs=LRS,
    ),
    "photos": Setup(
        "photographs, crops of 64×64 of those not trained on",
        {"dataset": "folder", "image_size": 64, "batch_size": 16},
        lrs=LRS,
        data_folder="data/photos",
        missing="python experiments/photos.py makes it",
    ),
}


def shared_training(recipe: str) -> dict[str, Any]:
    """The training flags of a recipe, which all quantisers share, without its learning rate."""
    known = {item.name for item in fields(TrainConfig)} - {"lr"}
    return {name: value for name, value in RECIPES[recipe].items() if name in known}


def settings_of(flags: Mapping[str, Any], program: str, setup: Setup, suite: str) -> Settings:
    """Return the settings of the flags given; the setup fills in what is not given.

    Images are downloaded where that is possible. Raises UserError if images or folders are missing.
    """
    jobs, output = flags.get("jobs", 1), flags.get("output", Path("output", program))
    shared = (*fields(DataConfig), *fields(SharedConfig))
    data = {item.name: flags[item.name] for item in shared if item.name in flags}
    defaults = {
        "setup": setup,
        "steps": setup.steps,
        "lrs": setup.lrs,
        "latent_norms": setup.latent_norms,
        "threads": max(1, (os.cpu_count() or 1) // jobs),
        "output": output,
        "docs": output / "docs",
        "data_folder": setup.data_folder,
        "data": data,
    }
    given = build(Settings, {**defaults, **flags})
    settings = replace(
        given,
        setup=described(setup, given),
        seeds=tuple(dict.fromkeys(given.seeds)),
        lrs=tuple(dict.fromkeys(given.lrs)),
        latent_norms=tuple(dict.fromkeys(given.latent_norms)),
        output=given.output / labelled(suite, given),
        images=images_of(given),
    )
    writable_folder(settings.output, "--output")
    writable_folder(settings.docs, "--docs")
    if "lpips" not in settings.metrics:
        log.warning("LPIPS is left out: python evaluation.py --fetch_weights brings its weights")
    return settings


def labelled(suite: str, settings: Settings) -> str:
    """Return the suite's name, with those of the user's folder of images and shared flags."""
    own = settings.flags["dataset"] == "folder" and "data_folder" in settings.data
    folder = [Path(str(settings.data_folder)).resolve().name] if own else []
    shared = [f"{settings.data[f.name]}" for f in fields(SharedConfig) if f.name in settings.data]
    return "-".join([suite, *folder, *shared])


def described(setup: Setup, settings: Settings) -> Setup:
    """Return the setup, with a title that names folder and crop if other images are given."""
    if not settings.data.keys() & {"dataset", "data_folder", "image_size", "crop", "crop_scale"}:
        return setup
    data = build(DataConfig, settings.flags)
    name = Path(settings.data_folder).resolve().name if settings.data_folder else data.dataset
    scale = f" --crop_scale {data.crop_scale:g}" if data.crop == "patch" else ""
    size = f", {data.image_size}×{data.image_size}" if data.image_size else ""
    return replace(setup, title=f"{name}{size}, --crop {data.crop}{scale}")


def check_contenders(contenders: Sequence[Contender], settings: Settings) -> None:
    """Raise UserError where main.py would refuse a contender's flags, before any is trained."""
    for contender in contenders:
        flags = with_recipe({**settings.flags, **contender.flags})
        size = flags.get("image_size") or DATASETS[flags["dataset"]].image_size
        try:
            check_network(build(ModelConfig, flags), build(TrainConfig, flags), size)
        except UserError as error:
            raise UserError(f"{contender.name}: {error}") from error


def images_of(settings: Settings) -> str:
    """Return the numbers of training and test images, and their fingerprint."""
    setup, folder = settings.setup, settings.data_folder
    if setup.missing and folder == setup.data_folder and not Path(str(folder)).is_dir():
        raise UserError(f"--data_folder {folder} does not exist; {setup.missing}")
    training, test = (open_split(settings, split) for split in ("train", "test"))
    if settings.num_test is not None and settings.num_test > len(test):
        raise UserError(f"--num_test {settings.num_test}, but there are {len(test)} test images")
    return f"{len(training):,} + {len(test):,}, SHA-256 {fingerprint(training, test)}"


def open_split(settings: Settings, split: str) -> ImageSet:
    """Open training or test images, without the cache."""
    flags = {**settings.flags, "data_folder": settings.data_folder}
    return opener(build(DataConfig, flags))(split)


def fingerprint(*sets: ImageSet) -> str:
    """The first digits of a SHA-256 of some images of each set."""
    digest = hashlib.sha256()
    for images in sets:
        for index in range(0, len(images), max(1, len(images) // SAMPLED)):
            digest.update(images[index].contiguous().numpy().tobytes())
    return digest.hexdigest()[:8]


def chosen(contenders: Sequence[Contender], only: Sequence[str]) -> list[Contender]:
    """The contenders whose name or family matches a pattern of --only; all if there is none."""
    for word in only:
        if not any(fits(contender, word) for contender in contenders):
            known = {name for c in contenders for name in (c.family, c.name)}
            raise UserError(unknown_name("--only", word, sorted(known)))
    return [c for c in contenders if not only or any(fits(c, word) for word in only)]


def fits(contender: Contender, word: str) -> bool:
    return any(fnmatchcase(name, word) for name in (contender.name, contender.family))
