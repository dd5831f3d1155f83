"""Remake the sample of Fashion-MNIST, bit for bit, from the folder of the full data set:

python make_sample.py /usr/share/datasets/fashion-mnist
"""

from __future__ import annotations

import argparse
import gzip
import struct
from pathlib import Path

FILES = ("train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz")
STEP = 10  # every tenth image, from the first on
HEADER = struct.Struct(">4I")  # magic number, images, height, width


def every_tenth(content: bytes) -> bytes:
    """An idx file of n images → one of every tenth of them."""
    magic, number, height, width = HEADER.unpack_from(content)
    starts = range(HEADER.size, len(content), height * width * STEP)
    images = [content[start : start + height * width] for start in starts]
    return HEADER.pack(magic, -(-number // STEP), height, width) + b"".join(images)


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
