"""Image metrics as pure functions: a batch of uint8 images in, one value per image out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import groupby
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from utils.evaluation.colour import a_shift, b_shift, delta_e
from utils.evaluation.schema import Figure, Score
from utils.images import in_colour, to_signed

Pixels: TypeAlias = npt.NDArray[np.uint8]  # (B, C, H, W), C = 1 or 3
Values: TypeAlias = npt.NDArray[np.float64]  # (B,)

DATA_RANGE = 255
PACKAGES = ("torch", "torchvision", "numpy", "pillow", "scikit-image", "lpips", "torch-fidelity")
SSIM_SETTINGS: dict[str, Any] = {
    "data_range": DATA_RANGE,
    "gaussian_weights": True,
    "sigma": 1.5,
    "use_sample_covariance": False,
}
SSIM_WINDOW = 11  # of a Gaussian of sigma 1.5 in scikit-image
FID_ENOUGH = 2048  # features; with fewer images the covariance is rank-deficient
ROUNDING = 1e-4  # relative to the sum of variances: float64 error in 2048 roots of zero eigenvalues
KID_SUBSET_SIZE = 1000  # as in torch-fidelity, like the 100 subsets and their seed
NEIGHBOUR = 3  # as in torch-fidelity: balls of precision and recall reach the third neighbour
DENSITY_NEIGHBOUR = 5  # as in Naeem et al. 2020
DISTANCES_AT_ONCE = 1000  # rows and columns of the distance matrix


def l1(x: Pixels, y: Pixels) -> Values:
    """mean |x - y| / 255, from 0 to 1."""
    difference = np.abs(x.astype(np.int16) - y)  # (B, C, H, W)
    return np.asarray(difference.mean(axis=(1, 2, 3)) / DATA_RANGE)


def ssim(x: Pixels, y: Pixels, settings: Mapping[str, Any] = SSIM_SETTINGS) -> Values:
    """Structural similarity, by default as first defined (Wang et al. 2004): Gaussian, sigma 1.5.

    Settings are scikit-image's. The mean over channels; needs sides of 11 pixels or more.
    """
    from skimage.metrics import structural_similarity

    ssim_of: Any = structural_similarity  # scikit-image does not type it
    return np.array([ssim_of(a, b, channel_axis=0, **settings) for a, b in zip(x, y)])


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
    # Larger batches exceed the cache of a CPU; a GPU needs them large.
    pixels = 2**22 if x.is_cuda else 2**16
    size = max(1, pixels // (x.shape[2] * x.shape[3]))
    distances = [
        network(to_signed(in_colour(a)), to_signed(in_colour(b))).flatten()  # (b, 1, 1, 1) → (b,)
        for a, b in zip(torch.split(x, size), torch.split(y, size))
    ]
    return np.asarray(torch.cat(distances).double().cpu())


@torch.inference_mode()
def features(x: Tensor, network: nn.Module) -> Tensor:
    """The feature vectors (B, d) of uint8 images; the network is a torch-fidelity extractor."""
    return network(in_colour(x))[0]  # type: ignore[no-any-return]


class FeatureStatistics:
    """Mean and covariance of feature vectors that arrive batch by batch.

    With keep the vectors are kept too: 8 KB per image of 2048 features. Sums are merged in float64
    (Chan et al. 1979) to avoid cancellation.
    """

    def __init__(self, *, keep: bool = False) -> None:
        self.kept: list[Tensor] | None = [] if keep else None  # (b, d) float32 each, on the CPU
        self.count = 0
        self.mean = torch.zeros((), dtype=torch.float64)  # (d,) from the first batch on
        self.scatter = torch.zeros((), dtype=torch.float64)  # (d, d), sum of (f - mean)(f - mean)ᵀ

    def update(self, batch: Tensor) -> None:
        """Add feature vectors (B, d)."""
        if self.kept is not None:
            # A copy: the memory around the result itself would not be free again.
            self.kept.append(batch.float().cpu().clone())
        batch = batch.double()
        total = self.count + len(batch)
        batch_mean = batch.mean(0)  # (d,)
        centred = batch - batch_mean  # (B, d)
        shift = batch_mean - self.mean  # (d,)
        weight = self.count * len(batch) / total
        if not self.count:
            self.scatter = torch.zeros(2 * shift.shape, dtype=shift.dtype, device=shift.device)
        self.scatter.addmm_(centred.T, centred).addr_(shift, shift, alpha=weight)
        self.mean = self.mean + shift * (len(batch) / total)
        self.count = total

    def as_arrays(self) -> dict[str, Values]:
        """mu (d,) and sigma (d, d), the unbiased covariance, under torch-fidelity's names."""
        sigma = self.scatter / (self.count - 1)
        return {"mu": self.mean.cpu().numpy(), "sigma": sigma.cpu().numpy()}

    def vectors(self) -> Tensor:
        """All feature vectors (N, d), float32, on the CPU. Raises ValueError if not kept."""
        if self.kept is None:
            raise ValueError("the feature vectors were not kept")
        self.kept = [torch.cat(self.kept)]
        return self.kept[0]


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|μ_a - μ_b|² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½); FID if features are Inception's.

    Source: Heusel et al. 2017. Needs two vectors per set. Negative by rounding becomes 0.
    """
    from torch_fidelity import metric_fid

    x, y = a.as_arrays(), b.as_arrays()
    found = metric_fid.fid_statistics_to_metric(x, y, False)
    distance = float(found[metric_fid.KEY_METRIC_FID])
    scale = float(np.trace(x["sigma"]) + np.trace(y["sigma"]))
    return 0.0 if -ROUNDING * scale <= distance <= 0 else distance


def kernel_distance(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Squared maximum mean discrepancy of feature vectors (N, d), kernel (x·y / d + 1)³.

    KID if features are Inception's (Bińkowski et al. 2018), by torch-fidelity with its defaults:
    unbiased, mean and standard deviation over 100 seeded subsets of `kid_subset_size(N)`. Needs at
    least 4 vectors per set. A value slightly below 0 is valid: the sets are indistinguishable.
    """
    from torch_fidelity import metric_kid

    size = kid_subset_size(min(len(a), len(b)))
    found = metric_kid.kid_features_to_metric(a, b, kid_subset_size=size, verbose=False)
    return found[metric_kid.KEY_METRIC_KID_MEAN], found[metric_kid.KEY_METRIC_KID_STD]


