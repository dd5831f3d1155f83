"""The results folder of test.py: pictures from images or codes, analysis, lines on the screen."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from modules import Autoencoder
from utils.charts import save_figure
from utils.codebook.codes.files import CodeFile, file_rate, save_codes, spooled
from utils.codebook.codes.header import CodesInfo, pixel_sum
from utils.codebook.plots import draw_all
from utils.codebook.statistics import CodebookStatistics
from utils.distributed import gather, gather_items, num_ranks, rank, shared_folder
from utils.errors import UserError
from utils.evaluation import schema
from utils.evaluation.results import PREVIOUS, own_files, print_rows
from utils.evaluation.schema import Analysis, SkippedImages
from utils.files import inside
from utils.images import save_comparison, save_picture, to_bytes, to_signed
from utils.logger import log
from utils.report import write_report

NUM_SHOWN = 32
CODES = "codes.looc"
PICTURES = ("reconstructions.png", "usage.png", "slots.png", "codebook.png")
FILES = ("original", "rec", *PICTURES, CODES, "analysis.json", "report.html")


class Batches(Protocol):
    """This process's share of the images of a data set."""

    size: int  # images of the whole set
    bad_images: dict[int, str]  # position → why that image could not be decoded

    def numbered(self) -> Iterable[tuple[Tensor, Tensor]]: ...  # positions and images
    def shares(self, epoch: int, start: int) -> Sequence[Sized]: ...  # positions, by batch


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
    info: CodesInfo | None,
    known: Analysis,
    name_of: Callable[[int], str],
) -> None:
    """Write every image to original/ and its reconstruction to rec/, by its position, and report.

    With info all indices go to codes.looc too. known: the analysis, as far as it is known before.
    name_of: an image's name, by its position. Raises UserError if no image can be decoded.
    """
    statistics = CodebookStatistics(model.config.num_embedding, model.config.num_codebooks)
    first: list[tuple[int, Tensor]] = []
    total = sum(map(len, loader.shares(epoch=0, start=0)))
    with (
        replacing(results) as folder,
        pictures(folder / "original", form) as write_original,
        pictures(folder / "rec", form) as write_rec,
        spooled(folder / CODES, info) if info else nullcontext() as spool,
    ):
        with tqdm(total=total, unit="image", disable=rank() > 0) as bar:
            for positions, images in loader.numbered():
                if model.config.num_slots:  # exactly as --from_codes decodes them
                    indices = model.encode(to_signed(images))  # (B, H, W, m)
                    decoded = model.decode(indices)
                else:
                    decoded, quantized = model(to_signed(images))
                    indices = quantized.indices
                output = to_bytes(decoded).cpu()
                statistics.add(indices)
                if spool is not None:
                    spool.add(indices, output)
                numbers: list[int] = positions.tolist()
                pairs = torch.stack([images.cpu(), output], dim=1)  # (B, 2, C, h, w)
                # Clones: sending a view to the other processes would send the whole batch.
                shown = [pair.clone() for pair in pairs[: NUM_SHOWN - len(first)]]
                first.extend(zip(numbers, shown))
                write_original(numbers, pairs[:, 0])
                write_rec(numbers, output)
                bar.update(len(images))
        statistics.sum_over_ranks()
        if not statistics.num_images:
            raise UserError(f"none of the {loader.size:,} images of --data_folder can be decoded")
        found = dict(gather_items(first))
        samples = torch.stack([found[position] for position in sorted(found)[:NUM_SHOWN]])
        bad_images = sorted(gather_items(loader.bad_images))
        rate = statistics.rate(samples[0, 0, 0].numel())
        if spool is not None:
            rate = replace(rate, **save_codes(folder / CODES, spool, bad_images))
        skipped = SkippedImages(len(bad_images), list(map(name_of, bad_images)))
        analysis = replace(known, rate=rate, codebook=statistics.summary(), skipped_images=skipped)
        if rank() == 0:
            save_comparison(folder / "reconstructions.png", samples[:, 0], samples[:, 1])
            write_analysis(folder, analysis, draw_all(statistics, model.quantizer.codebook))
    if rank() == 0:
        finish(results, analysis, {})


@torch.no_grad()
def reconstruct_codes(
    model: Autoencoder, codes: CodeFile, form: Format, results: Path, known: Analysis
) -> None:
    """Write the reconstructions of a code file to rec/, and report. known: as above."""
    device, pixels = next(model.parameters()).device, 0
    statistics = CodebookStatistics(model.config.num_embedding, model.config.num_codebooks)
    with replacing(results) as folder, pictures(folder / "rec", form) as write_rec:
        with tqdm(total=codes.info.num_coded, unit="image", disable=rank() > 0) as bar:
            for positions, indices in codes.batches(rank(), num_ranks()):
                output = to_bytes(model.decode(indices.to(device))).cpu()  # (B, C, h, w)
                statistics.add(indices)
                pixels += pixel_sum(output)
                write_rec(positions.tolist(), output)
                bar.update(len(output))
        statistics.sum_over_ranks()
        same = sum(gather(pixels)) == codes.info.pixel_sum
        rate = statistics.rate(codes.info.image_size**2)
        analysis = replace(
            known,
            rate=replace(rate, **file_rate(codes.path, codes.info)),
            codebook=statistics.summary(),
        )
        if rank() == 0:
            write_analysis(folder, analysis, draw_all(statistics, model.quantizer.codebook))
    if rank() == 0:
        finish(results, analysis, {"same as when saved": "bit for bit" if same else "no"})
        if not same:
            log.warning(
                "some pixels differ from those of the run that saved the codes: "
                "another device or version of PyTorch rounds differently"
            )


@contextmanager
def pictures(folder: Path, form: Format) -> Iterator[Callable[[list[int], Tensor], object]]:
    """Yield a function that writes images (B, C, h, w), uint8, named by their positions in the set.

    All processes write to this folder, which is created.
    """
    folder.mkdir(exist_ok=True)
    with ThreadPoolExecutor() as pool:

        def write(number: int, image: Tensor) -> None:
            save_picture(folder / f"{number:08d}.{form.suffix}", image, form.jpeg_quality)

        yield lambda numbers, images: list(pool.map(write, numbers, images))


def results_folder(output: str, model_name: str, name: str, images: str) -> Path:
    """Return <output>/results/<model_name without .pt>/<name>, for the results of these images.

    Raises UserError if the folder has those of other images.
    """
    model = inside(Path(output) / "results", model_name.removesuffix(".pt"), "--model_name")
    folder = inside(model, name, "--data_folder")
    with suppress(FileNotFoundError):
        before = schema.read(folder / "analysis.json", Analysis).images
        if before != images:
            raise UserError(f"{folder} has results of {before}, not of {images}: rename it first")
    return folder


@contextmanager
def replacing(results: Path) -> Iterator[Path]:
    """Yield a new folder to all processes; its content replaces that of earlier runs at the end.

    Files that no script has written there stay.
    """
    new = results / ".new"
    with shared_folder(new) as folder:
        yield folder
    if rank() == 0:
        own = [results / name for name in (*FILES, PREVIOUS)]
        before = [path for path in (*own, *own_files(results)) if path.exists()]
        for path in before:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in FILES:  # analysis.json last: it marks the results as complete
            if (new / name).exists():
                (new / name).rename(results / name)
        new.rmdir()
        if before:
            names = ", ".join(path.name for path in before)
            log.info("replaced the results of an earlier run in %s: %s", results, names)


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
