"""Measure what each part of the method contributes, one table per question.

Trains the variants of a table with the same budget, measures them on the test images and writes the
table to docs in --output: python experiments/ablations.py --table codebook. Variants that are in
several tables are trained once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.start import run  # isort: skip  # before those that take seconds

from datasets.config import DataConfig
from experiments.children import Children
from experiments.options import (
    ALIVE,
    LRS,
    SETUPS,
    Contender,
    Settings,
    SharedConfig,
    chosen,
    settings_of,
    shared_training,
)
from experiments.page import Experiment
from experiments.suite import run_experiments
from modules.options import option
from utils.errors import UserError
from utils.flags.arguments import build, parse_flags
from utils.flags.command import words
from utils.flags.recipes import RECIPES
from utils.logger import start_logging
from utils.training.config import TrainConfig

UNITS = {"num_embedding": 256, "embedding_dim": 16}  # 8 units per position: 4 bits per pixel
LARGE = {"num_embedding": 512, "embedding_dim": 64}  # some codevectors die without anchors
SETTINGS = ((256, 4), (1024, 16), (1024, 64), (512, 128))
SHORT = {"num_embedding": "K", "embedding_dim": "d", "interpolation_scale": "scale"}


def variant(recipe: str, **flags: Any) -> Contender:
    """A recipe with some flags, which also make its name."""
    parts = [f"{SHORT[name]}{value}" for name, value in flags.items() if name in SHORT]
    parts += [f"{name}-{value}" for name, value in flags.items() if name not in SHORT]
    return Contender("-".join([recipe, *parts]), recipe, {"recipe": recipe, **flags})


def varied(flag: str, values: Iterable[Any], **fixed: Any) -> Callable[[str], Iterator[Contender]]:
    """Variants of a recipe that differ in one flag."""
    return lambda recipe: (variant(recipe, **{**fixed, flag: value}) for value in values)


def contrastive(recipe: str) -> Iterator[Contender]:
    needed = {} if recipe == "paper" else {"codebook_update": "gradient"}
    for contras_loss in (False, True):
        yield variant(recipe, **LARGE, **needed, contras_loss=contras_loss)


def ingredients(_recipe: str) -> Iterator[Contender]:
    """Each entry of the best recipe added alone to the published one, or left out of the best."""
    best = RECIPES["best"]
    yield variant("paper", **UNITS)
    for name, value in best.items():
        yield Contender(f"paper-with-{name}", "paper", {"recipe": "paper", **UNITS, name: value})
    yield variant("best", **UNITS)
    for left_out in best:
        others = {name: value for name, value in best.items() if name != left_out}
        flags = {"recipe": "paper", **UNITS, **others}
        yield Contender(f"best-without-{left_out}", "best", flags)


def headline(_recipe: str) -> Iterator[Contender]:
    """LooC as published and by the best recipe, and the library's most similar quantiser."""
    sizes = {"num_embedding": 256, "embedding_dim": 4}
    yield Contender("paper", "paper", {"recipe": "paper", **sizes, "lr": TrainConfig.lr})
    yield Contender("best", "best", {"recipe": "best", **sizes})
    peer = {"quantizer": "multihead-vq", **sizes, **shared_training("best"), **ALIVE}
    for distance in ("cos", "l2"):
        name = f"multihead-vq-{distance}"
        yield Contender(name, name, {**peer, "distance": distance})


def recipes(_recipe: str) -> Iterator[Contender]:
    for size, dim in SETTINGS:
        for scale in (0, 2):
            for recipe in ("paper", "best"):
                sizes = {"num_embedding": size, "embedding_dim": dim}
                yield variant(recipe, **sizes, interpolation_scale=scale)


@dataclass(frozen=True)
class Question:
    """A table: its heading, the question, and the variants that answer it."""

    title: str
    about: str
    variants: Callable[[str], Iterator[Contender]]
    lrs: tuple[float, ...] | None = ()  # default of --lrs; None: the rows have their own
    recipe: bool = True  # whether --recipe may be given


