"""Between bytes, the network's range and picture files."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from utils.files import whole_file


def to_signed(images: Tensor) -> Tensor:
    """Bytes 0…255 → float32 in [−1, 1], what the network sees; any shape."""
    return images.float() / 127.5 - 1


def to_bytes(images: Tensor) -> Tensor:
    """Values in [−1, 1] → bytes, rounded; values outside are clipped; any shape."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def mean_squared_errors(images: Tensor, others: Tensor) -> Tensor:
    """Mean squared error of each pair, in the range given: (B, C, H, W) twice → (B,)."""
    return (images - others).square().flatten(1).mean(1)


def psnr(mean_squared_error: Tensor, peak: float) -> Tensor:
    """10·log10(peak² / mse) in dB, peak being the width of the value range; any shape."""
    return 10 * torch.log10(peak**2 / mean_squared_error)


def to_picture(image: Tensor) -> Image.Image:
    """A byte tensor (C, H, W), C 1 or 3, as a Pillow image."""
    array = image.cpu().numpy()
    return Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0))


def save_picture(path: Path, image: Tensor, jpeg_quality: int = 75) -> None:
    """Write a byte tensor (C, H, W); the suffix of path chooses PNG or JPEG."""
    picture = to_picture(image)
    if path.suffix == ".png":
        picture.save(path, compress_level=1)  # the level changes size and time, never a pixel
    else:
        picture.save(path, quality=jpeg_quality)


def comparison(originals: Tensor, reconstructions: Tensor, columns: int = 8) -> Tensor:
    """Rows of originals, each above its reconstructions, 2 pixels apart.

    Byte tensors (n, C, H, W), n at most a few dozen → one byte tensor (C, height, width).
    """
    rows = []
    for start in range(0, len(originals), columns):
        for images in (originals, reconstructions):
            row = images[start : start + columns]
            missing = columns - len(row) if start else 0
            blank = row.new_full((missing, *row.shape[1:]), 255)
            tiles = [
                torch.nn.functional.pad(tile, (2, 2, 2, 2), value=255)
                for tile in torch.cat([row, blank])
            ]
            rows.append(torch.cat(tiles, dim=2))
    return torch.cat(rows, dim=1)


def save_comparison(path: Path, originals: Tensor, reconstructions: Tensor) -> None:
    """Write `comparison` as PNG, small images enlarged without smoothing."""
    picture = to_picture(comparison(originals, reconstructions))
    factor = max(1, 96 // originals.shape[-1])
    size = (picture.width * factor, picture.height * factor)
    with whole_file(path) as temporary:
        picture.resize(size, Image.Resampling.NEAREST).save(temporary, format="PNG")
