"""The results folder of test.py: pictures from images or codes, analysis, lines on the screen."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from modules import Autoencoder
from utils.charts import save_figure
from utils.codebook.codes.arrays import ARRAYS
from utils.codebook.codes.files import CodeFile, Spool, save_codes, spooled
from utils.codebook.codes.header import Header, by_position, pixel_sum
from utils.codebook.codes.prior_coder import PriorCoder
from utils.codebook.plots import draw_all
from utils.codebook.statistics import CodebookStatistics
from utils.distributed import gather, gather_items, num_ranks, rank, shared_folder
from utils.errors import UserError, memory_for
from utils.evaluation import schema
from utils.evaluation.results import PREVIOUS, own_files, print_rows
from utils.evaluation.schema import Analysis, SkippedImages
from utils.files import inside
from utils.images import padded, save_comparison, save_picture, to_bytes, to_signed
from utils.logger import log, progress
from utils.report import write_report

NUM_SHOWN = 32
CODES = "codes.looc"
PICTURES = ("reconstructions.png", "usage.png", "slots.png", "codebook.png")
FILES = ("original", "rec", *PICTURES, CODES, *ARRAYS, "analysis.json", "report.html")
NEW = ".new"  # results that are complete, but not in their place yet


class Batches(Protocol):
    """This process's share of the images of a data set."""

    size: int  # images of the whole set
    bad_images: dict[int, str]  # position → why that image could not be decoded

    def numbered(self) -> Iterable[tuple[Tensor, Tensor]]: ...  # positions and images
    def shares(self, epoch: int, start: int, /) -> Sequence[Sized]: ...  # positions, by batch


# Writes codes: their path, this process's spool, positions left out → figures of `Rate`.
Save: TypeAlias = Callable[[Path, Spool, Sequence[int]], dict[str, Any]]


class Format(NamedTuple):
    """Format of the picture files."""

    suffix: str
    jpeg_quality: int


@torch.no_grad()
def reconstruct(
    model: Autoencoder,
    loader: Batches,
    form: Format,
    results: Path,
    info: Header | None,
    known: Analysis,
    name_of: Callable[[int], str],
    names: Sequence[str] | None = None,
    *,
    whole: bool = False,
    prior: PriorCoder | None = None,
    save: Save = save_codes,
) -> None:
    """Write every image to original/ and its reconstruction to rec/, and report.

    With info all indices are saved too, coded by prior, if given. known: the analysis, as far as it
    is known before. name_of: the source of an image, by its position. names: those that
    are written; by default they are the positions. whole: a batch is one picture, of any size.
    Raises UserError if no image can be decoded.
    """
    statistics = CodebookStatistics(model.config.num_embedding, model.config.num_codebooks)
    first: list[tuple[int, Tensor]] = []
    num_pixels = 0
    total = sum(map(len, loader.shares(0, 0)))
    written = by_position if names is None else names.__getitem__
    with (
        replacing(results) as folder,
        pictures(folder / "original", form, written) as write_original,
        pictures(folder / "rec", form, written) as write_rec,
        spooled(folder / CODES, info, prior) if info else nullcontext() as spool,
    ):
        # With a delay no bar stands above the error of a first image that cannot be decoded.
        with progress(total, "image", disable=rank() > 0, delay=0.001) as bar:
            for positions, images in loader.numbered():
                numbers: list[int] = positions.tolist()
                height, width = images.shape[2:]
                large = f"image {name_of(numbers[0])} of {width}×{height}"
                with memory_for(large) if whole else nullcontext():
                    indices, output = code(model, images)
                statistics.add(indices)
                num_pixels += len(images) * height * width
                if spool is not None:
                    spool.add(numbers, indices, output)
                pairs = torch.stack([images.cpu(), output], dim=1)  # (B, 2, C, h, w)
                if not whole:
                    # Clones: sending a view to the other processes would send the whole batch.
                    shown = [pair.clone() for pair in pairs[: NUM_SHOWN - len(first)]]
                    first.extend(zip(numbers, shown))
                write_original(numbers, pairs[:, 0])
                write_rec(numbers, output)
                bar.update(len(images))
        statistics.sum_over_ranks()
        if not statistics.num_images:
            flag = "--images" if whole else "--data_folder"
            raise UserError(f"none of the {loader.size:,} images of {flag} can be decoded")
        found = dict(gather_items(first))
        bad_images = sorted(gather_items(loader.bad_images))
        rate = statistics.rate(sum(gather(num_pixels)) / statistics.num_images)
        if spool is not None:
            rate = replace(rate, **save(folder / CODES, spool, bad_images))
        skipped = SkippedImages(len(bad_images), list(map(name_of, bad_images)))
        sources = {
            written(position): name_of(position)
            for position in sorted({*range(loader.size)}.difference(bad_images))
            if name_of(position) != by_position(position)  # of sets in memory
        }
        analysis = replace(
            known,
            rate=rate,
            codebook=statistics.summary(),
            skipped_images=skipped,
            sources=sources,
        )
        if rank() == 0:
            if found:
                samples = torch.stack([found[position] for position in sorted(found)[:NUM_SHOWN]])
                save_comparison(folder / "reconstructions.png", samples[:, 0], samples[:, 1])
            write_analysis(folder, analysis, draw_all(statistics, model.quantizer.codebook))
    if rank() == 0:
        finish(results, analysis, {})


def code(model: Autoencoder, images: Tensor) -> tuple[Tensor, Tensor]:
    """Code images (B, C, h, w) of any size → indices, and reconstructions, uint8, on the CPU."""
    height, width = images.shape[2:]
    signed = padded(to_signed(images), model.config.downsampling)
    if model.config.num_slots:  # exactly as --from_codes decodes them
        indices = model.encode(signed)  # (B, H, W, m)
        decoded = model.decode(indices)
    else:
        decoded, quantized = model(signed)
        indices = quantized.indices
    return indices, to_bytes(decoded[..., :height, :width]).cpu()


