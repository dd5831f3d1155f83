"""Encoders and decoders trained elsewhere, from which --model vqgan can start: --pretrained.

Their quantiser is dropped; a new one takes its place, and the whole model is fine-tuned.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from modules import Autoencoder
from utils.checkpoints import translate
from utils.checkpoints.checkpoint import FORMAT, check_tensors
from utils.checkpoints.unpickle import read_weights
from utils.errors import UserError, one_line
from utils.logger import log

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
TAMING_GROUPS = 32  # normalisation groups, fixed in taming-transformers


@dataclass(frozen=True)
class Pretrained:
    """Weights of encoder, decoder and the 1×1 convolutions around the quantiser, as float32."""

    path: Path
    flags: dict[str, Any]  # fields of ModelConfig that describe the network
    state_dict: dict[str, Tensor]
    origin: str


def read_pretrained(path: str | Path) -> Pretrained:
    """Open a diffusers folder, or a checkpoint of taming-transformers or latent-diffusion.

    Raises UserError, naming --pretrained, if it is missing, damaged, would execute code when
    opened, or has an architecture that --model vqgan does not have.
    """
    path = Path(path)
    try:
        label, groups, weights = from_diffusers(path) if path.is_dir() else from_taming(path)
        state_dict = translate.with_convs(weights)
        flags = translate.flags_of_shapes(state_dict, groups)
    except OSError as error:
        name, reason = error.filename or path, error.strerror or one_line(error)
        raise UserError(f"--pretrained {name} cannot be read: {reason}") from error
    except ValueError as error:
        raise UserError(f"--pretrained {path} {one_line(error)}") from error
    return Pretrained(path, flags, state_dict, f"{label} in {path}")


def load_pretrained(model: Autoencoder, pretrained: Pretrained) -> None:
    """Load the weights into a new model. Raises UserError if they do not fit."""
    channels = pretrained.flags["in_channels"]
    if channels != model.config.in_channels:
        raise UserError(
            f"--pretrained {pretrained.path} takes images of {channels} channels, "
            f"those of --dataset have {model.config.in_channels}"
        )
    loaded = fit(pretrained, model.state_dict())
    missing, _ = model.load_state_dict(loaded, strict=False)
    new = dict.fromkeys(name.split(".")[0] for name in missing)
    log.info("starting from %s; new: %s", pretrained.origin, ", ".join(new))


def fit(pretrained: Pretrained, expected: translate.StateDict) -> dict[str, Tensor]:
    """Select the weights to load into the model that has this state dict.

    The convolutions around the quantiser stay new if the numbers of latent channels differ. Raises
    UserError naming the first tensor that is missing, misshapen or superfluous.
    """
    given = pretrained.state_dict
    parts: tuple[str, ...] = ("encoder.", "decoder.")
    if given["pre_vq_conv.weight"].shape[0] == expected["pre_vq_conv.weight"].shape[0]:
        parts += ("pre_vq_conv.", "post_vq_conv.")
    loaded, wanted = (
        {name: value for name, value in weights.items() if name.startswith(parts)}
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


def from_taming(path: Path) -> tuple[str, Any, dict[str, Tensor]]:
    """Read a checkpoint of PyTorch Lightning, or its bare state dict, as `from_diffusers` does."""
    content = read_weights(f"--pretrained {path}", path, INERT)
    if any(str(name).startswith("encoder.down_blocks.") for name in content):
        raise ValueError(f"holds the weights of diffusers alone: give its folder, {path.parent}")
    if content.get("format") == FORMAT:
        raise ValueError("is a checkpoint of this repository, which --resume continues")
    state_dict = translate.renamed(content.get("state_dict", content), translate.TAMING)
    state_dict = translate.mirrored(state_dict)
    if len({name in state_dict for name in CONVS.values()}) > 1:
        raise ValueError("is damaged: it has only one of quant_conv and post_quant_conv")
    return "first stage in the format of taming-transformers", TAMING_GROUPS, state_dict