def kid_subset_size(num_images: int) -> int:
    """1000, but at most half of the images: larger subsets would show no spread."""
    return min(KID_SUBSET_SIZE, num_images // 2)


def precision_recall(originals: Tensor, reconstructions: Tensor) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019) of feature vectors (N, d).

    Precision: the share of reconstructions inside some original's ball, which reaches its third
    neighbour; recall: the share of originals inside some reconstruction's. By torch-fidelity with
    its defaults, some of the distances at a time. Needs at least 4 vectors per set.
    """
    from torch_fidelity import metric_prc

    found = metric_prc.prc_features_to_metric(
        reconstructions,
        originals,
        prc_neighborhood=NEIGHBOUR,
        prc_batch_size=DISTANCES_AT_ONCE,
        save_cpu_ram=True,
        verbose=False,
    )
    return found[metric_prc.KEY_METRIC_PRECISION], found[metric_prc.KEY_METRIC_RECALL]


def density_coverage(originals: Tensor, generated: Tensor) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020) of feature vectors (N, d) and (M, d).

    An original's ball reaches its fifth neighbour. Density: the balls that a generated image lies
    in, over five, the mean; coverage: the share of balls that hold a generated image. Some rows of
    the distances at a time. Needs at least 6 originals.
    """
    inside = covered = 0
    for rows in torch.split(originals, DISTANCES_AT_ONCE):
        nearest = torch.cdist(rows, originals).kthvalue(DENSITY_NEIGHBOUR + 1)  # 1: itself
        within = torch.cdist(rows, generated) < nearest.values[:, None]  # (n, M)
        inside += int(within.sum())
        covered += int(within.any(dim=1).sum())
    return inside / (DENSITY_NEIGHBOUR * len(generated)), covered / len(originals)


