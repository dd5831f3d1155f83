"""Reconstructions as picture files: from the images of a data set, or from a code file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from modules import Autoencoder
from utils.codebook.codes.files import CodeFile, save_codes, spooled
from utils.codebook.codes.header import CodesInfo, pixel_sum
from utils.codebook.statistics import CodebookStatistics
from utils.distributed import gather, gather_items, num_ranks, rank, shared_folder
from utils.errors import UserError
from utils.evaluation.schema import Rate
from utils.images import save_picture, to_bytes, to_signed

NUM_SHOWN = 32
CODES = "codes.looc"


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


class Findings(NamedTuple):
    """Results of the reconstruction of all images by all processes."""

    statistics: CodebookStatistics
    rate: Rate
    shown: Tensor  # (n, 2, C, h, w), the first originals and reconstructions
    bad_images: list[int]  # positions of those that could not be decoded


@torch.no_grad()
def reconstruct(
    model: Autoencoder, loader: Batches, form: Format, results: Path, info: CodesInfo | None
) -> Findings:
    """Write every image to original/ and its reconstruction to rec/, named by its position.

    With info all indices go to codes.looc too. Raises UserError if no image can be decoded.
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
    return Findings(statistics, rate, samples, bad_images)


@torch.no_grad()
def reconstruct_codes(model: Autoencoder, codes: CodeFile, form: Format, results: Path) -> bool:
    """Write the reconstructions of a code file to rec/.

    Returns whether they equal, bit for bit, those of the run that saved the codes.
    """
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
    return sum(gather(pixels)) == codes.info.pixel_sum


@contextmanager
def pictures(path: Path, form: Format) -> Iterator[Callable[[list[int], Tensor], object]]:
    """Yield a function that writes images (B, C, h, w), uint8, named by their positions in the set.

    All processes write to one new folder, which replaces path when the block ends.
    """
    with shared_folder(path) as folder, ThreadPoolExecutor() as pool:

        def write(number: int, image: Tensor) -> None:
            save_picture(folder / f"{number:08d}.{form.suffix}", image, form.jpeg_quality)

        yield lambda numbers, images: list(pool.map(write, numbers, images))
