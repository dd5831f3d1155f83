"""Encoders and decoders of diffusers and taming-transformers (their own classes), loaded into ours.

The classes are those of the extra `plugin`; their weights are random.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from modules import VQGAN, ModelConfig, make_model
from tests.conftest import refusal
from tests.scripts.test_vqgan import Script, write_pictures
from tests.unit.test_checkpoint import Exploit
from tests.unit.test_plugin import need
from utils.checkpoints.checkpoint import read_checkpoint
from utils.checkpoints.pretrained import Pretrained, fit, read_pretrained
from utils.flags.arguments import build_model_config

TAMING = {
    **{"double_z": False, "z_channels": 6, "resolution": 32, "in_channels": 3, "out_ch": 3},
    **{"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (), "dropout": 0.0},
}
# Models run in float64, but the mean of a distribution is stored in float32.
equal = partial(torch.testing.assert_close, rtol=0, atol=1e-6)
Change = Callable[[dict[str, Any]], Any]
Function = Callable[[Tensor], Tensor]


def network(flags: Mapping[str, Any], latent_channels: int | None = None) -> VQGAN:
    """Build the network of these flags, with another number of latent channels if given."""
    changed = {} if latent_channels is None else {"latent_channels": latent_channels}
    return VQGAN(ModelConfig(model="vqgan", embedding_dim=1, **{**flags, **changed}))


def in_the_quantiser(names: Iterable[str]) -> set[str]:
    return {name for name in names if name.startswith("quantizer.")}


def assert_same(
    pretrained: Pretrained, source: nn.Module, encode: Function, decode: Function
) -> None:
    """Check that our network with these flags and weights equals the source, both in float64."""
    model = network(pretrained.flags).eval()
    loaded = fit(pretrained, model.state_dict())
    assert model.state_dict().keys() - loaded.keys() == in_the_quantiser(model.state_dict())
    model.load_state_dict(loaded, strict=False)
    model.double()
    source.double()
    random = torch.Generator().manual_seed(1)
    images = torch.rand(2, pretrained.flags["in_channels"], 32, 32, generator=random).double()
    latents = model.pre_vq_conv(model.encoder(images))
    equal(latents, encode(images))
    latents = torch.randn(latents.shape, generator=random).double()
    equal(model.reconstruct(latents), decode(latents))


def scattered(module: nn.Module) -> nn.Module:
    """Set all weights at random, including norms and biases."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        noise = torch.randn_like(parameter)
        parameter.data = noise * 0.1 if parameter.dim() > 1 else parameter.data + 0.3 * noise
    return module.eval()


def of_diffusers(name: str, **options: Any) -> Any:
    """Make a small model of diffusers; by default two resolutions of 32 and 64 channels."""
    settings = {
        "block_out_channels": (32, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
    }
    return scattered(getattr(need("diffusers"), name)(**{**settings, **options}))


# --------------------------------------------------------------------------------------- diffusers

ATTENTIVE = {
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
    "block_out_channels": (16, 16, 48),
    "norm_num_groups": 16,
}


@torch.no_grad()
@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({}, {"hidden_size": 32, "channel_multipliers": "1,2", "attention_levels": 0}),
        (
            {"norm_num_groups": 8},
            {"hidden_size": 32, "channel_multipliers": "1,2", "attention_levels": 0}
            | {"norm_groups": 8},
        ),
        (
            {**ATTENTIVE, "layers_per_block": 2, "vq_embed_dim": 5, "in_channels": 1}
            | {"out_channels": 1},
            {"hidden_size": 16, "channel_multipliers": "1,1,3", "attention_levels": 1}
            | {"num_residual_layers": 2, "latent_channels": 5, "in_channels": 1}
            | {"norm_groups": 16},
        ),
    ],
)
def test_a_vqmodel(
    options: dict[str, Any], flags: dict[str, Any], safe: bool, tmp_path: Path
) -> None:
    model = of_diffusers("VQModel", **options)
    model.save_pretrained(tmp_path, safe_serialization=safe)
    pretrained = read_pretrained(tmp_path)
    usual = {"num_residual_layers": 1, "z_channels": 4, "latent_channels": 4, "in_channels": 3}
    assert pretrained.flags == {**usual, "norm_groups": 32, **flags}
    assert pretrained.origin == f"VQModel of diffusers in {tmp_path}"
    assert_same(
        pretrained,
        model,
        lambda images: model.encode(images).latents,
        lambda latents: model.decode(latents, force_not_quantize=True).sample,
    )


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {},
        ATTENTIVE,
        {"use_quant_conv": False, "use_post_quant_conv": False},
        {"use_quant_conv": False},
        {"use_post_quant_conv": False},
    ],
)
def test_an_autoencoder_kl_gives_its_mean(options: dict[str, Any], tmp_path: Path) -> None:
    model = of_diffusers("AutoencoderKL", **options)
    model.save_pretrained(tmp_path / "vae")
    pretrained = read_pretrained(tmp_path / "vae")
    assert (pretrained.flags["z_channels"], pretrained.flags["latent_channels"]) == (4, 4)
    assert_same(
        pretrained,
        model,
        lambda images: model.encode(images).latent_dist.mean,
        lambda latents: model.decode(latents).sample,
    )


