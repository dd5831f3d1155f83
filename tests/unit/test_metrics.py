"""The metrics against closed forms and the libraries they stand for; the networks' weight files."""

from __future__ import annotations

import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor, nn

from utils.errors import UserError
from utils.evaluation import metrics, networks
from utils.evaluation.metrics import LPIPS_BACKBONES, METRICS, FeatureStatistics, Pixels
from utils.evaluation.schema import Score
from utils.weights.download import Downloads, Unavailable

COMPARISONS = [name for name, metric in METRICS.items() if metric.compare is not None]


def noise(channels: int, seed: int, count: int = 3, height: int = 19, width: int = 23) -> Pixels:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (count, channels, height, width), dtype=np.uint8)


def compare(name: str, x: Pixels, y: Pixels) -> Any:
    function = METRICS[name].compare
    assert function is not None
    return function(x, y)


# Pixel metrics


@pytest.mark.parametrize("channels", [1, 3])
def test_constant_offset_has_known_l1_and_psnr(channels: int) -> None:
    x = noise(channels, seed=0) // 2
    for a, b in ((x, x + 10), (x + 10, x)):
        assert metrics.l1(a, b) == pytest.approx([10 / 255] * 3)
        assert metrics.psnr(a, b) == pytest.approx([20 * math.log10(255 / 10)] * 3)


def test_black_and_white_are_one_apart() -> None:
    black = np.zeros((1, 1, 16, 16), np.uint8)
    assert metrics.l1(black, black + 255) == pytest.approx([1])
    assert metrics.psnr(black, black + 255) == pytest.approx([0])


def test_identical_images_are_perfect_and_silent() -> None:
    x = noise(3, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metrics.l1(x, x).tolist() == [0] * 3
        assert metrics.psnr(x, x).tolist() == [math.inf] * 3
        assert metrics.ssim(x, x) == pytest.approx([1] * 3)


def test_grey_values_are_scikit_images() -> None:
    x, y = noise(1, seed=2), noise(1, seed=3)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    for i, (a, b) in enumerate(zip(x[:, 0], y[:, 0])):  # (H, W)
        assert metrics.psnr(x, y)[i] == peak_signal_noise_ratio(a, b, data_range=255)
        expected = structural_similarity(a, b, data_range=255, **settings)
        assert metrics.ssim(x, y)[i] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("colour", "lab"),  # of sRGB's primaries, D65: CIE 15, to two decimals
    [((255, 0, 0), (53.24, 80.09, 67.20)), ((0, 0, 255), (32.30, 79.19, -107.86))],
)
def test_colour_is_that_of_cielab(colour: tuple[int, ...], lab: tuple[float, ...]) -> None:
    white = np.full((2, 3, 4, 5), 255, np.uint8)  # L* 100, a* and b* 0
    y = white.copy()
    y[1] = np.array(colour, np.uint8)[:, None, None]
    distance = math.dist(lab, (100, 0, 0))
    assert compare("delta_e", white, y) == pytest.approx([0, distance], abs=0.02)
    assert compare("a_shift", white, y) == pytest.approx([0, lab[1]], abs=0.02)
    assert compare("b_shift", white, y) == pytest.approx([0, lab[2]], abs=0.02)
    y[1, :, :, 1:] = 255  # one column in five
    assert compare("delta_e", white, y)[1] == pytest.approx(distance / 5, abs=0.02)
    assert compare("a_shift", white, y)[1] == pytest.approx(lab[1] / 5, abs=0.02)


def test_colour_is_scikit_images() -> None:
    from skimage.color import deltaE_cie76, rgb2lab

    x, y = noise(3, seed=6), noise(3, seed=7)
    for i, (a, b) in enumerate(zip(x.transpose(0, 2, 3, 1), y.transpose(0, 2, 3, 1))):  # (H, W, 3)
        a, b = rgb2lab(a), rgb2lab(b)
        expected = deltaE_cie76(a, b).mean(), *(b - a).mean(axis=(0, 1))[1:]
        found = [compare(name, x, y)[i] for name in ("delta_e", "a_shift", "b_shift")]
        assert found == pytest.approx(expected, abs=1e-9)


def test_grey_images_have_no_colour() -> None:
    x, y = noise(1, seed=8), noise(1, seed=9)
    assert compare("a_shift", x, y) == pytest.approx([0] * 3, abs=1e-3)
    assert compare("b_shift", x, y) == pytest.approx([0] * 3, abs=1e-3)
    in_colour = compare("delta_e", x.repeat(3, axis=1), y.repeat(3, axis=1))
    assert compare("delta_e", x, y) == pytest.approx(in_colour)
    black = np.zeros((1, 1, 4, 4), np.uint8)
    assert compare("delta_e", black, black + 255) == pytest.approx([100], abs=1e-3)


