"""The plug-in and the adapters beside the real classes of projects that are not on PyPI.

$LOOC_CLIENTS names a folder with checkouts, by the names in CHECKOUTS; what is absent is skipped.
Needs einops and huggingface_hub; TiTok accelerate, muse-maskgit vector-quantize-pytorch.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from modules import LooCPlugin
from modules.adapters import (
    LlamaGenQuantizer,
    LucidrainsQuantizer,
    SeedVokenQuantizer,
    SgmQuantizer,
    TiTokQuantizer,
)

# Folder of a checkout, and the commit that was tried.
CHECKOUTS = {
    "taming-transformers": "3ba01b2",
    "LlamaGen": "ce98ec4",
    "generative-models": "0ad7de9",
    "1d-tokenizer": "942a96f",
    "SEED-Voken": "b9a17ea",
    "muse-maskgit-pytorch": "6df7f33",
}
ONE_UNIT: dict[str, Any] = {"embedding_dim": 8, "anchor": "none"}


def client(monkeypatch: pytest.MonkeyPatch, checkout: str, folder: str, name: str) -> Any:
    """Import module `name` of a folder of a checkout, whose packages' __init__ are left out."""
    assert checkout in CHECKOUTS
    place = Path(os.environ.get("LOOC_CLIENTS", "absent"), checkout, folder)
    if not place.is_dir():
        pytest.skip(f"$LOOC_CLIENTS has no {checkout}")
    package = types.ModuleType(f"client_{checkout}".replace("-", "_"))
    package.__path__ = [str(place)]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    try:
        return importlib.import_module(f"{package.__name__}.{name}")
    except ImportError as error:
        pytest.skip(f"{checkout} needs {error.name}")


def latents() -> Tensor:
    return torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(1))


def same_codebook(ours: Any, theirs: Any) -> None:
    torch.manual_seed(0)
    nn.init.normal_(ours.embedding.weight)
    with torch.no_grad():
        theirs.embedding.weight.copy_(ours.embedding.weight)


def names(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "settings"]


