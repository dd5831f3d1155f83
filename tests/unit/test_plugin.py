"""The plug-in alone, and in models of other projects.

These models are the real classes of diffusers and taming-transformers (the extra `plugin`).
"""

from __future__ import annotations

import inspect
import re
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules import LooCPlugin, LooCQuantizer
from modules.adapters import UnitPermuter
from tests.unit.test_project import ROOT

SETTINGS: dict[str, dict[str, Any]] = {
    "units": {},
    "one unit": {"embedding_dim": 8},
    "scale": {"interpolation_scale": 2},
    "interval": {"split": "interval", "distance": "l2", "interpolation_scale": 3},
    "remap": {"remap": torch.tensor([9, 4, 0, 11]), "unknown_index": 2},
    "ema": {"codebook_update": "ema", "codebook_start": "features", "latent_norm": "batch"},
}
every_setting = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
VQGAN = {
    **{"double_z": False, "z_channels": 8, "resolution": 16, "in_channels": 3, "out_ch": 3},
    **{"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0},
}


def make(n_e: int = 16, e_dim: int = 8, **setting: Any) -> LooCPlugin:
    torch.manual_seed(0)
    plugin = LooCPlugin(n_e, e_dim, **setting)
    nn.init.normal_(plugin.embedding.weight)
    return plugin


def latents(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 8, 3, 5)), generator=torch.Generator().manual_seed(1))


def images() -> Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def need(module: str) -> ModuleType:
    """Import a module of an optional requirement, or skip the test."""
    reason = f"{module} cannot be imported; docs/plugin.md says which package it needs"
    found: ModuleType = pytest.importorskip(module, reason=reason, exc_type=ImportError)
    return found


# ------------------------------------------------------------------------------------------ alone


@every_setting
def test_indices_of_every_shape_decode_to_the_output(setting: dict[str, Any]) -> None:
    setting = {name: value for name, value in setting.items() if "remap" not in name}
    plugin, z = make(**setting, sane_index_shape=True).eval(), latents()
    output, loss, (perplexity, encodings, indices) = plugin(z)
    units = (
        8 * max(1, setting.get("interpolation_scale", 0)) ** 2 // setting.get("embedding_dim", 4)
    )
    assert plugin.units == units
    assert indices.shape == ((2, 3, 5, units) if units > 1 else (2, 3, 5))
    assert (loss.shape, perplexity.shape, encodings) == ((), (), None)
    F.one_hot(indices, plugin.n_e)  # needs int64 in [0, K)
    plugin.sane_index_shape = False
    assert torch.equal(plugin(z)[2][2], indices.flatten())

    equal = partial(torch.testing.assert_close, rtol=0, atol=1e-5)
    equal(plugin.embed_code(indices), output)
    last, full = output.permute(0, 2, 3, 1), indices.view(2, 3, 5, units)
    for given, expected in (
        (indices.flatten(), last.reshape(30, 8)),
        (indices.reshape(2, -1), last.reshape(2, 15, 8)),
        (indices, last),
        (full, last),
    ):
        equal(plugin.get_codebook_entry(given), expected)
        equal(plugin.get_codebook_entry(given, z.permute(0, 2, 3, 1).shape), output)


@every_setting
def test_evaluation_writes_and_prints_nothing(
    setting: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    plugin = make(**setting)
    plugin(latents())
    plugin.eval()
    before = {name: value.clone() for name, value in plugin.state_dict().items()}
    random_state = torch.get_rng_state()
    indices = plugin(latents())[2][2]
    plugin.get_codebook_entry(indices)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[name]) for name, value in plugin.state_dict().items())
    assert capfd.readouterr() == ("", "")


@every_setting
def test_state_survives_a_round_trip(setting: dict[str, Any]) -> None:
    one, other = make(**setting), make(**setting)
    one(latents())
    other.load_state_dict(one.state_dict())
    for plugin in (one, other):
        plugin(latents() + 1)
    assert torch.equal(one.embedding.weight, other.embedding.weight)
    assert [name for name, _ in one.named_parameters()] == ["quantizer.codebook"]