def test_colour_values_are_scikit_images() -> None:
    x, y = noise(3, seed=4), noise(3, seed=5)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    for i, (a, b) in enumerate(zip(x.transpose(0, 2, 3, 1), y.transpose(0, 2, 3, 1))):  # (H, W, 3)
        assert metrics.psnr(x, y)[i] == pytest.approx(
            peak_signal_noise_ratio(a, b, data_range=255), abs=1e-12
        )
        expected = structural_similarity(a, b, data_range=255, channel_axis=2, **settings)
        assert metrics.ssim(x, y)[i] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", COMPARISONS)
def test_each_image_is_measured_alone_and_either_way_round(name: str) -> None:
    x, y = noise(3, seed=6), noise(3, seed=7)
    together = compare(name, x, y)
    assert together.shape == (3,)
    assert len(set(together.tolist())) == 3
    for i in range(3):
        assert compare(name, x[i : i + 1], y[i : i + 1])[0] == together[i]
        sign = -1 if METRICS[name].better == "nearer 0" else 1  # of a shift
        other_way = compare(name, y[i : i + 1], x[i : i + 1])[0]
        assert other_way == pytest.approx(sign * together[i])


@pytest.mark.parametrize("name", COMPARISONS)
def test_grey_equals_three_equal_channels(name: str) -> None:
    x, y = noise(1, seed=8), noise(1, seed=9)
    assert compare(name, x, y) == pytest.approx(compare(name, x.repeat(3, 1), y.repeat(3, 1)))


@pytest.mark.parametrize("name", COMPARISONS)
def test_smallest_side_is_the_smallest(name: str) -> None:
    side = METRICS[name].smallest_side
    x = noise(1, seed=10, height=side, width=side)
    assert np.isfinite(compare(name, x, 255 - x)).all()
    if side > 1:
        with pytest.raises(ValueError, match="win_size"):
            compare(name, x[..., 1:], x[..., 1:])


def test_summary_is_the_population_variance() -> None:
    assert metrics.summarise([1.0, 2.0, 6.0]) == Score(3.0, 14 / 3, 3)


def test_infinite_values_are_counted_not_averaged() -> None:
    assert metrics.summarise([20.0, math.inf, 30.0]) == Score(25.0, 25.0, 2, 1)
    assert metrics.summarise([math.inf]) == Score(None, None, 0, 1)


# LPIPS


