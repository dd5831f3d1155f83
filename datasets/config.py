"""The flags that say which images to use."""

from __future__ import annotations

from dataclasses import dataclass

from datasets.registry import DATASETS
from modules.config import option


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
