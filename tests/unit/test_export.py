"""Export with free batch, height and width: torch.export and both ONNX exporters, run elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from modules import LooCPlugin, LooCQuantizer

Run = Callable[[Tensor], list[Tensor]]
SETTINGS: tuple[dict[str, Any], ...] = (
    {"latent_norm": "layer", "split": "interval"},
    {"latent_norm": "running", "interpolation_scale": 2, "distance": "l2", "rate_weight": 0.1},
    {"num_passes": 2, "latent_norm": "running"},
)


class Whole(nn.Module):
    """Small autoencoder around the plug-in."""

    def __init__(self, **setting: Any) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, 8, 4, 4)
        self.plugin = LooCPlugin(16, 8, sane_index_shape=True, **setting)
        self.quantizer: LooCQuantizer = self.plugin.quantizer
        self.decoder = nn.ConvTranspose2d(8, 3, 4, 4)

    def encode(self, images: Tensor) -> Tensor:
        return self.quantizer.encode(self.encoder(images))

    def forward(self, images: Tensor) -> Any:
        latents, _, (_, _, indices) = self.plugin(self.encoder(images))
        return self.decoder(latents), indices


class Encoder(Whole):
    def forward(self, images: Tensor) -> Any:
        return self.encode(images)


class Decoder(Whole):
    def forward(self, indices: Tensor) -> Any:
        return self.decoder(self.quantizer.decode(indices))


def example(model: Whole, batch: int, height: int, width: int) -> Tensor:
    """Images, or the indices of such images."""
    images = torch.randn(batch, 3, height, width)
    return model.encode(images) if isinstance(model, Decoder) else images


def free_axes(model: Whole) -> tuple[int, int, int]:
    return (0, 1, 2) if isinstance(model, Decoder) else (0, 2, 3)


def by_export(model: Whole, images: Tensor, _: Path) -> Run:
    shapes = (dict.fromkeys(free_axes(model), Dim.DYNAMIC),)
    module = torch.export.export(model, (images,), dynamic_shapes=shapes, strict=False).module()
    return lambda inputs: as_list(module(inputs))


def by_onnx(model: Whole, images: Tensor, folder: Path, *, dynamo: bool) -> Run:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path, axes = folder / "model.onnx", free_axes(model)
    if dynamo:
        shapes = (dict.fromkeys(axes, Dim.DYNAMIC),)
        torch.onnx.export(model, (images,), path, dynamic_shapes=shapes, verbose=False)
    else:
        names = {"input": {axis: f"axis{axis}" for axis in axes}}
        torch.onnx.export(
            model, (images,), path, dynamo=False, input_names=["input"], dynamic_axes=names
        )
    session = onnxruntime.InferenceSession(path)
    (name,) = (each.name for each in session.get_inputs())
    return lambda inputs: [torch.from_numpy(x) for x in session.run(None, {name: inputs.numpy()})]


def as_list(result: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: "-".join(setting) or "paper")
@pytest.mark.filterwarnings("ignore")
def test_a_quantizer_is_exported_alone_and_saved(
    setting: dict[str, Any], channel_dim: int, tmp_path: Path
) -> None:
    quantizer = LooCQuantizer(16, 4, latent_channels=8, channel_dim=channel_dim, **setting).eval()
    z = torch.randn(2, 8, 6, 6).movedim(1, channel_dim)
    torch.export.save(torch.export.export(quantizer, (z,)), tmp_path / "quantizer.pt2")
    again = torch.export.load(tmp_path / "quantizer.pt2").module()
    torch.testing.assert_close(again(z), quantizer(z))


@pytest.mark.filterwarnings("ignore")
def test_torchscript_has_the_axes_of_channels_that_come_last() -> None:
    """Count axes from 0: the older exporter to ONNX writes them as they are."""
    quantizer = LooCQuantizer(16, 4, channel_dim=-1).eval()
    graph = torch.jit.trace(quantizer, torch.randn(2, 6, 6, 8)).inlined_graph
    moves = [node for node in graph.nodes() if node.kind() == "aten::movedim"]
    assert len(moves) == 3
    assert all(value.toIValue() >= 0 for node in moves for value in [*node.inputs()][1:])


EXPORTERS: dict[str, Callable[[Whole, Tensor, Path], Run]] = {
    "torch": by_export,
    "onnx": lambda *given: by_onnx(*given, dynamo=True),
    "torchscript": lambda *given: by_onnx(*given, dynamo=False),
}


@pytest.mark.filterwarnings("ignore")  # the exporters' own
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: "-".join(setting) or "paper")
@pytest.mark.parametrize("form", [Whole, Encoder, Decoder])
@pytest.mark.parametrize(
    "exporter",
    [
        "torch",
        pytest.param("onnx", marks=pytest.mark.slow),  # minutes on a busy machine
        pytest.param("torchscript", marks=pytest.mark.slow),
    ],
)
def test_exports_run_at_other_sizes(
    exporter: str, form: type[Whole], setting: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = form(**setting)
    model.plugin(model.encoder(torch.randn(4, 3, 16, 16)))  # a training call
    model.eval()
    with torch.no_grad():
        run = EXPORTERS[exporter](model, example(model, 2, 24, 32), tmp_path)
        for size in ((2, 24, 32), (1, 16, 16), (5, 40, 20)):
            inputs = example(model, *size)
            torch.testing.assert_close(run(inputs), as_list(model(inputs)), rtol=1e-4, atol=1e-5)
