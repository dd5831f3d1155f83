"""Sections on the use of the codebook: by rank, on a map, and by unit slot."""

from __future__ import annotations

from functools import partial
from itertools import zip_longest

import numpy as np
import torch

from utils.codebook.plots import principal_components
from utils.image_files import open_image, viewed
from utils.report.charts import chart, draw_bars, draw_heat_map, draw_scatter
from utils.report.files import Found, stale, test_command
from utils.report.markup import Missing, command, details, figure, shown, spread, table, text
from utils.report.pictures import uri

MAX_COLUMNS = 512  # of a histogram or a heat map


def counts_of(found: Found) -> list[float]:
    """Return the count of each codevector."""
    found.need("analysis.json", "test.py writes it:" + command(test_command(found)))
    counts = [float(count) for count in found.analysis.codebook.counts or ()]
    if not counts or sum(counts) <= 0:
        raise Missing("analysis.json holds no counts of codevectors.")
    return counts


def usage_histogram(found: Found) -> str:
    counts = sorted(counts_of(found), reverse=True)
    total, unused = sum(counts), counts.count(0)
    share = np.array(counts) / total * len(counts)  # 1 is equal use
    bins = np.array_split(share, min(len(share), MAX_COLUMNS))
    half = int(np.searchsorted(np.cumsum(counts), total / 2)) + 1
    described = (
        f"{len(counts):,} codevectors, {unused:,} unused; the most used is used "
        f"{share[0]:.3g} times as often as equal use; {half:,} carry half of all codes"
    )
    histogram = chart(
        "Use of the codevectors, the most used first",
        described,
        "codevectors, most used first",
        "times equal use",
        partial(
            draw_bars,
            values=[part.mean() for part in bins],
            start=0,
            width=len(share) / len(bins),
            mark=(1, "equal use"),
        ),
    )
    rows = [
        (f"{rank:,}", shown(int(counts[rank - 1])), f"{sum(counts[:rank]) / total:.1%}")
        for rank in sorted({1, 2, 5, *(1 + i for i in spread(len(counts), 9))})
        if rank <= len(counts)
    ]
    return figure(
        histogram,
        f"{text(described)}. <b>One should see</b> a line near equal use that falls gently to the "
        "right end. <b>Bad:</b> a few spikes on the left with a long tail near zero (the nominal "
        "rate is wasted), or an end at zero before the right edge: those codevectors are dead.",
        beside=True,
    ) + details(
        "Usage as a table",
        table("Codevectors by rank", ("rank", "times used", "this and above"), {"": rows}),
    )


def codebook_map(found: Found) -> str:
    caption = (
        "Codevectors on their two principal axes; dots are used, larger ones more often, crosses "
        "are unused. <b>One should see</b> dots spread over the whole cloud. <b>Bad:</b> crosses "
        "far from all dots (dead codevectors), many dots in one place (they say the same), or one "
        "large dot that carries nearly everything."
    )
    if found.checkpoint is None:
        return figure(codebook_picture(found), caption, beside=True)
    counts = torch.tensor(counts_of(found))  # (K,)
    codebook = found.checkpoint.model().quantizer.codebook.detach().float()  # (K, d) or (m·K, d)
    if len(codebook) != len(counts):
        raise Missing(
            f"The checkpoint has {len(codebook)} codevectors, analysis.json {len(counts)}; "
            "test.py writes it anew:" + command(test_command(found))
        )
    points, variance = principal_components(codebook)
    used = counts > 0
    diameters = (1 + 4 * (counts / counts.max()).sqrt()).round() * 2  # (K,) 2, 4 … 10
    dots = {float(d): points[used & (diameters == d)].numpy() for d in (2, 4, 6, 8, 10)}
    described = (
        f"{int(used.sum()):,} used and {int((~used).sum()):,} unused codevectors; the two axes "
        f"explain {variance.sum():.0%} of the variance"
    )
    plane = chart(
        "Map of the codebook",
        described,
        f"first axis ({variance[0]:.0%} of variance)",
        f"second axis ({variance[1]:.0%})",
        partial(draw_scatter, dots=dots, crosses=points[~used].numpy()),
    )
    return stale(found) + figure(plane, f"{text(described)}. {caption}", beside=True)


