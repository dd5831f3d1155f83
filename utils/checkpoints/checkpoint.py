"""Checkpoints that rebuild their model alone, and the reference's bare state dicts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from modules import Autoencoder, ModelConfig, make_model
from modules.config import implied_flags
from modules.vqgan import default_groups
from utils.checkpoints.unpickle import read_pickle
from utils.errors import UserError, one_line
from utils.files import whole_file
from utils.flags.arguments import value_problem

FORMAT = "looc-1"
LARGEST_COUNT = 10**12
StateDict: TypeAlias = Mapping[str, Tensor]
Group = TypeVar("Group")


@dataclass(frozen=True)
class Checkpoint:
    """What a file of ours, or the reference's, holds."""

    path: Path
    model_config: ModelConfig
    state_dict: StateDict
    content: Mapping[str, Any]  # everything else: data set, seed, epoch, optimiser …; may be empty

    def model(self) -> Autoencoder:
        """The model, in evaluation mode, on the CPU."""
        model = make_model(self.model_config)
        model.load_state_dict(self.state_dict)
        return model.eval()

    def group(self, name: str, group: type[Group]) -> Group:
        """A dataclass of flags that was stored under this name."""
        return stored_group(self.path, group, self.content.get(name))

    def count(self, name: str) -> int:
        """A number of steps, epochs or images that was stored under this name."""
        value = self.content.get(name)
        if type(value) is not int or not 0 <= value <= LARGEST_COUNT:
            raise UserError(f"checkpoint {self.path} is damaged: its {name} is no count")
        return value


def load_model(path: str | Path) -> Autoencoder:
    """Open a checkpoint of ours or a state dict of the reference; returns it in evaluation mode.

    Raises UserError where the file is missing, damaged, of another architecture, or would execute
    code when opened.
    """
    return read_checkpoint(path).model()


def save_checkpoint(path: Path, model: Autoencoder, content: Mapping[str, Any]) -> None:
    """Write the model and everything in content (tensors and plain Python values), atomically."""
    write_checkpoint(path, {**model_content(model), **content})


def model_content(model: Autoencoder) -> dict[str, Any]:
    """Entries of a checkpoint from which the model is rebuilt."""
    return {
        "format": FORMAT,
        "model_config": asdict(model.config),
        "model": model.state_dict(),
    }


def write_checkpoint(path: Path, content: Mapping[str, Any], previous: Path | None = None) -> None:
    """Write a checkpoint of tensors and plain Python values, atomically.

    The file that was at path is kept at previous, where that is given.
    """
    with whole_file(path, previous) as temporary:
        try:
            torch.save(dict(content), temporary)
        except RuntimeError as error:  # how torch reports a full disk
            reason = one_line(error)[:100]
            raise UserError(f"cannot write {path}: is the disk full? ({reason})") from error


def read_checkpoint(path: str | Path, flags: Mapping[str, Any] | None = None) -> Checkpoint:
    """Open a checkpoint and check it against the model flags given.

    A flag that contradicts the checkpoint raises UserError naming it and both values. A bare state
    dict carries no configuration: what its shapes do not tell is taken from the flags.
    """
    path = Path(path)
    flags = {name: value for name, value in (flags or {}).items() if name in MODEL_FIELDS}
    content = open_file(path)
    if content.get("format") == FORMAT:
        known = asdict(stored_group(path, ModelConfig, with_groups(content.get("model_config"))))
        state_dict = content.get("model")
        if not isinstance(state_dict, Mapping):
            raise UserError(f"checkpoint {path} is damaged: it holds no model")
    else:
        state_dict = from_reference(path, content)
        known = shapes_tell(path, state_dict)
        flags = {**implied_flags({**flags, **known}), **flags}
        content = {}
    for name, value in flags.items():
        if name in known and known[name] != value:
            raise UserError(f"--{name} {value} contradicts {path}, which has {known[name]}")
    try:
        config = ModelConfig(**{**flags, **known})
        config.need_libraries()
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    if not content:
        # The reference does not store every buffer; those start anew.
        fresh = dict(make_model(config).quantizer.named_buffers(prefix="quantizer"))
        state_dict = {**fresh, **state_dict}
    checkpoint = Checkpoint(path, config, state_dict, content)
    check_shapes(checkpoint)
    return checkpoint


MODEL_FIELDS = {item.name: item for item in fields(ModelConfig)}


def open_file(path: Path) -> dict[str, Any]:
    """The dictionary in the file, opened without executing anything."""
    if not path.is_file():
        raise UserError(f"checkpoint {path} {'is no file' if path.exists() else 'does not exist'}")
    content = read_pickle(f"checkpoint {path}", path)
    if not isinstance(content, dict):
        raise UserError(f"checkpoint {path} holds a {type(content).__name__}, not a state dict")
    return content


