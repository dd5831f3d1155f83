"""Setups, and the options on the command line of the programs that train many models."""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Sequence
from dataclasses import fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from datasets import ImageSet, open_dataset
from experiments.children import Flags
from experiments.runs import Contender, Settings, Setup
from utils.errors import UserError, unknown_name
from utils.files import writable_folder
from utils.flags.arguments import Parser
from utils.flags.recipes import RECIPES
from utils.logger import log
from utils.training.trainer import TrainConfig

LRS = (RECIPES["best"]["lr"],)
SAMPLED = 32  # images of a set in its fingerprint
# The library's options against unused codevectors.
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


def add_options(parser: Parser, output: str) -> None:
    """Add the options that compare and ablations share."""
    cores, add = os.cpu_count() or 1, parser.add_argument
    lrs = "learning rates to choose from by validation PSNR (default: the suite's)"
    only = "run these contenders or families; * stands for any characters"
    keep = "keep rows and seeds of the existing page whose flags are the same"
    add("--steps", type=natural, help="training steps (default: the suite's)")
    add("--seeds", type=whole, nargs="+", default=[42], help="(default: 42)")
    add("--lrs", type=positive, nargs="+", default=[], metavar="LR", help=lrs)
    add("--jobs", type=natural, default=1, help="runs at a time (default: 1)")
    add("--threads", type=natural, help=f"threads per job (default: {cores} cores / jobs)")
    add("--output", type=Path, default=Path(output), help="folder of the runs")
    add("--docs", type=Path, default=Path("docs/results"), help="folder of the pages")
    add("--data_folder", help="folder of the data set (default: the suite's)")
    add("--weights_dir", help="folder of LPIPS's weights (default: torch hub's)")
    add("--num_test", type=natural, metavar="N", help="pairs to measure LPIPS on (default: all)")
    add("--only", nargs="+", default=[], metavar="NAME", help=only)
    add("--keep", action="store_true", help=keep)


def natural(text: str) -> int:
    return at_least(1, int(text))


def whole(text: str) -> int:
    return at_least(0, int(text))


def at_least(least: int, number: int) -> int:
    if number < least:
        raise argparse.ArgumentTypeError(f"{number} is less than {least}")
    return number


def positive(text: str) -> float:
    number = float(text)
    if not 0 < number <= 10:
        raise argparse.ArgumentTypeError(f"{number} is not between 0 and 10")
    return number


natural.__name__ = whole.__name__ = "whole number"  # for argparse's messages
positive.__name__ = "number"


def settings_of(arguments: argparse.Namespace, setup: Setup, suite: str) -> Settings:
    """Return the command line's settings; the setup fills what is not given.

    Images are downloaded where that is possible. Raises UserError if images or folders are missing.
    """
    settings = Settings(
        setup=setup,
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
        keep=arguments.keep,
        images=images_of(arguments, setup),
    )
    writable_folder(settings.output, "--output")
    writable_folder(settings.docs, "--docs")
    if "lpips" not in settings.metrics:
        log.warning("LPIPS is left out: python evaluation.py --fetch_weights brings its weights")
    return settings


def images_of(arguments: argparse.Namespace, setup: Setup) -> str:
    """Return the numbers of training and test images, and their fingerprint."""
    folder = arguments.data_folder or setup.data_folder
    if setup.missing and not Path(str(folder)).is_dir():
        raise UserError(f"--data_folder {folder} does not exist; {setup.missing}")
    source, size = (setup.flags["dataset"], folder), setup.flags.get("image_size")
    training, test = (open_dataset(*source, split, size) for split in ("train", "test"))
    if arguments.num_test is not None and arguments.num_test > len(test):
        raise UserError(f"--num_test {arguments.num_test}, but there are {len(test)} test images")
    return f"{len(training):,} + {len(test):,}, SHA-256 {fingerprint(training, test)}"


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