def test_further_keywords_reach_the_quantiser() -> None:
    """Names, defaults and order; the plug-in accepts every keyword of LooCQuantizer."""
    contract = "n_e e_dim beta remap unknown_index sane_index_shape legacy embedding_dim"
    names = f"self {contract} interpolation_scale distance anchor settings"
    plugin, quantizer = (
        inspect.signature(which.__init__).parameters for which in (LooCPlugin, LooCQuantizer)
    )
    assert list(plugin) == names.split()
    assert plugin["beta"].default == quantizer["commitment_cost"].default
    for name in ("distance", "anchor", "interpolation_scale"):
        assert plugin[name].default == quantizer[name].default
    settings: dict[str, Any] = {
        **{"split": "interval", "first_batch": True, "codebook_update": "ema", "ema_decay": 0.5},
        **{"codebook_start": "kmeans", "latent_norm": "batch", "gradient": "rotation"},
        **{"distance": "l2", "anchor": "random", "interpolation_scale": 2, "embedding_dim": 2},
        **{"rate_weight": 0.1, "channel_dim": -1, "num_passes": 2},
    }
    made = make(**settings).quantizer
    assert {name: getattr(made, name) for name in settings} == settings
    assert make(contras_loss=True, beta=0.5).quantizer.contras_loss
    assert make(beta=0.5).quantizer.commitment_cost == 0.5
    set_apart = {"self", "num_embedding", "commitment_cost", "latent_channels", "contras_loss"}
    assert set(quantizer) == set(settings) | set_apart


def test_attributes_read_elsewhere() -> None:
    plugin = make(sane_index_shape=True)
    assert (plugin.n_e, plugin.e_dim, plugin.vq_embed_dim, plugin.re_embed) == (16, 8, 8, 16)
    assert (plugin.beta, plugin.legacy, plugin.remap) == (0.25, False, None)
    assert plugin.sane_index_shape
    assert plugin.embedding.weight is plugin.quantizer.codebook
    assert torch.equal(plugin.embedding(torch.tensor([3])), plugin.quantizer.codebook[3:4])


def test_perplexity_is_of_the_codevectors_used() -> None:
    plugin, z = make().eval(), latents()
    share = torch.bincount(plugin(z)[2][2], minlength=16) / 60
    expected = -sum(float(p) * np.log(float(p)) for p in share if p)
    assert plugin(z)[2][0].item() == pytest.approx(np.exp(expected), rel=1e-5)
    assert plugin(z[:0])[2][0] == 1
    assert plugin(z[:1, :, :1, :1].abs() * 0)[2][0] == 1


@pytest.mark.parametrize("beta", [0.25, 2.0])
def test_legacy_moves_the_weight_to_the_codebook(beta: float) -> None:
    setting: dict[str, Any] = {"beta": beta, "anchor": "none"}
    gradients = {}
    for legacy in (False, True):
        plugin, z = make(**setting, legacy=legacy), latents().requires_grad_()
        loss = plugin(z)[1]
        loss.backward()
        gradients[legacy] = (loss.detach(), z.grad, plugin.embedding.weight.grad)
    (loss, on_z, on_codebook), (legacy_loss, legacy_on_z, legacy_on_codebook) = gradients.values()
    assert on_z is not None
    assert on_codebook is not None
    torch.testing.assert_close(legacy_loss, loss)  # both terms have the same value
    torch.testing.assert_close(legacy_on_z, on_z / beta)
    torch.testing.assert_close(legacy_on_codebook, on_codebook * beta)


