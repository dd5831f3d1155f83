"""Measure reconstructions against originals: L1, SSIM, PSNR, LPIPS and FID over two folders.

Images are paired by name, without suffix, and compared as a viewer shows them; subfolders count,
hidden files do not. Writes metrics.json (means, variances, settings) and metrics.csv (a line a
pair), by default beside the folder of the reconstructions.
"""

from __future__ import annotations

import csv
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from modules.config import option
from utils import metrics
from utils.arguments import build, parse_flags
from utils.devices import keep_freed_memory, resolve_device
from utils.distributed import launched
from utils.errors import UserError, run
from utils.files import whole_file, writable_folder, write_json
from utils.images import SUFFIXES, image_names, more_than_8_bits, open_image, viewed, viewed_size
from utils.logger import log, start_logging
from utils.metrics import METRICS, FeatureStatistics, Pixels, Summary, Values
from utils.networks import LPIPS_BACKBONES, Network, inception_network, lpips_network

GREY_MODES = ("1", "L", "LA", "La")
MAX_NAMED = 5  # names in an error
PACKAGES = ("torch", "torchvision", "numpy", "pillow", "scikit-image", "lpips", "torch-fidelity")

# --num_workers is the user's choice, and more than the cores may suit a slow disk.
warnings.filterwarnings("ignore", "This DataLoader will create")


