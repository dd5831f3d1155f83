"""The sections about two sets of images, as evaluation.py --unpaired measures them."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from utils.errors import UserError
from utils.evaluation.pairs import images_in, read_header
from utils.image_files import open_image, viewed
from utils.images import fitted
from utils.report.files import Found
from utils.report.markup import Missing, figure, shown, spread, table, text
from utils.report.pictures import ENLARGED, uri
from utils.report.tables import protocol_row, quality_rows

NUM_SHOWN = 32  # images of each set, evenly spaced by name
SETS = {"gt_path": "Originals", "g_path": "Compared with them"}


def set_lead(found: Found) -> str:
    """Number of images and quality in a sentence."""
    scores = ", ".join(f"{label} {value}" for label, value, _ in quality_rows(found))
    images = f"{found.metrics.compared} images, compared as sets without pairs"
    return f'<p class="lead">{text(f"{images}: {scores}.")}</p>'


def set_figures(found: Found) -> str:
    folders = [
        (label, shown(found.metrics.images[key]), f"images of {found.metrics.settings.get(key)}")
        for key, label in SETS.items()
    ]
    content = table(
        "How alike the sets are",
        ("figure", "value", "note"),
        {"Quality": [*quality_rows(found), *protocol_row(found)], "Images": folders},
        "figures",
    )
    return (
        "<p>Compare FIDs of equal numbers of images only. <b>Bad:</b> a precision or density far "
        "above recall or coverage (the images look right, but they lack variety), or the reverse."
        f"</p>{content}"
    )


def set_pictures(found: Found, side: int) -> str:
    """Some images of each set."""
    rows = ""
    for key, label in SETS.items():
        try:
            folder = Path(str(found.metrics.settings.get(key)))
            paths = list(images_in(f"--{key}", folder).images.values())
            limit = found.metrics.settings.get("num_test")
            chosen = spread(paths[:limit], NUM_SHOWN)
            tiles = "".join(tile(path, side) for path in chosen)
        except UserError as error:
            raise Missing(text(error)) from error
        caption = f"{len(chosen)} of {found.metrics.images[key]:,} images, evenly spaced by name."
        rows += f"<h3>{label}</h3>" + figure(f"<p>{tiles}</p>", caption)
    return rows


def tile(path: Path, side: int) -> str:
    """One image as HTML."""
    with open_image(path, str(path)) as image:
        picture: Image.Image = viewed(image, read_header(path)[1])
    small = fitted(picture, min(ENLARGED, side), min(ENLARGED, side))
    name = text(path.name)
    size = f'width="{small.width}" height="{small.height}"'
    return f'<img src="{uri(small)}" {size} alt="{name}" title="{name}"> '