@torch.no_grad()
def reconstruct_codes(
    model: Autoencoder, codes: CodeFile, form: Format, results: Path, known: Analysis
) -> None:
    """Write the reconstructions of a code file to rec/, and report. known: as above."""
    device, pixels = next(model.parameters()).device, 0
    statistics = CodebookStatistics(model.config.num_embedding, model.config.num_codebooks)
    info = codes.info
    with replacing(results) as folder, pictures(folder / "rec", form, info.name) as write_rec:
        with progress(info.num_coded, "image", disable=rank() > 0) as bar:
            for batch, indices in codes.batches(rank(), num_ranks()):
                height, width = batch.size
                with memory_for(
                    f"code file {codes.path}: {len(indices)} × {width}×{height} pixels"
                ):
                    decoded = model.decode(indices.to(device))  # (B, C, f·H, f·W)
                    output = to_bytes(decoded[..., :height, :width]).cpu()
                statistics.add(indices)
                pixels += pixel_sum(output)
                write_rec(batch.positions.tolist(), output)
                bar.update(len(output))
        statistics.sum_over_ranks()
        same = sum(gather(pixels)) == info.pixel_sum
        rate = statistics.rate(info.num_pixels / info.num_coded)
        analysis = replace(
            known,
            rate=replace(rate, **codes.rate()),
            codebook=statistics.summary(),
        )
        if rank() == 0:
            write_analysis(folder, analysis, draw_all(statistics, model.quantizer.codebook))
    if rank() == 0:
        known_pixels = info.pixel_sum > 0  # those of codes that a prior has drawn are not
        verdict = {"same as when saved": "bit for bit" if same else "no"} if known_pixels else {}
        finish(results, analysis, verdict)
        if known_pixels and not same:
            log.warning(
                "some pixels differ from those of the run that saved the codes: "
                "another device or version of PyTorch rounds differently"
            )


@contextmanager
def pictures(
    folder: Path, form: Format, name_of: Callable[[int], str]
) -> Iterator[Callable[[list[int], Tensor], object]]:
    """Yield a function that writes images (B, C, h, w), uint8, of these positions in the set.

    All processes write to this folder, which is created. name_of: a picture's name without suffix.
    """
    folder.mkdir(exist_ok=True)
    with ThreadPoolExecutor() as pool:

        def write(number: int, image: Tensor) -> None:
            path = folder / f"{name_of(number)}.{form.suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_picture(path, image, form.jpeg_quality)

        yield lambda numbers, images: list(pool.map(write, numbers, images))


def results_folder(output: str, model_name: str, name: str, images: str) -> Path:
    """Return <output>/results/<model_name without .pt>/<name>, for the results of these images.

    Raises UserError if the folder has those of other images.
    """
    model = inside(Path(output) / "results", model_name.removesuffix(".pt"), "--model_name")
    folder = inside(model, name, "--data_folder")
    for analysis in (folder / "analysis.json", folder / NEW / "analysis.json"):
        if analysis.exists():
            before = schema.read(analysis, Analysis).images
            if before != images:
                raise UserError(
                    f"{folder} has results of {before}, not of {images}: "
                    "rename that folder, or choose another --output_folder"
                )
    return folder


@contextmanager
def replacing(results: Path) -> Iterator[Path]:
    """Yield a new folder to all processes; its content replaces that of earlier runs at the end.

    Files that no script has written there stay.
    """
    if rank() == 0:
        swap(results)  # what a killed run had completed
    with shared_folder(results / NEW) as folder:
        yield folder
    if rank() == 0:
        swap(results)


def swap(results: Path) -> None:
    """Replace the results by those in NEW, if any; the next call finishes what a kill cuts short.

    The old ones move away, then the new ones in, then the old ones are removed: pictures are never
    beside an analysis or metrics of other pictures.
    """
    new, leaving, old = results / NEW, results / ".leaving", results / ".old"
    if new.exists() and not old.exists():
        own = [results / name for name in (*FILES, PREVIOUS)]
        before = [path for path in (*own, *own_files(results)) if path.exists()]
        leaving.mkdir(exist_ok=True)
        for path in reversed(before):  # metrics and analysis.json first
            path.rename(leaving / path.name)
        leaving.rename(old)  # all of them have left
        if before:
            names = ", ".join(path.name for path in before)
            log.info("replaced the results of an earlier run in %s: %s", results, names)
    if new.exists():
        for name in FILES:  # analysis.json last: it marks the results as complete
            if (new / name).exists():
                (new / name).rename(results / name)
        new.rmdir()
    if old.exists():
        shutil.rmtree(old)


def write_analysis(folder: Path, analysis: Analysis, charts: dict[str, Any]) -> None:
    """Write the analysis of the codebook and its charts."""
    for name, figure in charts.items():
        save_figure(folder / f"{name}.png", figure)
    schema.write(folder / "analysis.json", analysis)


def finish(results: Path, analysis: Analysis, more: dict[str, str]) -> None:
    """Write the report, and print what there is: figures, more rows and paths."""
    write_report(results)
    rate, codebook, skipped = analysis.rate, analysis.codebook, analysis.skipped_images.count
    rows = {
        "images": f"{codebook.images}",
        **({"skipped images": f"{skipped}"} if skipped else {}),
        **(codebook.rows() | rate.rows() if rate else {"rate": "not quantised"}),
        **more,
    }
    print_rows(rows, [results / name for name in FILES if (results / name).exists()])