def weights_file(folder: Path) -> Path:
    (path,) = folder.glob("diffusion_pytorch_model.*")
    return path


def rewrite(folder: Path, change: Change) -> None:
    """Replace the weights in the folder by the result of `change`."""
    safetensors, path = need("safetensors.torch"), weights_file(folder)
    safetensors.save_file(change(safetensors.load_file(path)), path)


def test_the_file_of_a_folder_of_diffusers(tmp_path: Path) -> None:
    of_diffusers("VQModel", **ATTENTIVE).save_pretrained(tmp_path)
    message = refused(weights_file(tmp_path))
    assert message == f"holds the weights of diffusers alone: give its folder, {tmp_path}"


def test_attention_as_older_files_name_it(tmp_path: Path) -> None:
    of_diffusers("VQModel", **ATTENTIVE).save_pretrained(tmp_path)
    expected = read_pretrained(tmp_path).state_dict
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    pattern = rf"\.({'|'.join(map(re.escape, old))})\."
    rewrite(
        tmp_path,
        lambda state: {
            re.sub(pattern, lambda found: f".{old[found[1]]}.", name): value
            for name, value in state.items()
        },
    )
    assert b"encoder.mid_block.attentions.0.proj_attn.weight" in weights_file(tmp_path).read_bytes()
    found = read_pretrained(tmp_path).state_dict
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_half_precision_becomes_single(tmp_path: Path) -> None:
    of_diffusers("AutoencoderKL").half().save_pretrained(tmp_path)
    values = read_pretrained(tmp_path).state_dict.values()
    assert {value.dtype for value in values} == {torch.float32}


# ------------------------------------------------------------------------------------------ taming


def of_taming(embed_dim: int = 5, **options: Any) -> Any:
    """Make the first stage of taming-transformers, as its VQModel does."""
    layers = need("taming.modules.diffusionmodules.model")
    settings: dict[str, Any] = {**TAMING, **options}
    z_channels, factor = settings["z_channels"], 2 if settings["double_z"] else 1
    model = nn.Module()
    model.encoder, model.decoder = layers.Encoder(**settings), layers.Decoder(**settings)
    model.quant_conv = nn.Conv2d(z_channels * factor, embed_dim * factor, 1)
    model.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)
    model.quantize = nn.Embedding(7, embed_dim)
    model.loss = nn.Module()
    model.loss.discriminator = nn.Conv2d(3, 8, 4)
    return scattered(model)


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> type:
    """Make a class of pytorch_lightning that exists only while the checkpoint is written."""
    module = ModuleType("pytorch_lightning.callbacks.invented")
    made = type("Callback", (), {"__module__": module.__name__})
    module.Callback = made  # type: ignore[attr-defined]
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return made


