"""What the programs that train and measure many models are told on the command line."""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Sequence
from dataclasses import fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from datasets import ImageSet, open_dataset
from experiments.runs import Contender, Flags, Settings, Setup
from utils.errors import UserError, unknown_name
from utils.files import writable_folder
from utils.flags.arguments import Parser
from utils.flags.recipes import RECIPES
from utils.logger import log
from utils.training.trainer import TrainConfig

LRS = (RECIPES["best"].get("lr", TrainConfig.lr),)
LOOKED_AT = 32  # images of a set, to tell it from others
# What the library offers against codevectors that are not used.
ALIVE: Flags = {"codebook_start": "kmeans", "dead_code_threshold": 2}
TINY: Flags = {"hidden_size": 16, "num_residual_hidden": 8, "num_residual_layers": 1}
SETUPS = {
    "smoke": Setup(
        "Fashion-MNIST's sample, 1,000 test images of 28×28, a tiny network",
        {"dataset": "fashion-mnist-sample", **TINY, "batch_size": 32},
        steps=60,
        lrs=(3e-3,),
    ),
    "sample": Setup(
        "Fashion-MNIST's sample, 1,000 test images of 28×28",
        {"dataset": "fashion-mnist-sample", "batch_size": 64},
        steps=1000,
        lrs=LRS,
    ),
    "fashion-mnist": Setup(
        "Fashion-MNIST, 10,000 test images of 28×28",
        {"dataset": "fashion-mnist", "batch_size": 64},
        steps=1000,
        lrs=LRS,
    ),
    "photos": Setup(
        "photographs, crops of 64×64 of those not trained on",
        {"dataset": "folder", "image_size": 64, "batch_size": 16},
        steps=1000,
        lrs=LRS,
        data_folder="data/photos",
        missing="python experiments/photos.py makes it",
    ),
}


def shared_training(recipe: str) -> dict[str, Any]:
    """The recipe's flags of training, which quantisers of any kind get too; not its lr."""
    known = {item.name for item in fields(TrainConfig)} - {"lr"}
    return {name: value for name, value in RECIPES[recipe].items() if name in known}


def add_options(parser: Parser, output: str) -> None:
    """The options that all programs of this kind share."""
    cores = os.cpu_count() or 1
    parser.add_argument("--steps", type=natural, help="training steps (default: the suite's)")
    parser.add_argument("--seeds", type=whole, nargs="+", default=[42], help="(default: 42)")
    parser.add_argument(
        "--lrs", type=positive, nargs="+", default=[], metavar="LR",
        help="learning rates to choose from by validation PSNR (default: the suite's)",
    )  # fmt: skip
    parser.add_argument("--jobs", type=natural, default=1, help="runs at a time (default: 1)")
    parser.add_argument(
        "--threads", type=natural, help=f"of each job (default: {cores} cores / jobs)"
    )
    parser.add_argument("--output", type=Path, default=Path(output), help="folder of the runs")
    parser.add_argument(
        "--docs", type=Path, default=Path("docs/results"), help="folder of the tables"
    )
    parser.add_argument("--data_folder", help="where the data set lies (default: the suite's)")
    parser.add_argument("--weights_dir", help="folder of LPIPS's weights (default: torch hub's)")
    parser.add_argument(
        "--num_test",
        type=natural,
        metavar="N",
        help="pairs that LPIPS is measured on (default: all)",
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME",
        help="run these contenders or families; * stands for any characters",
    )  # fmt: skip
    parser.add_argument(
        "--keep", action="store_true",
        help="keep rows and seeds of the page that is there, where they are of the same flags",
    )  # fmt: skip


def natural(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def whole(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is less than 0")
    return number


def positive(text: str) -> float:
    number = float(text)
    if not 0 < number <= 10:
        raise argparse.ArgumentTypeError(f"{number} is not between 0 and 10")
    return number


natural.__name__ = whole.__name__ = "whole number"  # as argparse calls them
positive.__name__ = "number"


def settings_of(arguments: argparse.Namespace, setup: Setup, suite: str) -> Settings:
    """The command line's settings; what it leaves open is the setup's."""
    return Settings(
        steps=arguments.steps or setup.steps,
        seeds=tuple(dict.fromkeys(arguments.seeds)),
        lrs=tuple(dict.fromkeys(arguments.lrs)) or setup.lrs,
        jobs=arguments.jobs,
        threads=arguments.threads or max(1, (os.cpu_count() or 1) // arguments.jobs),
        output=arguments.output / suite,
        docs=arguments.docs,
        data_folder=arguments.data_folder or setup.data_folder,
        weights_dir=arguments.weights_dir,
        num_test=arguments.num_test,
        only=tuple(arguments.only),
        keep=arguments.keep,
    )


def chosen(contenders: Sequence[Contender], only: Sequence[str]) -> list[Contender]:
    """The contenders whose name or family is, or fits, one of those given; all where none is."""
    for word in only:
        if not any(fits(contender, word) for contender in contenders):
            known = {name for c in contenders for name in (c.family, c.name)}
            raise UserError(unknown_name("--only", word, sorted(known)))
    return [c for c in contenders if not only or any(fits(c, word) for word in only)]


def fits(contender: Contender, word: str) -> bool:
    return any(fnmatchcase(name, word) for name in (contender.name, contender.family))


def checked(setup: Setup, settings: Settings) -> Settings:
    """The settings, and which images they are of; images that can be are downloaded.

    Raises UserError where images or folders are not to be had.
    """
    if setup.missing and not Path(str(settings.data_folder)).is_dir():
        raise UserError(f"--data_folder {settings.data_folder} does not exist; {setup.missing}")
    flags = setup.flags
    source = flags["dataset"], settings.data_folder
    training, test = (
        open_dataset(*source, split, flags.get("image_size")) for split in ("train", "test")
    )
    if settings.num_test is not None and settings.num_test > len(test):
        raise UserError(f"--num_test {settings.num_test}, but there are {len(test)} test images")
    writable_folder(settings.output, "--output")
    writable_folder(settings.docs, "--docs")
    if "lpips" not in settings.metrics:
        log.warning("LPIPS is left out: python evaluation.py --fetch_weights brings its weights")
    images = f"{len(training):,} + {len(test):,}, SHA-256 {fingerprint(training, test)}"
    return replace(settings, images=images)


def fingerprint(*sets: ImageSet) -> str:
    """The first digits of a SHA-256 of some images of each set."""
    digest = hashlib.sha256()
    for images in sets:
        for index in range(0, len(images), max(1, len(images) // LOOKED_AT)):
            digest.update(images[index].contiguous().numpy().tobytes())
    return digest.hexdigest()[:8]
