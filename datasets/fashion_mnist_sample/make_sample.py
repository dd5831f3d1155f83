"""Remake the sample of Fashion-MNIST, bit for bit, from the folder of the full data set:

python make_sample.py /usr/share/datasets/fashion-mnist
"""

from __future__ import annotations

import argparse
import gzip
import math
import struct
from pathlib import Path

FILES = (
    *("train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz"),
    *("train-labels-idx1-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
)
STEP = 10  # every tenth image, from the first on


def every_tenth(content: bytes) -> bytes:
    """An idx file of n images or labels → one of every tenth of them."""
    header = struct.Struct(f">{1 + content[3]}I")  # magic number, n, height and width of images
    magic, number, *sides = header.unpack_from(content)
    size = math.prod(sides)
    starts = range(header.size, len(content), size * STEP)
    items = [content[start : start + size] for start in starts]
    return header.pack(magic, -(-number // STEP), *sides) + b"".join(items)


def compress(content: bytes, path: Path) -> None:
    """Write a gzip file that depends on its content alone."""
    with (
        path.open("wb") as file,
        gzip.GzipFile("", "wb", compresslevel=9, fileobj=file, mtime=0) as packed,
    ):
        packed.write(content)


def main() -> None:
    parser = argparse.ArgumentParser(description="Remake the sample of Fashion-MNIST.")
    parser.add_argument("full", type=Path, help=f"folder that holds {' and '.join(FILES)}")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder to fill")
    args = parser.parse_args()
    for name in FILES:
        try:
            with gzip.open(args.full / name) as file:
                compress(every_tenth(file.read()), args.output / name)
        except (OSError, EOFError, struct.error) as error:
            parser.error(f"{args.full / name}: {error}")


if __name__ == "__main__":
    main()
