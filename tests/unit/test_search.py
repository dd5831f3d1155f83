"""The codevector search: exactness, ties, calls without values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from modules import LooCQuantizer
from modules.quantizers.looc import search
from modules.quantizers.looc.search import DISTANCES, SEARCHES


@pytest.fixture(autouse=True)
def compiler() -> None:
    torch.compiler.reset()  # PyTorch compiles one function for eight shapes at most


def make() -> LooCQuantizer:
    torch.manual_seed(0)
    quantizer = LooCQuantizer(8, 4)
    torch.nn.init.normal_(quantizer.codebook)
    quantizer.search = "faiss"
    return quantizer.eval()


def latents() -> torch.Tensor:
    return torch.randn(2, 8, 3, 5, generator=torch.Generator().manual_seed(1))


def fake_call(quantizer: LooCQuantizer) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert quantizer.encode(latents()).shape == (2, 3, 5, 2)


TRACED: dict[str, Callable[[LooCQuantizer], object]] = {
    "fake": fake_call,
    "meta": lambda quantizer: search.search(
        torch.empty(5, 4, device="meta"), quantizer.codebook.to("meta"), "l2", "faiss"
    ),
    "traced": lambda quantizer: torch.jit.trace_module(quantizer, {"encode": latents()}),
    "fx": lambda quantizer: make_fx(lambda z: quantizer.encode(z))(latents()),
    "gradient": lambda quantizer: quantizer.encode(
        latents().contiguous(memory_format=torch.channels_last).requires_grad_()
    ),
}


@pytest.mark.parametrize("call", TRACED.values(), ids=TRACED)
@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning"
)
def test_no_traced_call_keeps_faiss_out(
    call: Callable[[LooCQuantizer], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss")
    quantizer, z = make(), latents()
    traced = call(quantizer)
    assert not search.failed_searches
    assert not search.pauses
    if callable(traced):  # it has not stored the indices of the example as a constant
        z = torch.randn(2, 8, 3, 5)
        encode = getattr(traced, "encode", traced)
        assert torch.equal(encode(z), quantizer.encode(z))
    used = []

    def spy(*arguments: Any) -> torch.Tensor:
        used.append(arguments)
        return search.search_blocks(*arguments)

    monkeypatch.setitem(SEARCHES, "faiss", spy)
    quantizer.encode(z)
    assert used


def test_the_threshold_of_faiss_is_restored() -> None:
    faiss = pytest.importorskip("faiss")
    before = faiss.cvar.distance_compute_blas_threshold
    search.search(torch.randn(50, 4), torch.randn(8, 4), "l2", "faiss")
    assert faiss.cvar.distance_compute_blas_threshold == before


def excess(features: torch.Tensor, codebook: torch.Tensor, distance: str, backend: str) -> float:
    """Similarity lost by the search; with "l2" relative to the squares about the mean."""
    found = search.search(features, codebook, distance, backend)
    features, codebook = features.double(), codebook.double()
    if distance == "cos":
        similarity = F.normalize(features) @ F.normalize(codebook).T
        scale = torch.ones(())
    else:
        mean = codebook.mean(0)
        similarity = -torch.cdist(
            features, codebook, compute_mode="donot_use_mm_for_euclid_dist"
        ).square()
        scale = (features - mean).square().sum(1) + (codebook - mean).square().sum(1)[found]
    lost = similarity.amax(1) - similarity.gather(1, found[:, None])[:, 0]
    return float((lost / scale).max())


@pytest.mark.parametrize("backend", SEARCHES)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dim", [2, 4, 20])
def test_every_search_is_within_a_millionth_of_the_best(
    backend: str, distance: str, dim: int
) -> None:
    """Both directions, any length, and 1,000 standard deviations from the origin."""
    if backend == "faiss":
        pytest.importorskip("faiss")
    if backend == "compiled" and dim > 4:
        pytest.skip("compiled for low dimensions")
    torch.manual_seed(0)
    features, codebook = torch.randn(3000, dim), torch.randn(256, dim)
    start = codebook / 1e4
    for pair in (
        (features, codebook),
        (1000 * features, codebook),
        (features / 1000, codebook),
        (features, start),
        (start, features),
        (features + 1000, codebook + 1000),
        (codebook + 1000, features + 1000),
        (codebook, features + 1000),
    ):
        assert excess(*pair, distance, backend) < 1e-6
    if distance == "l2":  # a sum of powers of two is exact, so the offset changes no index
        features, codebook = (x.mul(256).round() / 256 for x in (features, codebook))
        near = search.search(features, codebook, distance, backend)
        assert torch.equal(near, search.search(features + 1000, codebook + 1000, distance, backend))


@pytest.mark.parametrize("backend", SEARCHES)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(("size", "dim"), [(48, 4), (1000, 3), (48, 64), (1024, 64)])
def test_the_lowest_of_equals_is_found(backend: str, distance: str, size: int, dim: int) -> None:
    if backend == "faiss":
        pytest.importorskip("faiss")
    if backend == "compiled" and dim > 4:
        pytest.skip("compiled for low dimensions")
    torch.manual_seed(0)
    features, codebook = torch.randn(3000, dim), torch.randn(size // 2, dim)
    features[::5] = 0
    for keys in (codebook, codebook.round()):  # rounded ones agree in many coordinates
        found = search.search(features, keys.repeat(2, 1), distance, backend)
        lowest = (keys == keys[:, None]).all(2).int().argmax(1)
        assert torch.equal(found, lowest[found % len(keys)])
        if distance == "cos":
            assert not found[::5].any()


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_matched_in_float32(distance: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    quantizer = LooCQuantizer(1024, 4, distance=distance).eval()
    torch.nn.init.normal_(quantizer.codebook)
    z = torch.randn(4, 16, 8, 8).to(dtype)
    found = quantizer.to(dtype).encode(z)
    assert torch.equal(found, quantizer.float().encode(z.float()))


def test_faiss_takes_features_of_any_strides(caplog: pytest.LogCaptureFixture) -> None:
    """Units of a single position that were split by "interval" are a transposed view."""
    pytest.importorskip("faiss")
    quantizer = LooCQuantizer(16, 4, split="interval").eval()
    quantizer.search = "faiss"
    z = torch.randn(1, 8, 1, 1)
    quantizer.encode(z)
    assert not caplog.records
