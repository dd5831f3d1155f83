"""Weights that a run starts from: --pretrained.

Checkpoints of this repository give the whole model, or with --new_quantizer all but its quantiser.
Encoders and decoders of other projects are those of --model vqgan; the quantiser is new.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from modules import Autoencoder, ModelConfig
from modules.checkpoint import FORMAT, check_tensors
from modules.quantizers.registry import QUANTIZER_FLAGS
from modules.weights import is_exported
from utils.checkpoints import translate
from utils.checkpoints.checkpoint import open_checkpoint
from utils.checkpoints.unpickle import read_weights
from utils.errors import UserError, one_line
from utils.flags.arguments import check_stored
from utils.flags.recipes import RECIPES
from utils.training.losses.adversarial import AdversarialConfig

CLASSES = ("VQModel", "AutoencoderKL")
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
# Settings of diffusers for which --model vqgan has one value only.
ONLY = {"act_fn": "silu", "norm_type": "group", "mid_block_add_attention": True}
BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
}
CONVS = {"use_quant_conv": "pre_vq_conv.weight", "use_post_quant_conv": "post_vq_conv.weight"}
# Objects in checkpoints that are ignored: callbacks of Lightning, NumPy numbers in schedules.
INERT = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "numpy.")
AROUND = ("pre_vq_conv.", "post_vq_conv.", "decoder.conv_1.")  # the quantiser; the last: VQ-VAE
TAMING_GROUPS = 32  # normalisation groups, fixed in taming-transformers


@dataclass(frozen=True)
class Pretrained:
    """Weights of encoder, decoder, the 1×1 convolutions between them and perhaps the quantiser."""

    path: Path
    flags: dict[str, Any]  # of the model that has these weights
    state_dict: dict[str, Tensor]  # float32
    origin: str
    further: Mapping[str, Any] = field(default_factory=dict)  # weights of the discriminator


def read_pretrained(path: str | Path, given: Mapping[str, Any] | None = None) -> Pretrained:
    """Open a checkpoint of this repository, taming-transformers or latent-diffusion, or a diffusers
    folder, and check the flags given against it.

    Raises UserError, naming --pretrained or the flag, if it is missing, damaged, would execute code
    when opened, contradicts a flag, or has an architecture that no --model has.
    """
    path, given = Path(path), given or {}
    foreign = path.is_dir() and not is_exported(path)
    content = None if foreign else read_weights(f"--pretrained {path}", path, INERT)
    if content and (content.get("format") == FORMAT or "_vq_vae.embedding.weight" in content):
        return from_ours(path, content, given)
    try:
        label, groups, weights = (
            from_diffusers(path) if content is None else from_taming(path, content)
        )
        state_dict = translate.with_convs(weights)
        flags = translate.flags_of_shapes(state_dict, groups)
    except OSError as error:
        name, reason = error.filename or path, error.strerror or one_line(error)
        raise UserError(f"--pretrained {name} cannot be read: {reason}") from error
    except ValueError as error:
        raise UserError(f"--pretrained {path} {one_line(error)}") from error
    check_stored(given, {"model": "vqgan", **flags}, f"--pretrained {path}", {"latent_channels"})
    return Pretrained(path, flags, state_dict, f"{label} in {path}")


def from_ours(path: Path, content: Mapping[str, Any], given: Mapping[str, Any]) -> Pretrained:
    """Take the weights of a checkpoint of this repository, or of a state dict of the reference.

    With --new_quantizer, the quantiser's weights are left out and its flags may differ.
    """
    flags = dict(given)
    if new := given.get("new_quantizer", False):
        free = {"quantizer", "latent_channels", *QUANTIZER_FLAGS}
        flags = {name: value for name, value in given.items() if name not in free}
    checkpoint = open_checkpoint(path, content, flags)
    config, state_dict = checkpoint.model_config, dict(checkpoint.state_dict)
    flags = {**asdict(config), "latent_channels": config.channels}
    if config.model == "vqgan":
        flags["z_channels"] = config.z_channels or config.channels
    if new:
        left_out = {*replaced(config, given), *RECIPES[given.get("recipe", "paper")]}
        flags = {name: value for name, value in flags.items() if name not in left_out}
        state_dict = {n: v for n, v in state_dict.items() if not n.startswith("quantizer.")}
    further = {}
    if "discriminator" in content and has_discriminator(config, given):
        own = asdict(checkpoint.group("objective_config", AdversarialConfig))
        shape = {name: own[name] for name in ("disc_channels", "disc_layers")}
        flags |= shape
        if shape.items() <= {**shape, **given}.items():
            further = {"discriminator": content["discriminator"]}
    return Pretrained(path, flags, state_dict, str(path), further)


def replaced(config: ModelConfig, given: Mapping[str, Any]) -> set[str]:
    """Return the flags of a checkpoint that a new quantiser with the flags given does not keep."""
    if given.get("quantizer", config.quantizer) != config.quantizer:
        return {"quantizer", *QUANTIZER_FLAGS}
    if {"num_embedding", "embedding_dim", "levels"} & given.keys():
        return set(config.spec.derive(given, ModelConfig))  # they follow from those given
    return set()


def has_discriminator(model: ModelConfig, flags: Mapping[str, Any]) -> bool:
    """Return whether a run with these flags trains a discriminator."""
    return bool({**model.network.implies, **flags}.get("disc_weight"))


def load_pretrained(
    model: Autoencoder, pretrained: Pretrained, flags: Mapping[str, Any] | None = None
) -> str:
    """Load the weights into a new model; return what they are, and which parts stay new.

    flags are those of the run. Raises UserError if they do not fit.
    """
    loaded = fit(pretrained, model.state_dict())
    missing, _ = model.load_state_dict(loaded, strict=False)
    parts = (name.rpartition(".")[0] for name in missing)
    new = list(dict.fromkeys("quantizer" if "quantizer" in part else part for part in parts))
    if has_discriminator(model.config, flags or {}) and not pretrained.further:
        new.append("discriminator")
    return f"{pretrained.origin}; new: {', '.join(new)}" if new else pretrained.origin


def fit(pretrained: Pretrained, expected: translate.StateDict) -> dict[str, Tensor]:
    """Select the weights to load into the model that has this state dict.

    The convolutions around the quantiser stay new if the numbers of latent channels differ. Raises
    UserError naming the first tensor that is missing, misshapen or superfluous.
    """
    given, conv = pretrained.state_dict, "pre_vq_conv.weight"
    left_out = AROUND if given[conv].shape[0] != expected[conv].shape[0] else ()
    if not any(name.startswith("quantizer.") for name in given):
        left_out = (*left_out, "quantizer.")
    loaded, wanted = (
        {name: value for name, value in weights.items() if not name.startswith(left_out)}
        for weights in (given, expected)
    )
    try:
        check_tensors(wanted, loaded)
    except ValueError as error:
        raise UserError(f"--pretrained {pretrained.path} is {error}") from error
    return loaded


def from_diffusers(folder: Path) -> tuple[str, Any, dict[str, Tensor]]:
    """Read a folder of save_pretrained: its kind, normalisation groups, weights under our names."""
    if not (folder / "config.json").is_file():
        raise ValueError("has no config.json; for a pipeline, give its folder vae or vqvae")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"has a config.json that is damaged ({type(error).__name__})") from error
    label = config.get("_class_name") if isinstance(config, dict) else None
    if label not in CLASSES:
        raise ValueError(f"is of class {label}, not {' or '.join(CLASSES)}")
    for flag, only in ONLY.items():
        if config.get(flag, only) != only:
            raise ValueError(f"has {flag} {config[flag]}, where --model vqgan has {only}")
    for flag, known in BLOCKS.items():
        names = config.get(flag, [])
        if not isinstance(names, list) or any(name not in known for name in names):
            raise ValueError(f"has {flag} {names}, where --model vqgan has {' or '.join(known)}")
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(f"has no weights: neither {' nor '.join(WEIGHTS)}")
    content = read_weights(f"--pretrained {path}", path, INERT)
    state_dict = translate.renamed(content, translate.DIFFUSERS)
    for flag, name in CONVS.items():
        if config.get(flag, True) != (name in state_dict):
            there = translate.describe(state_dict.get(name))
            raise ValueError(f"is damaged: {flag} is {config.get(flag, True)}, {name} is {there}")
    return f"{label} of diffusers", config.get("norm_num_groups", 32), state_dict


def from_taming(path: Path, content: Mapping[Any, Any]) -> tuple[str, Any, dict[str, Tensor]]:
    """Read a checkpoint of PyTorch Lightning, or its bare state dict, as `from_diffusers` does."""
    if "pre_vq_conv.weight" in content:
        raise ValueError(
            "is a bare state dict, without its configuration: give main.py's checkpoint"
        )
    if any(str(name).startswith("encoder.down_blocks.") for name in content):
        raise ValueError(f"holds the weights of diffusers alone: give its folder, {path.parent}")
    state_dict = translate.renamed(content.get("state_dict", content), translate.TAMING)
    state_dict = translate.mirrored(state_dict)
    if len({name in state_dict for name in CONVS.values()}) > 1:
        raise ValueError("is damaged: it has only one of quant_conv and post_quant_conv")
    return "first stage in the format of taming-transformers", TAMING_GROUPS, state_dict
