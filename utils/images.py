"""Images as tensors and as pictures: value ranges, errors, and what is written to disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from utils.files import whole_file


def to_signed(images: Tensor) -> Tensor:
    """Convert bytes 0 … 255 to float32 in [−1, 1], the network's range; any shape."""
    return images.float() / 127.5 - 1


def to_bytes(images: Tensor) -> Tensor:
    """Convert values in [−1, 1] to bytes: round, and clip values outside; any shape."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def padded(images: Tensor, factor: int) -> Tensor:
    """Repeat the last row and column of (B, C, h, w), so that the sides are multiples of factor."""
    height, width = images.shape[2:]
    return pad(images, (0, -width % factor, 0, -height % factor), mode="replicate")


def in_colour(images: Tensor) -> Tensor:
    """Repeat a grey channel three times: (B, 1 or 3, H, W) → (B, 3, H, W)."""
    return images.expand(-1, 3, -1, -1)


def mean_squared_errors(images: Tensor, others: Tensor) -> Tensor:
    """Mean squared error of each pair: (B, C, H, W) twice → (B,)."""
    return (images - others).square().flatten(1).mean(1)


def psnr(mean_squared_error: Tensor, peak: float) -> Tensor:
    """10·log10(peak² / MSE) in dB, where peak is the width of the value range; any shape."""
    return 10 * torch.log10(peak**2 / mean_squared_error)


def signed_psnr(mean_squared_error: Tensor) -> Tensor:
    """PSNR of values in [−1, 1], at most 126 dB; any shape."""
    return psnr(mean_squared_error.clamp_min(1e-12), peak=2.0)


def to_picture(image: Tensor | np.ndarray) -> Image.Image:
    """Convert bytes (C, H, W), C = 1 or 3, to a Pillow image."""
    array = image.cpu().numpy() if isinstance(image, Tensor) else image
    return Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0))


def save_picture(path: Path, image: Tensor, jpeg_quality: int = 75) -> None:
    """Write a byte tensor (C, H, W) as PNG or JPEG, by the suffix of path."""
    picture = to_picture(image)
    if path.suffix == ".png":
        picture.save(path, compress_level=1)  # lossless at any level
    else:
        picture.save(path, quality=jpeg_quality)


def fitted(picture: Image.Image, enlarged: int, largest: int) -> Image.Image:
    """Shrink a picture to a longer side of at most largest, or enlarge it by a whole factor."""
    longest = max(picture.size)
    if longest > largest:
        share = largest / longest
        size = max(1, round(picture.width * share)), max(1, round(picture.height * share))
        return picture.resize(size, Image.Resampling.LANCZOS)
    factor = max(1, enlarged // longest)
    size = picture.width * factor, picture.height * factor
    return picture.resize(size, Image.Resampling.NEAREST)


def comparison(originals: Tensor, reconstructions: Tensor, columns: int = 8) -> Tensor:
    """Arrange originals (n, C, H, W) above reconstructions, in rows → (C, height, width)."""
    missing = -len(originals) % columns if len(originals) > columns else 0
    pairs = torch.stack([originals, reconstructions])
    tiles = pad(pairs, (2, 2, 2, 2, 0, 0, 0, missing), value=255)  # (2, n, C, H, W)
    rows = [torch.cat(list(row), dim=2) for part in torch.split(tiles, columns, 1) for row in part]
    return torch.cat(rows, dim=1)


def save_comparison(path: Path, originals: Tensor, reconstructions: Tensor) -> None:
    """Write `comparison` as PNG; small images are enlarged without smoothing."""
    picture = to_picture(comparison(originals, reconstructions))
    factor = max(1, 96 // originals.shape[-1])
    size = picture.width * factor, picture.height * factor
    with whole_file(path) as temporary:
        picture.resize(size, Image.Resampling.NEAREST).save(temporary, format="PNG")
