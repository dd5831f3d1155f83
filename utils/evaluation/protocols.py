"""Preparation of images before they are measured: the choices of --protocol."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from PIL import Image

from utils.errors import UserError, one_line
from utils.evaluation import metrics
from utils.evaluation.metrics import Pixels, Values
from utils.images import to_picture

Side: TypeAlias = Literal["original", "reconstruction"]
SIDES: tuple[Side, ...] = get_args(Side)


@dataclass(frozen=True)
class Protocol:
    """Preparation and comparison of the images of a pair."""

    about: str
    ssim: Mapping[str, Any]  # scikit-image's settings
    truncate_originals: bool = False
    jpeg_quality: int | None = None
    inception_side: int | None = None  # bilinear resize before Inception's own to 299

    def prepare(self, image: Pixels, file_format: str | None, side: Side) -> Pixels:
        """Prepare the pixels (C, H, W) of a file of that format.

        A JPEG file has already been through these steps and is not changed.
        """
        if file_format == "JPEG":
            return image
        if self.truncate_originals and side == "original":
            image = truncated(image)
        return image if self.jpeg_quality is None else through_jpeg(image, self.jpeg_quality)

    def for_inception(self, images: Pixels) -> Pixels:
        """Prepare images (B, C, H, W) for Inception."""
        side = self.inception_side
        return images if side is None else np.stack([resized(image, side) for image in images])

    def comparison(self, name: str) -> Callable[[Pixels, Pixels], Values] | None:
        """The function of a metric; None if it needs a network."""
        compare = metrics.METRICS[name].compare
        return partial(metrics.ssim, settings=self.ssim) if compare is metrics.ssim else compare


def truncated(image: Pixels) -> Pixels:
    """Truncate bytes as the reference does when it writes originals: to [−1, 1] and back.

    By rounding in float32 levels 1 … 63 become one less; the others stay.
    """
    return image - ((image > 0) & (image < 64))


def through_jpeg(image: Pixels, quality: int) -> Pixels:
    """Write an image (C, H, W) as JPEG by Pillow (4:2:0) and read it again."""
    file = io.BytesIO()
    try:
        to_picture(image).save(file, "JPEG", quality=quality)
    except OSError as error:  # a side is longer than 65,500
        size = f"an image of {image.shape[2]}×{image.shape[1]}"
        raise UserError(f"{size} cannot be written as JPEG: {one_line(error)}") from error
    return from_picture(Image.open(file))


def resized(image: Pixels, side: int) -> Pixels:
    """Resize an image (C, H, W) to (C, side, side) with Pillow's bilinear filter."""
    return from_picture(to_picture(image).resize((side, side), Image.Resampling.BILINEAR))


def from_picture(picture: Image.Image) -> Pixels:
    """Convert a Pillow image of mode L or RGB to (C, H, W)."""
    pixels = np.asarray(picture)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


PROTOCOLS: dict[str, Protocol] = {
    "clean": Protocol(
        about="pixels as the files hold them, SSIM with a Gaussian window, FID by torch-fidelity",
        ssim=metrics.SSIM_SETTINGS,
    ),
    # As for the published tables of LooC and CVQ-VAE. Their reconstructions were truncated too,
    # before they were rounded to bytes; files hold only rounded values.
    "reference": Protocol(
        about="JPEG of quality 75, SSIM with a uniform window, FID of images resized to 229×229",
        ssim={"data_range": metrics.DATA_RANGE, "win_size": metrics.SSIM_WINDOW},
        truncate_originals=True,
        jpeg_quality=75,
        inception_side=229,
    ),
}
