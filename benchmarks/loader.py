"""Measure the loading of images alone: python -m benchmarks.loader.

Writes docs/results/loader.md and .json. The files are made at run time from scikit-image's
photographs, in the sizes, formats and qualities of the real data sets. --need N adds how many
workers feed a network that takes N images/s.
"""

from __future__ import annotations

import io
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import SEED, printed
from datasets import BatchLoader, FileImages, ImageSet
from datasets.cache import keep_decoded
from datasets.image_sets import square_of
from datasets.loader import DecodedBatches
from datasets.lsun import LmdbImages
from utils.errors import run
from utils.files import write_json
from utils.flags.arguments import Parser
from utils.tables import Table, machine, machine_line, write_page

SIZE = 256
BATCH = 16
WORKERS = (0, 1, 2)
DIFFERENT = 8  # pictures per source; its other files repeat them
BICUBIC = Image.Resampling.BICUBIC


@dataclass(frozen=True)
class Source:
    """Files like those of a data set."""

    label: str
    width: int
    height: int
    format: str
    quality: int | None  # of JPEG
    grain: float  # standard deviation of sensor noise, in grey levels; PNG cannot compress it
    count: int
    lmdb: bool = False


SOURCES = (
    Source("FFHQ: PNG 1024×1024", 1024, 1024, "PNG", None, 1.5, 64),
    Source("ImageNet: JPEG 500×375", 500, 375, "JPEG", 95, 1.5, 256),
    Source("LSUN: JPEG 341×256 in lmdb", 341, 256, "JPEG", 75, 1.5, 256, lmdb=True),
    Source("folder: JPEG 1536×1024", 1536, 1024, "JPEG", 90, 1.5, 64),
)


# ---------------------------------------------------------------------------------- the files


def photograph(number: int, source: Source) -> Image.Image:
    """A photograph of scikit-image, cut and resized to the source's size, with grain."""
    from skimage import data

    picture = Image.fromarray(
        getattr(data, ("astronaut", "chelsea", "coffee", "rocket")[number % 4])()
    )
    scale = max(source.width / picture.width, source.height / picture.height)
    random = np.random.default_rng([SEED, number])
    width, height = source.width / scale, source.height / scale
    left, top = random.uniform(0, [picture.width - width + 1e-9, picture.height - height + 1e-9])
    box = (left, top, min(left + width, picture.width), min(top + height, picture.height))
    smooth = np.asarray(picture.resize((source.width, source.height), BICUBIC, box=box))
    noisy = smooth + random.normal(0, source.grain, smooth.shape)
    return Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))


@lru_cache
def contents(source: Source) -> list[bytes]:
    """The different files of a source."""
    files = []
    for number in range(DIFFERENT):
        buffer = io.BytesIO()
        quality = {} if source.quality is None else {"quality": source.quality}
        photograph(number, source).save(buffer, source.format, **quality)
        files.append(buffer.getvalue())
    return files


def write_source(source: Source, folder: Path, count: int) -> ImageSet:
    """Write so many files of a source and open them as main.py does."""
    files = contents(source)
    folder.mkdir()
    if source.lmdb:
        import lmdb

        with lmdb.open(str(folder), map_size=2**30) as database, database.begin(write=True) as t:
            for number in range(count):
                t.put(f"{number:08d}".encode(), files[number % DIFFERENT])
        return LmdbImages(folder, SIZE)
    names = [f"{number:08d}.{source.format.lower()}" for number in range(count)]
    for number, name in enumerate(names):
        (folder / name).write_bytes(files[number % DIFFERENT])
    return FileImages(folder, names, SIZE)


# ---------------------------------------------------------------------------------- the tables


class Rate(NamedTuple):
    """Images/s of a loader."""

    by_clock: float  # of all workers together; other work on the machine lowers it
    by_processor: float  # of one worker's processor time, or the main process's without workers


Rates: TypeAlias = dict[tuple[str, int], Rate]  # by "files" or "cache", and workers


def measured(source: Source, quick: bool) -> Rates:
    """Median rates; a first round, not counted, starts the workers and fills the cache."""
    count = 2 * BATCH if quick else source.count
    with tempfile.TemporaryDirectory() as name:
        images = write_source(source, Path(name) / "files", count)
        contenders = {"files": images, "cache": keep_decoded(images, Path(name) / "cache", "set")}
        loaders = {
            (kind, workers): BatchLoader(
                contender, BATCH, device=torch.device("cpu"), shuffle=True, num_workers=workers
            )
            for kind, contender in contenders.items()
            for workers in WORKERS
        }
        epochs = {"files": 1, "cache": 1 if quick else 4}
        rounds = [
            {key: read(loader, epochs[key[0]]) for key, loader in loaders.items()}
            for _ in range(2 if quick else 4)
        ]
    return {
        key: Rate(*(median(values) for values in zip(*(found[key] for found in rounds[1:]))))
        for key in loaders
    }


def read(loader: BatchLoader, epochs: int) -> Rate:
    """Rate of reading some epochs and doing nothing with the batches."""
    workers = loader.source.num_workers > 0 if isinstance(loader.source, DecodedBatches) else False
    start, before = time.perf_counter(), processor_seconds(workers)
    for epoch in range(epochs):
        for _ in loader.epoch(epoch):
            pass
    seconds, busy = time.perf_counter() - start, processor_seconds(workers) - before
    return Rate(epochs * loader.size / seconds, epochs * loader.size / busy)


def processor_seconds(workers: bool) -> float:
    """Processor time so far of all workers, or of this process."""
    if not workers:
        return time.process_time()
    pids = [child.pid for child in multiprocessing.active_children()]
    return sum(int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) for pid in pids) / 1e9