@pytest.mark.parametrize("unknown", ["random", "extra", 1])
@pytest.mark.parametrize("units", [1, 2])
def test_remap(unknown: str | int, units: int, tmp_path: Path) -> None:
    """Known indices survive the round trip; unknown ones follow `unknown_index`."""
    used = [9, 4, 0, 11, 2]
    np.save(tmp_path / "used.npy", np.array(used, dtype=np.uint8))
    setting = {"embedding_dim": 8 // units}
    plain = make(**setting, sane_index_shape=True).eval()
    plugin = make(**setting, remap=tmp_path / "used.npy", unknown_index=unknown).eval()
    assert plugin.re_embed == (6 if unknown == "extra" else 5)
    all_indices, found = plain(latents())[2][2].flatten(), plugin(latents())[2][2]
    assert found.shape == (30 * units,)
    known = torch.isin(all_indices, torch.tensor(used))
    assert 0 < known.sum() < len(known)
    back = plugin.unmap_to_all(found)
    assert torch.equal(back[known], all_indices[known])
    if unknown == "random":
        assert set(found[~known].tolist()) <= set(range(5))
    else:
        assert set(found[~known].tolist()) == {5 if unknown == "extra" else 1}
    assert torch.equal(
        plugin.get_codebook_entry(found, (2, 3, 5, 8)),
        plain.get_codebook_entry(back, (2, 3, 5, 8)),
    )
    for narrow in (torch.uint8, torch.int16, torch.int32):
        tokens = found.to(narrow)
        assert torch.equal(plugin.unmap_to_all(tokens), back)
        for one in (plain, plugin):
            entries = one.get_codebook_entry(found, (2, 3, 5, 8))
            assert torch.equal(one.get_codebook_entry(tokens, (2, 3, 5, 8)), entries)
        if unknown != "random":
            mapped = plugin.remap_to_used(all_indices)
            assert torch.equal(plugin.remap_to_used(all_indices.to(narrow)), mapped)
    for wrong in (-1, plugin.re_embed):  # which unmap_to_all would map to one in use
        with pytest.raises(ValueError, match=rf"not in \[0, {plugin.re_embed}\)"):
            plugin.get_codebook_entry(torch.full_like(found, wrong), (2, 3, 5, 8))
    restored = make(**setting, remap=torch.arange(5), unknown_index=unknown).eval()
    restored.load_state_dict(plugin.state_dict())
    assert torch.equal(restored.used, torch.tensor(used))


# --------------------------------------------------------------------------------- wrong arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_e": 0}, "n_e 0 is less than 1"),
        ({"e_dim": 0}, "e_dim 0 is less than 1"),
        ({"beta": -1}, "beta -1 is less than 0"),
        ({"embedding_dim": 0}, "embedding_dim 0 is less than 1"),
        ({"interpolation_scale": -1}, "interpolation_scale -1 is less than 0"),
        ({"embedding_dim": 3}, "embedding_dim 3 does not divide the 8 channels"),
        ({"embedding_dim": 5, "interpolation_scale": 2}, "the 32 channels, 8 times 2²"),
        ({"legacy": True, "beta": 0}, "legacy True needs beta above 0, not 0"),
        ({"legacy": True, "contras_loss": True}, "contras_loss True does not go with legacy True"),
        (
            {"legacy": True, "codebook_update": "ema"},
            "codebook_update ema does not go with legacy True",
        ),
        ({"distance": "dot"}, "distance 'dot' is none of cos, l2"),
        ({"remap": "absent.npy"}, "remap absent.npy cannot be read"),
        ({"remap": __file__}, "test_plugin.py cannot be read"),
        ({"remap": torch.tensor([0.5])}, r"remap of shape \(1,\) and torch.float32 is not a list"),
        ({"remap": torch.tensor([3, 16])}, "remap has indices 3 … 16, not all below n_e 16"),
        ({"remap": torch.tensor([3, 3])}, "remap has 2 indices, only 1 of them distinct"),
        ({"remap": torch.tensor([3]), "unknown_index": 1}, "unknown_index 1 is neither 'random'"),
        ({"remap": torch.tensor([3]), "unknown_index": "some"}, "unknown_index 'some' is neither"),
        ({"remap": ["a"]}, "remap cannot be read: "),
        ({"remap": 3}, r"remap of shape \(\) and torch.int64 is not a list"),
        ({"n_e": 16.0}, "n_e 16.0 is not an integer"),
        ({"e_dim": None}, "e_dim None is not an integer"),
        ({"beta": "a"}, "beta 'a' is not a number"),
        ({"legacy": "yes"}, "legacy 'yes' is not True or False"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LooCPlugin(**{"n_e": 16, "e_dim": 8, **arguments})


def test_arguments_with_another_name_are_refused() -> None:
    """The recipe of LooCQuantizer has them."""
    with pytest.raises(TypeError, match="latent_channels 4 is given as e_dim 8 here: leave it out"):
        make(latent_channels=4)


def test_remap_is_any_sequence() -> None:
    for remap in ([3, 1], (3, 1), np.array([3, 1]), torch.tensor([3, 1])):
        assert make(remap=remap).config["remap"] == [3, 1]


def test_wrong_inputs_are_named() -> None:
    plugin, index = make(), torch.zeros(1, dtype=torch.int64)
    message = r"shape \(2, 4, 3, 3\) have 4 channels at channel_dim 1, not latent_channels 8"
    with pytest.raises(ValueError, match=message):
        plugin(latents(2, 4, 3, 3))
    for name, value in (("temp", 0.5), ("rescale_logits", True), ("return_logits", True)):
        with pytest.raises(ValueError, match=f"{name} {value}"):
            plugin(latents(), **{name: value})
    plugin(latents(), temp=1.0, rescale_logits=False, return_logits=False)
    for shape in ((3,), (2, 3), (1, 2, 3), (2, 3, 5, 1), (1, 1, 1, 2, 1)):
        with pytest.raises(ValueError, match="are not 2 per position"):
            plugin.get_codebook_entry(index.expand(shape))
    for grid in ((1, 3, 5, 8), (2, 3, 5, 4)):
        with pytest.raises(ValueError, match=r"\(60,\) and shape .* e_dim is 8, with 2 indices"):
            plugin.get_codebook_entry(index.expand(60), grid)
    for decode in (plugin.get_codebook_entry, plugin.embed_code):
        with pytest.raises(TypeError, match="indices have to be a tensor, not list"):
            decode([1, 2])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"indices of shape \(\) are not 2 per position"):
        plugin.get_codebook_entry(index[0])
    with pytest.raises(ValueError, match=r"indices of shape \(2, 30\) are not \(B, …, 2\)"):
        plugin.embed_code(index.expand(2, 30))


@pytest.mark.parametrize("embedding_dim", [8, 4])
def test_calls_that_need_one_index_per_position(embedding_dim: int) -> None:
    """With more, each of these is an error; none decodes something else."""
    plugin, z = make(embedding_dim=embedding_dim).eval(), latents()
    output, _, (_, _, indices) = plugin(z)
    tokens = torch.zeros(2, 15, dtype=torch.int64)  # of a model that draws one per position
    calls = (
        lambda: indices.reshape(2, 3, 5),  # diffusers: aMUSEd, image to image and inpainting
        lambda: plugin.get_codebook_entry(tokens, shape=(2, 3, 5, 8)),  # diffusers: VQ-Diffusion
        # latent-diffusion: decode_first_stage(predict_cids=True)
        lambda: plugin.get_codebook_entry(tokens.view(2, 3, 5), shape=None).permute(0, 3, 1, 2),
    )
    for call in calls:
        if embedding_dim == 8:
            assert call().shape in ((2, 3, 5), output.shape)
        else:
            with pytest.raises((ValueError, RuntimeError)):
                call()


def test_gradient_accumulation_of_others() -> None:
    """With defer_update set but for the last part, a batch in parts is one step."""
    whole, parts = make(), make()
    whole(latents())
    for number, part in enumerate(latents().split(1)):
        parts.quantizer.defer_update = number < 1
        parts(part)
    assert torch.equal(parts.embedding.weight, whole.embedding.weight)
    assert torch.equal(parts.quantizer.usage, whole.quantizer.usage)


# ---------------------------------------------------------------------- the quantisers it replaces

PEERS = {
    "taming": ("taming.modules.vqvae.quantize", "VectorQuantizer2"),
    "diffusers": ("diffusers.models.autoencoders.vae", "VectorQuantizer"),
}
every_peer = pytest.mark.parametrize("peer", PEERS)


def make_pair(peer: str, **setting: Any) -> tuple[Any, LooCPlugin]:
    """The quantiser of another project, and the plug-in as its equal: one unit and l2."""
    module, name = PEERS[peer]
    theirs = getattr(need(module), name)(16, 8, 0.25, **setting)
    ours = make(embedding_dim=8, distance="l2", anchor="none", **setting)
    with torch.no_grad():
        theirs.embedding.weight.copy_(ours.embedding.weight)
    return theirs, ours


@every_peer
@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("sane_index_shape", [True, False])
def test_as_one_unit_it_is_the_quantiser_it_replaces(
    peer: str, legacy: bool, sane_index_shape: bool
) -> None:
    results = []
    for quantizer in make_pair(peer, legacy=legacy, sane_index_shape=sane_index_shape):
        z = latents().requires_grad_()
        output, loss, (_, _, indices) = quantizer(z)
        (loss + (output * latents().flip(0)).sum()).backward()
        entries = quantizer.get_codebook_entry(indices.flatten(), (2, 3, 5, 8))
        plain = quantizer.get_codebook_entry(indices, None)
        weight = quantizer.embedding.weight
        results.append((output, loss, indices, entries, plain, z.grad, weight.grad))
    torch.testing.assert_close(*results)


@every_peer
@pytest.mark.parametrize("unknown", ["extra", 2])
def test_remap_is_that_of_the_quantiser_it_replaces(
    peer: str, unknown: str | int, tmp_path: Path
) -> None:
    path = tmp_path / "used.npy"
    np.save(path, np.array([9, 4, 0, 11, 2]))
    theirs, ours = make_pair(peer, remap=str(path), unknown_index=unknown, sane_index_shape=True)
    assert (ours.re_embed, ours.unknown_index) == (theirs.re_embed, theirs.unknown_index)
    found = ours(latents())[2][2]
    assert torch.equal(found, theirs(latents())[2][2])
    expected = theirs.get_codebook_entry(found.clone(), (2, 3, 5, 8))
    torch.testing.assert_close(ours.get_codebook_entry(found, (2, 3, 5, 8)), expected)


# --------------------------------------------------------------------------------------- diffusers

UNITS = [{"embedding_dim": 4}, {"embedding_dim": 4, "interpolation_scale": 2}]
every_units = pytest.mark.parametrize("units", UNITS, ids=["units", "scale"])


def make_diffusers(**config: Any) -> Any:
    torch.manual_seed(0)
    return need("diffusers").VQModel(
        **{"block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2},
        **{"up_block_types": ("UpDecoderBlock2D",) * 2, "norm_num_groups": 4},
        **{"latent_channels": 8, "num_vq_embeddings": 16, **config},
    )


@every_units
def test_diffusers_trains_and_reconstructs(units: dict[str, Any]) -> None:
    model = make_diffusers()
    model.quantize = make(**units)
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    before = model.quantize.embedding.weight.clone()
    losses = []
    for _ in range(8):
        output = model(images())
        loss = (output.sample - images()).square().mean() + output.commit_loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not torch.equal(model.quantize.embedding.weight, before)
    model.eval()
    with torch.no_grad():
        h = model.encode(images()).latents
        assert h.shape == (2, 8, 8, 8)
        sample, commit_loss = model.decode(h, return_dict=False)
        torch.testing.assert_close(sample, model(images()).sample)
        assert sample.shape == (2, 3, 16, 16)
        assert commit_loss.dim() == 0
        unquantised = model.decode(h, force_not_quantize=True).sample
    assert not torch.allclose(unquantised, sample)


@every_units
def test_diffusers_looks_codes_up(units: dict[str, Any]) -> None:
    model = make_diffusers(lookup_from_codebook=True).eval()
    model.quantize = make(**units).eval()
    with torch.no_grad():
        h = model.encode(images()).latents
        indices = model.quantize(h)[2][2]
        expected = model.decode(h).sample
        for given in (indices, indices.view(2, -1), indices.view(2, 8, 8, -1)):
            decoded = model.decode(given, force_not_quantize=True, shape=(2, 8, 8, 8)).sample
            torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-5)


@every_units
def test_diffusers_saves_and_loads(
    units: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plug-in is built by from_pretrained, or assigned before the weights are loaded."""
    model = make_diffusers()
    model.quantize = make(**units)
    model(images())
    model.eval().save_pretrained(tmp_path)
    state = need("safetensors.torch").load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    by_hand = make_diffusers().eval()
    by_hand.quantize = LooCPlugin(16, 8, **units).eval()
    by_hand.load_state_dict(state)
    vq_model = need("diffusers.models.autoencoders.vq_model")
    monkeypatch.setattr(vq_model, "VectorQuantizer", partial(LooCPlugin, **units))
    loaded = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        for other in (by_hand, loaded):
            assert torch.equal(other(images()).sample, model(images()).sample)
            for name, value in model.state_dict().items():
                assert torch.equal(other.state_dict()[name], value), name


# ----------------------------------------------------------------------------- taming-transformers


class Transformer(nn.Module):
    """Replacement of taming's, which imports names that transformers has removed."""

    def __init__(self, vocab_size: int, block_size: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size)
        self.block_size = block_size
        self.table = nn.Embedding(vocab_size, vocab_size)

    def get_block_size(self) -> int:
        return self.block_size

    def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
        """Tokens (b, n) → logits of the next token (b, n, K)."""
        assert tokens.shape[1] <= self.block_size
        return self.table(tokens), None


class PixelDistance(nn.Module):
    """Replacement of LPIPS, whose weights would be downloaded."""

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return (one - other).abs().mean((1, 2, 3), keepdim=True)


@pytest.fixture
def loss_config(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Configuration of taming's loss; its discriminator trains from the first step."""
    monkeypatch.setattr(need("taming.modules.losses.vqperceptual"), "LPIPS", PixelDistance)
    target = "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"
    return {"target": target, "params": {"disc_start": 0, "disc_num_layers": 1, "disc_ndf": 8}}


@pytest.fixture
def taming(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Module taming.models.vqgan, where the plug-in replaces the quantiser."""
    vqgan = need("taming.models.vqgan")
    monkeypatch.setattr(vqgan, "VectorQuantizer", partial(LooCPlugin, interpolation_scale=2))
    return vqgan


@every_units
def test_taming_encoder_decoder_and_loss(
    units: dict[str, Any], loss_config: dict[str, Any]
) -> None:
    """The modules without taming.models, which would need Lightning."""
    parts = need("taming.modules.diffusionmodules.model")
    losses = need("taming.modules.losses.vqperceptual")
    torch.manual_seed(0)
    encoder, decoder, plugin = parts.Encoder(**VQGAN), parts.Decoder(**VQGAN), make(**units)
    criterion = losses.VQLPIPSWithDiscriminator(**loss_config["params"])
    before = plugin.embedding.weight.clone()
    optimiser = torch.optim.Adam(
        [*encoder.parameters(), *decoder.parameters(), *plugin.parameters()], 1e-3
    )
    for _ in range(2):
        z_q, codebook_loss, _ = plugin(encoder(images()))
        reconstruction = decoder(z_q)
        last = decoder.conv_out.weight
        for number in (0, 1):
            loss, log = criterion(
                codebook_loss, images(), reconstruction, number, 5, last_layer=last
            )
            loss.backward()
            assert all(value.isfinite() for value in log.values())
        optimiser.step()
    assert encoder.conv_in.weight.grad.abs().sum() > 0
    assert not torch.equal(plugin.embedding.weight, before)


@pytest.mark.filterwarnings("ignore")
def test_taming_model_is_trained_by_its_own_trainer(
    taming: ModuleType, loss_config: dict[str, Any], tmp_path: Path
) -> None:
    model = taming.VQModel(VQGAN, loss_config, n_embed=16, embed_dim=8)
    assert isinstance(model.quantize, LooCPlugin)
    model.learning_rate = 1e-3
    before = model.quantize.embedding.weight.clone()
    pictures: Any = [{"image": picture.permute(1, 2, 0)} for picture in images()]
    loader: Any = torch.utils.data.DataLoader(pictures, batch_size=1)
    trainer = need("pytorch_lightning").Trainer(
        **{"max_epochs": 1, "accelerator": "cpu", "default_root_dir": tmp_path},
        **{"logger": False, "enable_progress_bar": False, "enable_model_summary": False},
    )
    trainer.fit(model, loader)  # no validation: it logs one name twice, an error in Lightning 1.9
    assert not torch.equal(model.quantize.embedding.weight, before)
    (path,) = tmp_path.rglob("*.ckpt")
    again = taming.VQModel(VQGAN, loss_config, n_embed=16, embed_dim=8)
    again.load_state_dict(torch.load(path, weights_only=False)["state_dict"])
    model.eval(), again.eval()
    with torch.no_grad():
        assert torch.equal(again(images())[0], model(images())[0])
        h, _, (_, _, indices) = model.encode(images())
        code = indices.view(2, 8, 8, -1)
        torch.testing.assert_close(model.decode_code(code), model.decode(h), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sane_index_shape", [True, False])
def test_taming_stage_two_decodes_its_own_tokens(
    taming: ModuleType, sane_index_shape: bool
) -> None:
    """Net2NetTransformer reads the tokens, samples some, and decodes them with the shape."""
    del taming  # the fixture has replaced the quantiser
    first_stage = {
        "target": "taming.models.vqgan.VQModel",
        "params": {
            **{"ddconfig": VQGAN, "lossconfig": {"target": "taming.modules.losses.DummyLoss"}},
            **{"n_embed": 16, "embed_dim": 8, "sane_index_shape": sane_index_shape},
        },
    }
    tokens = 8 * 8 * 8  # 8 × 8 positions of 8 · 2² / 4 units
    transformer = {
        "target": f"{__name__}.Transformer",
        "params": {"vocab_size": 16, "block_size": tokens},
    }
    stage_two = need("taming.models.cond_transformer").Net2NetTransformer(
        transformer, first_stage, "__is_unconditional__"
    )
    stage_two.eval()
    with torch.no_grad():
        quantized, indices = stage_two.encode_to_z(images())
        assert indices.shape == (2, tokens)
        logits, target = stage_two(images(), images())
        assert F.cross_entropy(logits.reshape(-1, 16), target.reshape(-1)).isfinite()
        decoded = stage_two.decode_to_img(indices, quantized.shape)
        expected = stage_two.first_stage_model.decode(quantized)
        torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-5)
        start = indices[:, : tokens - 3]
        real = need("taming.modules.transformer.permuter").Subsample(8, 8)
        assert real(indices).shape == (2, 64)  # tokens of the other units are gone
        stage_two.permuter = UnitPermuter(real, 8)
        _, permuted = stage_two.encode_to_z(images())
        decoded = stage_two.decode_to_img(permuted, quantized.shape)
        torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-5)
        sampled = stage_two.sample(start, torch.zeros(2, 1, dtype=torch.int64), 3)
        assert stage_two.decode_to_img(sampled, quantized.shape).shape == (2, 3, 16, 16)


# --------------------------------------------------------------------------------- docs/plugin.md

# The name that a recipe replaces by the plug-in.
RECIPES: dict[str, tuple[str, str] | None] = {
    "alone": None,
    "vqgan": ("taming.models.vqgan", "VectorQuantizer"),
    "latent diffusion": ("ldm.models.autoencoder", "VectorQuantizer"),
    "diffusers": ("diffusers.models.autoencoders.vq_model", "VectorQuantizer"),
    "hub": None,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", range(len(RECIPES)), ids=RECIPES)
def test_the_recipes_run_as_printed(
    number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "plugin.md").read_text(), re.S)
    assert len(blocks) == len(RECIPES)
    place = list(RECIPES.values())[number]
    if "huggingface_hub" in blocks[number]:
        need("huggingface_hub")
    if place is not None:
        module, name = need(place[0]), place[1]
        if not hasattr(module, name):
            pytest.skip(f"{place[0]} of this version has no {name}")
        monkeypatch.setattr(module, name, getattr(module, name))  # restored after the test
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    code = re.sub(r"^from looc\b", "from modules", blocks[number], flags=re.M)
    exec(code, names)
    quantizer = names["quantizer"] if place is None else names["model"].quantize
    assert isinstance(quantizer, LooCPlugin)
    if "tokens" in names:
        shape = re.search(r"tokens = .*# \((\d+), (\d+)\)", blocks[number])
        assert shape
        assert names["tokens"].shape == tuple(map(int, shape.groups()))
