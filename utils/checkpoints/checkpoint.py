"""Checkpoints from which a model is rebuilt without further flags."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from modules import Autoencoder, ModelConfig, make_model
from modules.config import implied_flags
from modules.vqgan import default_groups
from utils.checkpoints.translate import StateDict, describe, from_reference
from utils.checkpoints.unpickle import read_weights
from utils.errors import UserError, one_line
from utils.files import inside, whole_file
from utils.flags.arguments import check_stored, value_problem

FORMAT = "looc-1"
LARGEST_COUNT = 10**12
Group = TypeVar("Group")


@dataclass(frozen=True)
class Stored:
    """Content of a checkpoint of any task, and the file from which it was read."""

    path: Path
    content: Mapping[str, Any]

    def group(self, name: str, group: type[Group]) -> Group:
        """Return the dataclass of flags stored under this name, each value checked like a flag.

        A flag that is newer than the checkpoint gets its default.
        """
        values = self.content.get(name)
        if not isinstance(values, Mapping):
            kind = group.__name__
            raise UserError(f"checkpoint {self.path} does not hold the flags of its {kind}")
        flags = {}
        try:
            for item in fields(group):  # type: ignore[arg-type]
                flags[item.name] = values.get(item.name, item.default)
                problem = value_problem(item, flags[item.name])
                if problem:
                    raise ValueError(f"{item.name}: {problem}")
            if flags.get("model") == "vqgan" and "norm_groups" not in values:
                flags["norm_groups"] = earlier_groups(flags["hidden_size"])
            return group(**flags)
        except (TypeError, ValueError) as error:
            raise UserError(f"checkpoint {self.path} is damaged: {one_line(error)}") from error

    def count(self, name: str) -> int:
        """Return the number of steps, epochs or images stored under this name."""
        value = self.content.get(name)
        if type(value) is not int or not 0 <= value <= LARGEST_COUNT:
            raise UserError(f"checkpoint {self.path} is damaged: its {name} is not a count")
        return value


@dataclass(frozen=True)
class Checkpoint(Stored):
    """Checkpoint of an autoencoder, or a state dict of the reference, which has no content."""

    model_config: ModelConfig
    state_dict: StateDict

    def model(self) -> Autoencoder:
        """Make the model, in evaluation mode, on the CPU."""
        model = make_model(self.model_config)
        model.load_state_dict(self.state_dict)
        return model.eval()


def load_model(path: str | Path) -> Autoencoder:
    """Load the model of a checkpoint, or of a state dict of the reference, in evaluation mode.

    Raises UserError if the file is missing, damaged, of another architecture, or would execute
    code when opened.
    """
    return read_checkpoint(path).model()


def save_checkpoint(path: Path, model: Autoencoder, content: Mapping[str, Any]) -> None:
    """Write the model and `content` (tensors and plain Python values) atomically."""
    write_checkpoint(path, {**model_content(model), **content})


def model_content(model: Autoencoder) -> dict[str, Any]:
    """Return the entries of a checkpoint from which the model is rebuilt."""
    return {"model_config": asdict(model.config), "model": model.state_dict()}


def write_checkpoint(path: Path, content: Mapping[str, Any], previous: Path | None = None) -> None:
    """Write a checkpoint of tensors and plain Python values atomically.

    If `previous` is given, the file that was at `path` is kept there.
    """
    with whole_file(path, previous) as temporary:
        try:
            torch.save({"format": FORMAT, **content}, temporary)
        except RuntimeError as error:  # how torch reports a full disk
            reason = one_line(error)[:100]
            raise UserError(f"cannot write {path}: is the disk full? ({reason})") from error


def read_stored(path: Path) -> Stored:
    """Open a checkpoint of any task. Raises UserError if it is not one or is damaged."""
    content = read_weights(f"checkpoint {path}", path)
    if content.get("format") != FORMAT:
        raise UserError(f"checkpoint {path} is not of this repository")
    return Stored(path, content)


def read_checkpoint(path: str | Path, flags: Mapping[str, Any] | None = None) -> Checkpoint:
    """Open a checkpoint and check the model flags given against it.

    A flag that contradicts the checkpoint raises UserError naming it and both values. A state dict
    of the reference has no configuration: flags give what its shapes do not show.
    """
    path = Path(path)
    names = {item.name for item in fields(ModelConfig)}
    flags = {name: value for name, value in (flags or {}).items() if name in names}
    content = read_weights(f"checkpoint {path}", path)
    if content.get("format") == FORMAT:
        known = asdict(Stored(path, content).group("model_config", ModelConfig))
        state_dict: Any = content.get("model")
    else:
        try:
            state_dict, known = from_reference(content)
        except ValueError as error:
            raise UserError(f"checkpoint {path} {error}") from error
        flags = {**implied_flags({**flags, **known}), **flags}
        content = {}
    check_stored(flags, known, path)
    try:
        config = ModelConfig(**{**flags, **known})
        config.need_libraries()
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    if not content:
        # The reference does not store every buffer; the others start anew.
        fresh = config.spec.make(config).named_buffers(prefix="quantizer")
        state_dict = {**dict(fresh), **state_dict}
    try:
        with torch.device("meta"):
            check_tensors(make_model(config).state_dict(), state_dict)
        check_averages(state_dict)
    except ValueError as error:
        raise UserError(f"checkpoint {path} is {error}") from error
    return Checkpoint(path, content, config, state_dict)


def read_named(output_folder: str, name: str | None, flags: Mapping[str, Any]) -> Checkpoint:
    """Open <output_folder>/models/<name> and check it against the model flags given."""
    if name is None:
        raise UserError("--model_name is missing: a checkpoint under <output_folder>/models")
    models, whole = Path(output_folder) / "models", Path(name).resolve()
    if not (models / name).is_file() and whole.is_file() and models.resolve() in whole.parents:
        relative = whole.relative_to(models.resolve())
        raise UserError(f"--model_name {name} must be relative to {models}: give {relative}")
    path = inside(models, name, "--model_name")
    if (path / "best.pt").is_file():
        raise UserError(f"--model_name {name} is a folder: give {Path(name) / 'best.pt'}")
    return read_checkpoint(path, flags)


def earlier_groups(width: int) -> int | None:
    """Return --norm_groups of a VQGAN that was saved before this flag existed."""
    groups = math.gcd(32, width)
    return None if groups == default_groups(width) else groups


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
    """Raise ValueError for impossible counts or averages of the quantiser."""
    for name in ("usage", "ema_count", "latent_variance", "latent_steps", "pool_size"):
        value = given.get(f"quantizer.{name}")
        if value is not None and (value < 0).any():
            raise ValueError(f"damaged: quantizer.{name} is negative")
    pool = given.get("quantizer.pool")
    if pool is not None and given["quantizer.pool_size"] > len(pool):
        raise ValueError("damaged: quantizer.pool_size is more than quantizer.pool holds")
