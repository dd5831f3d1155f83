"""Rate and distortion of LooC and of its peers under one protocol.

Trains every contender of a suite with the same budget, measures it on the test images and writes
tables and curves: python experiments/compare.py --suite fashion-mnist. The same command again goes
on where it was interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.curves import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PINK,
    RED,
    SKY,
    YELLOW,
    Style,
    draw,
)
from experiments.margins import margins_table
from experiments.options import (
    ALIVE,
    SETUPS,
    add_options,
    checked,
    chosen,
    settings_of,
    shared_training,
)
from experiments.runs import Contender, contests, run_all
from experiments.tables import Document, Row, collect, earlier_page, with_kept
from utils.errors import run
from utils.flags.arguments import Parser
from utils.logger import start_logging
from utils.training.trainer import TrainConfig

CHANNELS = 128  # of encoder and decoder, and of LooC's latents
UNITS = (1, 2, 4, 8, 16, 32)  # codes a position; with K = 256 0.5 to 16 bits a pixel
FEWER = (2, 4, 8)  # of slow quantisers
SIZES = (32, 1024)  # codevectors of quantisers with one code a position
FSQ = (("8,4", 1), ("8,6,5", 1), *(("8,5,5,5", m) for m in UNITS[1:]))  # levels, and units

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
}
OURS = [family for family in STYLES if family.startswith("looc")]


def contender(family: str, point: str, **flags: Any) -> Contender:
    return Contender(f"{family}-{point}" if point else family, family, flags)


def looc(**flags: Any) -> Iterator[Contender]:
    """LooC by dimension, by channels, by interpolation and by K; and as published.

    The flags are those that the images ask for, besides the best recipe's.
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
    # At the lowest rates fewer channels still.
    for size, dim in ((32, 2), (48, 2), (64, 2), (96, 2), (128, 2), (32, 3), (96, 3)):
        narrower = {"num_embedding": size, "embedding_dim": dim, "latent_channels": dim}
        yield contender("looc-narrow", f"K{size}-d{dim}-m1", **best, **narrower)
    # More codevectors than bits: the match weighs what a bit costs.
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


def fsq(family: str, levels: str, m: int, **flags: Any) -> Contender:
    """FSQ of so many units a position, of one channel a level."""
    dim = levels.count(",") + 1
    scalar = {"levels": levels, "embedding_dim": dim, "latent_channels": m * dim}
    return contender(family, f"{levels.replace(',', 'x')}-m{m}", **flags, quantizer="fsq", **scalar)


