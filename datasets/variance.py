"""Variance of the pixels of a set, by which the reconstruction loss is divided."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from datasets.image_sets import ImageSet, TensorImages
from datasets.sampling import permutation
from utils.errors import UserError

SAMPLE = 2048  # images decoded to measure the variance of a set on disk
CHUNK = 2**24  # pixels counted at a time


def pixel_variance(images: ImageSet, skip_bad: bool = False) -> float:
    """Return the variance of pixel / 255 over all pixels and channels, in [0, 1/4].

    Exact for sets in memory; for others that of at most SAMPLE images, the same in every run.
    Raises UserError naming a damaged image; skip_bad leaves those out, and the error is raised
    where no image remains.
    """

    def count(index: int) -> Tensor:
        try:
            return pixel_counts(images[index])
        except UserError:
            if skip_bad:
                return torch.zeros(256, dtype=torch.int64)
            raise

    if isinstance(images, TensorImages):
        counts = [pixel_counts(part) for part in torch.split(images.images.flatten(), CHUNK)]
    else:
        sample = permutation(len(images), "variance")[:SAMPLE].sort().values.tolist()
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            counts = list(pool.map(count, sample))
    total = torch.stack(counts).sum(0)  # (256,), of each of the 256 values
    if total.sum() == 0:
        raise UserError(f"none of the {len(counts):,} images of --data_folder can be decoded")
    levels = torch.arange(256, dtype=torch.float64) / 255
    share = total.double() / total.sum()  # (256,)
    mean = (share * levels).sum()
    return float((share * (levels - mean).square()).sum())


def pixel_counts(pixels: Tensor) -> Tensor:
    """Count each of the 256 values: uint8 of any shape → (256,), int64."""
    return torch.bincount(pixels.flatten().cpu(), minlength=256)
