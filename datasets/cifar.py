"""CIFAR-10, kept in memory."""

from __future__ import annotations

from pathlib import Path

import torch

from datasets.image_sets import ImageSet, Labels, Split, TensorImages
from datasets.staging import fetch


def open_cifar10(folder: Path, split: Split, _image_size: int) -> ImageSet:
    """CIFAR-10 (Krizhevsky 2009): 50,000 training and 10,000 test images of 32 × 32, RGB.

    torchvision opens these pickles only if each has the MD5 of the published file.
    """
    from torchvision.datasets import CIFAR10

    root = str(folder.absolute())
    try:
        data = CIFAR10(root, train=split == "train")
    except RuntimeError:
        missing = f"--dataset cifar10: {folder / CIFAR10.base_folder} is missing or incomplete"
        fetch(lambda root: CIFAR10(root, download=True), folder, missing, [CIFAR10.filename])
        data = CIFAR10(root, train=split == "train")
    labels = Labels(torch.tensor(data.targets), tuple(data.classes))
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return TensorImages(images, lambda: labels)
