"""Properties that hold for every anchor, distance, split and interpolation scale."""

from __future__ import annotations

import itertools
import math
import os
import resource
import signal
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modules import LooCQuantizer
from modules.quantizers.looc import search, usage
from modules.quantizers.looc.anchors import ANCHORS, closest_anchor, most_similar_anchor
from modules.quantizers.looc.losses import contrastive_terms
from modules.quantizers.looc.search import DISTANCES, SEARCHES
from modules.quantizers.looc.units import SPLITS, extrapolate, interpolate_back
from modules.quantizers.looc.usage import code_bits, reinit_rate
from tests.conftest import HANGS

SCALES = (0, 1, 2, 3, 4)
SETTINGS = [
    dict(zip(("anchor", "distance", "split", "interpolation_scale"), values))
    for values in itertools.product(ANCHORS, DISTANCES, SPLITS, SCALES)
]
every_setting = pytest.mark.parametrize(
    "setting", SETTINGS, ids=lambda setting: "-".join(map(str, setting.values()))
)


def make(setting: dict[str, Any], num_embedding: int = 8, dim: int = 4) -> LooCQuantizer:
    torch.manual_seed(0)
    quantizer = LooCQuantizer(num_embedding, dim, **setting)
    torch.nn.init.normal_(quantizer.codebook)
    return quantizer


def latents(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (2, 8, 3, 5)), generator=torch.Generator().manual_seed(1))


@every_setting
def test_output_is_the_decoding_of_its_own_indices(setting: dict[str, Any]) -> None:
    quantizer, z = make(setting).eval(), latents()
    output, _, indices = quantizer(z)
    units = 8 * max(1, setting["interpolation_scale"]) ** 2 // 4
    assert indices.shape == (2, 3, 5, units)
    assert indices.dtype == torch.int64
    assert output.shape == z.shape
    torch.testing.assert_close(output, quantizer.decode(indices), rtol=0, atol=1e-6)
    assert torch.equal(quantizer.encode(z), indices)


@every_setting
def test_gradient_passes_straight_through(setting: dict[str, Any]) -> None:
    quantizer, z = make(setting).eval(), latents().requires_grad_()
    direction = torch.randn(z.shape)
    output = quantizer(z).latents
    (gradient,) = torch.autograd.grad((output * direction).sum(), z)
    # Expected: the gradient through extrapolation and its inverse, without a match between them.
    scale = setting["interpolation_scale"]
    smooth = interpolate_back(extrapolate(z, scale), scale)
    (expected,) = torch.autograd.grad((smooth * direction).sum(), z)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("setting", [{}, {"codebook_update": "ema"}, {"anchor": "none"}])
def test_a_frozen_model_in_training_mode_is_told_once(
    setting: dict[str, Any], recwarn: pytest.WarningsRecorder
) -> None:
    """The encoder alone tells that a codebook that never has a gradient is frozen."""
    model = nn.Sequential(nn.Conv2d(8, 8, 1), make(setting))
    for _ in range(2):  # training, and evaluation in evaluation mode
        model(latents())
        model.eval()(latents())
        with torch.no_grad():
            model(latents())
        model.train()
    assert not len(recwarn)
    model.requires_grad_(False)
    for _ in range(2):
        model(latents())
    told = [str(warning.message) for warning in recwarn]
    assert len(told) == (0 if setting == {"anchor": "none"} else 1)  # nothing of it moves
    assert all("call eval() to keep them as they are" in line for line in told)


def test_validation_in_training_mode_is_told() -> None:
    quantizer = make({})
    with torch.no_grad(), pytest.warns(UserWarning, match="moves its codevectors"):
        quantizer(latents())


@every_setting
def test_evaluation_changes_nothing(setting: dict[str, Any]) -> None:
    quantizer = make(setting).eval()
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    random_state = torch.get_rng_state()
    quantizer(latents())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


@every_setting
def test_a_dead_codevector_moves_and_a_live_one_stays(setting: dict[str, Any]) -> None:
    quantizer, z = make(setting), latents().abs()
    quantizer.usage.fill_(1.0)
    quantizer.usage[3] = 0.0
    with torch.no_grad():
        quantizer.codebook[3] = -50.0  # far from all features and opposite to them
    before = quantizer.codebook.detach().clone()
    quantizer(z)
    moved = (quantizer.codebook != before).any(dim=1).nonzero().flatten()
    assert moved.tolist() == ([] if setting["anchor"] == "none" else [3])


@every_setting
def test_a_dead_codevector_lands_on_a_feature(setting: dict[str, Any]) -> None:
    if setting["anchor"] == "none":
        return
    quantizer, z = make(setting, num_embedding=2), latents().abs()
    with torch.no_grad():
        quantizer.codebook[1] = torch.tensor(-1e3)
    quantizer(z)
    scale = setting["interpolation_scale"]
    channels_last = extrapolate(z, scale).permute(0, 2, 3, 1)
    features = SPLITS[setting["split"]].cut(channels_last, 4).reshape(-1, 4)
    rate = reinit_rate(quantizer.usage)[1]
    anchor = (quantizer.codebook[1].detach() - (1 - rate) * torch.tensor(-1e3)) / rate
    assert (features - anchor).abs().amax(dim=1).min() < 1e-2


