"""The flags that say which images to use."""

from __future__ import annotations

from dataclasses import dataclass

from datasets.images import CROPS
from datasets.registry import DATASETS
from modules.options import option


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they are read."""

    dataset: str = option("fashion-mnist-sample", "data set", choices=tuple(DATASETS))
    data_folder: str | None = option(None, "where the data set lies (default: data/<dataset>)")
    image_size: int | None = option(
        None, "side of the square images, for sets that can be resized", minimum=4, maximum=8192
    )
    num_workers: int = option(
        4, "processes that decode images, for sets on disk", minimum=0, maximum=1024
    )
    skip_bad_images: bool = option(
        False, "leave out images that cannot be decoded; they are counted and listed"
    )
    flip: bool = option(False, "mirror half of the training images, others in every epoch")
    crop: str = option(
        "centre",
        "where the square is cut out of a training image, along its longer side, for sets on disk; "
        "square images are taken whole",
        choices=CROPS,
    )
    image_cache: str | None = option(
        None,
        "folder that keeps the decoded images, for sets on disk, so that none is decoded twice "
        "(default: none)",
    )

    def __post_init__(self) -> None:
        if self.image_cache == "":
            raise ValueError("--image_cache is empty")
        if self.crop == "random" and self.image_cache is not None:
            raise ValueError(
                f"--crop random contradicts --image_cache {self.image_cache}, which keeps images "
                "cropped in the centre"
            )
        if DATASETS[self.dataset].resizable:
            return
        square = f"--dataset {self.dataset}, whose square images are in memory"
        if self.crop == "random":
            raise ValueError(f"--crop random contradicts {square}")
        if self.image_cache is not None:
            raise ValueError(f"--image_cache {self.image_cache} contradicts {square}")
