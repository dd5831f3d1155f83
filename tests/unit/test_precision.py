"""Half precision around the quantiser, which computes in float32; TF32 around its search."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from modules import LooCPlugin, LooCQuantizer
from modules.quantizers.looc.anchors import ANCHORS
from modules.quantizers.looc.norms import LATENT_NORMS
from modules.quantizers.looc.search import search

every_norm = pytest.mark.parametrize("norm", LATENT_NORMS)
every_scale = pytest.mark.parametrize("scale", [0, 2])
every_type = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def trained(norm: str, scale: int, **settings: Any) -> LooCQuantizer:
    """Quantiser after three training calls."""
    torch.manual_seed(0)
    settings |= {"latent_norm": norm, "interpolation_scale": scale, "latent_channels": 8}
    quantizer = LooCQuantizer(128, 4, distance="l2", codebook_start="features", **settings)
    for _ in range(3):
        quantizer(latents().requires_grad_())
    return quantizer


def latents() -> Tensor:
    return 2 * torch.randn(4, 8, 12, 10) + 1


@every_norm
@every_scale
@every_type
@pytest.mark.parametrize("codebook_update", ["gradient", "ema"])
def test_a_narrow_module_agrees_with_its_float32_copy(
    norm: str, scale: int, dtype: torch.dtype, codebook_update: str
) -> None:
    narrow = trained(norm, scale, codebook_update=codebook_update).to(dtype)
    wide = copy.deepcopy(narrow).float()
    z = latents().to(dtype).requires_grad_()
    for training in (True, False):
        ours, theirs = narrow.train(training)(z), wide.train(training)(z.float())
        assert torch.equal(ours.indices, theirs.indices)
        assert torch.equal(ours.loss, theirs.loss)
        assert torch.equal(ours.latents, theirs.latents.to(dtype))
        for name, buffer in wide.named_buffers():
            assert torch.equal(narrow.get_buffer(name), buffer), name
        rounding = 2 * torch.finfo(dtype).eps  # "ema" and anchors are rounded one after the other
        torch.testing.assert_close(narrow.codebook.float(), wide.codebook, rtol=rounding, atol=0)
        wide.codebook.data.copy_(narrow.codebook)
    assert torch.equal(narrow.encode(z), ours.indices)
    assert torch.equal(narrow.decode(ours.indices), ours.latents)


@every_norm
@every_scale
def test_autocast_changes_no_index_and_no_state(norm: str, scale: int) -> None:
    plain, z = trained(norm, scale), latents().bfloat16().requires_grad_()
    cast = copy.deepcopy(plain)
    expected = plain(z.float())
    with torch.autocast("cpu", torch.bfloat16):
        given = cast(z)
    assert torch.equal(given.indices, expected.indices)
    assert torch.equal(given.latents, expected.latents.bfloat16())
    for name, value in plain.state_dict().items():
        assert torch.equal(cast.state_dict()[name], value), name


@every_type
def test_statistics_stay_in_float32(dtype: torch.dtype) -> None:
    """In bfloat16 an average that changes by a hundredth of 1/250 or less would stand still."""
    module = torch.nn.Sequential(LooCPlugin(128, 8, latent_norm="running")).to(dtype)
    assert {value.dtype for value in module.parameters()} == {dtype}
    assert {value.dtype for value in module.buffers()} == {torch.float32}
    assert {value.dtype for value in module.double().buffers()} == {torch.float64}


@every_norm
@pytest.mark.parametrize("anchor", ANCHORS)
def test_a_state_that_a_loader_has_narrowed_is_trained_on(norm: str, anchor: str) -> None:
    """Loaders of diffusers and transformers set buffers too in the type that is asked for."""
    quantizer = trained(norm, 0, anchor=anchor, codebook_update="ema")
    for name, buffer in quantizer.named_buffers():
        setattr(quantizer, name, buffer.bfloat16())
    quantizer.codebook.data = quantizer.codebook.data.bfloat16()
    result = quantizer(latents().bfloat16().requires_grad_())
    assert result.latents.dtype == torch.bfloat16
    assert all(value.isfinite().all() for value in quantizer.state_dict().values())


@pytest.mark.parametrize("allowed", ["high", "medium"])
@pytest.mark.parametrize("distance", ["cos", "l2"])
def test_products_that_a_program_allows_to_round_are_exact_in_the_search(
    allowed: str, distance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TF32 and bfloat16, simulated: whether a processor has them is its own."""
    exact = torch.addmm

    def addmm(offset: Tensor, features: Tensor, keys: Tensor) -> Tensor:
        if precision() not in ("ieee", "highest"):
            features, keys = features.bfloat16().float(), keys.bfloat16().float()
        return exact(offset, features, keys)

    features, codebook = torch.randn(2048, 8), torch.randn(512, 8)
    expected = search(features, codebook, distance, "torch")
    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch, "addmm", addmm)
    torch.set_float32_matmul_precision(allowed)
    try:
        given = precision()
        assert torch.equal(search(features, codebook, distance, "torch"), expected)
        assert precision() == given
        assert torch.get_float32_matmul_precision() == allowed
    finally:
        torch.set_float32_matmul_precision(before)


def precision() -> str:
    """Precision of products of float32 matrices on the CPU."""
    if hasattr(torch.backends, "fp32_precision"):
        return str(torch.backends.mkldnn.matmul.fp32_precision)  # type: ignore[attr-defined]
    return torch.get_float32_matmul_precision()