TABLES = {
    "codebook": Question(
        "Codevectors K",
        "`--num_embedding`. The rate grows with log2 K.",
        varied("num_embedding", (32, 64, 128, 256, 512, 1024), **UNITS),
    ),
    "dimension": Question(
        "Dimension d",
        "`--embedding_dim`. The number of codes, and so the rate, is channels / d.",
        varied("embedding_dim", (4, 8, 16, 32, 64, 128), **UNITS),
    ),
    "anchor": Question(
        "Re-initialisation",
        "`--anchor`: where unused codevectors are drawn to.",
        varied("anchor", ("closest", "random", "probrandom", "none"), **LARGE),
    ),
    "offline": Question(
        "Offline re-initialisation",
        "`--first_batch`: re-initialise on the first training batch only.",
        varied("first_batch", (False, True), **LARGE),
    ),
    "contrastive": Question("Contrastive loss", "`--contras_loss`.", contrastive),
    "interpolation": Question(
        "Extrapolation-by-interpolation",
        "`--interpolation_scale`. The rate grows with its square: compare at equal rate with other "
        "d, not across rows.",
        varied("interpolation_scale", (0, 2, 3, 4), **UNITS),
    ),
    "ingredients": Question(
        "Ingredients of the recipe",
        "Each entry of `--recipe best` added alone to `--recipe paper`, and each left out of "
        "`best`, that is, as in `paper`.",
        ingredients,
        lrs=None,
        recipe=False,
    ),
    "headline": Question(
        "K = 256, d = 4",
        "`--recipe paper` at its learning rate, `--recipe best`, and vector-quantize-pytorch's "
        "multi-headed VQ (one shared codebook, started by k-means, dead codevectors replaced) with "
        "the training flags of `best`.",
        headline,
        lrs=LRS,
        recipe=False,
    ),
    "recipes": Question(
        "Recipes", "`--recipe best` against `--recipe paper`.", recipes, recipe=False
    ),
}


@dataclass(frozen=True)
class AblationsConfig:
    table: str | None = option(None, "question to answer", choices=tuple(TABLES))
    images: str = option("fashion-mnist", "images to train on", choices=tuple(SETUPS))
    recipe: str = option("paper", "recipe to vary", choices=tuple(RECIPES))


def main() -> None:
    flags = parse_flags(__doc__, AblationsConfig, Settings, SharedConfig, DataConfig)
    start_logging()
    config = build(AblationsConfig, flags)
    name, images, recipe = config.table, config.images, config.recipe
    if name is None:
        raise UserError("--table is missing")
    question = TABLES[name]
    if "lrs" in flags and question.lrs is None:
        raise UserError(f"--lrs {flags['lrs'][0]} has no effect with --table {name}")
    if recipe != "paper" and not question.recipe:
        raise UserError(f"--recipe {recipe} has no effect with --table {name}")
    variants = list(question.variants(recipe))
    selected = chosen(variants, flags.get("only", ()))
    setup = replace(SETUPS[images], lrs=question.lrs or ())
    settings = settings_of(flags, "ablations", setup, images)
    label = settings.output.name
    other = None if recipe == "paper" else recipe
    options = words({"table": name, "images": images, "recipe": other})
    experiments = [
        Experiment(
            "-".join(filter(None, ["ablation", label, name, str(one.max_steps), other])),
            f"{question.title}: {settings.setup.title}",
            f"{question.about} K = `--num_embedding`, d = `--embedding_dim`.",
            command=" ".join(["python experiments/ablations.py", *options]),
            settings=one,
            contenders=variants,
        )
        for one in settings.lengths()
    ]
    children = Children(settings.threads, settings.budget)
    sys.exit(run_experiments(experiments, selected, children))


if __name__ == "__main__":
    run(main)
