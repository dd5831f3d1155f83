"""JPEG, WebP and AVIF on the test images: sizes of their files, and the metrics of the models."""

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
from experiments.tables import ENTROPY, Row
from utils.errors import UserError
from utils.files import write_json
from utils.images import save_picture, to_picture

CODECS: dict[str, dict[str, Any]] = {  # options of Pillow's save
    "jpeg": {"format": "JPEG", "optimize": True},
    "webp": {"format": "WEBP", "method": 6},
    "avif": {"format": "AVIF"},
}
QUALITIES = (5, 10, 20, 40, 60, 80, 95)


def measure_codecs(codecs: Sequence[str], settings: Settings) -> list[Row]:
    """Encode and measure the test images by each codec at each quality, unless that is done.

    Raises UserError where Pillow lacks a codec.
    """
    check_codecs(codecs)
    children, points = Children(settings.threads), [(c, q) for c in codecs for q in QUALITIES]
    images = open_split(settings, "test")
    try:
        with stopping(children):
            bar = tqdm(points, unit="codec", disable=not points)
            return [codec_row(codec, quality, images, settings, children) for codec, quality in bar]
    except Failure as error:
        raise UserError(f"--codecs: {error}") from error


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
    identity |= {"num_test": settings.num_test, "metrics": list(settings.metrics), **CODECS[codec]}
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
        result = {"identity": identity, "metrics": metrics, ENTROPY: bits}
        write_json(folder / "result.json", result)
    measured = {"entropy": result[ENTROPY], **result["metrics"]}
    figures = {figure: [value] for figure, value in measured.items() if value is not None}
    return Row(name, codec, {"quality": quality}, 0.0, (), figures, {}, ())


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