@dataclass(frozen=True)
class EvaluationConfig:
    """What is compared, by which metrics."""

    gt_path: str = option(None, "folder of the originals")
    g_path: str = option(None, "folder of the reconstructions", aliases=("-g_path",))
    metrics: tuple[str, ...] = option(tuple(METRICS), "what to measure", choices=tuple(METRICS))
    num_test: int | None = option(None, "measure the first N pairs by name", minimum=1)
    batch_size: int = option(32, "images at a time", minimum=1, maximum=2**20)
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    num_workers: int | None = option(
        None, "processes that read and compare (default: one a core; 0: none)", minimum=0
    )
    skip_bad_images: bool = option(
        False, "leave out pairs of images that cannot be decoded; they are counted and listed"
    )
    lpips_net: str = option("vgg", "backbone of LPIPS", choices=tuple(LPIPS_BACKBONES))
    lpips_weights: str | None = option(
        None, "torchvision state dict of that backbone (default: torch hub's, downloaded once)"
    )
    inception_weights: str | None = option(
        None, "torch-fidelity's Inception weights (default: torch hub's, downloaded once)"
    )
    output: str | None = option(
        None, "folder of metrics.json and metrics.csv (default: the parent of --g_path)"
    )

    def __post_init__(self) -> None:
        for name in ("gt_path", "g_path"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing: a folder of images")

    @property
    def output_folder(self) -> Path:
        if self.output is not None:
            return Path(self.output)
        folder = Path(self.g_path)
        return folder.parent if folder.name not in ("", "..") else folder.resolve().parent


@dataclass(frozen=True)
class Pair:
    """Two image files of one name and one size, and the mode that both are read in."""

    name: str
    original: Path
    reconstruction: Path
    size: tuple[int, int]  # width, height
    mode: Literal["L", "RGB"]


@dataclass(frozen=True)
class Batch:
    """Images of one size, and what was measured where they were read."""

    names: list[str]  # B
    originals: Pixels  # (B, C, H, W)
    reconstructions: Pixels  # (B, C, H, W)
    values: dict[str, Values]  # (B,) each
    skipped: dict[str, str]  # name → why the pair could not be decoded and is not among them


@dataclass(frozen=True)
class Scores:
    """The values of each pair, in the order of names, and the distance of the two sets."""

    names: list[str]
    values: dict[str, list[float]]
    fid: float | None
    skipped: dict[str, str]  # name → why the pair was not measured


def main() -> None:
    config = build(EvaluationConfig, parse_flags(__doc__, EvaluationConfig))
    start_logging()
    if launched():
        raise UserError("it runs as one process; start it without torchrun")
    keep_freed_memory()
    device = resolve_device(config.device)
    pairs, skipped = open_pairs(config)
    check_number(config, len(pairs), skipped)
    check_sides(config, pairs)
    networks = load_networks(config, pairs, device)
    output = writable_folder(config.output_folder, "--output")

    scores = measure(config, pairs, skipped, networks, device)
    summaries = summarise(config, scores)
    write_csv(output / "metrics.csv", scores)
    write_json(output / "metrics.json", record(config, scores, networks, summaries))
    show(scores, summaries, output)


def open_pairs(config: EvaluationConfig) -> tuple[list[Pair], dict[str, str]]:
    """The pairs in the order of their names, --num_test of them, and why others are left out.

    Reads no more than the images' headers.
    """
    folders = {"--gt_path": Path(config.gt_path), "--g_path": Path(config.g_path)}
    files = {flag: images_in(flag, folder) for flag, folder in folders.items()}
    names = sorted({name for found in files.values() for name in found})
    if config.num_test is not None and config.num_test > len(names):
        raise UserError(f"--num_test {config.num_test}, but there are {len(names)} images")
    names = names[: config.num_test]
    lacking = {flag: [name for name in names if name not in files[flag]] for flag in folders}
    if any(lacking.values()):
        problems = [
            f"{flag} lacks {len(missing)} of {len(names)} ({first_few(missing)})"
            for flag, missing in lacking.items()
            if missing
        ]
        raise UserError(f"images are paired by name, and {'; '.join(problems)}")
    originals, reconstructions = files.values()
    headers, skipped = {}, {}
    for name in names:
        try:
            headers[name] = read_header(originals[name]), read_header(reconstructions[name])
        except UserError as error:
            if not config.skip_bad_images:
                raise
            skipped[name] = str(error)
    different = [
        f"{name} ({width}×{height} and {w}×{h})"
        for name, (((width, height), _), ((w, h), _)) in headers.items()
        if (width, height) != (w, h)
    ]
    if different:
        raise UserError(
            f"{len(different)} of {len(names)} pairs differ in size: {first_few(different)}"
        )
    pairs = [
        Pair(name, originals[name], reconstructions[name], size, mode if mode == other else "RGB")
        for name, ((size, mode), (_, other)) in headers.items()
    ]
    return pairs, skipped


def images_in(flag: str, folder: Path) -> dict[str, Path]:
    """The images of a folder and its subfolders by their relative path without suffix."""
    try:
        files = image_names(folder)
    except OSError as error:
        raise UserError(f"{flag} {error.filename} cannot be read: {error.strerror}") from error
    found: dict[str, Path] = {}
    for file in files:
        name, path = file[: file.rindex(".")], folder / file
        if name in found:
            raise UserError(f"{flag} holds two images of one name: {found[name]} and {path}")
        found[name] = path
    if not found:
        raise UserError(f"{flag} {folder} holds no images ({' '.join(SUFFIXES)})")
    return found


def first_few(names: Sequence[str]) -> str:
    return ", ".join(names[:MAX_NAMED]) + (", …" if len(names) > MAX_NAMED else "")


def read_header(path: Path) -> tuple[tuple[int, int], Literal["L", "RGB"]]:
    """Width and height, and the mode to read it in. Raises UserError where it cannot be read."""
    with open_image(path, str(path)) as image:
        if more_than_8_bits(image):
            raise UserError(f"image {path} has more than 8 bits a channel")
        return viewed_size(image), "L" if image.mode in GREY_MODES else "RGB"


def read_image(path: Path, pair: Pair) -> Pixels:
    """The pixels of one image of the pair as (C, H, W). Raises UserError where it is damaged."""
    with open_image(path, str(path)) as image:
        picture = viewed(image, pair.mode)
        if picture.size != pair.size:
            raise ValueError("its size is not that of its header")
        pixels = np.asarray(picture)
    return pixels[None] if pair.mode == "L" else pixels.transpose(2, 0, 1)


def check_number(config: EvaluationConfig, num_pairs: int, skipped: dict[str, str]) -> None:
    """Raise UserError where too few pairs remain."""
    if num_pairs == 0:
        reason = next(iter(skipped.values()))
        raise UserError(f"none of the {len(skipped)} pairs can be measured; {reason}")
    if "fid" in config.metrics and num_pairs < 2:
        raise UserError("--metrics fid needs 2 images or more, and there is 1")


def check_sides(config: EvaluationConfig, pairs: list[Pair]) -> None:
    """Raise UserError where images are too small for a metric."""
    for name in config.metrics:
        chosen, smallest = f"--metrics {name}", METRICS[name].smallest_side
        if name == "lpips":
            chosen += f" with --lpips_net {config.lpips_net}"
            smallest = LPIPS_BACKBONES[config.lpips_net].smallest_side
        small = [pair.name for pair in pairs if min(pair.size) < smallest]
        if small:
            raise UserError(
                f"{chosen} needs images of {smallest}×{smallest} or more; "
                f"{len(small)} of {len(pairs)} are smaller: {first_few(small)}"
            )


def load_networks(
    config: EvaluationConfig, pairs: list[Pair], device: torch.device
) -> dict[str, Network]:
    """The networks of the chosen metrics, on the device."""
    networks = {}
    if "lpips" in config.metrics:
        networks["lpips"] = lpips_network(config.lpips_net, config.lpips_weights)
    if "fid" in config.metrics:
        networks["fid"] = inception_network(config.inception_weights)
        if len(pairs) < metrics.FID_ENOUGH:
            log.warning(
                "FID of %d images is biased; compare values of %d or more",
                *(len(pairs), metrics.FID_ENOUGH),
            )
    for network in networks.values():
        network.module.to(device)
    return networks


def measure(
    config: EvaluationConfig,
    pairs: list[Pair],
    skipped: dict[str, str],
    networks: dict[str, Network],
    device: torch.device,
) -> Scores:
    """Every chosen metric, in the memory of a few batches; skipped are pairs left out before."""
    torch.backends.cudnn.allow_tf32 = False  # the values of a GPU are those of the CPU
    names: list[str] = []
    values: dict[str, list[float]] = {name: [] for name in config.metrics if name != "fid"}
    sets = FeatureStatistics(), FeatureStatistics()
    with tqdm(total=len(pairs), unit="image", disable=None, leave=False) as bar:
        for batch in batches(config, pairs):
            bar.update(len(batch.names) + len(batch.skipped))
            skipped = {**skipped, **batch.skipped}
            if not batch.names:
                continue
            names.extend(batch.names)
            columns = dict(batch.values)
            if networks:
                x = torch.from_numpy(batch.originals).to(device)
                y = torch.from_numpy(batch.reconstructions).to(device)
            if "lpips" in networks:
                columns["lpips"] = metrics.lpips(x, y, networks["lpips"].module)
                check_finite(torch.from_numpy(columns["lpips"]), networks["lpips"])
            if "fid" in networks:
                for statistics, images in zip(sets, (x, y)):
                    features = metrics.features(images, networks["fid"].module)
                    check_finite(features, networks["fid"])
                    statistics.update(features)
            for name, column in columns.items():
                values[name].extend(column.tolist())
    check_number(config, len(names), skipped)
    fid = metrics.frechet_distance(*sets) if "fid" in networks else None
    return Scores(names, values, fid, dict(sorted(skipped.items())))


def check_finite(values: Tensor, network: Network) -> None:
    if not values.isfinite().all():
        raise UserError(f"the weights {network.path} are damaged: they give values not finite")


def batches(config: EvaluationConfig, pairs: list[Pair]) -> Iterator[Batch]:
    """Consecutive pairs of one size and mode, --batch_size at a time, read by --num_workers.

    Raises UserError naming an image that is damaged, unless --skip_bad_images.
    """
    groups = [list(group) for _, group in groupby(pairs, lambda pair: (pair.size, pair.mode))]
    size = config.batch_size
    parts = [group[i : i + size] for group in groups for i in range(0, len(group), size)]
    compared = [name for name in config.metrics if METRICS[name].compare is not None]
    workers = cores() if config.num_workers is None else config.num_workers
    loader: DataLoader[Batch] = DataLoader(
        ReadAndCompare(parts, compared),
        batch_size=None,
        num_workers=min(workers, len(parts)),
        collate_fn=as_is,
    )
    for batch in loader:
        if batch.skipped and not config.skip_bad_images:
            raise UserError(next(iter(batch.skipped.values())))
        yield batch


class ReadAndCompare(Dataset[Batch]):
    """Reads a batch of pairs and computes the metrics that need no network; runs in workers."""

    def __init__(self, parts: list[list[Pair]], compared: list[str]) -> None:
        self.parts = parts
        self.compared = compared

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> Batch:
        read: dict[str, tuple[Pixels, Pixels]] = {}
        skipped: dict[str, str] = {}
        for pair in self.parts[index]:
            try:
                read[pair.name] = (
                    read_image(pair.original, pair),
                    read_image(pair.reconstruction, pair),
                )
            except UserError as error:  # raised here, it would arrive in the worker's traceback
                skipped[pair.name] = str(error)
        if not read:
            return Batch([], np.empty(0, np.uint8), np.empty(0, np.uint8), {}, skipped)
        x, y = (np.stack(images) for images in zip(*read.values()))
        comparisons = {name: METRICS[name].compare for name in self.compared}
        values = {name: f(x, y) for name, f in comparisons.items() if f is not None}
        return Batch(list(read), x, y, values, skipped)


def as_is(batch: Any) -> Any:
    """Leaves numpy arrays as they are: tensors would need shared memory, scarce in containers."""
    return batch


def cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def summarise(config: EvaluationConfig, scores: Scores) -> dict[str, Summary]:
    """Mean and variance of the chosen metrics, in the order of METRICS."""
    return {
        name: Summary(scores.fid, None, len(scores.names))
        if name == "fid"
        else metrics.summarise(scores.values[name])
        for name in METRICS
        if name in config.metrics
    }


def write_csv(path: Path, scores: Scores) -> None:
    """A header, then the name and the values of each pair."""
    columns = [name for name in METRICS if name in scores.values]
    with (
        whole_file(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["name", *columns])
        for index, pair in enumerate(scores.names):
            writer.writerow([pair, *(scores.values[name][index] for name in columns)])


def record(
    config: EvaluationConfig,
    scores: Scores,
    networks: dict[str, Network],
    summaries: dict[str, Summary],
) -> dict[str, Any]:
    """Results and everything needed to get them again."""
    return {
        "metrics": {name: asdict(summary) for name, summary in summaries.items()},
        "pairs": len(scores.names),
        "skipped": scores.skipped,
        "settings": {
            "gt_path": config.gt_path,
            "g_path": config.g_path,
            "num_test": config.num_test,
            "data_range": metrics.DATA_RANGE,
            "variance": "population, over images",
            "l1": "mean |x - y| / data_range",
            "ssim": {"window": metrics.SSIM_WINDOW, **metrics.SSIM_SETTINGS},
            "lpips_net": config.lpips_net,
        },
        "weights": {
            name: {"file": str(network.path), "sha256": network.sha256}
            for name, network in networks.items()
        },
        "versions": {package: version(package) for package in PACKAGES},
    }


def show(scores: Scores, summaries: dict[str, Summary], output: Path) -> None:
    """Print the table and the paths of what was written."""
    if scores.skipped:
        log.warning(
            "left out %d of %d pairs, which cannot be decoded: %s",
            *(len(scores.skipped), len(scores.skipped) + len(scores.names)),
            first_few(list(scores.skipped)),
        )
    sys.stdout.write(f"{'metric':10} {'mean':>12} {'variance':>12}\n")
    for name, summary in summaries.items():
        mean = "inf" if summary.mean is None else f"{summary.mean:.6g}"
        variance = "-" if summary.variance is None else f"{summary.variance:.6g}"
        metric = METRICS[name]
        sys.stdout.write(f"{metric.label:10} {mean:>12} {variance:>12}  {metric.direction}\n")
    for name, summary in summaries.items():
        if summary.identical:
            sys.stdout.write(
                f"{summary.identical} identical pairs, of infinite {METRICS[name].label}, "
                "are left out of its mean\n"
            )
    for file in ("metrics.json", "metrics.csv"):
        sys.stdout.write(f"{output / file}\n")


if __name__ == "__main__":
    run(main)
