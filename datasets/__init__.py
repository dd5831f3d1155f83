"""The data sets, as uint8 images: a registry of openers and the loader of batches."""

from datasets.images import FileImages, ImageSet, TensorImages, pixel_variance, split_validation
from datasets.loader import BatchLoader
from datasets.registry import DATASETS, DatasetEntry, open_dataset

__all__ = [
    "DATASETS",
    "BatchLoader",
    "DatasetEntry",
    "FileImages",
    "ImageSet",
    "TensorImages",
    "open_dataset",
    "pixel_variance",
    "split_validation",
]