@dataclass(frozen=True)
class Metric(Figure):
    """A figure, and the function or network that computes it."""

    smallest_side: int = 1  # of images
    smallest_set: int = 1  # of images
    compare: Callable[[Pixels, Pixels], Values] | None = None  # None: it needs a network
    network: str | None = None  # lpips, which compares pairs, or inception, for sets
    choice: str = ""  # value of --metrics that asks for it; empty: its name

    @property
    def lower_is_better(self) -> bool:
        return self.better in ("lower", "nearer 0")


INCEPTION: dict[str, Any] = {"network": "inception", "smallest_set": 4}
SHIFT: dict[str, Any] = {"better": "nearer 0", "choice": "colour"}
DENSITY: dict[str, Any] = {"network": "inception", "better": "higher", "smallest_set": 6}
METRICS: dict[str, Metric] = {
    "l1": Metric("L1", better="lower", compare=l1),
    "ssim": Metric("SSIM", better="higher", compare=ssim, smallest_side=SSIM_WINDOW),
    "psnr": Metric("PSNR", 2, "dB", better="higher", compare=psnr),
    "delta_e": Metric("delta E", 2, better="lower", compare=delta_e, choice="colour"),
    "a_shift": Metric("shift of a*", 2, compare=a_shift, **SHIFT),
    "b_shift": Metric("shift of b*", 2, compare=b_shift, **SHIFT),
    "lpips": Metric("LPIPS", better="lower", network="lpips"),
    "fid": Metric("FID", 2, better="lower", network="inception", smallest_set=2),
    "kid": Metric("KID", 5, better="lower", **INCEPTION),
    "precision": Metric("Precision", better="higher", choice="precision_recall", **INCEPTION),
    "recall": Metric("Recall", better="higher", choice="precision_recall", **INCEPTION),
    "density": Metric("Density", choice="density_coverage", **DENSITY),
    "coverage": Metric("Coverage", choice="density_coverage", **DENSITY),
}
CHOICES = {  # value of --metrics → the metrics that it gives
    choice: tuple(names)
    for choice, names in groupby(METRICS, lambda name: METRICS[name].choice or name)
}
DEFAULT_METRICS = ("l1", "ssim", "psnr", "lpips", "fid")
SET_METRICS = tuple(  # values of --metrics that need no pairs
    choice for choice, names in CHOICES.items() if METRICS[names[0]].network == "inception"
)
NEIGHBOURS = {  # functions of both sets' vectors, by value of --metrics
    "precision_recall": precision_recall,
    "density_coverage": density_coverage,
}
LPIPS_BACKBONES = {"vgg": 16, "alex": 31}  # smallest side of images that each accepts


def summarise(values: Sequence[float]) -> Score:
    """The mean and population variance of per-image values."""
    finite = [value for value in values if not math.isinf(value)]
    mean, variance = (float(np.mean(finite)), float(np.var(finite))) if finite else (None, None)
    return Score(mean, variance, len(finite), identical=len(values) - len(finite))


def settings(num_images: int) -> dict[str, Any]:
    """The settings of each metric that its definition leaves open."""
    return {
        "data_range": DATA_RANGE,
        "variance": "population, over images; of KID over subsets",
        "l1": "mean |x - y| / data_range",
        "lpips_range": [-1, 1],
        "fid": {"features": "2048", "resize": "torch-fidelity's, to 299"},
        "kid": {"subsets": 100, "subset_size": kid_subset_size(num_images), "seed": 2020},
        "precision_recall": {"neighbour": NEIGHBOUR},
        "density_coverage": {"neighbour": DENSITY_NEIGHBOUR},
    }


def versions() -> dict[str, str]:
    """Versions of the packages on which values depend."""
    return {package: version(package) for package in PACKAGES}
