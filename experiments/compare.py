"""Compare rate and distortion of LooC and its peers under one protocol.

Trains every contender of a suite with the same budget, measures it on the test images and writes
tables and curves to docs in --output: python experiments/compare.py --suite fashion-mnist. The same
command continues an interrupted run. Your own images: --suite photos --data_folder my_pictures.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.start import run  # isort: skip  # before those that take seconds

from datasets.config import DataConfig
from experiments.children import Children
from experiments.codecs import CODECS, measure_codecs
from experiments.contenders import SUITES, setup_of
from experiments.curves import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY, YELLOW, Style, draw
from experiments.learning import write_learning
from experiments.margins import margins_table
from experiments.options import Settings, SharedConfig, chosen, settings_of
from experiments.page import Experiment, Extras
from experiments.suite import run_experiments
from experiments.tables import Row
from modules.options import option
from utils.errors import UserError
from utils.evaluation.metrics import METRICS
from utils.flags.arguments import build, parse_flags
from utils.logger import start_logging

STYLES = {
    "looc": Style("LooC, d = 128/m", RED, "o", main=True),
    "looc-narrow": Style("LooC, d = 2 to 4, d·m channels", RED, "s", "--", main=True),
    "looc-rate": Style("LooC, d = 4, bits weighed in the match", RED, "*", "-.", main=True),
    "looc-scaled": Style("LooC, interpolated (scale 2)", BLUE, "D", main=True),
    "looc-size": Style("LooC, d = 16, K varied", RED, "^", ":", main=True),
    "looc-passes": Style("LooC, codebook matched several times", RED, "P", main=True),
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
    "jpeg-bare": Style("JPEG without header", BLACK, "x", "-"),
    "webp-bare": Style("WebP without header", BLACK, "+", "-"),
    "avif-bare": Style("AVIF without header", BLACK, "4", "-"),
}
OURS = [family for family in STYLES if family.startswith("looc")]


ABOUT = """\
The rate is what an ideal entropy coder with one frequency table per code slot needs for the indices
of the test images; *nominal* counts log2 K bits per code, *coded* the file of all test images that
`test.py --save_codes` writes. m is the number of codes per position; there is one position for
every 4×4 pixels. LooC is trained by `--recipe best` and, with its own learning rate, by `--recipe
paper`, for the same steps. Peers share the training flags of `--recipe best`; those whose
codevectors are running means start by k-means and replace dead codes, as their library recommends.
Families whose name ends in norm also have LooC's `--latent_norm`, and multi-head VQ its widths and
distance too. The width of the latents is in the flags; `none` has 128 channels. Contenders of one
family differ in the flags of the last column. Points of a curve are joined in order of rate. Times
per step, and the core-hours of all steps, are those of runs that shared the machine, as noted
below. Margins compare upper hulls, over log2 of the rate, of the means over seeds; beyond its last
point a hull stays level. JPEG, WebP and AVIF, where shown, are Pillow's at the qualities in the
last column. Their rate is the size of the files, one for each test image, as a whole, and *bare*
without what the file of a grey picture of this size has: a header that most of a small file is."""


@dataclass(frozen=True)
class CompareConfig:
    suite: str | None = option(None, "contenders and images", choices=tuple(SUITES))
    codecs: tuple[str, ...] = option(
        (), "image formats to measure as well, at several qualities", choices=tuple(CODECS)
    )


def main() -> None:
    flags = parse_flags(__doc__, CompareConfig, Settings, SharedConfig, DataConfig)
    start_logging()
    config = build(CompareConfig, flags)
    name = config.suite
    if name is None:
        raise UserError("--suite is missing")
    setup, contenders = setup_of(name), SUITES[name]
    selected = chosen(contenders, flags.get("only", ()))
    settings = settings_of(flags, "compare", setup, name)
    children = Children(settings.threads, settings.budget)
    codecs = measure_codecs(config.codecs, settings, children)
    experiments = [
        Experiment(
            f"compare-{settings.output.name}-{one.max_steps}",
            f"Rate and distortion: {settings.setup.title}",
            ABOUT,
            command=f"python experiments/compare.py --suite {name}",
            settings=one,
            contenders=contenders,
            codecs=codecs,
        )
        for one in settings.lengths()
    ]
    code = run_experiments(experiments, selected, children, extras)
    if len(experiments) > 1:
        write_learning(experiments, STYLES)
    sys.exit(code)


def extras(experiment: Experiment, rows: list[Row]) -> Extras:
    """The curves and the margins."""
    settings = experiment.settings
    what = f"{settings.setup.title}; {settings.max_steps:,} steps"
    pictures = draw_curves(rows, what, settings.docs, experiment.page)
    return pictures, [margins_table(rows, OURS, [name for name in STYLES if name not in OURS])]


def draw_curves(rows: list[Row], what: str, docs: Path, page: str) -> Mapping[str, str]:
    """Draw the curves that have figures; return captions by file name.

    The sizes of files are a rate too, the only one that codecs have.
    """
    pictures = {}
    for rate, end, title in (
        ("entropy", "", "bits per pixel"),
        ("coded", "-coded", "size of files"),
    ):
        for quality in ("psnr", "lpips"):
            file = f"{page}-{quality}{end}.png"
            if draw(rows, STYLES, rate, quality, what, docs / file):
                pictures[file] = f"{METRICS[quality].label} against {title}, a curve per family"
    return pictures


if __name__ == "__main__":
    run(main)
