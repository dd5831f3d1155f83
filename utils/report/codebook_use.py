"""Sections on the use of the codebook: by rank, on a map, and by unit slot."""

from __future__ import annotations

from itertools import zip_longest

import numpy as np

from utils.codebook.plots import codebook_chart, slot_charts, usage_chart
from utils.image_files import open_image, viewed
from utils.report.files import Found, stale, test_command
from utils.report.markup import Missing, command, details, figure, shown, spread, table, text
from utils.report.pictures import uri

SECOND_OF_SLOTS = {  # name of the chart → how to read it
    "Slots in which a codevector is used": "<b>One should see</b> most codevectors on the right: "
    "they serve many slots. <b>Bad:</b> a bar at 0 (dead) or a heap at 1 (codevectors of a single "
    "slot).",
    "Usage of each slot's codebook": "<b>One should see</b> bars near 100 %. <b>Bad:</b> a low "
    "bar: the codebook of that slot is larger than it needs.",
}


def counts_of(found: Found) -> np.ndarray:
    """Return the count of each codevector."""
    found.need("analysis.json", "test.py writes it:" + command(test_command(found)))
    counts = np.array(found.analysis.codebook.counts or (), dtype=float)
    if counts.sum() <= 0:
        raise Missing("analysis.json holds no counts of codevectors.")
    return counts


def usage_histogram(found: Found) -> str:
    chart = usage_chart(counts_of(found))
    counts = sorted(counts_of(found).tolist(), reverse=True)
    rows = [
        (f"{rank:,}", shown(int(counts[rank - 1])), f"{sum(counts[:rank]) / sum(counts):.1%}")
        for rank in sorted({1, 2, 5, *spread(range(1, len(counts) + 1), 9)})
        if rank <= len(counts)
    ]
    return figure(
        chart.svg(),
        f"{text(chart.description)}. <b>One should see</b> a line near equal use that falls gently "
        "to the right end. <b>Bad:</b> a few spikes on the left with a long tail near zero (the "
        "nominal rate is wasted), or an end at zero before the right edge: those codevectors are "
        "dead.",
        beside=True,
    ) + details(
        "Usage as a table",
        table("Codevectors by rank", ("rank", "times used", "this and above"), {"": rows}),
    )


def codebook_map(found: Found) -> str:
    caption = (
        "<b>One should see</b> dots spread over the whole cloud. <b>Bad:</b> crosses far from all "
        "dots (dead codevectors), many dots in one place (they say the same), or one large dot "
        "that carries nearly everything."
    )
    if found.checkpoint is None:
        return figure(codebook_picture(found), caption, beside=True)
    counts = counts_of(found)  # (K,)
    codebook = found.checkpoint.model().quantizer.codebook  # (K, d) or (m·K, d)
    if len(codebook) != len(counts):
        raise Missing(
            f"The checkpoint has {len(codebook)} codevectors, analysis.json {len(counts)}; "
            "test.py writes it anew:" + command(test_command(found))
        )
    chart = codebook_chart(codebook, counts)
    described = f"{text(chart.description)}. {caption}"
    return stale(found) + figure(chart.svg(), described, beside=True)


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
    counts, codebook = counts_of(found), found.analysis.codebook
    if not codebook.slot_counts or not all(codebook.slot_counts):
        raise Missing("analysis.json holds no counts by slot.")
    heat_map, *second = slot_charts(np.array(codebook.slot_counts, dtype=float), counts)
    content = figure(
        heat_map.svg(),
        f"{text(heat_map.description)}. <b>One should see</b> every row lit over most of its "
        "length. <b>Bad:</b> rows with a few bright cells (the slot says little), or, where all "
        "slots share a codebook, blocks: each slot has codevectors of its own, and sharing gains "
        "nothing.",
    )
    for chart in second:
        read = f"{text(chart.description)}. {SECOND_OF_SLOTS[chart.name]}"
        content = f'<div class="columns">{content}{figure(chart.svg(), read)}</div>'
    columns = codebook.slot_usage_percent or [], codebook.slot_perplexity or []
    slots = list(enumerate(zip_longest(*columns)))
    rows = [(slot, *(shown(value, 3) for value in values)) for slot, values in spread(slots, 64)]
    header = ("slot", "usage, % of codevectors", "perplexity")
    return content + details("Slots as a table", table("Unit slots", header, {"": rows}))