def as_lightning(model: nn.Module, callback: type) -> dict[str, Any]:
    """Make a checkpoint of Lightning: its own class and objects, numbers of NumPy."""
    state = callback()
    state.best = 0.5
    return {
        "epoch": 3,
        "state_dict": model.state_dict(),
        "callbacks": {callback: {"best_model_score": torch.ones(())}, "object": state},
        "lr_schedulers": [{"_last_lr": [np.float64(0.1)], "base": np.arange(3)}],
    }


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "multipliers", "levels"),
    [
        ({}, "1,2", 0),
        ({"attn_resolutions": (16,)}, "1,2", 1),
        ({"ch_mult": (1, 1, 3), "attn_resolutions": (8,), "num_res_blocks": 2}, "1,1,3", 1),
        ({"attn_resolutions": (16, 32)}, "1,2", 2),
        ({"ch_mult": (1,), "ch": 64}, "1", 0),
    ],
)
def test_a_checkpoint_of_taming(
    options: dict[str, Any], multipliers: str, levels: int, trainer: type, tmp_path: Path
) -> None:
    model = of_taming(**options)
    torch.save(as_lightning(model, trainer), tmp_path / "last.ckpt")
    for name in [name for name in sys.modules if name.startswith("pytorch_lightning")]:
        del sys.modules[name]
    pretrained = read_pretrained(tmp_path / "last.ckpt")
    assert not any(name.startswith("pytorch_lightning") for name in sys.modules)
    assert pretrained.flags == {
        "hidden_size": options.get("ch", 32),
        "channel_multipliers": multipliers,
        "num_residual_layers": options.get("num_res_blocks", 1),
        "attention_levels": levels,
        "norm_groups": 32,
        "z_channels": 6,
        "latent_channels": 5,
        "in_channels": 3,
    }
    assert_same(
        pretrained,
        model,
        lambda images: model.quant_conv(model.encoder(images)),
        lambda latents: model.decoder(model.post_quant_conv(latents)),
    )


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_a_bare_state_dict_of_latent_diffusion_gives_its_mean(prefix: str, tmp_path: Path) -> None:
    model = of_taming(embed_dim=6, double_z=True)
    state = {f"{prefix}{name}": value for name, value in model.state_dict().items()}
    torch.save({**state, "model_ema.decay": torch.tensor(1)}, tmp_path / "kl.pt")
    assert_same(
        read_pretrained(tmp_path / "kl.pt"),
        model,
        lambda images: model.quant_conv(model.encoder(images)).chunk(2, 1)[0],
        lambda latents: model.decoder(model.post_quant_conv(latents)),
    )


# ----------------------------------------------------------------------------------------- fitting


