"""report.html: one page about a run, in its results folder; it opens without network.

It shows the files that main.py, test.py and evaluation.py have written. For a missing or damaged
file it says so, and which command writes it. To write the page again:

python -m utils.report <results folder>

A section is a function of `Found` that returns HTML or raises Missing, and one line in `page`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from utils.errors import UserError
from utils.evaluation.extremes import Shown
from utils.files import whole_file
from utils.report.codebook_use import codebook_map, unit_slots, usage_histogram
from utils.report.files import Found, find, layout
from utils.report.markup import document, origin
from utils.report.pictures import reconstructions, worst_images
from utils.report.scalar_curves import training_curves
from utils.report.sets import set_figures, set_lead, set_pictures
from utils.report.tables import commands, configuration, key_figures, lead, quantised

LARGEST = 4_500_000  # characters of the page
LARGEST_SIDE, SMALLEST_SIDE = 256, 48  # images are shrunk until the page is below LARGEST
OF_SETS = ("figures", "worst", "configuration", "reproduce")  # sections of sets without a model
OF_CODEBOOKS = ("usage", "codebook", "slots")  # sections of quantised models only


def write_report(results: Path, kept: Mapping[str, Shown] | None = None) -> Path:
    """Write report.html into the results folder and return its path.

    kept: pairs by name that need not be read again. Raises UserError where the page cannot be
    written.
    """
    if not results.is_dir():
        raise UserError(f"{results} is not a results folder")
    found = find(results, kept)
    side = LARGEST_SIDE
    while len(content := page(found, side)) > LARGEST and side > SMALLEST_SIDE:
        side = max(SMALLEST_SIDE, int(0.95 * side * math.sqrt(LARGEST / len(content))))
    path = results / "report.html"
    with whole_file(path) as temporary:
        temporary.write_text(content, encoding="utf-8")
    return path


def page(found: Found, side: int) -> str:
    """Return the page's HTML, with no image larger than side."""
    sections: dict[str, tuple[str, Callable[[Found], str]]] = {
        "figures": ("Key figures", key_figures),
        "reconstructions": ("Reconstructions", lambda found: reconstructions(found, side)),
        "worst": ("Worst images", lambda found: worst_images(found, side)),
        "training": ("Training", training_curves),
        "usage": ("Codebook usage", usage_histogram),
        "codebook": ("Codebook map", codebook_map),
        "slots": ("Unit slots", unit_slots),
        "configuration": ("Configuration", configuration),
        "reproduce": ("Commands", commands),
    }
    if found.metrics.images:
        sections["worst"] = ("The two sets", lambda found: set_pictures(found, side))
    if found.sets_only:
        sections["figures"] = ("Key figures", set_figures)
        sections = {key: sections[key] for key in OF_SETS}
    elif not quantised(found):
        sections = {key: sections[key] for key in sections if key not in OF_CODEBOOKS}
    _, name = layout(found.results) or (None, found.results.resolve().name)
    bodies = {key: (title, partial(build, found)) for key, (title, build) in sections.items()}
    introduction = (set_lead if found.sets_only else lead)(found)
    return document(name, introduction, bodies, origin(found.results, found.metrics.versions))
