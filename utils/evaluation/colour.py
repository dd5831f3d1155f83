"""Differences of colour in CIELAB, as scikit-image converts sRGB (white point D65)."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]  # (B, C, H, W), C = 1 or 3
Values = npt.NDArray[np.float64]  # (B,)


def lab(images: Pixels) -> Any:
    """L*, a* and b* of images; grey ones stand for three equal channels. (B, 3, H, W)"""
    from skimage.color import rgb2lab

    convert: Any = rgb2lab  # scikit-image does not type it
    return convert(np.repeat(images, 3 // images.shape[1], axis=1), channel_axis=1)


def delta_e(x: Pixels, y: Pixels) -> Values:
    """ΔE of CIE 1976, the Euclidean distance in CIELAB: the mean over pixels."""
    from skimage.color import deltaE_cie76

    distance: Any = deltaE_cie76
    return np.asarray(distance(lab(x), lab(y), channel_axis=1).mean(axis=(1, 2)))


def shift(axis: int, x: Pixels, y: Pixels) -> Values:
    """An axis of CIELAB, in the reconstructions y less in the originals x: the mean over pixels."""
    return np.asarray((lab(y) - lab(x))[:, axis].mean(axis=(1, 2)))


a_shift, b_shift = partial(shift, 1), partial(shift, 2)
