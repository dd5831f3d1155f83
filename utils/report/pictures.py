"""Originals beside their reconstructions and error maps: a selection, and the worst."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from utils.errors import UserError
from utils.evaluation.extremes import Shown, extremes, to_show
from utils.evaluation.metrics import METRICS, Metric
from utils.evaluation.pairs import open_pair, read_entry
from utils.evaluation.protocols import PROTOCOLS
from utils.images import fitted, to_picture
from utils.report.files import Found, evaluation_command, test_command
from utils.report.markup import Missing, command, figure, spread, table, text

NUM_SHOWN = 16  # reconstructions, evenly spaced by name
NUM_WORST = 8
ENLARGED = 96  # pixels: the longest side to which small images are enlarged
ERROR_RANGE = 64  # of 255, drawn in the brightest colour
WORST_BY = ("psnr", "lpips")


def colours(share: np.ndarray) -> np.ndarray:
    """Colours (…, 3), bytes, of values (…) from 0 (black) to 1 (pale yellow)."""
    from matplotlib import colormaps

    return np.asarray(colormaps["inferno"](share, bytes=True))[..., :3]


def uri(picture: Image.Image) -> str:
    """A picture as a PNG inside the page."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def pair_of(found: Found, name: str) -> Shown:
    """A pair as it was measured, read if it is not in memory. Raises UserError if it is damaged."""
    if name not in found.kept:
        if name not in found.pairs:
            raise UserError("its pictures are not there")
        protocol = PROTOCOLS.get(str(found.metrics.protocol.get("name")), PROTOCOLS["clean"])
        images = read_entry(open_pair(name, *found.pairs[name]), protocol)
        found.kept[name] = to_show(name, *images)
    return found.kept[name]


def triplet(shown: Shown, side: int) -> Image.Image:
    """Original, reconstruction and error side by side, with a transparent gap."""
    error = Image.fromarray(colours(shown.error / ERROR_RANGE))
    pictures = (to_picture(shown.original), to_picture(shown.reconstruction), error)
    tiles = [fitted(picture, ENLARGED, side) for picture in pictures]
    width, height = tiles[0].size
    whole = Image.new("RGBA", (3 * width + 12, height))
    for position, tile in enumerate(tiles):
        whole.paste(tile, (position * (width + 6), 0))
    return whole


def tiles(found: Found, names: Sequence[str], side: int) -> str:
    """A list of triplets with names and values, or with the reason why one cannot be read."""
    items, widest = [], 0
    for name in names:
        values, source = found.values.get(name, {}), found.analysis.sources.get(name)
        label = name if source is None else f"{name}, {source}"
        scores = ", ".join(
            f"{METRICS[key].label} {METRICS[key].format(value)}"
            for key, value in values.items()
            if key in METRICS
        )
        try:
            picture = triplet(pair_of(found, name), side)
        except UserError as error:
            items.append(f'<li class="tile">{text(label)}: {text(error)}</li>')
            continue
        widest = max(widest, picture.width)
        described = f"Image {name}: original, reconstruction and error. {scores}"
        items.append(
            f'<li class="tile"><img src="{uri(picture)}" width="{picture.width}" '
            f'height="{picture.height}" alt="{text(described)}">{text(label)}'
            f"{'<br>' if scores else ''}{text(scores)}</li>"
        )
    return f'<ul class="tiles" style="--tile: {max(widest, 200)}px">{"".join(items)}</ul>'


def error_key() -> str:
    """A key to the colours of the error maps."""
    strip = Image.fromarray(colours(np.linspace(0, 1, 256)[None]))
    return (
        '<svg class="key" viewBox="0 0 320 34" role="img" aria-label="Colours of the error: black '
        f'is none, pale yellow is {ERROR_RANGE} of 255 or more"><image href="{uri(strip)}" '
        'width="320" height="14" preserveAspectRatio="none"/><text x="0" y="30">no error</text>'
        f'<text x="320" y="30" text-anchor="end">{ERROR_RANGE} of 255 or more</text></svg>'
    )


def need_pairs(found: Found) -> None:
    found.need(
        "the pair of original/ and rec/", "test.py writes them:" + command(test_command(found))
    )


def reconstructions(found: Found, side: int) -> str:
    need_pairs(found)
    if not found.pairs:
        raise Missing("original/ and rec/ hold no two pictures with the same name.")
    chosen = spread(list(found.pairs), NUM_SHOWN)
    return figure(
        tiles(found, chosen, side) + error_key(),
        f"From left to right: original, reconstruction, mean absolute error over channels. "
        f"{len(chosen)} of {len(found.pairs):,} images, evenly spaced by name, not by quality; "
        f"small images are enlarged without smoothing, those above {side} pixels shrunk. "
        "<b>One should see</b> errors that are faint and look like noise. <b>Bad:</b> error maps "
        "in which the object can be recognised (edges and texture are lost), blocks of the "
        "latents' grid, or a glow over plain areas (a shift of colour).",
    )


def worst_images(found: Found, side: int) -> str:
    measure = "evaluation.py measures the images:" + command(evaluation_command(found))
    found.need("metrics.csv", measure)
    need_pairs(found)
    content = quantiles(found)
    for metric in WORST_BY:
        label, lower = METRICS[metric].label, METRICS[metric].lower_is_better
        values = {
            name: own[metric]
            for name, own in found.values.items()
            if not math.isnan(own.get(metric, math.nan))
        }
        if not values:
            continue
        worst, _ = extremes(list(values.values()), lower_is_better=lower)
        names = [list(values)[position] for position in worst[:NUM_WORST]]
        content += f"<h3>Worst by {label}</h3>" + figure(
            tiles(found, names, side),
            f"The {len(names)} images of {'highest' if lower else 'lowest'} {label}, the worst "
            "first; colours of the error as above. <b>One should see</b> the hardest images: fine "
            "texture, print, noise. <b>Bad:</b> images that look easy, all of one kind (it is "
            "rare in training), or reconstructions that show something else.",
        )
    return content


def quantiles(found: Found) -> str:
    """Quantiles of each metric over the images."""
    columns: dict[str, list[float]] = {}
    for values in found.values.values():
        for metric, value in values.items():
            if not math.isnan(value):
                columns.setdefault(metric, []).append(value)
    steps = (0, 0.05, 0.5, 0.95, 1)
    rows = []
    for name, column in columns.items():
        shown = METRICS.get(name, Metric(name))
        numbers = np.quantile(column, steps, method="nearest").tolist()
        rows.append((shown.title, *map(shown.format, numbers)))
    return table(
        f"Spread over {len(found.values):,} images",
        ("metric", "least", "5 %", "median", "95 %", "most"),
        {"": rows},
    )