def test_other_latents_leave_the_convolutions_around_the_quantiser_new(tmp_path: Path) -> None:
    torch.save(of_taming().state_dict(), tmp_path / "m.ckpt")
    pretrained = read_pretrained(tmp_path / "m.ckpt")
    expected = network(pretrained.flags, latent_channels=8).state_dict()
    loaded = fit(pretrained, expected)
    convs = [f"{side}_vq_conv.{kind}" for side in ("pre", "post") for kind in ("weight", "bias")]
    assert expected.keys() - loaded.keys() == {*convs, *in_the_quantiser(expected)}
    assert loaded.keys() <= expected.keys()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"hidden_size": 64},
            "encoder.conv_in.weight is (32, 3, 3, 3) where the model has (64, 3, 3, 3)",
        ),
        (
            {"channel_multipliers": "1,2,2"},
            "encoder.down_blocks.1.downsamplers.0.conv.weight is nothing where",
        ),
        ({"attention_levels": 1}, "attentions.0.group_norm.weight is nothing where the model has"),
        ({"z_channels": 3}, "encoder.conv_out.weight is (6, 64, 3, 3) where the model has (3, 64"),
        ({"in_channels": 1}, "(32, 3, 3, 3) where the model has (32, 1, 3, 3)"),
    ],
)
def test_flags_that_contradict_the_file(
    flags: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "m.ckpt"
    torch.save(of_taming().state_dict(), path)
    pretrained = read_pretrained(path)
    model = network({**pretrained.flags, **flags})
    said = refusal(lambda: fit(pretrained, model.state_dict()))
    assert said.startswith(f"--pretrained {path} is of another architecture: ")
    assert message in said


def test_tensors_without_a_place_are_noticed(tmp_path: Path) -> None:
    state = of_taming().state_dict()
    state["encoder.down.0.block.0.temb_proj.weight"] = torch.zeros(32, 8)
    torch.save(state, tmp_path / "m.ckpt")
    pretrained = read_pretrained(tmp_path / "m.ckpt")
    expected = network(pretrained.flags).state_dict()
    assert "temb_proj.weight is (32, 8) where the model has nothing" in refusal(
        lambda: fit(pretrained, expected)
    )


# -------------------------------------------------------------------------------------- as a user


def test_main_starts_from_weights_and_trains_on(script: Script, tmp_path: Path) -> None:
    """Encoder and decoder equal those of the folder, up to one negligible step."""
    model = of_diffusers("VQModel", block_out_channels=(8, 16), norm_num_groups=8)
    model.save_pretrained(tmp_path / "vq")
    write_pictures(tmp_path / "pictures")
    words = (
        *("--dataset", "folder", "--data_folder", "pictures", "--image_size", "32"),
        *("--perceptual_weight", "0", "--num_workers", "0", "--exp_name", "e", "--lr", "1e-9"),
        *("--pretrained", "vq", "--max_steps", "1", "--num_embedding", "16"),
    )
    outcome = script("main.py", *words, "--latent_norm", "batch")
    assert outcome.code == 0, outcome.err
    assert (
        "starting from VQModel of diffusers in vq; new: quantizer, discriminator\n" in outcome.err
    )
    checkpoint = read_checkpoint(tmp_path / "output/models/e/best.pt")
    assert checkpoint.model_config.channel_multipliers == "1,2"
    for name, weight in read_pretrained(tmp_path / "vq").state_dict.items():
        torch.testing.assert_close(checkpoint.state_dict[name], weight, rtol=0, atol=1e-6)
    outcome = script("main.py", *words, "--latent_channels", "8", "--exp_name", "f")
    assert "in vq; new: pre_vq_conv, quantizer, post_vq_conv, discriminator\n" in outcome.err
    for flag, value, told in (("hidden_size", "16", "8"), ("model", "vqvae", "vqgan")):
        outcome = script("main.py", *words, f"--{flag}", value)
        assert outcome.code == 2
        assert f"--{flag} {value} contradicts --pretrained vq, which has {told}" in outcome.err
    like = ["--model", "vqgan", "--hidden_size", "8", "--channel_multipliers", "1,2"]
    like += ["--num_residual_layers", "1", "--attention_levels", "0", "--latent_channels", "4"]
    scratch = [word for word in words if word not in ("--pretrained", "vq")]
    outcome = script("main.py", *scratch, *like, "--z_channels", "4", "--exp_name", "g")
    assert outcome.code == 0, outcome.err
    outcome = script("main.py", *words, "--exp_name", "g")
    assert outcome.code == 2
    assert "--pretrained vq (it has none)" in outcome.err
    grey = ("--dataset", "fashion-mnist-sample", "--image_size", "28", "--disc_layers", "2")
    bundled = [word for word in words if word not in ("--data_folder", "pictures")]
    outcome = script("main.py", *bundled, *grey)
    assert outcome.code == 2
    said = (
        "--pretrained vq takes 3-channel images, --dataset fashion-mnist-sample has 1-channel ones"
    )
    assert outcome.err == f"main.py: error: {said}\n"


# ------------------------------------------------------------------------------- what is refused


def refused(path: Path) -> str:
    """Return the message that refuses the path, without flag and path."""
    message = refusal(lambda: read_pretrained(path))
    start = f"--pretrained {path}"
    assert message.startswith(start)
    return message.removeprefix(start).removeprefix(" ")


def test_what_is_not_there(tmp_path: Path) -> None:
    assert refused(tmp_path / "none") == "does not exist"
    assert refused(tmp_path).startswith("has no config.json")
    (tmp_path / "config.json").write_text('{"_class_name": "VQModel"}')
    assert refused(tmp_path).startswith("has no weights: neither diffusion_pytorch_model.safe")
    (tmp_path / "config.json").write_text('{"_class_name": "VQ')
    assert refused(tmp_path) == "has a config.json that is damaged (JSONDecodeError)"
    (tmp_path / "config.json").write_text("[1]")
    assert refused(tmp_path) == "is of class None, not VQModel or AutoencoderKL"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AutoencoderTiny"}, "is of class AutoencoderTiny, not VQModel or"),
        ({"act_fn": "relu"}, "has act_fn relu, where --model vqgan has silu"),
        ({"norm_type": "spatial"}, "has norm_type spatial, where --model vqgan has group"),
        ({"mid_block_add_attention": False}, "has mid_block_add_attention False, where --model"),
        ({"norm_num_groups": 5}, "normalises in 5 groups, which do not divide 32 channels"),
        ({"norm_num_groups": "8"}, "normalises in 8 groups, which do not divide 32 channels"),
        ({"norm_num_groups": 0}, "normalises in 0 groups, which do not divide 32 channels"),
        ({"down_block_types": ["DownBlock2D"]}, "has down_block_types ['DownBlock2D'], where"),
        ({"up_block_types": 3}, "has up_block_types 3, where --model vqgan has UpDecoderBlock2D"),
        ({"use_quant_conv": False}, "is damaged: use_quant_conv is False, pre_vq_conv.weight is"),
    ],
)
def test_configurations_of_another_architecture(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    of_diffusers("VQModel").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    assert refused(tmp_path).startswith(message)


ATTENTION_FIRST = {
    "down_block_types": ("AttnDownEncoderBlock2D", "DownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ATTENTION_FIRST, "has attention at resolutions [0] of 0 to 1, where"),
        (
            {"block_out_channels": (32, 48), "norm_num_groups": 16},
            "has [32, 48] channels at its resolutions, where --model vqgan has multiples of the 32",
        ),
        ({"out_channels": 1}, "makes 1-channel images from 3-channel ones"),
    ],
)
def test_shapes_of_another_architecture(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    of_diffusers("AutoencoderKL", **options).save_pretrained(tmp_path)
    assert refused(tmp_path).startswith(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ch_mult": (2, 2)}, "has [64, 64] channels at its resolutions, where --model vqgan has"),
        (
            {"double_z": True},
            "is of another architecture: pre_vq_conv.weight is (10, 12, 1, 1), not (12, 12, 1, 1)",
        ),
        ({"attn_resolutions": (32,)}, "has attention at resolutions [0] of 0 to 1, where"),
    ],
)
def test_checkpoints_of_another_architecture(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    torch.save(of_taming(**options).state_dict(), tmp_path / "m.ckpt")
    assert refused(tmp_path / "m.ckpt").startswith(message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("quant_conv.weight"), "is damaged: it has only one of quant_conv"),
        (
            lambda state: state.pop("encoder.conv_in.weight"),
            "is of another architecture: encoder.conv_in.weight is nothing, not (any, any, 3, 3)",
        ),
        (
            lambda state: state.update({"encoder.conv_out.weight": torch.ones(9, 64, 3, 3)}),
            "is of another architecture: its encoder gives 9 channels, its decoder takes 6",
        ),
        (
            lambda state: state["decoder.conv_in.bias"].fill_(math.nan),
            "is damaged: decoder.conv_in.bias is not finite",
        ),
        (
            lambda state: state.update({"encoder.conv_in.weight": 3}),
            "is damaged: encoder.conv_in.weight is nothing",
        ),
        (
            lambda state: state.update({"encoder.conv_in.bias": torch.ones(32).int()}),
            "is damaged: encoder.conv_in.bias is (32,) torch.int32",
        ),
        (
            lambda state: state.update({"encoder.conv_in.bias": torch.ones(1).expand(2**40)}),
            "is damaged: encoder.conv_in.bias is (1099511627776,)",
        ),
        (
            lambda state: state.update({"encoder.conv_in.bias": torch.ones(3, device="meta")}),
            "is damaged: encoder.conv_in.bias is (3,)",
        ),
        (lambda state: state.update({"state_dict": [1]}), "holds no state dict"),
    ],
)
def test_damaged_checkpoints(change: Change, message: str, tmp_path: Path) -> None:
    state = of_taming().state_dict()
    change(state)
    torch.save(state, tmp_path / "m.ckpt")
    assert refused(tmp_path / "m.ckpt").startswith(message)