def stored_group(path: Path, group: type[Group], values: Any) -> Group:
    """A dataclass of flags as a checkpoint of ours holds it, every value checked like a flag.

    A flag that is newer than the checkpoint has its default.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"checkpoint {path} does not hold the flags of its {group.__name__}")
    try:
        checked = {}
        for item in fields(group):  # type: ignore[arg-type]
            checked[item.name] = values.get(item.name, item.default)
            problem = value_problem(group, item, checked[item.name])
            if problem:
                raise ValueError(f"{item.name}: {problem}")
        return group(**checked)
    except (TypeError, ValueError) as error:
        raise UserError(f"checkpoint {path} is damaged: {one_line(error)}") from error


def with_groups(values: Any) -> Any:
    """The flags of a VQGAN from before there was --norm_groups with those that it had."""
    if not isinstance(values, Mapping) or values.get("model") != "vqgan":
        return values
    width = values.get("hidden_size")
    if type(width) is not int or width < 1 or math.gcd(32, width) == default_groups(width):
        return values
    return {"norm_groups": math.gcd(32, width), **values}


def from_reference(path: Path, content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The reference's parameter names, translated into ours."""
    renamed = {}
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UserError(f"checkpoint {path} is neither ours nor a state dict")
        name = re.sub(r"(^|\.)_", r"\1", key)
        name = name.replace("vq_vae.embedding.weight", "quantizer.codebook")
        name = name.replace("vq_vae.embed_prob", "quantizer.usage")
        # The reference counts the leading ReLU of a residual block.
        name = re.sub(r"block\.([13])\.", lambda match: f"block.{int(match[1]) - 1}.", name)
        renamed[name] = value
    return renamed


def shapes_tell(path: Path, state_dict: StateDict) -> dict[str, Any]:
    """The configuration, as far as the shapes of a bare state dict tell it."""
    try:
        hidden, in_channels = (
            state_dict["encoder.conv_3.weight"].shape[0],
            state_dict["encoder.conv_1.weight"].shape[1],
        )
        num_embedding, dim = state_dict["quantizer.codebook"].shape
        channels = state_dict["pre_vq_conv.weight"].shape[0]
        blocks = [
            value.shape[0]
            for key, value in state_dict.items()
            if re.search(r"^encoder.*layers\.\d+\.block\.0\.weight", key)
        ]
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(
            f"checkpoint {path} is of another architecture: "
            f"{one_line(error)} is missing or misshapen"
        ) from error
    told: dict[str, Any] = {
        "num_embedding": num_embedding,
        "embedding_dim": dim,
        "hidden_size": hidden,
        "in_channels": in_channels,
        "num_residual_layers": len(blocks),
    }
    if blocks:
        told["num_residual_hidden"] = blocks[0]
    if channels != dim:
        told["quantizer"] = "looc"
    elif channels != hidden:
        # One unit a position: the reference's CVQ-VAE, or its VQ, which keeps no usage average.
        told["quantizer"] = "cvq" if "quantizer.usage" in state_dict else "vq"
    for name, value in told.items():
        problem = value_problem(ModelConfig, MODEL_FIELDS[name], value)
        if problem:
            raise UserError(f"checkpoint {path} is of another architecture: {name}: {problem}")
    return told


def check_shapes(checkpoint: Checkpoint) -> None:
    """Raise UserError naming the first parameter that does not fit the configuration."""
    with torch.device("meta"):
        expected = make_model(checkpoint.model_config).state_dict()
    try:
        check_tensors(expected, checkpoint.state_dict)
        check_averages(checkpoint.state_dict)
    except ValueError as error:
        raise UserError(f"checkpoint {checkpoint.path} is {error}") from error


def check_tensors(expected: StateDict, given: Any) -> None:
    """Raise ValueError naming the first tensor that is missing, misshapen or not finite."""
    if not isinstance(given, Mapping):
        raise ValueError(f"damaged: a {type(given).__name__} where weights are expected")
    for key in [*expected, *given]:
        value = given.get(key)
        ours, theirs = describe(expected.get(key)), describe(value)
        if ours != theirs or value is None:
            raise ValueError(
                f"of another architecture: {key} is {theirs} where the model has {ours}"
            )
        if value.device.type != "cpu" or not value.isfinite().all():
            raise ValueError(f"damaged: {key} is not finite")


def check_averages(given: StateDict) -> None:
    """Raise ValueError where what the quantiser counts and averages cannot have been."""
    for name in ("usage", "ema_count", "latent_variance", "latent_steps", "pool_size"):
        value = given.get(f"quantizer.{name}")
        if value is not None and (value < 0).any():
            raise ValueError(f"damaged: quantizer.{name} is negative")
    pool = given.get("quantizer.pool")
    if pool is not None and given["quantizer.pool_size"] > len(pool):
        raise ValueError("damaged: quantizer.pool_size is more than quantizer.pool holds")


def describe(value: Any) -> str:
    """Shape and type of a tensor in words, "nothing" for anything else."""
    if not isinstance(value, Tensor):
        return "nothing"
    sparse = "" if value.layout == torch.strided else " sparse"
    return f"{tuple(value.shape)} {value.dtype}{sparse}"