@pytest.fixture(scope="module", params=LPIPS_BACKBONES)
def random_lpips(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    import lpips

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = lpips.LPIPS(net=request.param, pnet_rand=True, verbose=False)
    return request.param, network


def test_lpips_of_a_batch_is_that_of_each_image(random_lpips: tuple[str, nn.Module]) -> None:
    import lpips

    _, network = random_lpips
    x, y = noise(3, 11, height=40, width=36), noise(3, 12, height=40, width=36)
    together = metrics.lpips(torch.from_numpy(x), torch.from_numpy(y), network)
    assert together.shape == (3,)
    assert (together > 0).all()
    for i, (a, b) in enumerate(zip(x.transpose(0, 2, 3, 1), y.transpose(0, 2, 3, 1))):
        with torch.no_grad():
            alone = network(lpips.im2tensor(a), lpips.im2tensor(b)).item()
        assert together[i] == pytest.approx(alone, abs=1e-6)


def test_lpips_of_identical_images_is_zero(random_lpips: tuple[str, nn.Module]) -> None:
    x = torch.from_numpy(noise(1, 13, height=40, width=40))
    assert metrics.lpips(x, x, random_lpips[1]).tolist() == [0] * 3


def test_smallest_side_of_the_backbone(random_lpips: tuple[str, nn.Module]) -> None:
    net, network = random_lpips
    side = LPIPS_BACKBONES[net]
    x = torch.from_numpy(noise(1, 14, height=side, width=side))
    assert np.isfinite(metrics.lpips(x, 255 - x, network)).all()
    with pytest.raises(RuntimeError):
        metrics.lpips(x[..., 1:], x[..., 1:], network)


def test_lpips_network_sees_three_channels_from_minus_one_to_one() -> None:
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            seen.extend([x, y])
            return x[:, :1, :1, :1]

    black = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    metrics.lpips(black, black + 255, Spy())
    assert torch.equal(seen[0], torch.full((2, 3, 4, 4), -1.0))
    assert torch.equal(seen[1], torch.full((2, 3, 4, 4), 1.0))


# Fréchet distance


def statistics_of(features: Tensor, batch_size: int = 1000) -> FeatureStatistics:
    statistics = FeatureStatistics()
    for batch in features.split(batch_size):
        statistics.update(batch)
    return statistics


def correlated(seed: int, count: int = 60, dim: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator)
    return torch.randn(count, dim, generator=generator) @ mix + seed


def test_frechet_distance_of_gaussians_in_closed_form() -> None:
    """Independent dimensions: Σ (m_a - m_b)² + (σ_a - σ_b)²."""
    signs = torch.tensor([[i, j, k] for i in (-1, 1) for j in (-1, 1) for k in (-1, 1)])
    scale = math.sqrt(7 / 8)  # the unbiased variance of eight signs is 8 / 7
    a = signs * scale * torch.tensor([1.0, 2.0, 3.0]) + torch.tensor([0.0, 1.0, 0.0])
    b = signs * scale * torch.tensor([4.0, 2.0, 1.0]) + torch.tensor([0.0, 0.0, 5.0])
    expected = (1**2 + 5**2) + (3**2 + 0**2 + 2**2)
    distance = metrics.frechet_distance(statistics_of(a), statistics_of(b))
    assert distance == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_is_scipys_and_torch_fidelitys() -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    a, b = correlated(1), correlated(2)
    ours = metrics.frechet_distance(statistics_of(a, 7), statistics_of(b, 11))
    mean = (a.double().mean(0) - b.double().mean(0)).numpy()
    sigmas = [np.cov(features.numpy(), rowvar=False) for features in (a, b)]
    root = sqrtm(sigmas[0] @ sigmas[1]).real
    assert ours == pytest.approx(mean @ mean + np.trace(sum(sigmas) - 2 * root), rel=1e-8)
    theirs = fid_statistics_to_metric(
        fid_features_to_statistics(a), fid_features_to_statistics(b), False
    )
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)


def test_frechet_distance_of_a_set_to_itself_is_zero() -> None:
    a = correlated(3)
    assert metrics.frechet_distance(statistics_of(a), statistics_of(a, 9)) == pytest.approx(
        0, abs=1e-8
    )


@pytest.mark.parametrize("batch_size", [1, 7, 60])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_streaming_equals_all_at_once(batch_size: int, offset: float) -> None:
    features = correlated(4).double() + offset
    arrays = statistics_of(features, batch_size).as_arrays()
    assert arrays["mu"] == pytest.approx(features.numpy().mean(0), rel=1e-12)
    assert arrays["sigma"] == pytest.approx(np.cov(features.numpy(), rowvar=False), rel=1e-6)


