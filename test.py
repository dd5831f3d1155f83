"""Reconstruct the test images of a checkpoint and analyse its codebook.

Writes <output_folder>/results/<model_name>/: original/ and rec/ with one picture an image,
analysis.json, reconstructions.png, usage.png, slots.png and codebook.png. Model flags are checks:
one that contradicts the checkpoint is an error. Under torchrun the images are split over processes.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from datasets import BatchLoader, ImageSet, open_dataset
from datasets.config import DataConfig
from modules import VQVAE, ModelConfig
from modules.config import option
from modules.vqvae import DOWNSAMPLING
from utils.arguments import build, parse_flags
from utils.checkpoint import Checkpoint, read_checkpoint
from utils.codebook import CodebookStatistics
from utils.devices import keep_freed_memory
from utils.distributed import (
    first_goes_ahead,
    gather_items,
    num_ranks,
    rank,
    shared_folder,
    start_ranks,
    stop_ranks,
)
from utils.errors import UserError, run
from utils.files import inside, writable_folder, write_json
from utils.images import save_comparison, save_picture, to_bytes, to_signed
from utils.logger import start_logging
from utils.plots import plot_codebook, plot_slots, plot_usage
from utils.search import SearchConfig, apply_search

NUM_SHOWN = 32


@dataclass(frozen=True)
class TestConfig:
    """What is tested, and what is written."""

    output_folder: str = option("output", "folder of models, logs and results")
    model_name: str | None = option(None, "checkpoint under <output_folder>/models, <exp>/best.pt")
    batch_size: int = option(16, "images at a time", minimum=1, maximum=2**20)
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    image_format: str = option("png", "format of the pictures", choices=("png", "jpg"))
    jpeg_quality: int = option(75, "quality of jpg pictures", minimum=1, maximum=100)


def main() -> None:
    flags = parse_flags(__doc__, TestConfig, ModelConfig, DataConfig, SearchConfig)
    config = build(TestConfig, flags)
    start_logging(quiet=rank() > 0)
    keep_freed_memory()
    device = start_ranks(config.device)
    checkpoint = open_checkpoint(config, flags)
    data = data_of(checkpoint, flags)
    with first_goes_ahead():
        images = open_images(checkpoint, data)
    model = checkpoint.model().to(device)
    apply_search(build(SearchConfig, flags), model, device)
    results = results_folder(config)
    loader = BatchLoader(
        images,
        config.batch_size,
        device=device,
        num_workers=data.num_workers,
        rank=rank(),
        num_ranks=num_ranks(),
        skip_bad=data.skip_bad_images,
    )

    with shared_folder(results / "original") as original, shared_folder(results / "rec") as rec:
        found = reconstruct(model, loader, config, original, rec)
    if rank() == 0:
        analysis = {
            "model": asdict(model.config),
            "data": asdict(data),
            "image_format": config.image_format,
            "rate": found.statistics.rate(images.image_size**2),
            "codebook": found.statistics.summary(),
            "skipped_images": {
                "count": len(found.bad_images),
                "names": [images.name(position) for position in found.bad_images],
            },
        }
        write_findings(results, model, found, analysis)
        report(analysis, results)
    stop_ranks()


def open_checkpoint(config: TestConfig, flags: dict[str, Any]) -> Checkpoint:
    if config.model_name is None:
        raise UserError("--model_name is missing: a checkpoint under <output_folder>/models")
    models = Path(config.output_folder) / "models"
    return read_checkpoint(inside(models, config.model_name, "--model_name"), flags)


def data_of(checkpoint: Checkpoint, flags: dict[str, Any]) -> DataConfig:
    """The data flags given, else those of training."""
    if not checkpoint.content and "dataset" not in flags:
        raise UserError(f"--dataset is missing: {checkpoint.path} does not say which it saw")
    stored = asdict(checkpoint.group("data_config", DataConfig)) if checkpoint.content else {}
    if flags.get("dataset", stored.get("dataset")) != stored.get("dataset"):
        stored = {}
    return build(DataConfig, {**stored, **flags})


def open_images(checkpoint: Checkpoint, data: DataConfig) -> ImageSet:
    images = open_dataset(data.dataset, data.data_folder, "test", data.image_size)
    if images.channels != checkpoint.model_config.in_channels:
        raise UserError(
            f"--dataset {data.dataset} has {images.channels} channels, "
            f"{checkpoint.path} takes {checkpoint.model_config.in_channels}"
        )
    if images.image_size % DOWNSAMPLING:
        raise UserError(f"--image_size {images.image_size} is not a multiple of {DOWNSAMPLING}")
    return images


def results_folder(config: TestConfig) -> Path:
    results = Path(config.output_folder) / "results"
    folder = inside(results, str(config.model_name), "--model_name")
    return writable_folder(folder, "--output_folder")


class Findings(NamedTuple):
    """What the reconstruction of all images, by all processes, has shown."""

    statistics: CodebookStatistics
    shown: Tensor  # (n, 2, C, H, W), the first originals and reconstructions
    bad_images: list[int]  # positions of those that could not be decoded


@torch.no_grad()
def reconstruct(
    model: VQVAE, loader: BatchLoader, config: TestConfig, original: Path, rec: Path
) -> Findings:
    """Write every image and its reconstruction, named by its position in the set.

    Takes the memory of one batch. Raises UserError where no image can be decoded.
    """
    statistics = CodebookStatistics(model.config.num_embedding)
    first: list[tuple[int, Tensor]] = []

    def write(position: int, pair: Tensor) -> None:
        name = f"{position:08d}.{config.image_format}"
        for folder, image in zip((original, rec), pair):
            save_picture(folder / name, image, config.jpeg_quality)

    total = sum(len(share) for share in loader.shares(epoch=0, start=0))
    with ThreadPoolExecutor() as pool, tqdm(total=total, unit="image", disable=rank() > 0) as bar:
        for positions, images in loader.numbered():
            output, quantized = model(to_signed(images))
            statistics.add(quantized.indices)
            pairs = torch.stack([images.cpu(), to_bytes(output).cpu()], dim=1)  # (B, 2, C, H, W)
            numbers: list[int] = positions.tolist()
            first.extend(list(zip(numbers, pairs))[: NUM_SHOWN - len(first)])
            list(pool.map(write, numbers, pairs))
            bar.update(len(images))
    statistics.sum_over_ranks()
    if not statistics.num_images:
        raise UserError(f"none of the {loader.size:,} images of --data_folder can be decoded")
    shown = dict(gather_items(first))
    return Findings(
        statistics,
        torch.stack([shown[position] for position in sorted(shown)[:NUM_SHOWN]]),
        sorted(gather_items(loader.bad_images)),
    )


def write_findings(
    results: Path, model: VQVAE, found: Findings, analysis: Mapping[str, Any]
) -> None:
    """Replace everything in the results but the pictures of the images."""
    for stale in ("metrics.json", "metrics.csv"):  # of the pictures just replaced
        (results / stale).unlink(missing_ok=True)
    save_comparison(results / "reconstructions.png", found.shown[:, 0], found.shown[:, 1])
    plot_usage(results / "usage.png", found.statistics)
    plot_slots(results / "slots.png", found.statistics)
    plot_codebook(results / "codebook.png", model.quantizer.codebook, found.statistics.counts)
    write_json(results / "analysis.json", analysis)


def report(analysis: dict[str, Any], results: Path) -> None:
    """Print usage, rate and the paths of what was written."""
    rate, codebook = analysis["rate"], analysis["codebook"]
    skipped = analysis["skipped_images"]["count"]
    rows = {
        "images": f"{codebook['images']}",
        **({"images left out": f"{skipped}"} if skipped else {}),
        "codebook usage": f"{codebook['usage_percent']:.1f} %",
        "perplexity": f"{codebook['perplexity']:.1f} of {analysis['model']['num_embedding']}",
        "codes per image": f"{rate['codes_per_image']}",
        "bits per pixel, nominal": f"{rate['nominal_bits_per_pixel']:.3f}",
        "bits per pixel, entropy": f"{rate['entropy_bits_per_pixel']:.3f}",
    }
    for name, value in rows.items():
        sys.stdout.write(f"{name:24} {value}\n")
    for name in (
        "original",
        "rec",
        "reconstructions.png",
        "usage.png",
        "slots.png",
        "codebook.png",
        "analysis.json",
    ):
        sys.stdout.write(f"{results / name}\n")


if __name__ == "__main__":
    run(main)
