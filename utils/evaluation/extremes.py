"""The worst and the best pairs by each metric: kept while all pairs are measured, then drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.evaluation.metrics import METRICS, Metric, Pixels, Values
from utils.evaluation.protocols import from_picture
from utils.files import whole_file
from utils.images import fitted, to_picture
from utils.logger import log

COUNT = 10  # pairs in a row
LARGEST = 256  # pixels: the longer side of a pair that is kept; larger ones are shrunk
TILE = 144  # pixels
GAP = 6
MARGIN = 112  # for the names of the rows
LINE = 18  # height of a line of text
ROWS = ("original", "reconstruction", "error")
MAX_NAME = 18  # letters under an image


class Shown(NamedTuple):
    """A pair as it is shown."""

    name: str
    original: Pixels  # (C, H, W)
    reconstruction: Pixels  # (C, H, W)
    error: Values  # |x − y|, the mean over channels: (H, W)


def to_show(name: str, original: Pixels, reconstruction: Pixels) -> Shown:
    """Copy a pair that was measured, (C, H, W) each, and its error map, shrunk if it is large."""
    error = np.abs(original.astype(np.int16) - reconstruction).mean(axis=0)
    if max(error.shape) <= LARGEST:
        return Shown(name, original.copy(), reconstruction.copy(), np.asarray(error))
    x, y = (from_picture(fitted(to_picture(i), 1, LARGEST)) for i in (original, reconstruction))
    small = fitted(Image.fromarray(error.astype(np.float32)), 1, LARGEST)
    return Shown(name, x, y, np.asarray(small, dtype=np.float64).clip(0))


def extremes(values: Sequence[float], *, lower_is_better: bool) -> tuple[list[int], list[int]]:
    """Positions of the 10 worst values, worst first, and of the 10 best, best first.

    Where lower is better the values are distances, or shifts of either sign: 0 is the best.
    """
    badness = [abs(value) if lower_is_better else -value for value in values]
    order = sorted(range(len(values)), key=badness.__getitem__)
    return order[::-1][:COUNT], order[:COUNT]


class KeptPairs:
    """Pairs to show, chosen while all pass by: the extremes of each metric, and those named.

    Memory is bounded: at most 20 pairs per metric, none larger than 256 pixels.
    """

    def __init__(self, named: Iterable[str] = ()) -> None:
        self.named = frozenset(named)
        self.candidates: dict[str, list[tuple[str, float]]] = {}  # metric → (name, value)
        self.shown: dict[str, Shown] = {}  # by name

    def add(
        self, names: Sequence[str], images: Iterable[Pixels], columns: Mapping[str, Values]
    ) -> None:
        """Pass a batch, (B, C, H, W) each, with its values (B,) by metric."""
        for metric, column in columns.items():
            found = [*self.candidates.get(metric, ()), *zip(names, column.tolist())]
            worst, best = extremes(
                [value for _, value in found], lower_is_better=METRICS[metric].lower_is_better
            )
            self.candidates[metric] = [found[i] for i in sorted({*worst, *best})]
        wanted = self.named.union(name for own in self.candidates.values() for name, _ in own)
        self.shown = {name: pair for name, pair in self.shown.items() if name in wanted}
        for name, x, y in zip(names, *images):
            if name in wanted:
                self.shown[name] = to_show(name, x, y)


def write_extremes(
    output: Path,
    names: Sequence[str],
    values: Mapping[str, Sequence[float]],
    shown: Mapping[str, Shown],
    measured: Sequence[Path],
) -> list[Path]:
    """Write worst_<metric>.png for each metric of single pairs; returns the paths.

    None is written inside the measured folders, where it would count as an image.
    """
    if any(output.resolve().is_relative_to(folder.resolve()) for folder in measured):
        log.warning("%s holds the images that are measured: no pictures are written there", output)
        return []
    written = []
    for name, column in values.items():
        worst, best = (
            [(column[i], shown[names[i]]) for i in positions]
            for positions in extremes(column, lower_is_better=METRICS[name].lower_is_better)
        )
        written.append(output / f"worst_{name}.png")
        save_extremes(written[-1], METRICS[name], {"worst": worst, "best": best})
    return written


def save_extremes(
    path: Path, metric: Metric, blocks: Mapping[str, Sequence[tuple[float, Shown]]]
) -> None:
    """Write a PNG of blocks of pairs with their values: original, reconstruction and error map.

    White in the error maps is the largest error shown.
    """
    peak = max(1.0, *(shown.error.max() for pairs in blocks.values() for _, shown in pairs))
    height = 2 * LINE + len(ROWS) * (TILE + GAP) + LINE  # of a block
    size = MARGIN + COUNT * (TILE + GAP) + GAP, LINE + GAP + len(blocks) * height
    picture = Image.new("RGB", size, "white")
    draw = partial(ImageDraw.Draw(picture).text, fill="black", font=ImageFont.load_default(13))
    error = f"error: |original - reconstruction|, black 0, white {peak:.0f} of 255"
    draw((GAP, GAP), f"{metric.title}, {metric.direction}; {error}")
    for number, (title, pairs) in enumerate(blocks.items()):
        top = LINE + GAP + number * height
        draw((GAP, top + LINE), title)
        for row, label in enumerate(ROWS):
            centre = top + 2 * LINE + row * (TILE + GAP) + TILE // 2
            draw((GAP, centre), label, anchor="lm")
        for column, (value, shown) in enumerate(pairs):
            left = MARGIN + column * (TILE + GAP)
            draw((left, top + LINE), f"{value:.4g}")
            brightness = (255 * shown.error / peak).round().astype(np.uint8)[None]
            for row, image in enumerate((shown.original, shown.reconstruction, brightness)):
                place = left, top + 2 * LINE + row * (TILE + GAP)
                picture.paste(fitted(to_picture(image), TILE, TILE), place)
            name = shown.name.encode("ascii", "replace").decode()  # letters that the font has
            caption = name if len(name) <= MAX_NAME else "..." + name[3 - MAX_NAME :]
            draw((left, top + height - LINE), caption)
    with whole_file(path) as temporary:
        picture.save(temporary, format="PNG")