def rate_table(found: dict[Source, Rates]) -> Table:
    """Images/s of BatchLoader."""
    table = Table(
        f"Images/s through the loader, {SIZE}×{SIZE}, batches of {BATCH}",
        [
            *("source", "kB per file", "", *map(workers_in_words, WORKERS)),
            *("a core in the main process", "a worker with a core of its own"),
        ],
    )
    for source, rates in found.items():
        size = sum(map(len, contents(source))) / DIFFERENT / 1000
        for kind, words in (("files", "decoded"), ("cache", "from `--image_cache`")):
            values = [rates[kind, workers].by_clock for workers in WORKERS]
            values += [rates[kind, workers].by_processor for workers in (0, max(WORKERS))]
            cells = [f"{value:,.0f}" for value in values]
            table.rows.append([source.label, f"{size:,.0f}", words, *cells])
    return table


def workers_in_words(workers: int) -> str:
    return f"{workers} worker{'s' if workers > 1 else ''}" if workers else "in the main process"


def part_table(quick: bool) -> Table:
    """Time of each stage for one image, and what shortcuts would save and change."""
    table = Table(
        "One image, ms of processor time; in brackets PSNR in dB against the loader's result",
        ["source", "decode", "crop, resize", "to a tensor", "all, `reducing_gap=2`", "all, draft"],
    )
    for source in SOURCES:
        table.rows.append([source.label, *parts_of(contents(source)[0], 1 if quick else 15)])
    return table


def parts_of(content: bytes, rounds: int) -> list[str]:
    """Cells of one source."""
    whole = opened(content)
    exact = shrunk(whole)
    gap, draft = shrunk(whole, 2.0), shrunk(opened(content, draft=True))
    decode, resize, tensor, with_gap, with_draft = (
        f"{median([processor_ms(run) for _ in range(rounds)]):.2f}"
        for run in (
            lambda: opened(content),
            lambda: shrunk(whole),
            lambda: torch.from_numpy(np.asarray(exact).transpose(2, 0, 1).copy()),
            lambda: shrunk(opened(content), 2.0),
            lambda: shrunk(opened(content, draft=True)),
        )
    )
    return [
        *(decode, resize, tensor),
        f"{with_gap} ({likeness(exact, gap)})",
        f"{with_draft} ({likeness(exact, draft)})",
    ]


def processor_ms(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return 1e3 * (time.process_time() - start)


def opened(content: bytes, draft: bool = False) -> Image.Image:
    """A decoded image; with draft, scaled by the JPEG decoder to no less than twice the size."""
    with Image.open(io.BytesIO(content)) as image:
        if draft:
            image.draft("RGB", (2 * SIZE, 2 * SIZE))
        image.load()
        return image


def shrunk(image: Image.Image, gap: float | None = None) -> Image.Image:
    return square_of(image).resize((SIZE, SIZE), BICUBIC, reducing_gap=gap)


def likeness(image: Image.Image, other: Image.Image) -> str:
    """PSNR in dB, or "same"."""
    error = np.square(np.asarray(image, float) - np.asarray(other, float)).mean()
    return f"{10 * math.log10(255**2 / error):.1f}" if error else "same"


def need_table(found: dict[Source, Rates], need: float) -> Table:
    """Workers for a network that takes `need` images/s."""
    table = Table(
        f"Workers, with a core each, that feed a training of {need:g} images/s",
        ["source", "decoding", "from `--image_cache`"],
    )
    for source, rates in found.items():
        by_worker = [rates[kind, max(WORKERS)].by_processor for kind in ("files", "cache")]
        table.rows.append([source.label, *(str(workers_for(need, rate)) for rate in by_worker)])
    return table


def workers_for(need: float, rate: float) -> int:
    """Number of workers of `rate` images/s that give `need` images/s."""
    return max(1, math.ceil(need / rate))


def tables(quick: bool, need: float | None) -> Iterator[Table]:
    found = {source: measured(source, quick) for source in SOURCES}
    yield rate_table(found)
    if need is not None:
        yield need_table(found, need)
    yield part_table(quick)


# --------------------------------------------------------------------------------------- the page


ABOUT = """\
Made by `{command}`. The files are made of scikit-image's photographs, cut,
resized and given a sensor's grain, in the sizes, formats and qualities of the real sets. After a
first round, which is not counted, they and the cache are in memory: disk reads are not measured.
Medians of three rounds. The last two columns of the first table count processor time; only the
columns before them depend on other work of the machine (load at the start: {load:.1f})."""
LEFT_OUT = """\
`reducing_gap` and JPEG's own scaling (`Image.draft`, to no less than twice the size) are not used:
they change pixels where they save time, and there the cache saves far more."""


def main() -> None:
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="few images, to see that it works")
    parser.add_argument("--need", type=float, help="images/s that the network's training takes")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="folder of pages")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    about = {**machine(), "seed": SEED, "load": os.getloadavg()[0]}
    found = printed(tables(arguments.quick, arguments.need))
    words = ["python -m benchmarks.loader", *(["--quick"] if arguments.quick else [])]
    if arguments.need is not None:
        words.append(f"--need {arguments.need:g}")
    command, page = " ".join(words), arguments.output / "loader.md"
    text = ABOUT.format(command=command, load=about["load"])
    write_page(page, "The loader", text, f"{machine_line(about)}.", *found, LEFT_OUT)
    content = {"command": command, "machine": about, "tables": [asdict(table) for table in found]}
    write_json(page.with_suffix(".json"), content)


if __name__ == "__main__":
    run(main)
