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
    SET_METRICS,
)
from utils.evaluation.protocols import PROTOCOLS


@dataclass(frozen=True)
class EvaluationConfig:
    """Images that are compared, and how."""

    gt_path: str = option(None, "folder of the originals")
    g_path: str = option(None, "folder of the reconstructions or samples", aliases=("-g_path",))
    unpaired: bool = option(False, "compare the folders as sets: any names and numbers of images")
    metrics: tuple[str, ...] = option(
        (),
        f"what to measure (default: {' '.join(DEFAULT_METRICS)}; "
        f"with --unpaired {' '.join(SET_METRICS)})",
        choices=CHOICES,
    )
    protocol: str = option("clean", "preparation of the images", choices=PROTOCOLS)
    num_test: int | None = option(
        None, "the first N pairs by name (--unpaired: N of each folder)", minimum=1
    )
    batch_size: int = option(32, "images at a time", minimum=1, maximum=2**20)
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    num_workers: int | None = option(None, "worker processes (default: one a core)", minimum=0)
    skip_bad_images: bool = option(False, "skip, count and list what cannot be decoded")
    lpips_net: str = option("vgg", "backbone of LPIPS", choices=LPIPS_BACKBONES)
    weights_dir: str | None = option(None, "folder of network weights (default: torch hub's)")
    fetch_weights: bool = option(False, "download weights to --weights_dir, measure nothing")
    lpips_weights: str | None = option(None, "torchvision weights (default: in --weights_dir)")
    inception_weights: str | None = option(None, "Inception weights (default: in --weights_dir)")
    cache: bool = option(True, "keep Inception's statistics of --gt_path in ~/.cache/looc")
    output: str | None = option(None, "folder of what is written (default: the parent of --g_path)")

    def __post_init__(self) -> None:
        for name in ("gt_path", "g_path"):
            if not getattr(self, name) and not self.fetch_weights:
                raise ValueError(f"--{name} is missing: a folder of images")
        if not self.metrics:
            chosen = SET_METRICS if self.unpaired else DEFAULT_METRICS
            object.__setattr__(self, "metrics", chosen)
        paired = [choice for choice in CHOICES if choice not in SET_METRICS]
        refused = [choice for choice in self.metrics if choice in paired]
        if self.unpaired and refused:
            raise ValueError(
                f"--unpaired contradicts --metrics {' '.join(refused)}: {', '.join(paired)} "
                f"compare pairs, {', '.join(SET_METRICS)} do not"
            )
        for name, needed, users in (
            ("lpips_net", "lpips" in self.metrics, "lpips"),
            ("lpips_weights", "lpips" in self.metrics, "lpips"),
            ("inception_weights", self.inception, ", ".join(SET_METRICS)),
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
        return "inception" in self.networks.values()
