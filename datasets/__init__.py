"""Data sets of uint8 images: a registry of openers, and the loader of batches."""
# ruff: noqa: F401

from datasets.image_sets import FileImages, ImageSet, Labels, TensorImages
from datasets.loader import BatchLoader
from datasets.registry import DATASETS, DatasetEntry, open_dataset
from datasets.sampling import evenly_spread, split_validation
from datasets.variance import pixel_variance
