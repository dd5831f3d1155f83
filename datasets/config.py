"""Flags of the data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from datasets.image_sets import CROPS
from datasets.registry import DATASETS
from modules.options import option


@dataclass(frozen=True)
class DataConfig:
    """The data set and how its images are read."""

    dataset: str = option("fashion-mnist-sample", "data set", choices=DATASETS)
    data_folder: str | None = option(
        None, "folder of the data set; without --dataset, of any images (default: data/<dataset>)"
    )
    image_size: int | None = option(
        None, "side of the square images in pixels, for sets on disk", minimum=4, maximum=8192
    )
    num_workers: int = option(4, "processes that read images on disk", minimum=0, maximum=1024)
    skip_bad_images: bool = option(False, "skip images that cannot be decoded, and list them")
    flip: bool = option(False, "mirror half of the training images, chosen anew in every epoch")
    crop: str = option(
        "centre",
        "square that is cut out of each image on disk: the largest, in the middle (centre) or in "
        "training at a random place (random), or --image_size pixels at full resolution (patch)",
        choices=CROPS,
    )
    crop_scale: float = option(
        1.0,
        "resolution of the images that --crop patch cuts, as a share of their own",
        above=0,
        maximum=1,
    )
    bits: int = option(
        16, "bits that 16-bit grey images use, like 12 of many cameras", minimum=9, maximum=16
    )
    image_cache: str | None = option(
        None, "folder that keeps decoded images for later runs, for sets on disk (default: none)"
    )

    @property
    def name(self) -> str:
        """Name of the data set in paths: that of its folder with --dataset folder."""
        folder = Path(self.data_folder or "").resolve().name
        return folder if self.dataset == "folder" and folder else self.dataset

    def __post_init__(self) -> None:
        if self.image_cache == "":
            raise ValueError("--image_cache is empty")
        cache = f"--image_cache {self.image_cache}"
        if self.crop == "random" and self.image_cache is not None:
            raise ValueError(f"--crop random contradicts {cache}, whose images are cropped already")
        square = f"--dataset {self.dataset}, whose square images are in memory"
        if self.crop != "centre" and not DATASETS[self.dataset].resizable:
            raise ValueError(f"--crop {self.crop} contradicts {square}")
        if self.crop != "patch" and self.crop_scale != 1:
            raise ValueError(
                f"--crop_scale {self.crop_scale:g} needs --crop patch, not {self.crop}"
            )
        if self.image_cache is not None and not DATASETS[self.dataset].resizable:
            raise ValueError(f"{cache} contradicts {square}")

    @property
    def patch_scale(self) -> float | None:
        """Scale of --crop patch; None with the other crops."""
        return self.crop_scale if self.crop == "patch" else None
