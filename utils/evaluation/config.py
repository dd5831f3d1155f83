"""The flags of evaluation.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from modules.options import option
from utils.evaluation.metrics import (
    CHOICES,
    DEFAULT_METRICS,
    LPIPS_BACKBONES,
    METRICS,
    NEED_VECTORS,
)
from utils.evaluation.protocols import PROTOCOLS


@dataclass(frozen=True)
class EvaluationConfig:
    """Images that are compared, and how."""

    gt_path: str = option(None, "folder of the originals")
    g_path: str = option(None, "folder of the reconstructions", aliases=("-g_path",))
    metrics: tuple[str, ...] = option(DEFAULT_METRICS, "what to measure", choices=CHOICES)
    protocol: str = option(
        "clean",
        "how images are prepared and compared: as they are, or as for the published tables",
        choices=PROTOCOLS,
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
    lpips_net: str = option("vgg", "backbone of LPIPS", choices=LPIPS_BACKBONES)
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
    def networks(self) -> dict[str, str]:
        """Choices of --metrics that need a network, and which."""
        found = {choice: METRICS[CHOICES[choice][0]].network for choice in self.metrics}
        return {choice: network for choice, network in found.items() if network is not None}

    @property
    def inception(self) -> bool:
        """Return whether a metric needs Inception."""
        return "inception" in self.networks.values()

    @property
    def keep_vectors(self) -> bool:
        """Return whether a metric needs all feature vectors at once."""
        return any(choice in NEED_VECTORS for choice in self.metrics)