@pytest.mark.parametrize("model", ["vqvae", "vqgan"])
def test_a_bare_state_dict_of_ours(model: str, tmp_path: Path) -> None:
    config = build_model_config({"model": model, "hidden_size": 8, "num_embedding": 8}, 3)
    torch.save(make_model(config).state_dict(), tmp_path / "m.pt")
    assert refused(tmp_path / "m.pt").startswith("is a bare state dict, without its configuration")


def test_weights_of_diffusers_that_are_not_finite(tmp_path: Path) -> None:
    of_diffusers("VQModel").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda state: {**state, "encoder.conv_in.bias": torch.tensor([math.inf])})
    assert refused(tmp_path) == "is damaged: encoder.conv_in.bias is not finite"


@pytest.mark.parametrize("safe", [True, False])
def test_truncated_files(safe: bool, tmp_path: Path) -> None:
    of_diffusers("VQModel").save_pretrained(tmp_path, safe_serialization=safe)
    path = weights_file(tmp_path)
    whole = path.read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        message = refusal(lambda: read_pretrained(tmp_path))
        assert message.startswith(f"--pretrained {tmp_path}")
        assert re.search(r" is refused: .* is truncated or damaged", message)


@pytest.mark.parametrize("legacy", [True, False])
def test_nothing_is_executed(legacy: bool, trainer: type, tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "bad.ckpt"
    content = {"state_dict": {}, "callbacks": {trainer: Exploit(victim)}}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    assert refused(path).startswith("is refused: it would execute code when opened")
    path.write_bytes(pickle.dumps(Exploit(victim)))
    assert refused(path).startswith("is refused: it would execute code when opened")
    assert not victim.exists()


def test_a_class_of_the_trainer_is_never_called(
    trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No other name of its package is used either: every object of the file is a stand-in."""
    trainer.__reduce__ = lambda _: (trainer, (1, 2), {"a": 3})
    torch.save(as_lightning(of_taming(), trainer), tmp_path / "m.ckpt")
    called: list[Any] = []
    monkeypatch.setattr(trainer, "__new__", called.append)
    monkeypatch.setattr(trainer, "__setstate__", called.append, raising=False)
    assert read_pretrained(tmp_path / "m.ckpt").flags["hidden_size"] == 32
    assert not called


def test_the_refused_class_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("omegaconf")
    module.Config = type("Config", (), {"__module__": "omegaconf"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "omegaconf", module)
    torch.save({"state_dict": {}, "hyper_parameters": module.Config()}, tmp_path / "m.ckpt")
    assert "would execute code when opened (omegaconf.Config)" in refused(tmp_path / "m.ckpt")


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "VQModel"}')
    (tmp_path / "diffusion_pytorch_model.bin").mkdir()
    assert refused(tmp_path).startswith("has no weights")