def peers() -> Iterator[Contender]:
    """Other quantisers, each over its own sizes, trained as LooC's best."""
    shared = shared_training("best")
    for family, dim in (("sim-vq", 64), ("cvq", 64), ("vq", 64)):
        for size in SIZES:
            one = {"quantizer": family, "num_embedding": size, "embedding_dim": dim}
            yield contender(family, f"K{size}", **shared, **one)
    alive = {**shared, **ALIVE}
    for family, dim in (("ema-vq", 64), ("cosine-vq", 16)):
        for size in SIZES:
            one = {"quantizer": family, "num_embedding": size, "embedding_dim": dim}
            yield contender(family, f"K{size}", **alive, **one)
    for distance, several in (("cos", UNITS[1:]), ("l2", (4, 32))):
        for m in several:
            parts = {"num_embedding": 256, "embedding_dim": CHANNELS // m, "distance": distance}
            family = f"multihead-vq-{distance}"
            yield contender(family, f"K256-m{m}", **alive, quantizer="multihead-vq", **parts)
    for m in (4, 16):
        product = {"num_embedding": 256, "embedding_dim": CHANNELS // m, "distance": "cos"}
        yield contender("product-vq", f"K256-m{m}", **alive, quantizer="product-vq", **product)
    for m in FEWER:
        residual = {"num_embedding": 256, "embedding_dim": 64, "num_quantizers": m}
        yield contender("residual-vq", f"K256-m{m}", **alive, quantizer="residual-vq", **residual)
    for levels, m in FSQ:
        yield fsq("fsq", levels, m, **shared)
    for dim, m in ((5, 1), (8, 1), (8, 2)):
        signs = {"num_embedding": 2**dim, "embedding_dim": dim, "latent_channels": m * dim}
        signs["lr"] = 3e-4  # it collapses at higher ones
        yield contender("lfq", f"d{dim}-m{m}", **shared, quantizer="lfq", **signs)
    yield contender("none", "", **shared, quantizer="none")


def normalised_peers(latent_norm: str) -> Iterator[Contender]:
    """The strongest peers and none with what LooC's best has besides: normalised latents."""
    shared = {**shared_training("best"), "latent_norm": latent_norm}
    alive = {**shared, **ALIVE, "num_embedding": 256}
    for m in UNITS[:4]:
        heads = {"embedding_dim": 4, "latent_channels": 4 * m, "distance": "l2"}
        yield contender(
            "multihead-vq-norm", f"K256-m{m}", **alive, quantizer="multihead-vq", **heads
        )
    for m in FEWER:
        residual = {"embedding_dim": 64, "num_quantizers": m}
        yield contender(
            "residual-vq-norm", f"K256-m{m}", **alive, quantizer="residual-vq", **residual
        )
    for levels, m in FSQ:
        yield fsq("fsq-norm", levels, m, **shared)
    yield contender("none-norm", "", **shared, quantizer="none")


def smoke() -> Iterator[Contender]:
    """A few tiny ones, to see that everything works."""
    best: dict[str, Any] = {"recipe": "best", "num_embedding": 16}
    yield contender("looc", "m1", **best, embedding_dim=16)
    yield contender("looc", "m4", **best, embedding_dim=4)
    yield contender("vq", "K16", quantizer="vq", num_embedding=16, embedding_dim=16)
    yield contender("none", "", quantizer="none")


SUITES = {
    "smoke": [*smoke()],
    "fashion-mnist": [*looc(), *peers(), *normalised_peers("batch")],
    # Batches of 16 unlike photographs: their own mean and variance are too noisy.
    "photos": [*looc(latent_norm="running"), *peers(), *normalised_peers("running")],
}


def main() -> None:
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--suite", choices=tuple(SUITES), required=True)
    add_options(parser, "output/compare")
    arguments = parser.parse_args()
    start_logging()
    name, setup, contenders = arguments.suite, SETUPS[arguments.suite], SUITES[arguments.suite]
    settings = settings_of(arguments, setup, name)
    selected = chosen(contenders, settings.only)
    settings = checked(setup, settings)
    page = f"compare-{name}-{settings.steps}"
    earlier = earlier_page(page, settings)
    failures = run_all(contests(selected, setup, settings), settings)
    rows = collect(contests(contenders, setup, settings), settings)
    rows = with_kept(rows, contenders, setup, settings, earlier)
    document = Document(
        page,
        f"Rate and distortion: {setup.title}",
        ABOUT,
        command=f"python experiments/compare.py --suite {name}",
        setup=setup,
        settings=settings,
        rows=rows,
        expected=len(contenders),
        failures=failures,
        pictures=draw_curves(rows, f"{setup.title}; {settings.steps:,} steps", settings.docs, page),
        summaries=[margins_table(rows, OURS, [name for name in STYLES if name not in OURS])],
    )
    sys.stdout.write("".join(f"{path}\n" for path in document.write()))
    sys.exit(1 if failures else 0)


ABOUT = """\
The rate is what an ideal entropy coder with one table of frequencies a code slot needs for the
indices of the test images; *nominal* counts log2 K bits a code. m is the number of codes a
position; there is one position for every 4×4 pixels. LooC is trained by `--recipe best` (on
photographs with `--latent_norm running`) and, with its own learning rate, by `--recipe paper`, for
the same steps. Peers share the training flags of `--recipe best`; those whose codevectors are
running means start by k-means and replace dead ones, as their library recommends. Families whose
name ends in norm have LooC's `--latent_norm` besides, and multi-head VQ its widths and distance
too. The width of the latents is in the flags, `none` has 128 channels. Contenders of one family
differ in the flags of the last column. Points of a curve are joined in order of rate. Times a step
are those of runs beside others, as told below. Each curve whose height is compared is the upper
hull over log2 of the rate of the means over seeds; beyond its last point it stays level."""


def draw_curves(rows: list[Row], what: str, docs: Path, page: str) -> Mapping[str, str]:
    """The curves that there are figures for: file name → what it shows."""
    pictures = {}
    for quality, label in (("psnr", "PSNR"), ("lpips", "LPIPS")):
        file = f"{page}-{quality}.png"
        if draw(rows, STYLES, quality, f"{label} against rate\n{what}", docs / file):
            pictures[file] = f"{label} against bits a pixel, one curve a family"
    return pictures


if __name__ == "__main__":
    run(main)
