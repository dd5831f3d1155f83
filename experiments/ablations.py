"""What each part of the method brings, one table a question.

Trains the variants of a table with the same budget and measures them on the test images: python
experiments/ablations.py --table codebook. Variants that stand in several tables are trained once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.options import (
    ALIVE,
    LRS,
    SETUPS,
    add_options,
    checked,
    chosen,
    settings_of,
    shared_training,
)
from experiments.runs import Contender, contests, run_all
from experiments.tables import Document, collect, earlier_page, with_kept
from utils.errors import UserError, run
from utils.flags.arguments import Parser
from utils.flags.recipes import RECIPES
from utils.logger import start_logging
from utils.training.trainer import TrainConfig

UNITS = {"num_embedding": 256, "embedding_dim": 16}  # 8 units a position: 4 bits a pixel
LARGE = {"num_embedding": 512, "embedding_dim": 64}  # some codevectors die without anchors
SETTINGS = ((256, 4), (1024, 16), (1024, 64), (512, 128))
SHORT = {"num_embedding": "K", "embedding_dim": "d", "interpolation_scale": "scale"}


def variant(recipe: str, **flags: Any) -> Contender:
    """A recipe with some flags, and the name that these make."""
    parts = [f"{SHORT[name]}{value}" for name, value in flags.items() if name in SHORT]
    parts += [f"{name}-{value}" for name, value in flags.items() if name not in SHORT]
    return Contender("-".join([recipe, *parts]), recipe, {"recipe": recipe, **flags})


def codebook(recipe: str) -> Iterator[Contender]:
    for size in (32, 64, 128, 256, 512, 1024):
        yield variant(recipe, **{**UNITS, "num_embedding": size})


def dimension(recipe: str) -> Iterator[Contender]:
    for dim in (4, 8, 16, 32, 64, 128):
        yield variant(recipe, **{**UNITS, "embedding_dim": dim})


def anchor(recipe: str) -> Iterator[Contender]:
    for rule in ("closest", "random", "probrandom", "none"):
        yield variant(recipe, **LARGE, anchor=rule)


def offline(recipe: str) -> Iterator[Contender]:
    for first_batch in (False, True):
        yield variant(recipe, **LARGE, first_batch=first_batch)


def contrastive(recipe: str) -> Iterator[Contender]:
    needed = {} if recipe == "paper" else {"codebook_update": "gradient"}
    for contras_loss in (False, True):
        yield variant(recipe, **LARGE, **needed, contras_loss=contras_loss)


def interpolation(recipe: str) -> Iterator[Contender]:
    for scale in (0, 2, 3, 4):
        yield variant(recipe, **UNITS, interpolation_scale=scale)


def ingredients(_recipe: str) -> Iterator[Contender]:
    """Each entry of the best recipe alone added to the published one, and left out of the best."""
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
    """LooC as published, by the best recipe, and the library's quantiser that is most like it."""
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
    """A table: its heading, what is asked, and the variants that answer."""

    title: str
    about: str
    variants: Callable[[str], Iterator[Contender]]
    lrs: tuple[float, ...] | None = ()  # unless others are asked for; None: those of the rows alone
    recipe: bool = True  # whether --recipe says what is varied


TABLES = {
    "codebook": Question(
        "Codevectors K", "`--num_embedding`. The rate grows with log2 K.", codebook
    ),
    "dimension": Question(
        "Dimension d",
        "`--embedding_dim`. The number of codes, and so the rate, is channels / d.",
        dimension,
    ),
    "anchor": Question(
        "Re-initialisation", "`--anchor`: where unused codevectors are drawn to.", anchor
    ),
    "offline": Question(
        "Offline re-initialisation",
        "`--first_batch`: re-initialise on the first training batch only.",
        offline,
    ),
    "contrastive": Question("Contrastive loss", "`--contras_loss`.", contrastive),
    "interpolation": Question(
        "Extrapolation-by-interpolation",
        "`--interpolation_scale`. The rate grows with its square: compare at equal rate with other "
        "d, not across rows.",
        interpolation,
    ),
    "ingredients": Question(
        "Ingredients of the recipe",
        "Each entry of `--recipe best` alone added to `--recipe paper`, and each left out of "
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


def main() -> None:
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--table", choices=tuple(TABLES), required=True)
    parser.add_argument("--images", choices=tuple(SETUPS), default="fashion-mnist")
    parser.add_argument(
        "--recipe", choices=tuple(RECIPES), default="paper", help="what is varied (default: paper)"
    )
    add_options(parser, "output/ablations")
    arguments = parser.parse_args()
    start_logging()
    name, images, question = arguments.table, arguments.images, TABLES[arguments.table]
    if arguments.lrs and question.lrs is None:
        raise UserError(
            f"--lrs {arguments.lrs[0]} has no effect with --table {name}, of fixed rates"
        )
    if arguments.recipe != "paper" and not question.recipe:
        raise UserError(f"--recipe {arguments.recipe} has no effect with --table {name}")
    setup = replace(SETUPS[images], lrs=question.lrs or ())
    settings = settings_of(arguments, setup, images)
    variants = list(question.variants(arguments.recipe))
    selected = chosen(variants, settings.only)
    settings = checked(setup, settings)
    suffix = "" if arguments.recipe == "paper" else f" --recipe {arguments.recipe}"
    page = f"ablation-{images}-{name}-{settings.steps}" + suffix.replace(" --recipe ", "-")
    earlier = earlier_page(page, settings)
    failures = run_all(contests(selected, setup, settings), settings)
    about = f"{question.about} K = `--num_embedding`, d = `--embedding_dim`."
    rows = collect(contests(variants, setup, settings), settings)
    document = Document(
        page,
        f"{question.title}: {setup.title}",
        about,
        command=f"python experiments/ablations.py --table {name} --images {images}{suffix}",
        setup=setup,
        settings=settings,
        rows=with_kept(rows, variants, setup, settings, earlier),
        expected=len(variants),
        failures=failures,
    )
    sys.stdout.write("".join(f"{path}\n" for path in document.write()))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    run(main)