def test_features_are_the_networks_of_three_equal_channels() -> None:
    class Corner(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            assert x.dtype == torch.uint8
            return (x[:, :, 0, 0],)

    x = torch.from_numpy(noise(1, 15))
    assert torch.equal(metrics.features(x, Corner()), x[:, :, 0, 0].expand(-1, 3))


# Weight files


@pytest.fixture(scope="module")
def backbone_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random state dicts in torchvision's layout, without its classifiers."""
    from torchvision.models import alexnet, vgg16

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("weights")
    files = {}
    for net, build in (("vgg", vgg16), ("alex", alexnet)):
        with torch.device("meta"):
            layout = build().features.state_dict(prefix="features.")
        files[net] = folder / f"{net}.pth"
        torch.save(
            {key: 0.02 * torch.randn(value.shape) for key, value in layout.items()}, files[net]
        )
    return files


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where torch hub keeps weights, empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Every download fails; what was asked for, and the hash it was to have, are noted."""
    asked: list[tuple[str, str]] = []

    def fail(_: Downloads, url: str, path: Path, sha256_prefix: str) -> None:
        path.write_bytes(b"half")
        asked.append((url, sha256_prefix))
        raise Unavailable("Network is unreachable")

    monkeypatch.setattr(Downloads, "get", fail)
    return asked


@pytest.mark.parametrize("net", LPIPS_BACKBONES)
def test_backbone_holds_the_file(net: str, backbone_files: dict[str, Path]) -> None:
    network = networks.lpips_network(net, str(backbone_files[net]))
    stored = torch.load(backbone_files[net])
    loaded = network.module.get_submodule("net").state_dict()
    assert len(loaded) == len(stored)
    assert not network.module.training
    for key, value in loaded.items():
        assert torch.equal(value, stored["features." + key.split(".", 1)[1]])


def test_backbone_is_found_in_torch_home(
    hub: Path, downloads: list[Any], backbone_files: dict[str, Path]
) -> None:
    file = hub / "alexnet-owt-7be5be79.pth"
    file.write_bytes(backbone_files["alex"].read_bytes())
    network = networks.lpips_network("alex")
    assert network.path == file
    assert network.sha256 == networks.sha256(backbone_files["alex"])
    assert not downloads


def test_sha256_is_the_standards(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    digest = networks.sha256(tmp_path / "abc")
    assert digest == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize(
    ("load", "flag", "file", "digest"),
    [
        (lambda: networks.lpips_network("vgg"), "lpips", "vgg16-397923af.pth", "397923af"),
        (lambda: networks.lpips_network("alex"), "lpips", "alexnet-owt-7be5be79.pth", "7be5be79"),
        (
            networks.inception_network,
            "inception",
            "weights-inception-2015-12-05-6726825d.pth",
            "6726825d",
        ),
    ],
)
def test_absent_weights_are_downloaded_else_one_line(
    load: Callable[[], Any],
    flag: str,
    file: str,
    digest: str,
    hub: Path,
    downloads: list[tuple[str, str]],
) -> None:
    with pytest.raises(UserError) as caught:
        load()
    for part in (file, str(hub), "Network is unreachable", f"--{flag}_weights", "l1 ssim psnr"):
        assert part in str(caught.value)
    assert "python evaluation.py --fetch_weights" in str(caught.value)
    ((url, sha256_prefix),) = downloads
    assert url.startswith("https://")
    assert url.endswith("/" + file)
    assert sha256_prefix == digest
    assert not list(hub.iterdir())


def test_weights_of_another_network_are_refused(backbone_files: dict[str, Path]) -> None:
    with pytest.raises(
        UserError, match=r"--lpips_net vgg: features\.0\.weight is \(64, 3, 11, 11\)"
    ):
        networks.lpips_network("vgg", str(backbone_files["alex"]))
    with pytest.raises(
        UserError, match="does not fit torch-fidelity's Inception: Missing key"
    ) as e:
        networks.inception_network(str(backbone_files["alex"]))
    assert len(str(e.value)) < 400 + len(str(backbone_files["alex"]))


class Intruder:
    """Unpickling it creates a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("flag", ["lpips", "inception"])
@pytest.mark.parametrize(
    "content", ["code", "pickle", "truncated", "text", "empty", "list", "absent", "folder"]
)
def test_bad_weight_files_are_refused_in_one_line_and_never_run(
    flag: str, content: str, tmp_path: Path, backbone_files: dict[str, Path]
) -> None:
    file, trace = tmp_path / "weights.pth", tmp_path / "trace"
    if content == "code":
        torch.save({"features.0.weight": Intruder(trace)}, file)
    elif content == "pickle":
        file.write_bytes(pickle.dumps({"features.0.weight": Intruder(trace)}))
    elif content == "truncated":
        file.write_bytes(backbone_files["alex"].read_bytes()[:100_000])
    elif content == "text":
        file.write_text("404: not found")
    elif content == "empty":
        file.touch()
    elif content == "list":
        torch.save([torch.zeros(2)], file)
    elif content == "folder":
        file.mkdir()
    load = {
        "lpips": lambda: networks.lpips_network("alex", str(file)),
        "inception": lambda: networks.inception_network(str(file)),
    }
    with pytest.raises(UserError) as caught:
        load[flag]()
    assert f"--{flag}_weights {file}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not trace.exists()


def test_inception_holds_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_fidelity import FeatureExtractorInceptionV3

    torch.manual_seed(2)
    torch.save({}, tmp_path / "nothing.pth")
    with monkeypatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        fresh = FeatureExtractorInceptionV3(
            "random", ["2048"], feature_extractor_weights_path=tmp_path / "nothing.pth"
        )
    torch.save(fresh.state_dict(), tmp_path / "random.pth")
    network = networks.inception_network(str(tmp_path / "random.pth"))
    for key, value in network.module.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[key])
    images = torch.from_numpy(noise(1, 16, count=2))
    features = metrics.features(images, network.module)
    assert features.shape == (2, 2048)
    assert torch.equal(features, fresh(images.expand(-1, 3, -1, -1))[0])
