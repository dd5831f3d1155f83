"""JPEG, WebP and AVIF on the test images: sizes of their files, and the metrics of the models.

A model codes all test images into one file. So does a codec here: it compresses a sheet of them, or
a file would hold little but its header. Where a side is not a multiple of 16, the largest block of
JPEG, an image's last row and column are repeated up to one, so that no block has two images.
"""

from __future__ import annotations

import io
import math
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import PIL
from PIL import Image
from tqdm import tqdm

from datasets import ImageSet
from experiments.children import Children, Failure, stopping
from experiments.options import Settings, open_split
from experiments.runs import evaluate, read_json
from experiments.tables import Row
from utils.errors import UserError
from utils.files import write_json
from utils.images import padded, save_picture, to_picture

CODECS: dict[str, dict[str, Any]] = {  # options of Pillow's save
    "jpeg": {"format": "JPEG", "optimize": True},
    "webp": {"format": "WEBP", "method": 6},
    "avif": {"format": "AVIF"},
}
QUALITIES = (5, 10, 20, 40, 60, 80, 95)
BLOCK = 16  # pixels
SHEET = 4096  # pixels of a side at most, unless an image is larger


def measure_codecs(codecs: Sequence[str], settings: Settings, children: Children) -> list[Row]:
    """Encode and measure the test images by each codec at each quality, while there is time.

    What is done is not done again. Raises UserError where Pillow lacks a codec.
    """
    check_codecs(codecs)
    points = [(codec, quality) for codec in codecs for quality in QUALITIES]
    images, rows = open_split(settings, "test"), []
    try:
        with stopping(children):
            for codec, quality in tqdm(points, unit="codec", disable=not points):
                if children.seconds_left:
                    rows.append(codec_row(codec, quality, images, settings, children))
    except Failure as error:
        raise UserError(f"--codecs: {error}") from error
    return rows


def check_codecs(codecs: Sequence[str]) -> None:
    """Raise UserError where Pillow lacks a codec."""
    lacking = [codec for codec in codecs if CODECS[codec]["format"] not in known_formats()]
    if lacking:
        raise UserError(f"--codecs {lacking[0]}: this Pillow cannot write it")


def known_formats() -> set[str]:
    """Formats that Pillow can write."""
    Image.init()
    return set(Image.SAVE)


def codec_row(
    codec: str, quality: int, images: ImageSet, settings: Settings, children: Children
) -> Row:
    """Return the figures of one codec at one quality."""
    name = f"{codec}-q{quality}"
    folder = settings.output / "codecs" / name
    identity: dict[str, Any] = {"images": settings.images, "pillow": PIL.__version__}
    identity |= {
        "sheet": SHEET,
        "num_test": settings.num_test,
        "metrics": list(settings.metrics),
        **CODECS[codec],
    }
    result = read_json(folder / "result.json")
    if result.get("identity") != identity:
        pictures = folder / "original", folder / "rec"
        try:
            bits = encode(images, {**CODECS[codec], "quality": quality}, *pictures)
            evaluation = partial(children.run, folder / "log.txt", "evaluation.py")
            metrics = evaluate(pictures, settings, evaluation)
        finally:
            for place in pictures:
                shutil.rmtree(place, ignore_errors=True)
        result = {"identity": identity, "metrics": metrics, "coded": bits}
        write_json(folder / "result.json", result)
    measured = {"coded": result["coded"], **result["metrics"]}
    figures = {figure: [value] for figure, value in measured.items() if value is not None}
    return Row(name, codec, {"quality": quality}, 0.0, (), figures, {}, ())


def encode(images: ImageSet, options: dict[str, Any], original: Path, rec: Path) -> float:
    """Write the images, and what is decoded from sheets of them; return files' bits per pixel."""
    for folder in (original, rec):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    side, bits = images.image_size, 0
    tile = -(-side // BLOCK) * BLOCK
    columns = min(max(1, SHEET // tile), math.ceil(len(images) ** 0.5))
    for start in range(0, len(images), columns**2):
        numbers = range(start, min(start + columns**2, len(images)))
        places = [(tile * (i % columns), tile * (i // columns)) for i in range(len(numbers))]
        file, mode = io.BytesIO(), to_picture(images[start]).mode
        sheet = Image.new(mode, (columns * tile, places[-1][1] + tile))
        for number, place in zip(numbers, places):
            save_picture(original / f"{number:08d}.png", images[number])
            sheet.paste(to_picture(padded(images[number][None].float(), BLOCK)[0].byte()), place)
        sheet.save(file, **options)
        bits += 8 * file.tell()
        with Image.open(file) as opened:
            decoded = opened.convert(mode)
        for number, (x, y) in zip(numbers, places):
            picture = decoded.crop((x, y, x + side, y + side))
            picture.save(rec / f"{number:08d}.png", compress_level=1)
    return bits / (len(images) * side**2)