def gradients(quantizer: Any, loss: Tensor, output: Tensor, z: Tensor) -> list[Tensor | None]:
    (loss + (output * latents().flip(0)).sum()).backward()
    return [z.grad, quantizer.embedding.weight.grad]


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("l2_normalize", [True, False])
def test_seed_voken(legacy: bool, l2_normalize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = client(monkeypatch, "SEED-Voken", "src/IBQ/modules/vqvae", "quantize")
    form = module.VectorQuantizer2
    assert names(SeedVokenQuantizer.__init__) == names(form.__init__)
    setting = {"legacy": legacy, "l2_normalize": l2_normalize, "sane_index_shape": True}
    ours = SeedVokenQuantizer(16, 8, 0.25, **setting, **ONE_UNIT)
    theirs = form(16, 8, 0.25, **setting)
    same_codebook(ours, theirs)
    results = []
    for quantizer in (ours, theirs):
        z = latents().requires_grad_()
        output, loss, (_, _, indices) = quantizer(z)
        entry = quantizer.get_codebook_entry(indices.flatten(), (2, 4, 4, 8))
        results.append([output, loss, indices, entry, *gradients(quantizer, loss, output, z)])
    torch.testing.assert_close(*results)


def test_sgm(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = "sgm/modules/autoencoding/regularizers"
    form = client(monkeypatch, "generative-models", folder, "quantize").VectorQuantizer
    assert names(SgmQuantizer.__init__) == names(form.__init__)
    setting: dict[str, Any] = {"sane_index_shape": True, "log_perplexity": True}
    setting["loss_key"] = "loss/x"
    ours = SgmQuantizer(16, 8, **setting, **ONE_UNIT, distance="l2")
    theirs = form(16, 8, **setting)
    same_codebook(ours, theirs)
    results = []
    for quantizer in (ours, theirs):
        z = latents().requires_grad_()
        output, log = quantizer(z)
        entry = quantizer.get_codebook_entry(log["min_encoding_indices"].flatten(), (2, 4, 4, 8))
        trained = gradients(quantizer, log["loss/x"], output, z)
        assert list(quantizer.get_trainable_parameters()) == list(quantizer.parameters())
        results.append([output, entry, *trained, *(log[name] for name in sorted(log))])
    torch.testing.assert_close(*results)


def test_titok(monkeypatch: pytest.MonkeyPatch) -> None:
    form = client(monkeypatch, "1d-tokenizer", "modeling/quantizer", "quantizer").VectorQuantizer
    assert names(TiTokQuantizer.__init__) == names(form.__init__)
    ours, theirs = TiTokQuantizer(16, 8, **ONE_UNIT), form(16, 8)
    same_codebook(ours, theirs)
    results = []
    for quantizer in (ours, theirs):
        z = latents().requires_grad_()
        output, log = quantizer(z)
        entry = quantizer.get_codebook_entry(log["min_encoding_indices"].flatten())
        trained = gradients(quantizer, log["quantizer_loss"], output, z)
        results.append([output, entry, *trained, *(log[name].detach() for name in sorted(log))])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("embedding_dim", [2, 8])
def test_llamagen(embedding_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its quantiser, and its whole model, which looks the name up and decodes codes."""
    module = client(monkeypatch, "LlamaGen", "tokenizer/tokenizer_image", "vq_model")
    form = module.VectorQuantizer
    assert names(LlamaGenQuantizer.__init__) == names(form.__init__)
    entry = names(form.get_codebook_entry)
    assert names(LlamaGenQuantizer.get_codebook_entry) == entry
    positional = (16, 8, 0.25, 0.0, False, False)  # its count of usage fails in this PyTorch
    ours, theirs = LlamaGenQuantizer(*positional, **ONE_UNIT), form(*positional)
    same_codebook(ours, theirs)
    results = []
    for quantizer in (ours, theirs):
        z = latents().requires_grad_()
        output, losses, (_, _, indices) = quantizer(z)
        loss = losses[0] + losses[1] + losses[2]
        found = [
            quantizer.get_codebook_entry(indices, shape, first)
            for shape, first in (((2, 8, 4, 4), True), ((2, 4, 4, 8), False), (None, True))
        ]
        trained = gradients(quantizer, loss, output, z)
        values = [value.detach() for value in losses[:3]]
        results.append([output, loss, indices, *values, *found, *trained])
    torch.testing.assert_close(*results)

    units: dict[str, Any] = {"embedding_dim": embedding_dim}
    monkeypatch.setattr(module, "VectorQuantizer", partial(LlamaGenQuantizer, **units))
    shape = {"encoder_ch_mult": [1, 1], "decoder_ch_mult": [1, 1], "z_channels": 32}
    model = module.VQModel(module.ModelArgs(codebook_size=16, **shape))
    images = torch.rand(1, 3, 8, 8)
    reconstruction, losses = model(images)
    (reconstruction.mean() + losses[0] + losses[1] + losses[2]).backward()
    assert model.quant_conv.weight.grad.abs().sum() > 0
    model.eval()
    with torch.no_grad():
        quantised, _, (_, _, indices) = model.encode(images)
        assert indices.shape == (4 * 4 * 8 // embedding_dim,)
        decoded = model.decode_code(indices, quantised.shape)
        torch.testing.assert_close(decoded, model.decode(quantised))


def test_muse_maskgit(monkeypatch: pytest.MonkeyPatch) -> None:
    module = client(monkeypatch, "muse-maskgit-pytorch", "muse_maskgit_pytorch", "vqgan_vae")
    model = module.VQGanVAE(dim=16, layers=2, codebook_size=16, use_vgg_and_gan=False)
    model.quantizer = LucidrainsQuantizer(
        model.encoded_dim, 16, accept_image_fmap=True, embedding_dim=model.encoded_dim
    )
    images = torch.rand(2, 3, 16, 16)
    model(images, return_loss=True).backward()
    model.eval()
    with torch.no_grad():
        quantised, ids, _ = model.encode(images)
        assert ids.shape == (2, 4, 4)
        torch.testing.assert_close(model.decode_from_ids(ids), model.decode(quantised))


@pytest.mark.parametrize("legacy", [True, False])
def test_real_taming(legacy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not its fork on PyPI. The plug-in has all arguments, and results bit for bit alike."""
    module = client(monkeypatch, "taming-transformers", "taming/modules/vqvae", "quantize")
    form = module.VectorQuantizer2
    wanted = names(form.__init__)
    assert names(LooCPlugin.__init__)[: len(wanted)] == wanted
    ours = LooCPlugin(16, 8, 0.25, legacy=legacy, **ONE_UNIT, distance="l2")
    theirs = form(16, 8, 0.25, legacy=legacy)
    same_codebook(ours, theirs)
    results = []
    for quantizer in (ours, theirs):
        z = latents().requires_grad_()
        output, loss, (_, _, indices) = quantizer(z)
        results.append([output, loss, indices, *gradients(quantizer, loss, output, z)])
    torch.testing.assert_close(*results)


def test_real_taming_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """It imports `main`, and the fork on PyPI hides it, whatever the order of the path."""
    found = client(monkeypatch, "taming-transformers", "taming/modules/vqvae", "quantize")
    package, main = types.ModuleType("taming"), types.ModuleType("main")
    package.__path__ = [str(Path(found.__file__).parents[2])]
    main.instantiate_from_config = nn.Identity  # type: ignore[attr-defined]
    others = {name: value for name, value in sys.modules.items() if not name.startswith("taming")}
    with patch.dict(sys.modules, {**others, "taming": package, "main": main}, clear=True):
        try:
            vqgan = importlib.import_module("taming.models.vqgan")
        except ImportError as error:
            pytest.skip(f"taming.models needs {error.name}")
    assert hasattr(vqgan, "EMAVQ")  # which the fork lacks
    monkeypatch.setattr(vqgan, "VectorQuantizer", partial(LooCPlugin, embedding_dim=4))
    config = {
        **{"double_z": False, "z_channels": 8, "resolution": 16, "in_channels": 3, "out_ch": 3},
        **{"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": []},
        "dropout": 0.0,
    }
    model = vqgan.VQModel(config, {}, n_embed=16, embed_dim=8)
    images = torch.rand(2, 3, 16, 16)
    reconstruction, loss = model(images)
    (reconstruction.mean() + loss).backward()
    model.eval()
    with torch.no_grad():
        quantised, _, info = model.encode(images)
        found = model.quantize.get_codebook_entry(info[2].view(2, -1), (2, 8, 8, 8))
        torch.testing.assert_close(model.decode(found), model.decode(quantised))


@pytest.mark.parametrize("codebook_update", ["gradient", "ema"])
def test_lit_ema(codebook_update: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It averages a codebook with a gradient, and leaves out one of codebook_update "ema"."""
    module = client(monkeypatch, "generative-models", "sgm/modules", "ema")
    plugin = LooCPlugin(16, 8, codebook_update=codebook_update)
    average = module.LitEma(plugin)
    start = plugin.embedding.weight.detach().clone()
    plugin(latents().requires_grad_())
    average(plugin)
    last = plugin.embedding.weight.detach().clone()
    average.store(plugin.parameters())
    average.copy_to(plugin)
    averaged = plugin.embedding.weight
    assert not torch.equal(last, start)
    assert torch.equal(averaged, last) == (codebook_update == "ema")
    average.restore(plugin.parameters())
    assert torch.equal(plugin.embedding.weight, last)
