"""The results folder of test.py: pictures from images or codes, analysis, lines on the screen."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
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
from utils.evaluation.results import print_rows, rate_of, remove_results
from utils.evaluation.schema import Analysis, Rate, SkippedImages
from utils.files import inside, writable_folder
from utils.images import save_comparison, save_picture, to_bytes, to_signed
from utils.logger import log
from utils.report import write_report

NUM_SHOWN = 32
CODES = "codes.looc"
PICTURES = ("reconstructions.png", "usage.png", "slots.png", "codebook.png")


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
    data: dict[str, Any],
    name_of: Callable[[int], str],
) -> None:
    """Write every image to original/ and its reconstruction to rec/, by its position, and report.

    With info all indices go to codes.looc too. data: the data flags. name_of: an image's name, by
    its position. Raises UserError if no image can be decoded.
    """
    statistics = CodebookStatistics(model.config.num_embedding, model.config.num_codebooks)
    first: list[tuple[int, Tensor]] = []
    total = sum(map(len, loader.shares(epoch=0, start=0)))
    with (
        pictures(results / "original", form) as write_original,
        pictures(results / "rec", form) as write_rec,
        spooled(results / CODES, info) if info else nullcontext() as spool,
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
            rate = replace(rate, **save_codes(results / CODES, spool, bad_images))
    if rank() == 0:
        skipped = SkippedImages(len(bad_images), list(map(name_of, bad_images)))
        analysis = Analysis(
            model=asdict(model.config),
            data=data,
            image_format=form.suffix,
            rate=rate,
            codebook=statistics.summary(),
            skipped_images=skipped,
        )
        write_results(results, analysis, samples, draw_all(statistics, model.quantizer.codebook))


@torch.no_grad()
def reconstruct_codes(model: Autoencoder, codes: CodeFile, form: Format, results: Path) -> None:
    """Write the reconstructions of a code file to rec/, and report."""
    device, pixels = next(model.parameters()).device, 0
    with (
        pictures(results / "rec", form) as write_rec,
        tqdm(total=codes.info.num_coded, unit="image", disable=rank() > 0) as bar,
    ):
        for positions, indices in codes.batches(rank(), num_ranks()):
            output = to_bytes(model.decode(indices.to(device))).cpu()  # (B, C, h, w)
            pixels += pixel_sum(output)
            write_rec(positions.tolist(), output)
            bar.update(len(output))
    same = sum(gather(pixels)) == codes.info.pixel_sum
    if rank() == 0:
        update_results(results, codes, same)


@contextmanager
def pictures(path: Path, form: Format) -> Iterator[Callable[[list[int], Tensor], object]]:
    """Yield a function that writes images (B, C, h, w), uint8, named by their positions in the set.

    All processes write to one new folder, which replaces path when the block ends.
    """
    with shared_folder(path) as folder, ThreadPoolExecutor() as pool:

        def write(number: int, image: Tensor) -> None:
            save_picture(folder / f"{number:08d}.{form.suffix}", image, form.jpeg_quality)

        yield lambda numbers, images: list(pool.map(write, numbers, images))


def results_folder(output: str, model_name: str) -> Path:
    """Create <output>/results/<model_name>. Raises UserError if that is not possible."""
    folder = inside(Path(output) / "results", model_name, "--model_name")
    return writable_folder(folder, "--output_folder")


def write_results(results: Path, analysis: Analysis, shown: Tensor, charts: dict[str, Any]) -> None:
    """Replace everything in the folder but original/ and rec/, and print what there is."""
    remove_results(results)
    save_comparison(results / "reconstructions.png", shown[:, 0], shown[:, 1])
    for name, figure in charts.items():
        save_figure(results / f"{name}.png", figure)
    schema.write(results / "analysis.json", analysis)
    write_report(results)
    rate, codebook, skipped = analysis.rate, analysis.codebook, analysis.skipped_images.count
    rows = {
        "images": f"{codebook.images}",
        **({"skipped images": f"{skipped}"} if skipped else {}),
        **(codebook.rows() | rate.rows() if rate else {"rate": "not quantised"}),
    }
    drawn = [name for name in PICTURES if (results / name).exists()]
    codes = [CODES] if rate.coded_bytes is not None else []
    files = ["original", "rec", *drawn, *codes, "analysis.json", "report.html"]
    print_rows(rows, [results / name for name in files])


def update_results(results: Path, codes: CodeFile, same: bool) -> None:
    """Remove what does not belong to the pictures made from these codes, and renew the report.

    same: the pictures equal, bit for bit, those of the run that saved the codes.
    """
    remove_results(results)
    if not saved_by_last_test(results, codes.path):
        names = ("original", "analysis.json", *PICTURES)
        left = [results / name for name in names if (results / name).exists()]
        if left:
            removed = ", ".join(path.name for path in left)
            log.warning("removed %s: their test did not save these codes", removed)
        for path in left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if (results / "report.html").exists():
        write_report(results)
    if not same:
        log.warning(
            "some pixels differ from those of the run that saved the codes: "
            "another device or version of PyTorch rounds differently"
        )
    rows = {
        "images": f"{codes.info.num_coded}",
        **Rate(**file_rate(codes.path, codes.info)).rows(),
        "same as when saved": "bit for bit" if same else "no",
    }
    print_rows(rows, [results / "rec"])


def saved_by_last_test(results: Path, codes: Path) -> bool:
    """Return whether the last test with these results saved these codes."""
    own, rate = results / CODES, rate_of(results / "rec") or Rate()
    if not own.is_file() or rate.coded_bits_per_pixel is None:
        return False
    return own.samefile(codes) or own.read_bytes() == codes.read_bytes()
