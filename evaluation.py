"""Measure reconstructions against originals, two folders of images; see docs/evaluation.md.

Images are paired by name, without suffix, and compared as a viewer shows them; subfolders count,
hidden files do not. Writes metrics.json (means, variances, settings), metrics.csv (a line a pair),
worst_<metric>.png (the worst and best pairs) and report.html, by default beside the folder of the
reconstructions. What an earlier run left there is replaced by a run that succeeds; one that fails
leaves it in previous_metrics/.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from modules.options import option
from utils.devices import keep_freed_memory, resolve_device
from utils.distributed import launched
from utils.errors import UserError, memory_for, run
from utils.evaluation import metrics, schema
from utils.evaluation.extremes import write_extremes
from utils.evaluation.feature_cache import FeatureCache, cache_folder, content_key
from utils.evaluation.metrics import CHOICES, DEFAULT_METRICS, METRICS, NEED_VECTORS
from utils.evaluation.networks import (
    LPIPS_BACKBONES,
    Network,
    fetch_weights,
    inception_network,
    lpips_network,
)
from utils.evaluation.pairs import Pair, batches, open_pairs
from utils.evaluation.protocols import PROTOCOLS
from utils.evaluation.results import rate_of, remove_previous, set_aside, show, write_csv
from utils.evaluation.schema import Metrics, Score
from utils.evaluation.scores import Scores, check_number, check_sides, measure, summarise
from utils.files import writable_folder
from utils.flags.arguments import build, parse_flags
from utils.logger import log, start_logging
from utils.report import write_report

PACKAGES = ("torch", "torchvision", "numpy", "pillow", "scikit-image", "lpips", "torch-fidelity")


@dataclass(frozen=True)
class EvaluationConfig:
    """What is compared, by which metrics."""

    gt_path: str = option(None, "folder of the originals")
    g_path: str = option(None, "folder of the reconstructions", aliases=("-g_path",))
    metrics: tuple[str, ...] = option(DEFAULT_METRICS, "what to measure", choices=tuple(CHOICES))
    protocol: str = option(
        "clean",
        "how images are prepared and compared: as they are, or as for the published tables",
        choices=tuple(PROTOCOLS),
    )
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
    weights_dir: str | None = option(
        None, "folder of the weights of LPIPS's and FID's networks (default: torch hub's)"
    )
    fetch_weights: bool = option(
        False, "bring these weights into that folder, each checked, and measure nothing"
    )
    lpips_weights: str | None = option(
        None, "torchvision state dict of that backbone (default: the one in --weights_dir)"
    )
    inception_weights: str | None = option(
        None, "torch-fidelity's Inception weights (default: those in --weights_dir)"
    )
    cache: bool = option(
        True, "keep Inception's statistics of --gt_path in ~/.cache/looc, found again by content"
    )
    output: str | None = option(None, "folder of what is written (default: the parent of --g_path)")

    def __post_init__(self) -> None:
        for name in ("gt_path", "g_path"):
            if not getattr(self, name) and not self.fetch_weights:
                raise ValueError(f"--{name} is missing: a folder of images")
        for name, needed, users in (
            ("lpips_net", "lpips" in self.metrics, "lpips"),
            ("lpips_weights", "lpips" in self.metrics, "lpips"),
            ("inception_weights", self.inception, "fid, kid or precision_recall"),
        ):
            value = getattr(self, name)
            if not (needed or self.fetch_weights or value == getattr(EvaluationConfig, name)):
                raise ValueError(f"--{name} {value} has no effect without --metrics {users}")

    @property
    def output_folder(self) -> Path:
        if self.output is not None:
            return Path(self.output)
        folder = Path(self.g_path)
        return folder.parent if folder.name not in ("", "..") else folder.resolve().parent

    @property
    def inception(self) -> bool:
        """Whether Inception is needed."""
        used = {METRICS[CHOICES[choice][0]].network for choice in self.metrics}
        return "inception" in used

    @property
    def keep(self) -> bool:
        """Whether all feature vectors are needed at once."""
        return any(choice in NEED_VECTORS for choice in self.metrics)


def main() -> None:
    config = build(EvaluationConfig, parse_flags(__doc__, EvaluationConfig))
    start_logging()
    if launched():
        raise UserError("it runs as one process; start it without torchrun")
    if config.fetch_weights:
        for fetched in fetch_weights(config.weights_dir):
            sys.stdout.write(f"{fetched}\n")
        return
    keep_freed_memory()
    device = resolve_device(config.device)
    pairs, skipped = find_pairs(config)
    check_number(config.metrics, len(pairs), skipped)
    check_sides(config.metrics, pairs, config.lpips_net)
    networks = load_networks(config, device)
    output = writable_folder(config.output_folder, "--output")
    cache = open_cache(config, pairs, networks, device)

    set_aside(output)
    with memory_for(f"--batch_size {config.batch_size}"):
        scores = measure_pairs(config, pairs, networks, device, cache)
    skipped = dict(sorted({**skipped, **scores.skipped}.items()))
    check_number(config.metrics, len(scores.names), skipped)
    summaries = summarise(config.metrics, scores)
    protocol, folders = PROTOCOLS[config.protocol], (Path(config.gt_path), Path(config.g_path))
    pictures = write_extremes(output, scores, pairs, protocol, folders)
    write_csv(output / "metrics.csv", scores)
    content = record(config, scores, skipped, networks, summaries)
    schema.write(output / "metrics.json", content)  # last: with it the results are whole
    remove_previous(output)
    report = write_report(output)
    show(content, [*pictures, output / "metrics.json", output / "metrics.csv", report])


def find_pairs(config: EvaluationConfig) -> tuple[list[Pair], dict[str, str]]:
    """The pairs to measure, and why others are left out."""
    folders = Path(config.gt_path), Path(config.g_path)
    found = open_pairs(*folders, num_test=config.num_test, skip_bad=config.skip_bad_images)
    if folders[0].samefile(folders[1]):
        log.warning("--gt_path and --g_path are one folder: images are compared with themselves")
    return found


def load_networks(config: EvaluationConfig, device: torch.device) -> dict[str, Network]:
    """The networks of the chosen metrics, on the device."""
    networks = {}
    if "lpips" in config.metrics:
        networks["lpips"] = lpips_network(
            config.lpips_net, config.lpips_weights, config.weights_dir
        )
    if config.inception:
        networks["inception"] = inception_network(config.inception_weights, config.weights_dir)
    for network in networks.values():
        network.module.to(device)
    return networks


def open_cache(
    config: EvaluationConfig,
    pairs: list[Pair],
    networks: Mapping[str, Network],
    device: torch.device,
) -> FeatureCache | None:
    """Where the statistics of the originals are kept; None where they are not.

    A pair left out while reading takes its original along, so --skip_bad_images goes without.
    """
    if "inception" not in networks or not config.cache or config.skip_bad_images:
        return None
    settings = {
        "protocol": config.protocol,
        "weights": networks["inception"].sha256,
        "device": device.type,
        **versions(),
    }
    key = content_key(((pair.name, pair.original) for pair in pairs), settings)
    return FeatureCache(cache_folder() / f"{key}.npz", len(pairs), config.keep)


def measure_pairs(
    config: EvaluationConfig,
    pairs: list[Pair],
    networks: Mapping[str, Network],
    device: torch.device,
    cache: FeatureCache | None,
) -> Scores:
    """Every pair measured; the statistics of the originals from the cache, or into it."""
    read = batches(
        pairs,
        [name for name in METRICS if name in config.metrics],
        PROTOCOLS[config.protocol],
        inception=config.inception,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        skip_bad=config.skip_bad_images,
    )
    known = cache.read() if cache is not None else None
    scores = measure(read, networks, device, total=len(pairs), keep=config.keep, known=known)
    if cache is not None and known is None:
        cache.write(scores.originals)
    return scores


def versions() -> dict[str, str]:
    return {package: version(package) for package in PACKAGES}


def record(
    config: EvaluationConfig,
    scores: Scores,
    skipped: Mapping[str, str],
    networks: Mapping[str, Network],
    summaries: Mapping[str, Score],
) -> Metrics:
    """Results and everything needed to get them again."""
    used = {name: METRICS[CHOICES[name][0]].network for name in config.metrics}
    return Metrics(
        metrics=dict(summaries),
        pairs=len(scores.names),
        skipped=dict(skipped),
        rate=rate_of(Path(config.g_path)),
        protocol={"name": config.protocol, **asdict(PROTOCOLS[config.protocol])},
        settings={
            "gt_path": config.gt_path,
            "g_path": config.g_path,
            "num_test": config.num_test,
            **metrics.settings(len(scores.names)),
            "ssim": {"window": metrics.SSIM_WINDOW, **PROTOCOLS[config.protocol].ssim},
            "lpips_net": config.lpips_net,
        },
        weights={
            name: {"file": str(networks[network].path), "sha256": networks[network].sha256}
            for name, network in used.items()
            if network is not None
        },
        versions=versions(),
    )


if __name__ == "__main__":
    run(main)
