"""Every metric against independent computations, to stated tolerances.

Features come from small random networks; the tests with real weights are skipped without them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from scipy.ndimage import correlate1d
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor, nn

from tests.unit.test_protocols import blurred, photographs
from utils.evaluation import metrics, networks
from utils.evaluation.metrics import FeatureStatistics, Pixels
from utils.weights.registry import WEIGHTS, find, weights_folder

COUNT, DIM = 200, 24


def real_weights(name: str) -> Path:
    """The file of real weights in torch hub's folder; skips where it is not there."""
    path = find(WEIGHTS[name], weights_folder(None))
    if path is None:
        pytest.skip(f"the weights of {name} are not in {weights_folder(None)}")
    return path


def pairs() -> tuple[Pixels, Pixels]:
    return photographs(), blurred(photographs())


class SmallNetwork(nn.Module):
    """Random features (B, DIM) of uint8 images."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 5, 2), nn.ReLU(), nn.Conv2d(16, DIM, 3), nn.AdaptiveAvgPool2d(1)
        )

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.layers(x.float() / 128 - 1).flatten(1),)


@pytest.fixture(scope="module")
def features() -> tuple[Tensor, Tensor]:
    """Features of crops and of the same with noise, (COUNT, DIM) each."""
    random = np.random.default_rng(3)
    source = photographs()[:2]
    crops = []
    for number in range(COUNT):
        top, left = random.integers(0, 64), random.integers(0, 48)
        crops.append(source[number % 2, :, top : top + 32, left : left + 32])
    x = np.stack(crops)
    y = np.clip(x + random.normal(0, 12, x.shape), 0, 255).astype(np.uint8)
    network = SmallNetwork()
    a, b = (metrics.features(torch.from_numpy(images), network) for images in (x, y))
    return a, b


def statistics_of(vectors: Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics(keep=True)
    for batch in vectors.split(17):
        statistics.update(batch)
    return statistics


# Pixels: tolerance 1e-12 to plain formulas and scikit-image, 1e-4 to torchmetrics in float32


def test_l1_and_psnr_are_the_plain_formulas() -> None:
    x, y = pairs()
    for i, (a, b) in enumerate(zip(x.astype(float), y.astype(float))):
        assert metrics.l1(x, y)[i] == pytest.approx(np.abs(a - b).mean() / 255, abs=1e-12)
        expected = 10 * np.log10(255**2 / np.square(a - b).mean())
        assert metrics.psnr(x, y)[i] == pytest.approx(expected, abs=1e-10)
        assert metrics.psnr(x, y)[i] == peak_signal_noise_ratio(a, b, data_range=255)


def plain_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004, equation 13, of one channel, where the window lies inside."""
    kernel = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    kernel /= kernel.sum()

    def local(image: np.ndarray) -> np.ndarray:
        filtered = correlate1d(correlate1d(image, kernel, axis=0), kernel, axis=1)
        return np.asarray(filtered[5:-5, 5:-5])

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b = local(a), local(b)
    var_a, var_b = local(a * a) - mean_a**2, local(b * b) - mean_b**2
    covariance = local(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return float((luminance * (2 * covariance + c2) / (var_a + var_b + c2)).mean())


def test_ssim_is_the_plain_formula_and_scikit_images() -> None:
    x, y = pairs()
    for value, a, b in zip(metrics.ssim(x, y), x.astype(float), y.astype(float)):
        expected = np.mean([plain_ssim(p, q) for p, q in zip(a, b)])
        assert value == pytest.approx(expected, abs=1e-9)
        theirs = structural_similarity(
            *(a, b),
            channel_axis=0,
            data_range=255,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        assert value == pytest.approx(theirs, abs=1e-12)


def test_torchmetrics_agrees_on_psnr_and_ssim() -> None:
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    from torchmetrics.functional.image import (
        peak_signal_noise_ratio,
        structural_similarity_index_measure,
    )

    x, y = pairs()
    for i in range(len(x)):
        a, b = (torch.from_numpy(images[i : i + 1]).double() for images in (x, y))
        theirs = peak_signal_noise_ratio(a, b, data_range=255.0).item()
        assert metrics.psnr(x, y)[i] == pytest.approx(theirs, abs=1e-4)
        _, everywhere = structural_similarity_index_measure(
            a, b, sigma=1.5, data_range=255.0, return_full_image=True
        )
        inside = everywhere[..., 5:-5, 5:-5]  # where it mirrors no border, which scikit-image omits
        assert metrics.ssim(x, y)[i] == pytest.approx(inside.mean().item(), abs=1e-4)


# LPIPS: tolerance 1e-5, float32 sums of 13 layers


def plain_lpips(x: Pixels, y: Pixels, module: nn.Module) -> Tensor:
    """Zhang et al. 2018, equation 1: per layer, unit-length channels, weighted squares, means."""
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    a, b = (
        (torch.from_numpy(images).float() / 127.5 - 1 - shift.view(3, 1, 1)) / scale.view(3, 1, 1)
        for images in (x, y)
    )
    total = torch.zeros(len(x))
    for number in range(5):
        part = module.get_submodule(f"net.slice{number + 1}")
        a, b = part(a), part(b)
        p, q = (t / t.square().sum(1, keepdim=True).sqrt() for t in (a, b))
        weight = module.get_parameter(f"lin{number}.model.1.weight")  # (1, C, 1, 1)
        total += (weight * (p - q).square()).sum(1).mean((1, 2))
    return total


@pytest.mark.parametrize("net", ["vgg", "alex"])
@pytest.mark.parametrize("real", [False, True])
def test_lpips_is_the_plain_formula(net: str, real: bool) -> None:
    import lpips

    torch.manual_seed(0)
    if real:
        module = networks.lpips_network(net, str(real_weights(net))).module
    else:
        module = lpips.LPIPS(net=net, pnet_rand=True, verbose=False).eval()
    x, y = pairs()
    found = metrics.lpips(torch.from_numpy(x), torch.from_numpy(y), module)
    with torch.inference_mode():
        assert found == pytest.approx(plain_lpips(x, y, module).numpy(), abs=1e-5)
        theirs = module(*(torch.from_numpy(i).float() / 255 for i in (x, y)), normalize=True)
    assert found == pytest.approx(theirs.flatten().numpy(), abs=1e-5)  # as the reference calls it


# FID: relative tolerance 1e-6 to the formula in float64


def test_fid_is_the_plain_formula(features: tuple[Tensor, Tensor]) -> None:
    ours = metrics.frechet_distance(*(statistics_of(vectors) for vectors in features))
    a, b = (vectors.double().numpy() for vectors in features)
    sigmas = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.asarray(sqrtm(sigmas[0] @ sigmas[1])).real
    shift = a.mean(0) - b.mean(0)
    expected = shift @ shift + np.trace(sigmas[0] + sigmas[1] - 2 * root)
    assert ours == pytest.approx(expected, rel=1e-6)
    assert ours > 0


def test_torchmetrics_agrees_on_fid(features: tuple[Tensor, Tensor]) -> None:
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Floats(nn.Module):
        """Takes the features themselves for images."""

        num_features = DIM

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)

    theirs = FrechetInceptionDistance(Floats(), normalize=True, input_img_size=(DIM, 1, 1))
    theirs.set_dtype(torch.float64)
    for vectors, real in zip(features, (True, False)):
        theirs.update(vectors[:, :, None, None].double(), real=real)
    ours = metrics.frechet_distance(*(statistics_of(vectors) for vectors in features))
    assert ours == pytest.approx(float(theirs.compute()), rel=1e-4)


def test_only_rounding_is_taken_for_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_fidelity import metric_fid

    sets = [statistics_of(torch.randn(40, 3)) for _ in range(2)]
    for value, expected in ((-1e-7, 0.0), (-0.0, 0.0), (1e-9, 1e-9), (-1.0, -1.0)):
        answer = {metric_fid.KEY_METRIC_FID: value}
        monkeypatch.setattr(metric_fid, "fid_statistics_to_metric", lambda *_, a=answer: a)
        found = metrics.frechet_distance(*sets)
        assert found == expected
        assert str(found) != "-0.0"


def test_fid_of_fewer_images_than_features_and_itself_is_zero() -> None:
    """On a small test set the covariance is rank-deficient, and rounding shows."""
    vectors = torch.randn(30, 400, generator=torch.Generator().manual_seed(0)).abs() * 3
    found = metrics.frechet_distance(statistics_of(vectors), statistics_of(vectors.flip(0)))
    assert 0 <= found < 1e-3


# KID: tolerance 1e-6 absolute, of a kernel in float32


def plain_mmd(a: np.ndarray, b: np.ndarray) -> float:
    """Gretton et al. 2012, the unbiased estimate of squared MMD, kernel (x·y / d + 1)³."""
    m = len(a)

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.asarray((x @ y.T / x.shape[1] + 1) ** 3)

    within = sum((k.sum() - np.trace(k)) / (m * (m - 1)) for k in (kernel(a, a), kernel(b, b)))
    return float(within - 2 * kernel(a, b).mean())


def test_kid_is_the_plain_formula(features: tuple[Tensor, Tensor]) -> None:
    size = metrics.kid_subset_size(COUNT)
    assert size == COUNT // 2
    a, b = (vectors.double().numpy() for vectors in features)
    random = np.random.RandomState(2020)
    values = []
    for _ in range(100):
        first = random.choice(COUNT, size, replace=False)
        second = random.choice(COUNT, size, replace=False)
        values.append(plain_mmd(a[first], b[second]))
    ours = metrics.kernel_distance(*features)
    assert ours == pytest.approx((np.mean(values), np.std(values)), abs=1e-6)
    assert ours == metrics.kernel_distance(*features)  # seeded


def test_torchmetrics_agrees_on_kid(features: tuple[Tensor, Tensor]) -> None:
    """On all vectors at once, where nothing is drawn."""
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    from torchmetrics.image.kid import poly_mmd

    a, b = (vectors.double() for vectors in features)
    assert float(poly_mmd(a, b)) == pytest.approx(plain_mmd(a.numpy(), b.numpy()), abs=1e-9)


@pytest.mark.parametrize(("images", "size"), [(4, 2), (999, 499), (2000, 1000), (50_000, 1000)])
def test_kid_subsets(images: int, size: int) -> None:
    assert metrics.kid_subset_size(images) == size


# Precision and recall: exact


def test_precision_and_recall_are_the_definition(
    features: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "DISTANCES_AT_ONCE", 64)
    originals, reconstructions = (vectors.double() for vectors in features)

    def share(points: Tensor, centres: Tensor) -> float:
        radii = (centres[:, None] - centres).norm(dim=2).sort(dim=1).values[:, 3]  # 0: itself
        return float(((points[:, None] - centres).norm(dim=2) <= radii).any(1).double().mean())

    found = metrics.precision_recall(originals, reconstructions)
    expected = share(reconstructions, originals), share(originals, reconstructions)
    assert found == pytest.approx(expected, abs=1e-6)
    assert 0 < found[0] < 1


def test_a_set_has_all_precision_and_recall_of_itself() -> None:
    vectors = torch.randn(50, 8)
    assert metrics.precision_recall(vectors, vectors) == (1, 1)


# Density and coverage: the definition of Naeem et al. 2020, exact


def test_density_and_coverage_are_the_definition(
    features: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "DISTANCES_AT_ONCE", 64)
    originals, generated = features[0].double(), features[1][:50].double()
    radii = (originals[:, None] - originals).norm(dim=2).sort(dim=1).values[:, 5]  # 0: itself
    within = (originals[:, None] - generated).norm(dim=2) < radii[:, None]
    expected = float(within.sum() / (5 * 50)), float(within.any(1).double().mean())
    assert metrics.density_coverage(originals, generated) == pytest.approx(expected, abs=1e-6)
    assert 0 < expected[1] < 1


def test_a_set_has_density_and_coverage_1_of_itself() -> None:
    vectors = torch.randn(50, 8)
    assert metrics.density_coverage(vectors, vectors) == (1, 1)


# Inception: relative tolerance 1e-4 to torch-fidelity run on the folders by itself


def test_inceptions_metrics_are_torch_fidelitys(tmp_path: Path) -> None:
    import torch_fidelity

    file = real_weights("inception")
    network = networks.inception_network(str(file)).module
    random = np.random.default_rng(1)
    sets = []
    for kind, noise in (("original", 0), ("rec", 20)):
        (tmp_path / kind).mkdir()
        images = np.stack([photographs()[i % 2, :, i : i + 48, i : i + 40] for i in range(8)])
        images = np.clip(images + random.normal(0, noise, images.shape), 0, 255).astype(np.uint8)
        for number, image in enumerate(images):
            Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / kind / f"{number:02d}.png")
        sets.append(statistics_of(metrics.features(torch.from_numpy(images), network)))
    theirs = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "rec"),
        input2=str(tmp_path / "original"),
        feature_extractor="inception-v3-compat",  # of its own, precision and recall take VGG's
        feature_extractor_weights_path=str(file),
        **dict.fromkeys(("fid", "kid", "prc"), True),
        kid_subset_size=4,
        cuda=False,
        cache=False,
        verbose=False,
    )
    fid = metrics.frechet_distance(*sets)
    assert fid == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    vectors = [statistics.vectors() for statistics in sets]
    found = metrics.precision_recall(*vectors)
    assert found == (theirs["precision"], theirs["recall"])
    kid = [theirs[f"kernel_inception_distance_{name}"] for name in ("mean", "std")]
    assert metrics.kernel_distance(vectors[1], vectors[0]) == pytest.approx(kid, abs=1e-5)
