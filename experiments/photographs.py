"""Measure models on four photographs, whole, beside JPEG, WebP and AVIF files of the same size.

scikit-image's astronaut, chelsea, coffee and rocket at 256×256, on which no model is trained:
python experiments/photographs.py --models a/best.pt b/best.pt. Each model codes the four into one
file; each codec has the quality at which its four files together come nearest to that size. Writes
photographs.md (PSNR, ΔE, shifts of a* and b*) and photographs.png to --output.
"""

from __future__ import annotations

import io
import sys
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets.image_sets import FileImages
from experiments.children import Children, Failure, stopping
from experiments.codecs import CODECS, check_codecs
from modules.options import option
from utils.checkpoints.checkpoint import find_checkpoint, load_model
from utils.errors import UserError, run
from utils.evaluation.metrics import METRICS, Pixels
from utils.evaluation.protocols import from_picture
from utils.evaluation.schema import Analysis, read
from utils.files import whole_file, writable_folder
from utils.flags.arguments import build, parse_flags
from utils.flags.command import words
from utils.images import to_picture
from utils.logger import start_logging
from utils.tables import Table, machine, machine_line, write_page

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
SIDE = 256
FIGURES = ("psnr", "delta_e", "a_shift", "b_shift")
QUALITIES = range(1, 101)
LABELS = {"jpeg": "JPEG", "webp": "WebP", "avif": "AVIF"}
GAP, LINE, TEXT = 8, 34, 22  # pixels of the sheet


@dataclass(frozen=True)
class PhotographsConfig:
    """Models and codecs that are measured."""

    models: tuple[str, ...] = option((), "checkpoints, under <output_folder>/models, or paths")
    output_folder: str = option("output", "folder of models")
    codecs: tuple[str, ...] = option(
        tuple(CODECS), "image formats beside them", choices=tuple(CODECS)
    )
    output: Path = option(Path("output/photographs"), "folder of page and sheet")

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("--models is missing: trained models")


@dataclass(frozen=True)
class Contender:
    """The four photographs by one model or codec; their files together, if there are any."""

    name: str
    pictures: Sequence[Pixels]  # (3, SIDE, SIDE) each
    bits: float | None = None  # bits per pixel

    @property
    def rate(self) -> str:
        return "–" if self.bits is None else f"{self.bits:.2f}"

    def figures(self, originals: Sequence[Pixels]) -> dict[str, list[float]]:
        """Return a value per photograph of each figure."""
        x, y = np.stack(originals), np.stack(self.pictures)
        compare = {name: METRICS[name].compare for name in FIGURES}
        return {name: own(x, y).tolist() for name, own in compare.items() if own is not None}


def main() -> None:
    flags = parse_flags(__doc__, PhotographsConfig)
    config = build(PhotographsConfig, flags)
    start_logging()
    check_codecs(config.codecs)
    paths = [find_checkpoint("--models", name, config.output_folder) for name in config.models]
    output = writable_folder(config.output, "--output")
    children = Children(threads=1)
    try:
        with TemporaryDirectory() as temporary, stopping(children):
            folder = Path(temporary)
            originals = write_originals(folder / "originals")
            contenders: list[Contender] = []
            for number, path in enumerate(paths):
                model = reconstructed(path, folder / f"{number}", folder / "originals", children)
                contenders.append(model)
                if model.bits is not None:
                    contenders += [
                        nearest_files(codec, originals, model.bits) for codec in config.codecs
                    ]
    except Failure as error:
        raise UserError(f"--models: {error}") from error
    parts: list[str | Table] = [
        f"`python experiments/photographs.py {' '.join(words(flags))}`",
        *tables(contenders, originals),
        machine_line(machine()),
    ]
    write_page(output / "photographs.md", "Four photographs", *parts)
    save_sheet(output / "photographs.png", contenders, originals)
    for part in parts:
        sys.stdout.write(f"{part.markdown() if isinstance(part, Table) else part}\n\n")
    sys.stdout.write(f"{output / 'photographs.md'}\n{output / 'photographs.png'}\n")


