"""The training images that are nearest to others, and a picture of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from utils.files import whole_file
from utils.images import fitted, to_picture

COUNT = 3  # neighbours of an image
AT_ONCE = 4096  # training images whose distances are computed together
TILE, GAP, MARGIN, LINE = 84, 6, 120, 18  # pixels; the margin is for the names of the rows


class Nearest(NamedTuple):
    """The nearest training images of each image, the nearest one first."""

    distances: Tensor  # (n, COUNT), root mean squared difference of bytes
    positions: Tensor  # (n, COUNT), in the training set


def nearest(images: Tensor, training: Tensor) -> Nearest:
    """Find the neighbours of images (n, C, H, W) among training images, uint8 both, by blocks.

    Float32 gives a copy a distance of up to 0.1.
    """
    points = images.flatten(1).float()
    found = Nearest(torch.empty(len(points), 0), torch.empty(len(points), 0, dtype=torch.int64))
    for start in range(0, len(training), AT_ONCE):
        block = training[start : start + AT_ONCE].flatten(1).float()
        distances = torch.cdist(points, block)
        positions = torch.arange(start, start + len(block)).expand(len(points), -1)
        distances = torch.cat([found.distances, distances / points.shape[1] ** 0.5], 1)
        positions = torch.cat([found.positions, positions], 1)
        best = distances.topk(min(COUNT, distances.shape[1]), largest=False)
        found = Nearest(best.values, positions.gather(1, best.indices))
    return found


def save_neighbours(
    path: Path, blocks: Mapping[str, tuple[Tensor, Nearest]], training: Tensor
) -> None:
    """Write a PNG: in each block a row of images, and below each its neighbours and distances."""
    columns = max(len(images) for images, _ in blocks.values())
    height = (COUNT + 1) * (TILE + LINE) + 2 * GAP
    size = MARGIN + columns * (TILE + GAP), len(blocks) * (height + GAP) - GAP
    picture = Image.new("RGB", size, "white")
    font = ImageFont.load_default(13)
    draw = partial(ImageDraw.Draw(picture).text, fill="black", font=font)
    for number, (title, (images, found)) in enumerate(blocks.items()):
        top = number * (height + GAP) + GAP
        for row in range(found.positions.shape[1] + 1):
            label = title if row == 0 else f"neighbour {row}"
            level = top + row * (TILE + LINE)
            draw((GAP, level + TILE // 2), label, anchor="lm")
            for column, image in enumerate(images):
                left = MARGIN + column * (TILE + GAP)
                shown = image if row == 0 else training[found.positions[column, row - 1]]
                picture.paste(fitted(to_picture(shown), TILE, TILE), (left, level))
                if row > 0:
                    distance = f"{found.distances[column, row - 1]:.1f}"
                    draw((left + TILE // 2, level + TILE + 1), distance, anchor="ma")
    with whole_file(path) as temporary:
        picture.save(temporary, format="PNG")
