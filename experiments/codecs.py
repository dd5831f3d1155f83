"""JPEG, WebP and AVIF on the test images: sizes of their files, and the metrics of the models.

Of a small picture most of a file is header, the same in each, where a model has one file of all
test images. So there are two rates: by whole files, and without the header, for which the file of a
grey picture stands.
"""

from __future__ import annotations

import io
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
from utils.images import save_picture, to_picture

CODECS: dict[str, dict[str, Any]] = {  # options of Pillow's save
    "jpeg": {"format": "JPEG", "optimize": True},
    "webp": {"format": "WEBP", "method": 6},
    "avif": {"format": "AVIF"},
}
QUALITIES = (5, 10, 20, 40, 60, 80, 95)


def measure_codecs(codecs: Sequence[str], settings: Settings, children: Children) -> list[Row]:
    """Encode and measure the test images by each codec at each quality, while there is time.

    What is done is not done again. Raises UserError where Pillow lacks a codec.
    """
    check_codecs(codecs)
    points = [(codec, quality) for codec in codecs for quality in QUALITIES]
    images = open_split(settings, "test")
    rows: list[Row] = []
    try:
        with stopping(children):
            for codec, quality in tqdm(points, unit="codec", disable=not points):
                if children.seconds_left:
                    rows += codec_rows(codec, quality, images, settings, children)
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


def codec_rows(
    codec: str, quality: int, images: ImageSet, settings: Settings, children: Children
) -> list[Row]:
    """Return the figures of one codec at one quality, by whole files and without the header."""
    name, options = f"{codec}-q{quality}", {**CODECS[codec], "quality": quality}
    folder = settings.output / "codecs" / name
    identity: dict[str, Any] = {"images": settings.images, "pillow": PIL.__version__}
    identity |= {"num_test": settings.num_test, "metrics": list(settings.metrics), **CODECS[codec]}
    result = read_json(folder / "result.json")
    if result.get("identity") != identity or "header" not in result:
        pictures = folder / "original", folder / "rec"
        try:
            bits = encode(images, options, *pictures)
            evaluation = partial(children.run, folder / "log.txt", "evaluation.py")
            metrics = evaluate(pictures, settings, evaluation)
        finally:
            for place in pictures:
                shutil.rmtree(place, ignore_errors=True)
        header = header_bits(images, options)
        result = {"identity": identity, "metrics": metrics, "coded": bits, "header": header}
        write_json(folder / "result.json", result)
    rates = {codec: result["coded"], f"{codec}-bare": result["coded"] - result["header"]}
    rows = []
    for family, rate in rates.items():
        measured = {"coded": rate, **result["metrics"]}
        figures = {figure: [value] for figure, value in measured.items() if value is not None}
        name = f"{family}-q{quality}"
        rows.append(Row(name, family, {"quality": quality}, 0.0, (), figures, {}, ()))
    return rows


def encode(images: ImageSet, options: dict[str, Any], original: Path, rec: Path) -> float:
    """Write each image, and what is decoded from its file; return the files' bits per pixel."""
    for place in (original, rec):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
    bits = 0
    for index in range(len(images)):
        picture, file = to_picture(images[index]), io.BytesIO()
        picture.save(file, **options)
        bits += 8 * file.tell()
        save_picture(original / f"{index:08d}.png", images[index])
        with Image.open(file) as decoded:
            decoded.convert(picture.mode).save(rec / f"{index:08d}.png", compress_level=1)
    return bits / (len(images) * images.image_size**2)


def header_bits(images: ImageSet, options: dict[str, Any]) -> float:
    """Bits per pixel of the file of a grey picture of this size: what every file has."""
    file, side = io.BytesIO(), images.image_size
    Image.new(to_picture(images[0]).mode, (side, side), "grey").save(file, **options)
    return 8 * file.tell() / side**2
