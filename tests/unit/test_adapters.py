"""The adapters: arguments, results and methods of the quantisers that they stand for.

tests/clients runs them beside the classes of these projects that no package installs.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.adapters import (
    Adapter,
    LlamaGenQuantizer,
    LucidrainsQuantizer,
    SeedVokenQuantizer,
    SgmQuantizer,
    TiTokQuantizer,
    UnitPermuter,
)

# Of each class the published arguments, K = 16 and c = 8.
ARGUMENTS: dict[type[Adapter], dict[str, Any]] = {
    LucidrainsQuantizer: {"dim": 8, "codebook_size": 16, "accept_image_fmap": True},
    SgmQuantizer: {"n_e": 16, "e_dim": 8},
    TiTokQuantizer: {"codebook_size": 16, "token_size": 8},
    LlamaGenQuantizer: {
        **{"n_e": 16, "e_dim": 8, "beta": 0.25, "entropy_loss_ratio": 0.0},
        **{"l2_norm": False, "show_usage": True},
    },
    SeedVokenQuantizer: {"n_e": 16, "e_dim": 8, "beta": 0.25},
}
every_adapter = pytest.mark.parametrize("form", ARGUMENTS)
# Latents, loss and indices of a result.
RESULTS: dict[type[Adapter], Callable[[Any], tuple[Tensor, Tensor, Tensor]]] = {
    LucidrainsQuantizer: lambda result: (result[0], result[2], result[1]),
    SgmQuantizer: lambda result: (
        *(result[0], result[1]["loss/vq"]),
        result[1]["min_encoding_indices"],
    ),
    TiTokQuantizer: lambda result: (
        *(result[0], result[1]["quantizer_loss"]),
        result[1]["min_encoding_indices"],
    ),
    LlamaGenQuantizer: lambda result: (result[0], sum(result[1][:3]), result[2][2]),
    SeedVokenQuantizer: lambda result: (result[0], result[1], result[2][2]),
}


def make(form: type[Adapter], **settings: Any) -> Any:
    torch.manual_seed(0)
    adapter = form(**{**ARGUMENTS[form], **settings})
    nn.init.normal_(adapter.embedding.weight)
    return adapter


def latents(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 8, 3, 5)), generator=torch.Generator().manual_seed(1))


@every_adapter
@pytest.mark.parametrize("embedding_dim", [2, 8])
def test_results_and_training(form: type[Adapter], embedding_dim: int) -> None:
    """A step trains z and codebook; indices decode to the latents; evaluation changes nothing."""
    adapter, z = make(form, embedding_dim=embedding_dim), latents().requires_grad_()
    before = adapter.embedding.weight.clone()
    output, loss, indices = RESULTS[form](adapter(z))
    assert (output.shape, loss.shape, indices.dtype) == (z.shape, (), torch.int64)
    assert indices.numel() == 2 * 3 * 5 * 8 // embedding_dim
    (output.sum() + loss).backward()
    assert z.grad is not None
    assert not torch.equal(adapter.embedding.weight, before)
    by_ema = adapter.quantizer.codebook_update == "ema"
    assert (adapter.embedding.weight.grad is None) == by_ema
    state = {name: value.clone() for name, value in adapter.eval().state_dict().items()}
    output, _, indices = RESULTS[form](adapter(z))
    assert all(torch.equal(value, state[name]) for name, value in adapter.state_dict().items())
    shape = (2, 8, 3, 5) if form is LlamaGenQuantizer else (2, 3, 5, 8)
    for dtype in (torch.int64, torch.int32, torch.int16):
        torch.testing.assert_close(adapter.get_codebook_entry(indices.to(dtype), shape), output)


@every_adapter
def test_keywords_of_the_plugin(form: type[Adapter]) -> None:
    settings = {"split": "interval", "interpolation_scale": 2, "anchor": "none", "distance": "cos"}
    adapter = make(form, **settings)
    assert {name: getattr(adapter.quantizer, name) for name in settings} == settings
    with pytest.raises(TypeError, match="colour"):
        make(form, colour=1)


@pytest.mark.parametrize(
    ("form", "arguments", "message"),
    [
        (LucidrainsQuantizer, {"heads": 2}, "heads 2 has no meaning with LooC, only 1"),
        (LucidrainsQuantizer, {"codebook_dim": 4}, "codebook_dim 4 has .*, only None"),
        (
            LucidrainsQuantizer,
            {"threshold_ema_dead_code": 2},
            "threshold_ema_dead_code 2 .* only 0",
        ),
        (SgmQuantizer, {"embedding_weight_norm": True}, "embedding_weight_norm True .* only False"),
        (TiTokQuantizer, {"clustering_vq": True}, "clustering_vq True has .*, only False"),
        (TiTokQuantizer, {"contras_loss": True}, "contras_loss True has .*, only False"),
        (LlamaGenQuantizer, {"entropy_loss_ratio": 0.1}, "entropy_loss_ratio 0.1 .* only 0.0"),
    ],
)
def test_arguments_without_a_meaning(
    form: type[Adapter], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(form, **arguments)


# ------------------------------------------------------------------------------------- lucidrains


def theirs(dim: int = 8, **setting: Any) -> Any:
    library = pytest.importorskip("vector_quantize_pytorch")
    return library.VectorQuantize(dim=dim, codebook_size=16, **setting)


def test_lucidrains_arguments_are_all_known() -> None:
    """Each argument of the real class is understood, or refused unless it has its default."""
    real = inspect.signature(type(theirs()).__init__).parameters
    ours = inspect.signature(LucidrainsQuantizer.__init__).parameters
    understood = set(ours) - {"settings"}
    assert set(real) == understood | set(LucidrainsQuantizer.unused)
    for name, default in LucidrainsQuantizer.unused.items():
        assert real[name].default == default, name
    for name in understood - {"self", "dim", "codebook_size"}:
        assert ours[name].default == real[name].default, name
    call = inspect.signature(type(theirs()).forward).parameters
    assert set(call) == {"self", "x", *LucidrainsQuantizer.unused_in_calls}
    for name, default in LucidrainsQuantizer.unused_in_calls.items():
        assert call[name].default == default, name


@pytest.mark.parametrize(
    ("setting", "shape"),
    [
        ({}, (2, 7, 8)),
        ({}, (3, 8)),
        ({"accept_image_fmap": True}, (2, 8, 3, 5)),
        ({"accept_3d_fmap": True}, (2, 8, 2, 3, 5)),
        ({"channel_last": False}, (2, 8, 7)),
    ],
)
@pytest.mark.parametrize("ema_update", [None, False])
def test_as_one_unit_it_is_lucidrains(
    setting: dict[str, Any], shape: tuple[int, ...], ema_update: bool | None
) -> None:
    setting = {**setting, "ema_update": ema_update, "rotation_trick": False}
    real = theirs(**setting)
    one_unit = {"embedding_dim": 8, "anchor": "none", "accept_image_fmap": False, **setting}
    ours = make(LucidrainsQuantizer, **one_unit)
    with torch.no_grad():
        real._codebook.embed.copy_(ours.embedding.weight[None])
    output, indices, loss = ours(latents(*shape))
    expected, expected_indices, expected_loss = real(latents(*shape))
    torch.testing.assert_close(output, expected)
    assert torch.equal(indices, expected_indices)
    if ema_update is None:  # without it the library has no loss of the codebook
        torch.testing.assert_close(loss, expected_loss)
    real.eval()
    with torch.no_grad():
        real._codebook.embed.copy_(ours.eval().embedding.weight[None])
    decoded = ours.get_output_from_indices(indices)
    torch.testing.assert_close(decoded, real.get_output_from_indices(indices))
    torch.testing.assert_close(
        ours.get_codes_from_indices(indices), real.get_codes_from_indices(indices)
    )
    torch.testing.assert_close(ours.codebook, real.codebook)


def test_lucidrains_units_are_as_its_heads() -> None:
    z = latents(2, 7, 8)
    ours = make(LucidrainsQuantizer, accept_image_fmap=False, embedding_dim=4).eval()
    real = theirs(heads=2, codebook_dim=4).eval()
    assert ours(z)[1].shape == real(z)[1].shape == (2, 7, 2)
    with pytest.raises(ValueError, match="mask a tensor has no meaning with LooC, only None"):
        ours(z, mask=torch.ones(2, 7, dtype=torch.bool))
    with pytest.raises(TypeError, match="a call takes no argument maks"):
        ours(z, maks=None)


# ------------------------------------------------------------------------------- further results


def test_sgm_log() -> None:
    adapter = make(SgmQuantizer, log_perplexity=True, loss_key="loss/looc").eval()
    _, log = adapter(latents())
    assert list(log) == ["loss/looc", "min_encoding_indices", "perplexity", "cluster_usage"]
    assert log["cluster_usage"] == len(log["min_encoding_indices"].unique())
    assert list(adapter.get_trainable_parameters()) == [adapter.embedding.weight]


@pytest.mark.parametrize("form", [TiTokQuantizer, LlamaGenQuantizer])
@pytest.mark.parametrize("codebook_update", ["gradient", "ema"])
def test_the_two_terms_of_the_loss(form: type[Adapter], codebook_update: str) -> None:
    setting = {"embedding_dim": 8, "codebook_update": codebook_update}
    adapter, z = make(form, **setting).eval(), latents()
    result = adapter(z)
    output, loss, _ = RESULTS[form](result)
    commitment = 0.25 * F.mse_loss(output, z)
    if form is TiTokQuantizer:
        terms = result[1]["codebook_loss"], result[1]["commitment_loss"]
    else:
        terms = result[1][:2]
    torch.testing.assert_close(terms[1], commitment)
    torch.testing.assert_close(terms[0] + terms[1], loss)
    if codebook_update == "ema":
        torch.testing.assert_close(terms[0], torch.zeros(()))


def test_l2_norm_matches_by_direction() -> None:
    for form, name in ((TiTokQuantizer, "use_l2_norm"), (LlamaGenQuantizer, "l2_norm")):
        adapter = make(form, **{name: True, "embedding_dim": 8}).eval()
        indices = RESULTS[form](adapter(latents()))[2].flatten()
        rows = F.normalize(latents().permute(0, 2, 3, 1).reshape(-1, 8), dim=1)
        codevectors = F.normalize(adapter.embedding.weight, dim=1)
        assert torch.equal(indices, (rows @ codevectors.T).argmax(1))
        assert adapter.quantizer.latent_norm == "unit"


def test_llamagen_entries_first_and_last() -> None:
    adapter = make(LlamaGenQuantizer).eval()
    output, losses, (_, _, indices) = adapter(latents())
    assert losses[3] == len(indices.unique()) / 16
    entry = adapter.get_codebook_entry
    torch.testing.assert_close(entry(indices, (2, 8, 3, 5), True), output)
    torch.testing.assert_close(entry(indices, (2, 3, 5, 8), False), output.permute(0, 2, 3, 1))
    torch.testing.assert_close(entry(indices), output.permute(0, 2, 3, 1).reshape(30, 8))
    assert make(LlamaGenQuantizer, show_usage=False)(latents())[1][3] == 0


def test_seed_voken_names_of_losses() -> None:
    adapter = make(SeedVokenQuantizer, l2_normalize=True, legacy=False).eval()
    assert adapter.quantizer.distance == "cos"
    output, loss, info = adapter(latents())
    (same, zero, _), losses = adapter(latents(), return_loss_breakdown=True)
    assert torch.equal(same, output)
    assert (zero, losses.per_sample_entropy) == (0, 0)
    assert torch.equal(losses.commitment, loss)
    torch.testing.assert_close(losses.codebook_entropy.exp(), info[0])


def test_a_permuter_of_units() -> None:
    """Also with the real one of taming, which drops tokens of several units if it is used alone."""
    permuter = pytest.importorskip("taming.modules.transformer.permuter").Subsample(4, 4)
    tokens = torch.arange(2 * 16 * 3).view(2, 48)
    assert permuter(tokens).shape == (2, 16)
    ours = UnitPermuter(permuter, 3)
    permuted = ours(tokens)
    assert torch.equal(permuted.view(2, 16, 3)[..., 1], permuter(tokens.view(2, 16, 3)[..., 1]))
    assert torch.equal(ours(permuted, reverse=True), tokens)


@every_adapter
def test_config_makes_the_adapter_again(form: type[Adapter]) -> None:
    settings = {"embedding_dim": 2, "split": "interval", "remap": [9, 4], "unknown_index": "extra"}
    by_direction = {"l2_norm": True} if form is LlamaGenQuantizer else {"distance": "cos"}
    adapter = make(form, **settings, **by_direction)
    again: Any = form.from_config(json.loads(json.dumps(adapter.config)))
    assert again.config == adapter.config
    assert again.quantizer.config == adapter.quantizer.config
    again.load_state_dict(adapter.state_dict())
    z = torch.randn(2, 8, 3, 5)
    for ours, theirs in zip(RESULTS[form](again.eval()(z)), RESULTS[form](adapter.eval()(z))):
        assert torch.equal(ours, theirs)


@every_adapter
def test_a_contradicting_state_is_refused(form: type[Adapter]) -> None:
    other = make(form, split="interval", remap=[9, 4], unknown_index=1)
    told = r"unknown_index 'random' contradicts the state, whose unknown_index is 1"
    with pytest.raises(RuntimeError, match=told):
        make(form, remap=[9, 4]).load_state_dict(other.state_dict())
    told = r"quantizer split 'fixed' contradicts the state, whose split is 'interval'"
    with pytest.raises(RuntimeError, match=told):
        make(form, remap=[9, 4], unknown_index=1).load_state_dict(other.state_dict())
