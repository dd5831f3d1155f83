"""The networks of LPIPS and FID with their weights, and known values that verify the weights."""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.checkpoints.unpickle import read_weights
from utils.errors import UserError, one_line
from utils.evaluation.config import EvaluationConfig
from utils.evaluation.metrics import FeatureStatistics, features, frechet_distance
from utils.weights.download import Unavailable, sha256
from utils.weights.fetch import download_usual, fetch
from utils.weights.registry import WEIGHTS, find, weights_folder


@dataclass(frozen=True)
class Network:
    """A network in evaluation mode, and the file of its weights."""

    module: nn.Module
    path: Path
    sha256: str


def load_networks(config: EvaluationConfig, device: torch.device) -> dict[str, Network]:
    """The networks of the chosen metrics, on the device."""
    networks, folder = {}, config.weights_dir
    if "lpips" in config.networks:
        networks["lpips"] = lpips_network(config.lpips_net, config.lpips_weights, folder)
    if config.inception:
        networks["inception"] = inception_network(config.inception_weights, folder)
    for network in networks.values():
        network.module.to(device).to(memory_format=torch.channels_last)  # faster on CPUs
    return networks


WITHOUT = "name the file with {}, or go without: --metrics l1 ssim psnr"


def lpips_network(
    net: str, given: str | None = None, folder: str | None = None, without: str = WITHOUT
) -> Network:
    """lpips.LPIPS with the backbone `net`; weights as in `find_weights`.

    Raises UserError if they are missing, damaged or of another network.
    """
    import lpips

    path = find_weights("--lpips_weights", given, net, folder, without)
    state = read_state_dict("--lpips_weights", path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    expected = model.net.state_dict()
    # lpips cuts the backbone into slices but keeps torchvision's layer numbers.
    source = {key: "features." + key.split(".", 1)[1] for key in expected}
    for key, parameter in expected.items():
        theirs = tuple(state[source[key]].shape) if source[key] in state else "nothing"
        if theirs != tuple(parameter.shape):
            raise UserError(
                f"--lpips_weights {path} does not fit --lpips_net {net}: "
                f"{source[key]} is {theirs} where the network has {tuple(parameter.shape)}"
            )
    model.net.load_state_dict({key: state[source[key]] for key in expected})
    return Network(model.eval().requires_grad_(False), path, sha256(path))


def inception_network(
    given: str | None = None, folder: str | None = None, layer: str = "2048"
) -> Network:
    """torch-fidelity's Inception, which returns the 2048 features of FID or those of another layer.

    Raises UserError as `lpips_network` does.
    """
    from torch_fidelity import FeatureExtractorInceptionV3

    path = find_weights("--inception_weights", given, "inception", folder)
    copy = io.BytesIO()  # of safely read tensors: the extractor unpickles without restriction
    torch.save(read_state_dict("--inception_weights", path), copy)
    copy.seek(0)
    try:
        model = FeatureExtractorInceptionV3(
            "inception-v3-compat", [layer], feature_extractor_weights_path=copy
        )
    except RuntimeError as error:
        reason = one_line(error).rpartition("FeatureExtractorInceptionV3: ")[2]
        reason = textwrap.shorten(reason, 160, placeholder=" …")
        raise UserError(
            f"--inception_weights {path} does not fit torch-fidelity's Inception: {reason}"
        ) from error
    return Network(model, path, sha256(path))


def find_weights(
    flag: str, given: str | None, name: str, folder: str | None, without: str = WITHOUT
) -> Path:
    """The given file, or that of WEIGHTS[name] in the folder (torch hub's), downloaded if missing.

    without: advice if it can neither be found nor downloaded.
    """
    if given is not None:
        return Path(given)
    wanted, place = WEIGHTS[name], weights_folder(folder)
    try:
        return find(wanted, place) or download_usual(wanted, place)
    except (Unavailable, UserError) as error:
        raise UserError(
            f"{wanted.usual} is not in {place} (--weights_dir) and cannot be downloaded "
            f"({one_line(error)}); try python evaluation.py --fetch_weights, {without.format(flag)}"
        ) from error


def fetch_weights(folder: str | None = None) -> Iterator[str]:
    """Download the weights of every network into the folder (torch hub's)."""
    return fetch(WEIGHTS, KNOWN_VALUES, weights_folder(folder))


def known_lpips(net: str, path: Path) -> float:
    """The mean LPIPS of torchmetrics' documented example, drawn after an LPIPS-VGG."""
    from torchvision.models import vgg16

    network = lpips_network(net, str(path)).module
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(123)
        vgg16(init_weights=False)
        for channels in (64, 128, 256, 512, 512):  # the linear heads
            nn.Conv2d(channels, 1, 1, bias=False)
        x, y = (torch.rand(10, 3, 100, 100) * 2 - 1 for _ in range(2))
        return float(network(x, y).mean())


def known_fid(path: Path) -> float:
    """The FID, of 64 features, of torchmetrics' documented example, drawn after its network."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(123)
        network = inception_network(str(path), layer="64").module
        sets = FeatureStatistics(), FeatureStatistics()
        for statistics, bounds in zip(sets, ((0, 200), (100, 255))):
            images = torch.randint(*bounds, (100, 3, 299, 299), dtype=torch.uint8)
            for first in range(0, 100, 10):
                statistics.update(features(images[first : first + 10], network))
    return frechet_distance(*sets)


KNOWN_VALUES: dict[str, Callable[[Path], float]] = {
    "vgg": partial(known_lpips, "vgg"),
    "alex": partial(known_lpips, "alex"),
    "inception": known_fid,
}


def read_state_dict(flag: str, path: Path) -> Mapping[str, Tensor]:
    """Read a state dict without executing code from the file."""
    state = read_weights(f"{flag} {path}", path)
    if not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"{flag} {path} is refused: it holds no state dict")
    return state
