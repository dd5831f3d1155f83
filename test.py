"""Reconstruct the test images of a checkpoint and analyse its codebook.

Writes <output_folder>/results/<model_name>/: original/ and rec/ with one picture an image,
analysis.json, reconstructions.png, usage.png, slots.png, codebook.png and report.html. Model flags
are checks: one that contradicts the checkpoint is an error. Under torchrun the images are split
over processes.
--save_codes writes the indices of all images, entropy-coded, to codes.looc; --from_codes makes the
pictures of rec/ from such a file and the checkpoint, without the data set.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from datasets import BatchLoader, ImageSet, open_dataset
from datasets.config import DataConfig
from modules import Autoencoder, ModelConfig
from modules.options import option
from utils.checkpoints.checkpoint import Checkpoint, read_checkpoint
from utils.codebook.codes import (
    CodeFile,
    Spool,
    codes_info,
    file_rate,
    need_coder,
    pixel_sum,
    save_codes,
    spooled,
)
from utils.codebook.plots import draw_all, save_figure
from utils.codebook.statistics import CodebookStatistics
from utils.devices import keep_freed_memory
from utils.distributed import (
    first_goes_ahead,
    gather,
    gather_items,
    num_ranks,
    rank,
    shared_folder,
    start_ranks,
    stop_ranks,
)
from utils.errors import UserError, memory_for, run
from utils.evaluation import schema
from utils.evaluation.results import print_rows, rate_of, remove_results
from utils.evaluation.schema import Analysis, Rate, SkippedImages
from utils.files import inside, writable_folder
from utils.flags.arguments import build, parse_flags
from utils.flags.search import SearchConfig, apply_search
from utils.images import save_comparison, save_picture, to_bytes, to_signed
from utils.logger import log, start_logging
from utils.report import write_report

NUM_SHOWN = 32
CODES = "codes.looc"
PICTURES = ("reconstructions.png", "usage.png", "slots.png", "codebook.png")


@dataclass(frozen=True)
class TestConfig:
    """What is tested, and what is written."""

    output_folder: str = option("output", "folder of models, logs and results")
    model_name: str | None = option(None, "checkpoint under <output_folder>/models, <exp>/best.pt")
    batch_size: int = option(16, "images at a time", minimum=1, maximum=2**20)
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    image_format: str = option("png", "format of the pictures", choices=("png", "jpg"))
    jpeg_quality: int = option(75, "quality of jpg pictures", minimum=1, maximum=100)
    save_codes: bool = option(False, "write the indices, entropy-coded, to codes.looc")
    from_codes: str | None = option(None, "reconstruct from this code file instead of images")

    def __post_init__(self) -> None:
        if self.image_format == "png" and self.jpeg_quality != TestConfig.jpeg_quality:
            raise ValueError(f"--jpeg_quality {self.jpeg_quality} needs --image_format jpg")
        if self.save_codes and self.from_codes is not None:
            raise ValueError("--save_codes contradicts --from_codes, which reads codes")


def main() -> None:
    flags = parse_flags(__doc__, TestConfig, ModelConfig, DataConfig, SearchConfig)
    config = build(TestConfig, flags)
    start_logging(quiet=rank() > 0)
    keep_freed_memory()
    device = start_ranks(config.device)
    torch.backends.cudnn.deterministic = True  # the same codes, the same pictures
    torch.backends.cudnn.allow_tf32 = False  # those of a GPU near those of the CPU
    checkpoint = open_checkpoint(config, flags)
    if config.from_codes is None:
        with memory_for(f"--batch_size {config.batch_size}"):
            test(checkpoint, config, flags, device)
    else:  # batches are of the size that the file tells
        test_from_codes(checkpoint, config, flags, device)
    stop_ranks()


def test(
    checkpoint: Checkpoint, config: TestConfig, flags: dict[str, Any], device: torch.device
) -> None:
    """Reconstruct the images of the data set, write everything and report."""
    data = data_of(checkpoint, flags)
    with first_goes_ahead():
        images = open_images(checkpoint, data)
    model = checkpoint.model().to(device)
    apply_search(build(SearchConfig, flags), model, device)
    info = None
    if config.save_codes:
        need_coder("--save_codes")
        info = codes_info(
            model,
            dataset=data.dataset,
            image_size=images.image_size,
            num_images=len(images),
            batch_size=config.batch_size,
        )
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

    with (
        shared_folder(results / "original") as original,
        shared_folder(results / "rec") as rec,
        spooled(results / CODES, info) if info else nullcontext() as spool,
    ):
        found = reconstruct(model, loader, config, original, rec, spool)
        rate = found.statistics.rate(images.image_size**2)
        if spool is not None:
            rate = replace(rate, **save_codes(results / CODES, spool, found.bad_images))
    if rank() == 0:
        analysis = Analysis(
            model=asdict(model.config),
            data=asdict(data),
            image_format=config.image_format,
            rate=rate,
            codebook=found.statistics.summary(),
            skipped_images=SkippedImages(
                len(found.bad_images), [images.name(position) for position in found.bad_images]
            ),
        )
        write_findings(results, model, found, analysis)
        show(analysis, [results / "analysis.json", write_report(results)])


def test_from_codes(
    checkpoint: Checkpoint, config: TestConfig, flags: dict[str, Any], device: torch.device
) -> None:
    """Make the pictures of rec/ from a code file, and report."""
    need_coder("--from_codes")
    codes = CodeFile(Path(str(config.from_codes)))
    codes.check_flags(flags)
    for item in (*fields(DataConfig), *fields(SearchConfig)):
        if item.name in flags and item.name not in ("dataset", "image_size"):
            raise UserError(f"--{item.name} has no effect with --from_codes")
    model = checkpoint.model().to(device)
    codes.check_model(model, checkpoint.path)
    results = results_folder(config)
    with shared_folder(results / "rec") as rec:
        same = decode(model, codes, config, rec)
    if rank() == 0:
        remove_results(results)
        if not of_these_codes(results, codes.path):
            remove_test(results)
        if (results / "report.html").exists():
            write_report(results)
        show_codes(codes, same, results)


def of_these_codes(results: Path, codes: Path) -> bool:
    """Whether the last test that is there is the one whose codes these are."""
    own, rate = results / CODES, rate_of(results / "rec") or Rate()
    if not own.is_file() or rate.coded_bits_per_pixel is None:
        return False
    return own.samefile(codes) or own.read_bytes() == codes.read_bytes()


def remove_test(results: Path) -> None:
    """Remove what an earlier test has left, which may be of other images."""
    left = [name for name in ("original", "analysis.json", *PICTURES) if (results / name).exists()]
    if left:
        log.warning("removed %s: their test did not save these codes", ", ".join(left))
    for name in left:
        path = results / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def open_checkpoint(config: TestConfig, flags: dict[str, Any]) -> Checkpoint:
    if config.model_name is None:
        raise UserError("--model_name is missing: a checkpoint under <output_folder>/models")
    models, name = Path(config.output_folder) / "models", config.model_name
    whole = Path(name).resolve()
    if not (models / name).is_file() and whole.is_file() and models.resolve() in whole.parents:
        meant = whole.relative_to(models.resolve())
        raise UserError(f"--model_name {name} is to be relative to {models}: give {meant}")
    path = inside(models, name, "--model_name")
    if (path / "best.pt").is_file():
        raise UserError(f"--model_name {name} is a folder: give {Path(name) / 'best.pt'}")
    return read_checkpoint(path, flags)


def data_of(checkpoint: Checkpoint, flags: dict[str, Any]) -> DataConfig:
    """The data flags given, else those of training, but for what concerns training images alone.

    A cache is taken where it is given: it would cost more than it brings for images read once.
    """
    untouched = {"flip": False, "crop": "centre"}
    for name, value in untouched.items():
        if flags.get(name, value) != value:
            raise UserError(f"--{name} has no effect on test images")
    if not checkpoint.content and "dataset" not in flags:
        raise UserError(f"--dataset is missing: {checkpoint.path} does not say which it saw")
    stored = asdict(checkpoint.group("data_config", DataConfig)) if checkpoint.content else {}
    if flags.get("dataset", stored.get("dataset")) != stored.get("dataset"):
        stored = {}
    return build(DataConfig, {**stored, "image_cache": None, **flags, **untouched})


def open_images(checkpoint: Checkpoint, data: DataConfig) -> ImageSet:
    images = open_dataset(data.dataset, data.data_folder, "test", data.image_size, data.image_cache)
    if images.channels != checkpoint.model_config.in_channels:
        raise UserError(
            f"--dataset {data.dataset} has {images.channels} channels, "
            f"{checkpoint.path} takes {checkpoint.model_config.in_channels}"
        )
    factor = checkpoint.model_config.downsampling
    if images.image_size % factor:
        raise UserError(f"--image_size {images.image_size} is not a multiple of {factor}")
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
    model: Autoencoder,
    loader: BatchLoader,
    config: TestConfig,
    original: Path,
    rec: Path,
    spool: Spool | None,
) -> Findings:
    """Write every image and its reconstruction, named by its position in the set.

    Takes the memory of one batch. Raises UserError where no image can be decoded.
    """
    statistics = CodebookStatistics(model.config.num_embedding, model.config.num_codebooks)
    first: list[tuple[int, Tensor]] = []
    total = sum(len(share) for share in loader.shares(epoch=0, start=0))
    with ThreadPoolExecutor() as pool, tqdm(total=total, unit="image", disable=rank() > 0) as bar:
        for positions, images in loader.numbered():
            indices, output = encode_and_decode(model, images)
            statistics.add(indices)
            if spool is not None:
                spool.add(indices, output)
            numbers: list[int] = positions.tolist()
            pairs = torch.stack([images.cpu(), output], dim=1)  # (B, 2, C, h, w)
            # Copies: to send a view to the other processes is to send the whole batch.
            shown = [pair.clone() for pair in pairs[: NUM_SHOWN - len(first)]]
            first.extend(zip(numbers, shown))
            for folder, pictures in ((original, pairs[:, 0]), (rec, output)):
                write_pictures(pool, folder, numbers, pictures, config)
            bar.update(len(images))
    statistics.sum_over_ranks()
    if not statistics.num_images:
        raise UserError(f"none of the {loader.size:,} images of --data_folder can be decoded")
    found = dict(gather_items(first))
    return Findings(
        statistics,
        torch.stack([found[position] for position in sorted(found)[:NUM_SHOWN]]),
        sorted(gather_items(loader.bad_images)),
    )


def encode_and_decode(model: Autoencoder, images: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes (B, C, h, w) → indices (B, H, W, m), and bytes on the CPU made of them alone.

    As --from_codes does it. Without a quantiser there are none: latents are decoded as they are.
    """
    if not model.config.num_slots:
        reconstruction, quantized = model(to_signed(images))
        return quantized.indices, to_bytes(reconstruction).cpu()
    indices = model.encode(to_signed(images))
    return indices, to_bytes(model.decode(indices)).cpu()