def write_originals(folder: Path) -> list[Pixels]:
    """Write the photographs, cut square and resized as --image_size does; return their pixels."""
    from skimage import data

    folder.mkdir()
    names = [f"{name}.png" for name in PHOTOGRAPHS]
    for name in PHOTOGRAPHS:
        Image.fromarray(getattr(data, name)()).save(folder / f"{name}.png")
    images = FileImages(folder, names, SIDE)
    pictures = [images[number].numpy() for number in range(len(names))]
    for name, picture in zip(names, pictures):
        to_picture(picture).save(folder / name)
    return pictures


def reconstructed(path: Path, folder: Path, originals: Path, children: Children) -> Contender:
    """Reconstruct the photographs by a model, and code them, as test.py does."""
    folder.mkdir()
    flags = {
        "model_name": str(path.resolve()),
        "output_folder": str(folder),
        "images": str(originals),
        "save_codes": load_model(path).config.quantizer != "none",
    }
    children.run(folder / "log.txt", "test.py", flags)
    analysis = next(folder.rglob("analysis.json"))
    pictures = []
    for name in PHOTOGRAPHS:
        with Image.open(analysis.parent / "rec" / f"{name}.png") as picture:
            pictures.append(from_picture(picture.convert("RGB")))
    name = path.parent.name if path.name == "best.pt" else f"{path.parent.name}/{path.name}"
    return Contender(name, pictures, read(analysis, Analysis).rate.coded_bits_per_pixel)


def nearest_files(codec: str, originals: Sequence[Pixels], bits: float) -> Contender:
    """The photographs by a codec, at the quality whose files come nearest to this rate."""
    sources = [to_picture(original) for original in originals]

    @cache
    def encoded(quality: int) -> list[bytes]:
        files = [io.BytesIO() for _ in sources]
        for source, file in zip(sources, files):
            source.save(file, **CODECS[codec], quality=quality)
        return [file.getvalue() for file in files]

    def rate(quality: int) -> float:
        return 8 * sum(map(len, encoded(quality))) / (len(sources) * SIDE**2)

    above = bisect_left(QUALITIES, bits, key=rate)  # files grow with the quality
    nearest = QUALITIES[max(0, above - 1) : above + 1]
    quality = min(nearest, key=lambda quality: abs(rate(quality) - bits))
    pictures = []
    for content in encoded(quality):
        with Image.open(io.BytesIO(content)) as picture:
            pictures.append(from_picture(picture.convert("RGB")))
    label = f"{LABELS[codec]}, quality {quality}"
    return Contender(label, pictures, rate(quality))


def tables(contenders: Sequence[Contender], originals: Sequence[Pixels]) -> list[Table]:
    """Means over the photographs with the largest shifts, then the figures of each photograph."""
    means = Table(
        "The four together",
        ["", "bits per pixel", "PSNR, dB", "ΔE", "largest shift of a*", "of b*"],
    )
    each = Table("PSNR in dB, ΔE, shifts of a* and b*", ["", *PHOTOGRAPHS])
    for contender in contenders:
        psnr, delta_e, a, b = contender.figures(originals).values()
        largest = [f"{max(own, key=abs):+.2f}" for own in (a, b)]
        means.rows.append(
            (contender.name, contender.rate, f"{mean(psnr):.2f}", f"{mean(delta_e):.2f}", *largest)
        )
        cells = (f"{p:.2f}, {e:.2f}, {c:+.2f}, {d:+.2f}" for p, e, c, d in zip(psnr, delta_e, a, b))
        each.rows.append((contender.name, *cells))
    return [means, each]


def save_sheet(path: Path, contenders: Sequence[Contender], originals: Sequence[Pixels]) -> None:
    """Write a PNG: a row of the photographs for each contender, under its name and figures."""
    rows = [("original", originals)]
    for contender in contenders:
        figures = contender.figures(originals)
        text = f"{contender.name}: {contender.rate} bits per pixel, "
        text += f"{mean(figures['psnr']):.1f} dB, delta E {mean(figures['delta_e']):.1f}"
        rows.append((text, contender.pictures))
    size = len(originals) * (SIDE + GAP) + GAP, len(rows) * (LINE + SIDE + GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for number, (text, pictures) in enumerate(rows):
        top = number * (LINE + SIDE + GAP)
        draw.text((GAP, top + LINE // 2), text, "black", ImageFont.load_default(TEXT), anchor="lm")
        for column, picture in enumerate(pictures):
            sheet.paste(to_picture(picture), (GAP + column * (SIDE + GAP), top + LINE))
    with whole_file(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)


if __name__ == "__main__":
    run(main)
