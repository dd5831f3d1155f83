"""Image metrics as pure functions: a batch of uint8 images in, one value an image out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from utils.images import to_signed

Pixels: TypeAlias = npt.NDArray[np.uint8]  # (B, C, H, W), C = 1 or 3
Values: TypeAlias = npt.NDArray[np.float64]  # (B,)

DATA_RANGE = 255
SSIM_SETTINGS: dict[str, Any] = {
    "data_range": DATA_RANGE,
    "gaussian_weights": True,
    "sigma": 1.5,
    "use_sample_covariance": False,
}
SSIM_WINDOW = 11  # what scikit-image makes of sigma 1.5
FID_ENOUGH = 2048  # fewer images than features: the covariance has no full rank


def l1(x: Pixels, y: Pixels) -> Values:
    """mean |x - y| / 255, from 0 to 1."""
    difference = np.abs(x.astype(np.int16) - y)  # (B, C, H, W)
    return np.asarray(difference.mean(axis=(1, 2, 3)) / DATA_RANGE)


def ssim(x: Pixels, y: Pixels) -> Values:
    """Structural similarity as first defined (Wang et al. 2004): Gaussian window, sigma 1.5.

    The mean over channels; both sides of the images must be 11 pixels or more.
    """
    from skimage.metrics import structural_similarity

    similarity: Any = structural_similarity  # scikit-image does not type it
    return np.array([similarity(a, b, channel_axis=0, **SSIM_SETTINGS) for a, b in zip(x, y)])


def psnr(x: Pixels, y: Pixels) -> Values:
    """10 log10(255² / mean squared error) in dB; infinite for identical images."""
    from skimage.metrics import peak_signal_noise_ratio

    ratio: Any = peak_signal_noise_ratio
    with np.errstate(divide="ignore"):
        return np.array([ratio(a, b, data_range=DATA_RANGE) for a, b in zip(x, y)])


@torch.inference_mode()
def lpips(x: Tensor, y: Tensor, network: nn.Module) -> Values:
    """Learned perceptual distance (Zhang et al. 2018) of uint8 images (B, C, H, W).

    The network takes two batches (B, 3, H, W) with values in [-1, 1].
    """
    # On a CPU larger runs fall out of its cache; a GPU wants them large.
    pixels = 2**22 if x.is_cuda else 2**16
    size = max(1, pixels // (x.shape[2] * x.shape[3]))
    distances = [
        network(to_signed(rgb(a)), to_signed(rgb(b))).flatten()  # (b, 1, 1, 1) → (b,)
        for a, b in zip(torch.split(x, size), torch.split(y, size))
    ]
    return np.asarray(torch.cat(distances).double().cpu())


@torch.inference_mode()
def features(x: Tensor, network: nn.Module) -> Tensor:
    """The feature vectors (B, d) of uint8 images; the network is a torch-fidelity extractor."""
    return network(rgb(x))[0]  # type: ignore[no-any-return]


def rgb(x: Tensor) -> Tensor:
    """Greyscale as three equal channels: (B, 1 or 3, H, W) to (B, 3, H, W)."""
    return x.expand(-1, 3, -1, -1)


class FeatureStatistics:
    """Mean and covariance of feature vectors that arrive batch by batch.

    Memory does not grow with their number; sums are merged in float64 (Chan et al. 1979), so there
    is no cancellation.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros((), dtype=torch.float64)  # (d,) from the first batch on
        self.scatter = torch.zeros((), dtype=torch.float64)  # (d, d), sum of (f - mean)(f - mean)ᵀ

    def update(self, batch: Tensor) -> None:
        """Add feature vectors (B, d)."""
        batch = batch.double()
        total = self.count + len(batch)
        batch_mean = batch.mean(0)  # (d,)
        centred = batch - batch_mean  # (B, d)
        shift = batch_mean - self.mean  # (d,)
        weight = self.count * len(batch) / total
        self.scatter = self.scatter + centred.T @ centred + weight * torch.outer(shift, shift)
        self.mean = self.mean + shift * (len(batch) / total)
        self.count = total

    def as_arrays(self) -> dict[str, Values]:
        """mu (d,) and sigma (d, d), the unbiased covariance, under torch-fidelity's names."""
        sigma = self.scatter / (self.count - 1)
        return {"mu": self.mean.cpu().numpy(), "sigma": sigma.cpu().numpy()}


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|μ_a - μ_b|² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½); FID where features are Inception's.

    Source: Heusel et al. 2017. Both sets need two feature vectors or more.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    return float(fid_statistics_to_metric(a.as_arrays(), b.as_arrays(), False)[KEY_METRIC_FID])


@dataclass(frozen=True)
class Metric:
    """How a metric is called, which way is better, and how it is computed."""

    label: str
    direction: str
    smallest_side: int = 1
    compare: Callable[[Pixels, Pixels], Values] | None = None  # None: it needs a network


METRICS: dict[str, Metric] = {
    "l1": Metric("L1", "lower is better", compare=l1),
    "ssim": Metric("SSIM", "higher is better", SSIM_WINDOW, compare=ssim),
    "psnr": Metric("PSNR (dB)", "higher is better", compare=psnr),
    "lpips": Metric("LPIPS", "lower is better"),
    "fid": Metric("FID", "lower is better"),
}


@dataclass(frozen=True)
class Summary:
    """Mean and population variance over n images; None where there is nothing to average.

    Identical images have an infinite PSNR: they are counted in `identical`, not averaged. FID is
    one value for the whole set: its mean is that value, without variance.
    """

    mean: float | None
    variance: float | None
    n: int
    identical: int = 0


def summarise(values: Sequence[float]) -> Summary:
    """The mean and population variance of per-image values."""
    finite = [value for value in values if not math.isinf(value)]
    identical = len(values) - len(finite)
    if not finite:
        return Summary(None, None, 0, identical)
    return Summary(float(np.mean(finite)), float(np.var(finite)), len(finite), identical)
