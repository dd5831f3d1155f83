"""Compare rate and distortion of LooC and its peers under one protocol.

Trains every contender of a suite with the same budget, measures it on the test images and writes
tables and curves to docs in --output: python experiments/compare.py --suite fashion-mnist. The same
command continues an interrupted run. Your own images: --suite photos --data_folder my_pictures.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.start import run  # isort: skip  # before those that take seconds

from datasets.config import DataConfig
from experiments.codecs import CODECS, measure_codecs
from experiments.curves import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY, YELLOW, Style, draw
from experiments.margins import margins_table
from experiments.options import (
    ALIVE,
    SETUPS,
    Contender,
    Settings,
    chosen,
    settings_of,
    shared_training,
)
from experiments.page import Experiment, Extras
from experiments.tables import Row
from modules.options import option
from utils.errors import UserError
from utils.evaluation.metrics import METRICS
from utils.flags.arguments import build, parse_flags
from utils.logger import start_logging
from utils.training.config import TrainConfig

CHANNELS = 128  # of encoder and decoder, and of LooC's latents
UNITS = (1, 2, 4, 8, 16, 32)  # codes per position; with K = 256, 0.5 to 16 bits per pixel
SIZES = (32, 1024)  # codevectors of quantisers with one code per position

STYLES = {
    "looc": Style("LooC, d = 128/m", RED, "o", main=True),
    "looc-narrow": Style("LooC, d = 2 to 4, d·m channels", RED, "s", "--", main=True),
    "looc-rate": Style("LooC, d = 4, bits weighed in the match", RED, "*", "-.", main=True),
    "looc-scaled": Style("LooC, interpolated (scale 2)", BLUE, "D", main=True),
    "looc-size": Style("LooC, d = 16, K varied", RED, "^", ":", main=True),
    "looc-paper": Style("LooC, --recipe paper", BLACK, "o", "--", main=True),
    "multihead-vq-cos": Style("multi-head VQ, cosine", GREEN, "v"),
    "multihead-vq-l2": Style("multi-head VQ, Euclidean", GREEN, "1", "--"),
    "product-vq": Style("product VQ, cosine", ORANGE, "^"),
    "residual-vq": Style("residual VQ", PINK, "s"),
    "fsq": Style("FSQ", SKY, "D"),
    "lfq": Style("LFQ", YELLOW, "P"),
    "ema-vq": Style("VQ, EMA", GREEN, "<", ":"),
    "cosine-vq": Style("VQ, cosine", ORANGE, ">", ":"),
    "sim-vq": Style("SimVQ", PINK, "X", ":"),
    "cvq": Style("CVQ-VAE", SKY, "p", ":"),
    "vq": Style("VQ", "#777777", "o", ":"),
    "none": Style("not quantised", "#777777", "", "-."),
    "multihead-vq-norm": Style("multi-head VQ, LooC's norm and width", GREEN, "v", "-."),
    "residual-vq-norm": Style("residual VQ, LooC's norm", PINK, "s", "-."),
    "fsq-norm": Style("FSQ, LooC's norm", SKY, "D", "-."),
    "none-norm": Style("not quantised, LooC's norm", BLACK, "", "-."),
    "jpeg": Style("JPEG", BLACK, "x", ":"),
    "webp": Style("WebP", BLACK, "+", ":"),
    "avif": Style("AVIF", BLACK, "4", ":"),
}
OURS = [family for family in STYLES if family.startswith("looc")]


def contender(family: str, point: str, **flags: Any) -> Contender:
    return Contender(f"{family}-{point}" if point else family, family, flags)


def looc(**flags: Any) -> Iterator[Contender]:
    """LooC by dimension, by channels, by interpolation and by K; and as published.

    The flags, which depend on the images, are added to those of the best recipe.
    """
    best: dict[str, Any] = {"recipe": "best", **flags}
    for size in (32, 128):
        one = {"num_embedding": size, "embedding_dim": CHANNELS}
        yield contender("looc", f"K{size}-m1", **best, **one)
    for m in UNITS:
        yield contender(
            "looc", f"K256-m{m}", **best, num_embedding=256, embedding_dim=CHANNELS // m
        )
    for size, m in (
        *((32, 1), (64, 1), (1024, 1), (4096, 1)),
        *((256, 1), (256, 2), (256, 4), (256, 8), (1024, 2), (1024, 4), (1024, 8)),
    ):
        narrow = {"num_embedding": size, "embedding_dim": 4, "latent_channels": 4 * m}
        yield contender("looc-narrow", f"K{size}-m{m}", **best, **narrow)
    # The lowest rates need still fewer channels.
    for size, dim in ((32, 2), (48, 2), (64, 2), (96, 2), (128, 2), (32, 3), (96, 3)):
        narrower = {"num_embedding": size, "embedding_dim": dim, "latent_channels": dim}
        yield contender("looc-narrow", f"K{size}-d{dim}-m1", **best, **narrower)
    # More codevectors than the rate allows: the match weighs the cost of their bits.
    for size, m, weight in (
        *((256, 1, 0.2), (256, 1, 0.15), (256, 1, 0.1), (256, 1, 0.06), (256, 1, 0.03)),
        *((1024, 1, 0.03), (256, 2, 0.1), (256, 4, 0.1)),
    ):
        weighed = {"num_embedding": size, "embedding_dim": 4, "latent_channels": 4 * m}
        point = f"K{size}-m{m}-{weight}"
        yield contender("looc-rate", point, **best, **weighed, rate_weight=weight)
    for channels, dim in ((32, 128), (128, 128), (128, 32)):
        scaled = {"num_embedding": 256, "embedding_dim": dim, "latent_channels": channels}
        point = f"K256-m{4 * channels // dim}"
        yield contender("looc-scaled", point, **best, **scaled, interpolation_scale=2)
    for size in (16, 64, 1024, 4096):
        yield contender("looc-size", f"K{size}-d16", **best, num_embedding=size, embedding_dim=16)
    for size, dim in ((512, 128), (1024, 64), (1024, 16), (256, 4)):
        published = {"num_embedding": size, "embedding_dim": dim, "lr": TrainConfig.lr}
        yield contender("looc-paper", f"K{size}-d{dim}", **published)


def peers() -> Iterator[Contender]:
    """Other quantisers, each over its own sizes, with the training flags of LooC's best recipe."""
    shared = shared_training("best")
    alive = {**shared, **ALIVE}
    for family, dim, training in (
        *(("sim-vq", 64, shared), ("cvq", 64, shared), ("vq", 64, shared)),
        *(("ema-vq", 64, alive), ("cosine-vq", 16, alive)),
    ):
        for size in SIZES:
            one = {"quantizer": family, "num_embedding": size, "embedding_dim": dim}
            yield contender(family, f"K{size}", **training, **one)
    for distance, several in (("cos", UNITS[1:]), ("l2", (4, 32))):
        for m in several:
            parts = {"num_embedding": 256, "embedding_dim": CHANNELS // m, "distance": distance}
            family = f"multihead-vq-{distance}"
            yield contender(family, f"K256-m{m}", **alive, quantizer="multihead-vq", **parts)
    for m in (4, 16):
        product = {"num_embedding": 256, "embedding_dim": CHANNELS // m, "distance": "cos"}
        yield contender("product-vq", f"K256-m{m}", **alive, quantizer="product-vq", **product)
    yield from residual("residual-vq", **alive)
    yield from fsq("fsq", **shared)
    for dim, m in ((5, 1), (8, 1), (8, 2)):
        signs = {"num_embedding": 2**dim, "embedding_dim": dim, "latent_channels": m * dim}
        signs["lr"] = 3e-4  # it collapses at higher ones
        yield contender("lfq", f"d{dim}-m{m}", **shared, quantizer="lfq", **signs)
    yield contender("none", "", **shared, quantizer="none")


def normalised_peers(latent_norm: str) -> Iterator[Contender]:
    """The strongest peers, and no quantiser, with the normalised latents of LooC's best recipe."""
    shared = {**shared_training("best"), "latent_norm": latent_norm}
    alive = {**shared, **ALIVE}
    for m in UNITS[:4]:
        heads = {"embedding_dim": 4, "latent_channels": 4 * m, "distance": "l2"}
        flags = {**alive, "num_embedding": 256, "quantizer": "multihead-vq", **heads}
        yield contender("multihead-vq-norm", f"K256-m{m}", **flags)
    yield from residual("residual-vq-norm", **alive)
    yield from fsq("fsq-norm", **shared)
    yield contender("none-norm", "", **shared, quantizer="none")


def residual(family: str, **flags: Any) -> Iterator[Contender]:
    """Residual VQ with several codes per position."""
    for m in (2, 4, 8):
        sizes = {"num_embedding": 256, "embedding_dim": 64, "num_quantizers": m}
        yield contender(family, f"K256-m{m}", **flags, quantizer="residual-vq", **sizes)


def fsq(family: str, **flags: Any) -> Iterator[Contender]:
    """FSQ with m units per position, which have one channel per level."""
    for levels, m in (("8,4", 1), ("8,6,5", 1), *(("8,5,5,5", m) for m in UNITS[1:])):
        dim = levels.count(",") + 1
        scalar = {"levels": levels, "embedding_dim": dim, "latent_channels": m * dim}
        point = f"{levels.replace(',', 'x')}-m{m}"
        yield contender(family, point, **flags, quantizer="fsq", **scalar)


def smoke() -> Iterator[Contender]:
    """A few tiny contenders, to see that everything works."""
    narrow: dict[str, Any] = {"latent_channels": 16}
    best = {"recipe": "best", "num_embedding": 16, **narrow}
    yield contender("looc", "m1", **best, embedding_dim=16)
    yield contender("looc", "m4", **best, embedding_dim=4)
    yield contender("vq", "K16", quantizer="vq", num_embedding=16, embedding_dim=16, **narrow)
    yield contender("none", "", quantizer="none", **narrow)


SUITES = {
    "smoke": [*smoke()],
    "fashion-mnist": [*looc(), *peers(), *normalised_peers("batch")],
    # Batches of 16 unlike photographs: their own mean and variance are too noisy.
    "photos": [*looc(latent_norm="running"), *peers(), *normalised_peers("running")],
}


ABOUT = """\
The rate is what an ideal entropy coder with one frequency table per code slot needs for the indices
of the test images; *nominal* counts log2 K bits per code. m is the number of codes per position;
there is one position for every 4×4 pixels. LooC is trained by `--recipe best` (on photographs with
`--latent_norm running`) and, with its own learning rate, by `--recipe paper`, for the same steps.
Peers share the training flags of `--recipe best`; those whose codevectors are running means start
by k-means and replace dead codes, as their library recommends. Families whose name ends in norm
also have LooC's `--latent_norm`, and multi-head VQ its widths and distance too. The width of the
latents is in the flags; `none` has 128 channels. Contenders of one family differ in the flags of
the last column. Points of a curve are joined in order of rate. Times per step are those of runs
that shared the machine, as noted below. Margins compare upper hulls, over log2 of the rate, of the
means over seeds; beyond its last point a hull stays level. JPEG and WebP, where shown, are Pillow's
at the qualities in the last column; their rate is the size of the files, headers included."""


@dataclass(frozen=True)
class CompareConfig:
    suite: str | None = option(None, "contenders and images", choices=tuple(SUITES))
    codecs: tuple[str, ...] = option(
        (), "image formats to measure as well, at several qualities", choices=tuple(CODECS)
    )


def main() -> None:
    flags = parse_flags(__doc__, CompareConfig, Settings, DataConfig)
    start_logging()
    config = build(CompareConfig, flags)
    name = config.suite
    if name is None:
        raise UserError("--suite is missing")
    setup, contenders = SETUPS[name], SUITES[name]
    selected = chosen(contenders, flags.get("only", ()))
    settings = settings_of(flags, "compare", setup, name)
    experiment = Experiment(
        f"compare-{settings.output.name}-{settings.steps}",
        f"Rate and distortion: {settings.setup.title}",
        ABOUT,
        command=f"python experiments/compare.py --suite {name}",
        settings=settings,
        contenders=contenders,
        codecs=measure_codecs(config.codecs, settings),
    )
    sys.exit(1 if experiment.run(selected, partial(extras, experiment)) else 0)


def extras(experiment: Experiment, rows: list[Row]) -> Extras:
    """The curves and the margins."""
    settings = experiment.settings
    what = f"{settings.setup.title}; {settings.steps:,} steps"
    pictures = draw_curves(rows, what, settings.docs, experiment.page)
    return pictures, [margins_table(rows, OURS, [name for name in STYLES if name not in OURS])]


def draw_curves(rows: list[Row], what: str, docs: Path, page: str) -> Mapping[str, str]:
    """Draw the curves that have figures; return captions by file name."""
    pictures = {}
    for quality in ("psnr", "lpips"):
        file = f"{page}-{quality}.png"
        if draw(rows, STYLES, quality, what, docs / file):
            pictures[file] = f"{METRICS[quality].label} against bits per pixel, a curve per family"
    return pictures


if __name__ == "__main__":
    run(main)
