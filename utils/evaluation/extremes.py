"""The worst and the best images by a metric as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.evaluation.metrics import METRICS, Pixels
from utils.evaluation.pairs import Pair, read_pair
from utils.evaluation.protocols import Protocol, to_picture
from utils.evaluation.scores import Scores
from utils.files import whole_file
from utils.images import fitted
from utils.logger import log

COUNT = 10  # images a row
TILE = 144  # pixels
GAP = 6
MARGIN = 112  # for the names of the rows
LINE = 18  # height of a line of text
ROWS = ("original", "reconstruction", "error")
MAX_NAME = 18  # letters under an image


class Shown(NamedTuple):
    """One pair and its value."""

    name: str
    value: float
    original: Pixels  # (C, H, W)
    reconstruction: Pixels  # (C, H, W)


def write_extremes(
    output: Path,
    scores: Scores,
    pairs: Sequence[Pair],
    protocol: Protocol,
    measured: Sequence[Path],
) -> list[Path]:
    """worst_<metric>.png for each metric of single images, in output; their paths.

    None are written inside the measured folders, where they would count as images.
    """
    if any(output.resolve().is_relative_to(folder.resolve()) for folder in measured):
        log.warning("%s holds the images that are measured: no pictures are written there", output)
        return []
    by_name = {pair.name: pair for pair in pairs}
    written = []
    for metric, values in scores.values.items():
        worst, best = (
            [
                Shown(name, value, *read_pair(by_name[name], protocol))
                for name, value in ((scores.names[i], values[i]) for i in positions)
            ]
            for positions in extremes(values, lower_is_better=METRICS[metric].lower_is_better)
        )
        written.append(output / f"worst_{metric}.png")
        save_extremes(written[-1], metric, worst, best)
    return written


def extremes(values: Sequence[float], *, lower_is_better: bool) -> tuple[list[int], list[int]]:
    """Positions of the 10 worst values, worst first, and of the 10 best, best first.

    Of fewer values each list holds all.
    """
    sign = 1 if lower_is_better else -1
    order = sorted(range(len(values)), key=lambda position: sign * values[position])
    return order[::-1][:COUNT], order[:COUNT]


def save_extremes(path: Path, metric: str, worst: Sequence[Shown], best: Sequence[Shown]) -> None:
    """Write a PNG: the worst above the best, each as original, reconstruction and error map.

    The map is |x − y|, the mean over channels; white is the largest error shown. Raises UserError
    where it cannot be written.
    """
    peak = max(1.0, *(float(error_of(shown).max()) for shown in (*worst, *best)))
    block = 2 * LINE + len(ROWS) * (TILE + GAP) + LINE
    size = MARGIN + COUNT * (TILE + GAP) + GAP, LINE + GAP + 2 * block
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(13)
    draw.text(
        (GAP, GAP),
        f"{METRICS[metric].title}, {METRICS[metric].direction}; "
        f"error: |original - reconstruction|, black 0, white {peak:.0f} of 255",
        fill="black",
        font=font,
    )
    for number, (title, columns) in enumerate((("worst", worst), ("best", best))):
        top = LINE + GAP + number * block
        draw.text((GAP, top + LINE), title, fill="black", font=font)
        for row, label in enumerate(ROWS):
            centre = top + 2 * LINE + row * (TILE + GAP) + TILE // 2
            draw.text((GAP, centre), label, fill="black", font=font, anchor="lm")
        for column, shown in enumerate(columns):
            left = MARGIN + column * (TILE + GAP)
            draw.text((left, top + LINE), f"{shown.value:.4g}", fill="black", font=font)
            for row, tile in enumerate(tiles(shown, peak)):
                picture.paste(tile, (left, top + 2 * LINE + row * (TILE + GAP)))
            draw.text((left, top + block - LINE), caption(shown.name), fill="black", font=font)
    with whole_file(path) as temporary:
        picture.save(temporary, format="PNG")


def error_of(shown: Shown) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """|x − y|, the mean over channels: (H, W)."""
    difference = np.abs(shown.original.astype(np.int16) - shown.reconstruction)
    return np.asarray(difference.mean(axis=0))


def tiles(shown: Shown, peak: float) -> list[Image.Image]:
    """Original, reconstruction and error map, each fitted into a square of TILE pixels."""
    error = (255 * error_of(shown) / peak).round().astype(np.uint8)[None]
    images = (shown.original, shown.reconstruction, error)
    return [fitted(to_picture(image), TILE, TILE) for image in images]


def caption(name: str) -> str:
    """The end of a name, in letters that the built-in font has."""
    text = name.encode("ascii", "replace").decode()
    return text if len(text) <= MAX_NAME else "..." + text[3 - MAX_NAME :]
