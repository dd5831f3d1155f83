"""The networks behind LPIPS and FID: their weights found or downloaded, checked and loaded."""

from __future__ import annotations

import hashlib
import io
import socket
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import torch
from torch import Tensor, nn

from utils.errors import UserError, one_line

DOWNLOAD_TIMEOUT = 20.0  # seconds without an answer


@dataclass(frozen=True)
class Backbone:
    """An LPIPS backbone: torchvision's name of its weights, the smallest image side it takes."""

    weights: str
    smallest_side: int


LPIPS_BACKBONES = {
    "vgg": Backbone("VGG16_Weights.IMAGENET1K_V1", smallest_side=16),
    "alex": Backbone("AlexNet_Weights.IMAGENET1K_V1", smallest_side=31),
}


@dataclass(frozen=True)
class Network:
    """A network ready for use, in evaluation mode, and the file that its weights came from."""

    module: nn.Module
    path: Path
    sha256: str


def lpips_network(net: str, given: str | None = None) -> Network:
    """lpips.LPIPS on the backbone `net`; weights from the given path or torch hub's folder.

    Raises UserError where the weights are missing, damaged or of another network.
    """
    import lpips
    from torchvision.models import get_weight

    path = find_weights("--lpips_weights", given, get_weight(LPIPS_BACKBONES[net].weights).url)
    state = read_weights("--lpips_weights", path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    expected = model.net.state_dict()
    # lpips cuts the backbone into slices but keeps torchvision's numbers of the layers.
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


def inception_network(given: str | None = None) -> Network:
    """torch-fidelity's Inception, giving the 2048 features of FID.

    Raises UserError where the weights are missing, damaged or of another network.
    """
    from torch_fidelity import FeatureExtractorInceptionV3
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = find_weights("--inception_weights", given, URL_INCEPTION_V3)
    # The extractor unpickles what it is given without restriction, so it never sees the file: it
    # gets a copy of the tensors that were read safely.
    copy = io.BytesIO()
    torch.save(read_weights("--inception_weights", path), copy)
    copy.seek(0)
    try:
        model = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=copy
        )
    except RuntimeError as error:
        reason = one_line(error).partition("FeatureExtractorInceptionV3: ")[2] or one_line(error)
        raise UserError(
            f"--inception_weights {path} does not fit torch-fidelity's Inception: "
            f"{textwrap.shorten(reason, 160, placeholder=' …')}"
        ) from error
    return Network(model, path, sha256(path))


def find_weights(flag: str, given: str | None, url: str) -> Path:
    """The given file, else the one in torch hub's folder, downloaded if need be."""
    if given is not None:
        return Path(given)
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    try:
        if not path.is_file():
            download(url, path)
    except (OSError, RuntimeError, HTTPException) as error:  # no network; a wrong hash
        raise UserError(
            f"{path.name} is not in {path.parent} and cannot be downloaded from {url} "
            f"({one_line(error)}); put it there, name the file with {flag}, "
            "or go without: --metrics l1 ssim psnr"
        ) from error
    return path


def download(url: str, path: Path) -> None:
    """Fetch the file and check it against the hash at the end of its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with time_limit(DOWNLOAD_TIMEOUT):
        torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rsplit("-", 1)[1])


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Connections opened inside give up after that many seconds of silence."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def read_weights(flag: str, path: Path) -> Mapping[str, Tensor]:
    """The state dict in the file, opened without executing anything."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(
            f"{flag} {path} cannot be read: {error.strerror or one_line(error)}"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # damaged files raise whatever the decoder stumbled over
        reason = "is damaged, or would execute code when opened"
        raise UserError(
            f"{flag} {path} is refused: it {reason} ({type(error).__name__})"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise UserError(f"{flag} {path} is refused: it holds no state dict")
    return state


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