def codebook_picture(found: Found) -> str:
    """Show codebook.png as test.py drew it."""
    path = found.results / "codebook.png"
    if not path.is_file():
        raise Missing(
            f"The checkpoint {text(found.problems.get('the checkpoint', ''))}, and codebook.png "
            "is not there. test.py writes it:" + command(test_command(found))
        )
    with open_image(path, path.name) as image:
        picture = viewed(image, "RGB")
    picture.thumbnail((800, 800))
    return (
        f'<img class="plain" src="{uri(picture)}" width="{picture.width}" '
        f'height="{picture.height}" alt="Map of the codebook on its two principal axes">'
    )


def unit_slots(found: Found) -> str:
    counts = np.array(counts_of(found))
    codebook = found.analysis.codebook
    if not codebook.slot_counts or not all(codebook.slot_counts):
        raise Missing("analysis.json holds no counts by slot.")
    slots = np.array(codebook.slot_counts, dtype=float)  # (m, K)
    share = slots / slots.sum(1, keepdims=True).clip(1)
    reach = (slots > 0).sum(0)  # (K,)
    own = slots.shape[1] < len(counts)  # each slot has a codebook of its own
    order = np.argsort(-(share if own else counts[None]), axis=1, kind="stable")
    ordered = np.sqrt(np.take_along_axis(share, np.broadcast_to(order, share.shape), axis=1))
    for axis in (0, 1):
        if ordered.shape[axis] > MAX_COLUMNS:
            groups = np.array_split(ordered, MAX_COLUMNS, axis=axis)
            ordered = np.stack([group.max(axis=axis) for group in groups], axis=axis)
    top = float(ordered.max()) or 1.0
    described = f"{len(slots)} unit slots by {slots.shape[1]:,} codevectors" + (
        ", of which each slot has its own"
        if own
        else f"; a codevector is used in {np.median(reach):.0f} slots in the median, "
        f"{int((reach == len(slots)).sum()):,} in all"
    )
    heat_map = chart(
        "Use of the codevectors by unit slot",
        described,
        "codevectors, most used first",
        "unit slot",
        partial(draw_heat_map, values=ordered, size=(slots.shape[1], len(slots))),
    )
    content = figure(
        heat_map,
        f"{text(described)}. Black is never; pale yellow is {top**2:.1%} of a slot's codes (the "
        "colour follows the root of the share, so that rare use can be seen). <b>One should "
        "see</b> every row lit over most of its length. <b>Bad:</b> rows with a few bright cells "
        "(the slot says little)"
        + (
            "."
            if own
            else ", or blocks: each slot has codevectors of its own, and sharing gains nothing."
        ),
    )
    if len(slots) > 1 and not own:
        bars = np.bincount(reach, minlength=len(slots) + 1)
        histogram = chart(
            "Slots in which a codevector is used",
            f"from 0 to {len(slots)} slots; {int(bars[0]):,} codevectors in none, "
            f"{int(bars[-1]):,} in all",
            "slots in which a codevector is used",
            "codevectors",
            partial(draw_bars, values=bars, start=-0.5, width=1, mark=None),
        )
        content = (
            f'<div class="columns">{content}'
            + figure(
                histogram,
                "<b>One should see</b> most codevectors on the right: they serve many slots. "
                "<b>Bad:</b> a bar at 0 (dead) or a heap at 1 (codevectors of a single slot).",
            )
            + "</div>"
        )
    columns = codebook.slot_usage_percent or [], codebook.slot_perplexity or []
    values = list(zip_longest(*columns))
    table_rows = [(i, *(shown(value, 3) for value in values[i])) for i in spread(len(values), 64)]
    return content + details(
        "Slots as a table",
        table(
            "Unit slots",
            ("slot", "usage, % of codevectors", "perplexity"),
            {"": table_rows},
        ),
    )