@torch.no_grad()
def decode(model: Autoencoder, codes: CodeFile, config: TestConfig, rec: Path) -> bool:
    """Write the reconstructions of a code file; whether they are, bit for bit, those once saved."""
    device, info = next(model.parameters()).device, codes.info
    pixels = 0
    with (
        ThreadPoolExecutor() as pool,
        tqdm(total=info.num_coded, unit="image", disable=rank() > 0) as bar,
    ):
        for positions, indices in codes.batches(rank(), num_ranks()):
            output = to_bytes(model.decode(indices.to(device))).cpu()  # (B, C, h, w)
            pixels += pixel_sum(output)
            write_pictures(pool, rec, positions.tolist(), output, config)
            bar.update(len(output))
    return sum(gather(pixels)) == info.pixel_sum


def write_pictures(
    pool: ThreadPoolExecutor, folder: Path, numbers: list[int], images: Tensor, config: TestConfig
) -> None:
    """Write images (B, C, h, w), uint8, under their positions in the set."""

    def write(number: int, image: Tensor) -> None:
        path = folder / f"{number:08d}.{config.image_format}"
        save_picture(path, image, config.jpeg_quality)

    list(pool.map(write, numbers, images))


def write_findings(results: Path, model: Autoencoder, found: Findings, analysis: Analysis) -> None:
    """Replace everything in the results but the pictures of the images."""
    remove_results(results)
    save_comparison(results / "reconstructions.png", found.shown[:, 0], found.shown[:, 1])
    for name, figure in draw_all(found.statistics, model.quantizer.codebook).items():
        save_figure(results / f"{name}.png", figure)
    schema.write(results / "analysis.json", analysis)


def show(analysis: Analysis, paths: Sequence[Path]) -> None:
    """Print usage, rate and the paths of what was written."""
    results = paths[0].parent
    rate, codebook, skipped = analysis.rate, analysis.codebook, analysis.skipped_images.count
    rows = {
        "images": f"{codebook.images}",
        **({"skipped images": f"{skipped}"} if skipped else {}),
        **(codebook.rows() | rate.rows() if rate else {"rate": "not quantised"}),
    }
    written = ["original", "rec", *(name for name in PICTURES if (results / name).exists())]
    if rate.coded_bytes is not None:
        written.append(CODES)
    print_rows(rows, [*(results / name for name in written), *paths])


def show_codes(codes: CodeFile, same: bool, results: Path) -> None:
    """Print what the code file held and where its pictures are."""
    rows = {
        "images": f"{codes.info.num_coded}",
        **Rate(**file_rate(codes.path, codes.info)).rows(),
        "as when saved": "bit for bit" if same else "no",
    }
    if not same:
        log.warning(
            "some pixels differ from those of the run that saved the codes: "
            "another device or version of PyTorch rounds otherwise"
        )
    print_rows(rows, [results / "rec"])


if __name__ == "__main__":
    run(main)