@pytest.mark.parametrize("distance", DISTANCES)
def test_match_and_anchors_agree_with_the_whole_matrix(
    distance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, codebook = torch.randn(1000, 4), torch.randn(37, 4)
    prepare, similarity_of, _ = DISTANCES[distance]
    whole = similarity_of(prepare(features), prepare(codebook))
    monkeypatch.setattr(search, "block_elements", lambda *_: 1000)  # many blocks
    assert torch.equal(search.search(features, codebook, distance), whole.argmax(1))
    closest = features[whole.argmax(0)]
    quantizer = LooCQuantizer(37, 4, distance=distance)
    for backend in SEARCHES:
        quantizer.search = backend
        assert torch.equal(closest_anchor(quantizer, features, codebook).vectors, closest)
    assert torch.equal(most_similar_anchor(quantizer, features, codebook).vectors, closest)


def test_probrandom_draws_from_the_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chi-square test over 20,000 draws, computed in several blocks."""
    torch.manual_seed(3)
    monkeypatch.setattr(search, "block_elements", lambda *_: 3 * 20_000)
    features = F.normalize(torch.randn(10, 3), dim=1)
    codevector = torch.randn(1, 3)
    codevectors = codevector.expand(20_000, 3)
    quantizer = LooCQuantizer(1, 3)
    drawn = most_similar_anchor(quantizer, features, codevectors, gumbel=True).vectors
    counts = (drawn[:, None] == features).all(-1).sum(0)
    expected = 20_000 * F.softmax(F.normalize(codevector, dim=1) @ features.T, dim=1)[0]
    assert ((counts - expected).square() / expected).sum() < 27.9  # 99.9 % quantile, χ²(9)


@pytest.mark.parametrize("num_features", [1, 2, 9, 64, 257])
@pytest.mark.parametrize("distance", DISTANCES)
def test_contrastive_loss_equals_the_sorted_definition(distance: str, num_features: int) -> None:
    codebook = torch.randn(8, 4, requires_grad=True)
    features = torch.randn(num_features, 4)
    prepare, similarity_of, _ = DISTANCES[distance]
    ordered = similarity_of(prepare(codebook), prepare(features)).sort(dim=1).values
    positive = ordered[:, -max(1, num_features // 8) :].mean(1, keepdim=True)
    logits = torch.cat([positive, ordered[:, : num_features // 2]], dim=1) / 0.07
    expected = F.cross_entropy(logits, torch.zeros(8, dtype=torch.int64))

    quantizer = LooCQuantizer(8, 4, distance=distance, contras_loss=True, anchor="none")
    with torch.no_grad():
        quantizer.codebook.copy_(codebook)
    with_loss = quantizer(features.T.reshape(1, 4, num_features, 1)).loss
    without = quantizer.eval()(features.T.reshape(1, 4, num_features, 1)).loss
    torch.testing.assert_close(with_loss - without, expected, rtol=1e-4, atol=1e-5)
    gradient = torch.autograd.grad(with_loss, quantizer.codebook, retain_graph=True)[0]
    base = torch.autograd.grad(without, quantizer.codebook)[0]
    torch.testing.assert_close(
        gradient - base, torch.autograd.grad(expected, codebook)[0], rtol=1e-3, atol=1e-5
    )


def test_contrastive_ties_share_the_lower_half() -> None:
    similarity = torch.tensor([[0.0, 0.5, 0.5, 0.5, 0.5, 1.0]])
    negatives = torch.tensor([0.0, 0.5, 0.5]) / 0.07
    positive = torch.tensor(1.0) / 0.07
    expected = torch.logsumexp(torch.cat([positive[None], negatives]), 0) - positive
    torch.testing.assert_close(contrastive_terms(similarity, 1), expected[None])


def test_interpolation_follows_the_stated_channel_order() -> None:
    z = latents(1, 3, 4, 5)
    upsampled = F.interpolate(z, scale_factor=2, mode="bilinear", align_corners=False)
    extrapolated = extrapolate(z, 2)
    for c, i, j in itertools.product(range(3), range(2), range(2)):
        assert torch.equal(extrapolated[:, c * 4 + i * 2 + j], upsampled[:, c, i::2, j::2])


def test_interval_units_take_every_mth_channel() -> None:
    z = torch.arange(8.0).view(1, 1, 1, 8)
    units = SPLITS["interval"].cut(z, 4)
    assert units[0, 0, 0].tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert torch.equal(SPLITS["interval"].join(units), z)


def test_first_batch_stops_re_initialisation_but_not_counting() -> None:
    quantizer = make({"first_batch": True})
    quantizer(latents())
    codebook, usage = quantizer.codebook.detach().clone(), quantizer.usage.clone()
    restored = make({"first_batch": True})
    restored.load_state_dict(quantizer.state_dict())
    restored(latents())
    assert torch.equal(restored.codebook, codebook)
    assert not torch.equal(restored.usage, usage)


def test_state_survives_a_round_trip() -> None:
    """Two quantisers with the same state continue alike, also with the pool of `random`."""
    one = make({"anchor": "random"}, num_embedding=32)
    one(latents(1, 8, 2, 3))
    assert one.pool_size == 12
    other = LooCQuantizer(32, 4, anchor="random")
    other.load_state_dict(one.state_dict())
    for quantizer in (one, other):
        torch.manual_seed(5)
        quantizer(latents(2, 8, 3, 3))
    assert torch.equal(one.codebook, other.codebook)
    assert torch.equal(one.pool, other.pool)


def test_a_full_pool_takes_new_features() -> None:
    quantizer = make({"anchor": "random"}, num_embedding=8)
    quantizer(latents())
    before = quantizer.pool.clone()
    quantizer(latents() + 10)
    replaced = (quantizer.pool != before).any(1).sum()
    assert quantizer.pool_size == 8
    assert replaced == 4


@pytest.mark.parametrize(
    ("shape", "num_embedding", "dim"),
    [((1, 4, 1, 1), 8, 4), ((1, 4, 1, 1), 1, 4), ((2, 4, 3, 3), 8, 1), ((3, 8, 2, 2), 300, 2)],
    ids=["one feature", "one codevector", "d of one", "fewer features than codevectors"],
)
@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("zero", [False, True])
def test_edges_stay_finite(
    shape: tuple[int, ...], num_embedding: int, dim: int, anchor: str, zero: bool
) -> None:
    quantizer = make({"anchor": anchor, "contras_loss": True}, num_embedding, dim)
    z = latents(*shape).mul(not zero).requires_grad_()
    for _ in range(3):
        output, loss, _ = quantizer(z)
        (loss + output.sum()).backward()
    assert all(torch.isfinite(value).all() for value in quantizer.state_dict().values())
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()
    assert quantizer.codebook.grad is not None
    assert torch.isfinite(quantizer.codebook.grad).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("device_waits", [True, False])
@pytest.mark.parametrize("anchor", ANCHORS)
def test_one_feature_that_is_not_finite_reaches_neither_codebook_nor_usage(
    anchor: str, device_waits: bool, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not device_waits:  # as on CUDA, where the loss is not read
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: tensor.dim() == 0))
    spoiled, clean = make({"anchor": anchor}), make({"anchor": anchor})
    z = latents()
    z[0, 1, 2, 3] = bad
    for _ in range(3):
        spoiled(z)
    assert all(torch.isfinite(value).all() for value in spoiled.state_dict().values())
    clean(latents())
    once = make({"anchor": anchor})
    once(z)
    # Of 60 features one is not counted.
    assert (once.usage * 59 * 100).sum() == pytest.approx(59, rel=1e-4)
    assert (once.usage - clean.usage).abs().max() <= 0.01 / 30


def test_a_batch_without_finite_features_changes_nothing() -> None:
    quantizer = make({"anchor": "closest"})
    quantizer(latents())
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer(latents() * float("nan"))
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_a_batch_that_falls_to_one_codevector(anchor: str, distance: str) -> None:
    quantizer, z = make({"anchor": anchor, "distance": distance}), torch.ones(2, 8, 3, 5)
    for _ in range(300):
        quantizer(z.requires_grad_()).loss.backward()
    assert all(torch.isfinite(value).all() for value in quantizer.state_dict().values())
    assert quantizer.usage.sum() == pytest.approx(1 - 0.99**300, rel=1e-3)


@every_setting
def test_a_batch_in_parts_counts_as_a_whole(setting: dict[str, Any]) -> None:
    whole, parts, z = make(setting), make(setting), latents(5, 8, 3, 5)
    start = parts.codebook.detach().clone()
    for step in range(3):
        whole(z + step)
        for number, part in enumerate((z + step).split([2, 0, 3])):
            assert torch.equal(parts.codebook, start)
            parts.defer_update = number < 2
            parts(part)
        start = parts.codebook.detach().clone()
        if setting["anchor"] in ("closest", "none"):
            assert torch.equal(parts.codebook, whole.codebook)
            assert torch.equal(parts.usage, whole.usage)
    assert parts.usage.sum() == pytest.approx(1 - 0.99**3, rel=1e-4)


def test_no_images_at_all() -> None:
    quantizer = make({})
    z = torch.zeros(0, 8, 3, 5, requires_grad=True)
    output, loss, indices = quantizer(z)
    (loss + output.sum()).backward()
    assert (output.shape, indices.shape, loss.item()) == (z.shape, (0, 3, 5, 2), 0)
    assert quantizer.codebook.grad is not None
    assert not quantizer.codebook.grad.any()


SCALES_OF_FEATURES = (1e-3, 1.0, 1e3)


@pytest.mark.parametrize("backend", SEARCHES)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(
    ("num_features", "num_embedding", "dim"), [(1, 1, 1), (300, 48, 4), (9000, 33, 3), (50, 64, 20)]
)
def test_every_search_is_exact(
    backend: str, distance: str, num_features: int, num_embedding: int, dim: int
) -> None:
    """The similarity found equals the best in float64, also with a codevector of zeros."""
    if backend == "faiss":
        pytest.importorskip("faiss")
    torch.manual_seed(0)
    codebook = torch.randn(num_embedding, dim)
    codebook[0] = 0
    prepare, similarity_of, _ = DISTANCES[distance]
    for scale in SCALES_OF_FEATURES:
        features = torch.randn(num_features, dim) * scale
        indices = search.search(features, codebook, distance, backend)
        whole = similarity_of(prepare(features.double()), prepare(codebook.double()))
        found = whole.gather(1, indices[:, None])[:, 0]
        tolerance = 1e-6 * (1 if distance == "cos" else max(1, scale**2))
        assert (whole.amax(1) - found).max() <= 10 * tolerance
    if search.failed_searches and torch.__version__.startswith("2.11"):
        assert {backend for backend, _ in search.failed_searches} == {"compiled"}
        search.failed_searches.clear()
        pytest.skip("this PyTorch's compiled kernel is wrong, and so torch was used")
    assert not search.failed_searches


@pytest.mark.parametrize("wrong", ["last", "beyond"])
def test_a_wrong_kernel_is_detected(
    wrong: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also with a codevector far away, and if the first features are NaN."""

    def broken(columns: torch.Tensor, keys: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return torch.full((columns.shape[1],), len(keys) - (wrong == "last"))

    monkeypatch.setattr(search, "compiled_argmax", lambda: broken)
    monkeypatch.setattr(search, "kernels_right", {})
    monkeypatch.setattr(search, "failed_searches", set())
    monkeypatch.setattr(search, "pauses", {})
    torch.manual_seed(0)
    features, codebook = torch.randn(9000, 3), torch.randn(33, 3)
    codebook[0] = 100
    search.search(torch.full_like(features, torch.nan), codebook, "l2", "compiled")
    found = search.search(features, codebook, "l2", "compiled")
    assert torch.equal(found, search.search(features, codebook, "l2", "torch"))
    (message,) = caplog.messages
    assert "search by compiled failed (the compiled kernel is wrong for (33, 3)" in message


def test_the_compiled_search_holds_no_matrix() -> None:
    """All similarities are 1.6 GB; the search needs less than a tenth of it."""
    features, codebook = torch.randn(200_000, 2), torch.randn(2000, 2)
    search.search(features[:9000], codebook, "l2", "compiled")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    search.search(features, codebook, "l2", "compiled")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 160_000  # KiB


def test_a_search_that_fails_is_replaced_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once in 64 searches, then in 128; each cause is told once; other sizes are not concerned."""
    tried = []

    def broken(_: object, keys: torch.Tensor, *__: object) -> torch.Tensor:
        tried.append(len(keys))
        raise RuntimeError("no\ncompiler")

    monkeypatch.setitem(SEARCHES, "compiled", broken)
    monkeypatch.setattr(search, "failed_searches", set())
    monkeypatch.setattr(search, "pauses", {})
    features, codebook = torch.randn(50, 4), torch.randn(8, 4)
    expected = search.search(features, codebook, "cos", "torch")
    for _ in range(1 + 64 + 1 + 128):
        assert torch.equal(search.search(features, codebook, "cos", "compiled"), expected)
    assert tried == [8, 8]
    search.search(features, codebook[:7], "cos", "compiled")
    assert tried == [8, 8, 7]
    assert [record.getMessage() for record in caplog.records] == [
        "search by compiled failed (no compiler); using torch instead"
    ]
    monkeypatch.setitem(SEARCHES, "compiled", search.search_blocks)
    search.search(features, codebook, "cos", "compiled")
    assert list(search.pauses) == [("compiled", (7, 4), torch.float32, torch.device("cpu"))]


class Host(nn.Module):
    """Small autoencoder around the quantiser."""

    def __init__(self, **setting: Any) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, 8, 4, 4)
        self.quantizer = LooCQuantizer(16, 4, latent_channels=8, **setting)
        self.decoder = nn.ConvTranspose2d(8, 3, 4, 4)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latents, loss, _ = self.quantizer(self.encoder(images))
        return self.decoder(latents), loss


NORMALISED = {"latent_norm": "batch", "codebook_update": "ema", "codebook_start": "features"}


@pytest.mark.parametrize("setting", [{}, NORMALISED], ids=["paper", "best"])
def test_a_model_around_it_can_be_compiled(setting: dict[str, Any]) -> None:
    """The codebook is the same bit for bit, and nothing is compiled again as the state changes."""
    codebooks, graphs = [], []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        torch.manual_seed(0)
        host = Host(**setting)
        model = torch.compile(host) if compiled else host
        for _ in range(6):
            images = torch.randn(4, 3, 16, 16)
            reconstruction, loss = model(images)
            ((reconstruction - images).square().mean() + loss).backward()
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        codebooks.append(host.quantizer.codebook.detach())
    assert torch.equal(*codebooks)
    assert graphs[:6] == [0] * 6
    assert graphs[6:] == [2] * 6  # the encoder and the decoder


@pytest.mark.parametrize("setting", [{}, NORMALISED], ids=["paper", "best"])
def test_a_model_around_it_can_be_exported(setting: dict[str, Any]) -> None:
    host, images = Host(**setting), torch.randn(4, 3, 16, 16)
    host(images)
    exported = torch.export.export(host.eval(), (images,), strict=False).module()
    torch.testing.assert_close(exported(images), host(images), rtol=1e-6, atol=1e-6)
    assert not search.failed_searches


@pytest.mark.parametrize("shards", [2, 5, 7])
def test_sums_in_shards(shards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are divided as on CUDA, and no row gets more than its part."""
    features, indices = torch.randn(33, 3, dtype=torch.float64), torch.randint(4, (33,))
    expected = usage.sums_by_index(features, indices, 5)
    monkeypatch.setattr(usage, "num_shards", lambda *_: shards)
    torch.testing.assert_close(usage.sums_by_index(features, indices, 5), expected)
    keys, _ = usage.shard_keys(indices, 5)
    assert torch.equal(keys % 5, indices)
    assert torch.bincount(keys, minlength=5 * shards).view(shards, 5).sum(1).max() <= -(
        -33 // shards
    )


@pytest.mark.parametrize("length", [3, 48, 511, 512, 1000, 1024])
def test_row_argmax(length: int) -> None:
    scores = torch.randn(40, length)
    assert torch.equal(search.row_argmax(scores), scores.argmax(1))
    scores = scores.round()  # many equals
    assert torch.equal(search.row_argmax(scores), scores.argmax(1))


def test_safe_steps_do_not_read_the_usage() -> None:
    """Safe steps change nothing, and end before a code can be dead."""
    one, other = make({}, num_embedding=2), make({}, num_embedding=2)
    z = torch.rand(1, 4, 8, 8, generator=torch.Generator().manual_seed(2)) + 1
    reads = 0
    with torch.no_grad():
        for quantizer in (one, other):
            quantizer.codebook.copy_(torch.tensor([[1.0, 1, 1, 1], [-1, -1, -1, -1]]))
    for step in range(800):
        direction = -1 if step < 40 and step % 2 else 1  # codevector 1 is unused from step 40
        for quantizer in (one, other):
            quantizer(direction * z)
        reads += one._safe_steps == 0
        other._safe_steps = 0
        assert torch.equal(one.codebook, other.codebook)
    assert reads < 790
    assert one.codebook[1].sum() > 0  # it was pulled to the features


@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_features_do_not_reach_the_codebook(anchor: str, distance: str, bad: float) -> None:
    quantizer, z = make({"anchor": anchor, "distance": distance}, num_embedding=64), latents()
    z[0, 0, 0, 0] = bad
    for _ in range(3):
        quantizer(z)
    quantizer(torch.full_like(z, bad))
    assert all(value.isfinite().all() for value in quantizer.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types(dtype: torch.dtype) -> None:
    """Latents of any type work with a float32 codebook, and a float64 codebook works too."""
    z = latents().to(dtype)
    output, loss, indices = make({})(z)
    assert (output.dtype, loss.dtype) == (dtype, torch.float32)
    assert torch.equal(indices, make({})(z.float()).indices)
    if dtype == torch.float64:
        assert make({}).double()(z).loss.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_codebook(dtype: torch.dtype) -> None:
    """Its loss does not overflow, and no search backend is marked as failed."""
    quantizer, z = make({}).eval(), 9 * latents(4, 8, 16, 16)
    expected = quantizer(z).loss
    narrow = quantizer.to(dtype)(z.to(dtype))
    assert expected * z.numel() > 65504
    torch.testing.assert_close(narrow.loss, expected, rtol=0.02, atol=0)
    assert not search.failed_searches


@pytest.mark.parametrize("anchor", ANCHORS)
def test_autocast_changes_no_index(anchor: str) -> None:
    one, other = make({"anchor": anchor}), make({"anchor": anchor})
    torch.manual_seed(1)
    plain = one(latents())
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        cast = other(latents())
    assert torch.equal(plain.indices, cast.indices)
    assert torch.equal(one.codebook, other.codebook)


def test_state_moves_between_anchors() -> None:
    make({"anchor": "closest"}).load_state_dict(make({"anchor": "random"}).state_dict())
    make({"anchor": "random"}).load_state_dict(make({"anchor": "closest"}).state_dict())


def test_no_similarity_block_exceeds_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(features: torch.Tensor, codevectors: torch.Tensor) -> torch.Tensor:
        result = features @ codevectors.T
        seen.append(result.numel())
        return result

    monkeypatch.setattr(search, "block_elements", lambda *_: 2000)
    monkeypatch.setitem(DISTANCES, "cos", DISTANCES["cos"]._replace(similarity=spy))
    quantizer = LooCQuantizer(50, 4, anchor="probrandom")
    quantizer.search = "torch"
    quantizer(latents(4, 8, 8, 8))
    assert seen
    assert max(seen) <= 2000


# ------------------------------------------------------------------- switches that the paper lacks

EMA = {"codebook_update": "ema"}
BATCH = {"latent_norm": "batch", "latent_channels": 8}
RUNNING = {"latent_norm": "running", "latent_channels": 8}
SWITCHES: dict[str, dict[str, Any]] = {
    "ema": EMA,
    "features": {"codebook_start": "features"},
    "kmeans": {"codebook_start": "kmeans"},
    "unit": {"latent_norm": "unit"},
    "layer": {"latent_norm": "layer"},
    "batch": BATCH,
    "running": RUNNING,
    "rotation": {"gradient": "rotation"},
    "all": {**EMA, **BATCH, "codebook_start": "kmeans", "gradient": "rotation", "distance": "l2"},
    "all by angle": {**EMA, "latent_norm": "unit", "codebook_start": "features"},
}
every_switch = pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
every_anchor = pytest.mark.parametrize("anchor", ANCHORS)


@every_switch
@every_anchor
@pytest.mark.parametrize("scale", [0, 2])
def test_switches_keep_the_quantisers_properties(
    switch: dict[str, Any], anchor: str, scale: int
) -> None:
    """The output is the decoding of its indices; state stays finite; evaluation changes nothing."""
    quantizer, z = make({**switch, "anchor": anchor, "interpolation_scale": scale}), latents()
    for step in range(4):
        output, loss, _ = quantizer((z + step).requires_grad_())
        (loss + output.square().sum()).backward()
    quantizer.eval()
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    random_state = torch.get_rng_state()
    output, _, indices = quantizer(z)
    torch.testing.assert_close(output, quantizer.decode(indices), rtol=0, atol=1e-6)
    assert torch.equal(quantizer.encode(z), indices)
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, value in quantizer.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.isfinite().all()


@every_switch
def test_switches_survive_a_round_trip(switch: dict[str, Any]) -> None:
    one = make({**switch, "anchor": "random"}, num_embedding=32)
    one(latents())
    other = make({**switch, "anchor": "random"}, num_embedding=32)
    other.load_state_dict(one.state_dict())
    for quantizer in (one, other):
        torch.manual_seed(5)
        quantizer(latents() + 1)
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


@every_switch
@every_anchor
def test_switches_let_no_bad_feature_in(switch: dict[str, Any], anchor: str) -> None:
    quantizer, z = make({**switch, "anchor": anchor}), latents()
    z[0, 0, 0, 0] = torch.inf
    z[1, 5, 1, 1] = torch.nan
    for batch in (z, torch.full_like(z, torch.nan), z, latents()[:0], latents()):
        quantizer(batch)
        assert all(value.isfinite().all() for value in quantizer.state_dict().values())


@pytest.mark.parametrize("setting", [EMA, {**EMA, "anchor": "none"}, {**EMA, "distance": "l2"}])
def test_ema_in_parts_counts_as_a_whole(setting: dict[str, Any]) -> None:
    whole, parts, z = make(setting).double(), make(setting).double(), latents(5, 8, 3, 5).double()
    for step in range(3):
        whole(z + step)
        for number, part in enumerate((z + step).split([2, 0, 3])):
            parts.defer_update = number < 2
            parts(part)
        torch.testing.assert_close(parts.codebook, whole.codebook)
        torch.testing.assert_close(parts.ema_count, whole.ema_count)


def test_ema_is_the_running_mean_of_what_matched() -> None:
    """The codebook equals s_k / c_k of running sums and counts, computed here step by step."""
    quantizer = make({**EMA, "anchor": "none", "distance": "l2", "ema_decay": 0.7})
    counts, sums = torch.zeros(8), torch.zeros(8, 4)
    start = quantizer.codebook.detach().clone()
    for step in range(6):
        z = latents() * (1 + step)
        indices = quantizer(z).indices
        features = z.permute(0, 2, 3, 1).reshape(-1, 4)
        counts = 0.7 * counts + 0.3 * torch.bincount(indices.flatten(), minlength=8)
        sums = 0.7 * sums + 0.3 * torch.zeros(8, 4).index_add(0, indices.flatten(), features)
        expected = torch.where(counts[:, None] > 0, sums / counts[:, None], start)
        torch.testing.assert_close(quantizer.codebook.detach(), expected)
        assert not quantizer.codebook.requires_grad
        quantised = quantizer.eval()(z)
        quantizer.train()
    # The loss is the commitment term alone.
    error = (quantizer.decode(quantised.indices) - z).square().mean()
    torch.testing.assert_close(quantised.loss, 0.25 * error)


@pytest.mark.parametrize("backend", SEARCHES)
def test_the_match_weighs_distance_against_bits(backend: str) -> None:
    if backend == "faiss":
        pytest.importorskip("faiss")
    quantizer = make({"distance": "l2", "rate_weight": 0.7}).eval()
    quantizer.search = backend
    quantizer.usage.copy_(torch.tensor([0.5, 0.2, 0.1, 0.1, 0.05, 0.03, 0.02, 0.0]))
    z = latents()
    features = z.permute(0, 2, 3, 1).reshape(-1, 4).double()
    share = (quantizer.usage.double() + 0.01 / 8) / 1.01
    squared = torch.cdist(features, quantizer.codebook.detach().double()).square()
    cost = squared - 0.7 * share.log2()
    found = quantizer.encode(z).flatten()
    assert not torch.equal(found, squared.argmin(1))
    torch.testing.assert_close(cost.gather(1, found[:, None])[:, 0], cost.amin(1))
    assert not search.failed_searches


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_bits_are_equal_before_any_use_and_always_finite(dtype: torch.dtype) -> None:
    assert code_bits(torch.zeros(16, dtype=dtype)).tolist() == pytest.approx([4.0] * 16)
    once = torch.zeros(2**20, dtype=dtype)
    once[0] = 0.5
    assert code_bits(once).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rate_weight", [0.1, 1e6])
def test_before_any_use_the_match_is_the_nearest(rate_weight: float, dtype: torch.dtype) -> None:
    quantizer = make({"distance": "l2", "rate_weight": rate_weight}, num_embedding=64).to(dtype)
    found = quantizer.eval().encode(latents().to(dtype))
    quantizer.rate_weight = 0.0
    assert torch.equal(found, quantizer.encode(latents().to(dtype)))


def test_a_rate_weight_lowers_the_entropy_of_the_codes() -> None:
    entropies = []
    for rate_weight in (0.0, 0.3, 1.0):
        torch.manual_seed(0)
        settings = {**EMA, "distance": "l2", "codebook_start": "features"}
        quantizer = make({**settings, "rate_weight": rate_weight}, num_embedding=32)
        for _ in range(300):
            quantizer(torch.randn(8, 8, 5, 5))
        share = torch.bincount(quantizer.eval().encode(torch.randn(64, 8, 5, 5)).flatten()) / 3200
        entropies.append(-float(torch.special.xlogy(share, share).sum()) / math.log(2))
    assert entropies[0] > entropies[1] + 0.1
    assert entropies[1] > entropies[2] + 0.1


def test_a_codevector_that_ema_left_dead_is_pulled() -> None:
    quantizer, z = make(EMA), latents().abs()
    quantizer.usage.fill_(1.0)
    quantizer.usage[3] = 0.0
    with torch.no_grad():
        quantizer.codebook[3] = -50.0
    quantizer(z)
    assert quantizer.codebook[3].min() > -1


def test_a_start_from_features_takes_each_at_most_once() -> None:
    quantizer, z = (
        make({"codebook_start": "features", "anchor": "none"}, num_embedding=40),
        latents(),
    )
    z[0, 2] = torch.nan  # 15 of 60 features
    quantizer(z)
    features = z.permute(0, 2, 3, 1).reshape(-1, 4)
    found = (quantizer.codebook[:, None] == features).all(-1)  # (K, N)
    assert found.sum(1).eq(1).all()
    assert found.sum(0).max() == 1
    before = quantizer.codebook.detach().clone()
    quantizer(latents() + 1)
    assert torch.equal(quantizer.codebook, before)


def test_a_start_with_fewer_features_than_codevectors() -> None:
    quantizer = make({"codebook_start": "kmeans", "anchor": "none"}, num_embedding=100)
    quantizer(latents())
    assert quantizer.started
    waiting = make({"codebook_start": "features"})
    before = waiting.codebook.detach().clone()
    waiting(torch.full_like(latents(), torch.nan))
    assert torch.equal(waiting.codebook, before)
    assert not waiting.started
    waiting(latents())
    assert waiting.started


def test_kmeans_finds_clusters() -> None:
    centres = torch.tensor([[3.0, 0], [0, 3], [-3, 0], [0, -3]])
    features = centres.repeat(50, 1) + 0.1 * torch.randn(200, 2)
    errors = {}
    for start in ("features", "kmeans"):
        torch.manual_seed(0)
        quantizer = LooCQuantizer(8, 2, codebook_start=start, anchor="none", distance="l2")
        z = features.T.reshape(1, 2, 200, 1)
        quantizer(z)
        errors[start] = (quantizer.eval()(z).latents - z).square().mean()
    assert errors["kmeans"] < 0.9 * errors["features"]


def test_rotation_is_the_gradient_of_the_turned_and_stretched_feature() -> None:
    quantizer = make({"gradient": "rotation", "commitment_cost": 0.0, "anchor": "none"}).double()
    z, direction = latents().double().requires_grad_(), latents().double().flip(0)
    output, _, indices = quantizer(z)
    (gradient,) = torch.autograd.grad((output * direction).sum(), z)
    units = z.permute(0, 2, 3, 1).reshape(-1, 4)
    with torch.no_grad():
        chosen = quantizer.codebook[indices.flatten()]
        turned = []
        for feature, codevector in zip(units, chosen):
            a, b = F.normalize(feature, dim=0), F.normalize(codevector, dim=0)
            r = F.normalize(a + b, dim=0)
            matrix = torch.eye(4) - 2 * torch.outer(r, r) + 2 * torch.outer(b, a)
            turned.append(matrix * codevector.norm() / feature.norm())
            torch.testing.assert_close(turned[-1] @ feature, codevector)
    again = torch.einsum("nij,nj->ni", torch.stack(turned), units)
    again = again.view(2, 3, 5, 8).permute(0, 3, 1, 2)
    torch.testing.assert_close(again, output)
    (expected,) = torch.autograd.grad((again * direction).sum(), z)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("norm", ["unit", "layer", "batch"])
def test_normalised_latents_have_mean_square_one(norm: str) -> None:
    quantizer = make({"latent_norm": norm, "latent_channels": 8})
    units = quantizer._cut(1e3 * latents(4, 8, 6, 6), training=True)
    over = {"unit": (4,), "layer": (3, 4), "batch": (0, 1, 2)}[norm]
    torch.testing.assert_close(units.square().mean(over), torch.ones_like(units.mean(over)))
    assert norm == "unit" or units.mean(over).abs().max() < 1e-5


def test_batch_norm_is_pytorchs() -> None:
    quantizer = make({**BATCH, "split": "interval"})
    peer = torch.nn.BatchNorm2d(8, affine=False)
    for step in range(3):
        z = (3 * latents() + step).requires_grad_()
        ours = quantizer._join(quantizer._cut(z, training=True))
        theirs = peer(z)
        torch.testing.assert_close(ours, theirs)
        direction = latents().flip(0)
        gradients = [torch.autograd.grad((y * direction).sum(), z)[0] for y in (ours, theirs)]
        torch.testing.assert_close(*gradients)
    mean = quantizer._join(quantizer.latent_mean.expand(1, 1, 1, -1, -1)).flatten()
    torch.testing.assert_close(mean, peer.running_mean)
    before = quantizer.latent_variance.clone()
    quantizer(latents()[:0])
    assert torch.equal(quantizer.latent_variance, before)


def test_running_norm_uses_its_averages() -> None:
    """Plain means of the first calls, then of rate 0.1; constants to the gradient."""
    quantizer = make(RUNNING)
    mean, variance = torch.zeros(8), torch.ones(8)
    for step in range(1, 13):
        z = (3 * latents(2, 8, 5, 4) + step).requires_grad_()
        ours = quantizer._join(quantizer._cut(z, training=True))
        rate = max(0.1, 1 / step)
        # Moments of a mixture: the past with weight 1 − rate, this call with weight rate.
        squares = (1 - rate) * (variance + mean**2) + rate * z.detach().square().mean((0, 2, 3))
        mean = mean + rate * (z.detach().mean((0, 2, 3)) - mean)
        variance = squares - mean**2
        scale = (variance + 1e-5).rsqrt()[:, None, None]
        torch.testing.assert_close(ours, (z - mean[:, None, None]) * scale)
        (gradient,) = torch.autograd.grad(ours.sum(), z)
        torch.testing.assert_close(gradient, scale.expand_as(z))
        torch.testing.assert_close(quantizer._join(quantizer._cut(z)), ours)
    before = {name: value.clone() for name, value in quantizer.named_buffers()}
    quantizer(latents()[:0])
    quantizer._cut(torch.full((1, 8, 2, 2), float("nan")), training=True)
    for name in ("latent_mean", "latent_variance", "latent_steps"):
        assert torch.equal(dict(quantizer.named_buffers())[name], before[name])


@pytest.mark.parametrize("parts", [1, 8])
def test_running_norm_is_independent_of_images_per_call(parts: int) -> None:
    """The images differ much from each other and little within; also one image per call."""
    quantizer = make({**RUNNING, "codebook_update": "ema"})
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        z = torch.randn(8, 8, 1, 1, generator=generator)
        z = 5 + z + 0.1 * torch.randn(8, 8, 5, 4, generator=generator)
        for part in z.chunk(parts):
            quantizer(part)
    assert (quantizer._cut(z).square().mean() - 1).abs() < 0.5
    assert (quantizer.latent_variance - 1).abs().mean() < 0.6


def test_a_batch_whose_squares_overflow_is_ignored() -> None:
    for norm in (RUNNING, {}):
        quantizer = make({**norm, "codebook_update": "ema", "codebook_start": "features"})
        quantizer(latents())
        before = {name: value.clone() for name, value in quantizer.state_dict().items()}
        assert not quantizer(latents() * 1e25).loss.isfinite()
        for name, value in quantizer.state_dict().items():
            if name != "ema_count":  # it decays in a step without matches
                assert torch.equal(value, before[name]), (norm, name)


def test_a_codebook_starts_from_normalised_features() -> None:
    quantizer = make({**RUNNING, "codebook_update": "ema", "codebook_start": "features"})
    spoilt = 100 + latents()
    spoilt[0, 0, 0, 0] = torch.nan
    quantizer(spoilt)
    assert quantizer.started is not None
    assert not quantizer.started
    assert not quantizer.latent_mean.any()
    quantizer(100 + latents())
    assert quantizer.started
    assert quantizer.codebook.abs().max() < 5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_faiss_searches_in_a_forked_process() -> None:
    pytest.importorskip("faiss")
    quantizer = make({})
    quantizer.search = "faiss"
    expected = quantizer.encode(latents())
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(quantizer.encode(latents()), expected) else 1)
    deadline = time.monotonic() + HANGS
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.05)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended == (child, 0)


# ------------------------------------------------------------------------------ wrong arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_embedding": 0}, "num_embedding 0"),
        ({"embedding_dim": -1}, "embedding_dim -1"),
        ({"distance": "cosine"}, "distance 'cosine' is none of cos, l2"),
        ({"anchor": "nearest"}, "anchor 'nearest'"),
        ({"split": "random"}, "split 'random'"),
        ({"interpolation_scale": -2}, "interpolation_scale -2"),
        ({"commitment_cost": float("nan")}, "commitment_cost nan"),
        ({"codebook_update": "adam"}, "codebook_update 'adam' is none of gradient, ema"),
        ({"ema_decay": 1.0}, r"ema_decay 1.0 is not in \[0, 1\)"),
        ({"codebook_start": "zero"}, "codebook_start 'zero'"),
        ({"latent_norm": "group"}, "latent_norm 'group'"),
        ({"latent_norm": "batch"}, "latent_norm 'batch' needs latent_channels"),
        ({"latent_norm": "running"}, "latent_norm 'running' needs latent_channels"),
        ({"latent_channels": 0}, "latent_channels 0 is less than 1"),
        ({"latent_norm": "batch", "latent_channels": 6}, "does not divide the 6 channels"),
        ({"latent_norm": "unit", "embedding_dim": 1}, "all units of embedding_dim 1"),
        ({"gradient": "none"}, "gradient 'none'"),
        ({"contras_loss": True, "codebook_update": "ema"}, "contras_loss has no effect"),
        ({"rate_weight": -1.0}, "rate_weight -1.0 is not in"),
        ({"rate_weight": math.inf}, "rate_weight inf is not in"),
        ({"rate_weight": 0.5}, "rate_weight 0.5 needs distance 'l2', not 'cos'"),
        ({"num_embedding": "8"}, "num_embedding '8' is not an integer"),
        ({"embedding_dim": None}, "embedding_dim None is not an integer"),
        ({"interpolation_scale": 1.5}, "interpolation_scale 1.5 is not an integer"),
        ({"interpolation_scale": True}, "interpolation_scale True is not an integer"),
        ({"latent_channels": 8.0}, "latent_channels 8.0 is not an integer"),
        ({"channel_dim": "last"}, "channel_dim 'last' is not an integer"),
        ({"channel_dim": 0}, "channel_dim 0 is the axis of the batch"),
        ({"ema_decay": "0.9"}, "ema_decay '0.9' is not a number"),
        ({"commitment_cost": None}, "commitment_cost None is not a number"),
        ({"commitment_cost": math.inf}, "commitment_cost inf is not finite"),
        ({"distance": ["l2"]}, r"distance \['l2'\] is none of"),
        ({"first_batch": "no"}, "first_batch 'no' is not True or False"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LooCQuantizer(**{"num_embedding": 8, "embedding_dim": 4, **arguments})


def test_wrong_inputs_are_named() -> None:
    quantizer = LooCQuantizer(8, 4, interpolation_scale=3)
    with pytest.raises(ValueError, match=r"embedding_dim 4 does not divide the 45 channels"):
        quantizer(torch.randn(1, 5, 4, 4))
    with pytest.raises(ValueError, match="scale 3 needs 1 to 3 axes of positions, not 0"):
        quantizer(torch.randn(5, 4))
    normed = LooCQuantizer(8, 4, latent_norm="batch", latent_channels=4)
    with pytest.raises(ValueError, match="8 channels at channel_dim 1, not latent_channels 4"):
        normed.eval()(torch.randn(1, 8, 4, 4))
    with pytest.raises(ValueError, match=r"latents of torch\.uint8 are not floating-point"):
        quantizer(torch.zeros(1, 4, 4, 4, dtype=torch.uint8))
    normed.search = "annoy"
    with pytest.raises(ValueError, match="search 'annoy' is none of auto, faiss, compiled, torch"):
        normed(torch.randn(1, 4, 4, 4))
    with pytest.raises(TypeError, match="latents have to be a tensor, not list"):
        quantizer.encode([[1.0]])
    with pytest.raises(TypeError, match="indices have to be a tensor, not list"):
        quantizer.decode([[1]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a multiple of 9"):
        quantizer.decode(torch.zeros(1, 4, 4, 2, dtype=torch.int64))
