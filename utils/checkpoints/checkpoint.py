"""Checkpoints of all tasks: written, opened and found by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, TypeVar

import torch

from modules import Autoencoder, ModelConfig, checkpoint, pretrained
from modules.checkpoint import FORMAT, model_content, read_model, rebuild, stored_flags
from modules.reference import StateDict
from utils.checkpoints.unpickle import read_weights
from utils.errors import UserError, one_line
from utils.files import check_unicode, whole_file
from utils.flags.arguments import check_stored
from utils.logger import log

LARGEST_COUNT = 10**12
USUAL = ("best.pt", "last.pt")
SHOWN = 8  # checkpoints in a message
Group = TypeVar("Group")


@dataclass(frozen=True)
class Stored:
    """Content of a checkpoint of any task, and the file from which it was read."""

    path: Path
    content: Mapping[str, Any]

    def group(self, name: str, group: type[Group]) -> Group:
        """Return the dataclass of flags stored under this name, as `stored_flags` does."""
        try:
            return stored_flags(self.content, name, group)
        except ValueError as error:
            raise UserError(f"checkpoint {self.path} {one_line(error)}") from error

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
        return rebuild(self.model_config, self.state_dict)


def load_model(path: str | Path) -> Autoencoder:
    """Load the model of a checkpoint, or of a state dict of the reference, in evaluation mode.

    The name of a model that comes with LooC may stand for a path. Raises UserError if the file is
    missing, damaged, of another architecture, or would execute code when opened.
    """
    try:
        return checkpoint.load_model(path)
    except ValueError as error:
        raise UserError(one_line(error)) from error


def save_checkpoint(path: Path, model: Autoencoder, content: Mapping[str, Any]) -> None:
    """Write the model and `content` (tensors and plain Python values) atomically."""
    write_checkpoint(path, {**model_content(model), **content})


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
    return open_checkpoint(path, read_weights(f"checkpoint {path}", path), flags or {})


def open_checkpoint(path: Path, content: Mapping[Any, Any], flags: Mapping[str, Any]) -> Checkpoint:
    """Open a checkpoint that has been read, as `read_checkpoint` does."""
    names = {item.name for item in fields(ModelConfig)}
    flags = {name: value for name, value in flags.items() if name in names}
    try:
        config, state_dict = read_model(path, content, flags)
    except ValueError as error:
        raise UserError(one_line(error)) from error
    check_stored(flags, asdict(config), path)
    return Checkpoint(path, content if content.get("format") == FORMAT else {}, config, state_dict)


def read_named(output_folder: str, name: str | None, flags: Mapping[str, Any]) -> Checkpoint:
    """Open the checkpoint of --model_name and check it against the model flags given."""
    if name is None:
        raise UserError("--model_name is missing: a checkpoint under <output_folder>/models")
    return read_checkpoint(find_checkpoint("--model_name", name, output_folder), flags)


def find_checkpoint(
    flag: str, name: str | None, output_folder: str, usual: str = "best.pt"
) -> Path:
    """Return <output_folder>/models/<name> or, if there is none, the path `name`.

    The name of a model that comes with LooC is that of an own experiment or file first. Raises
    UserError for the folder of any other experiment, whose usual file it names, and for what does
    not exist; then it lists what there is under models, nearest first. A last.pt, from which a run
    goes on, does not come with LooC.
    """
    if not name:
        problem = "is missing: a checkpoint under <output_folder>/models"
        raise UserError(f"{flag} {problem if name is None else 'is empty'}")
    check_unicode(name, flag)
    models, resumes = Path(output_folder) / "models", usual == "last.pt"
    if (shipped := pretrained.find(name)) and not resumes:
        own = (models / name, *(models / name / file for file in (usual, *USUAL)), Path(name))
        path = next((path for path in own if pretrained.holds_model(path)), shipped)
        log.info("%s %s: %s", flag, name, path)
        return path
    for path in (models / name, Path(name)):
        for file in (usual, *USUAL):
            if (path / file).is_file():
                raise UserError(f"{flag} {name} is a folder: give {Path(name) / file}")
        if path.exists():
            return path
    nowhere = f"{flag} {name} does not exist, neither under {models} nor as a path"
    there = known_names(models, name, usual)
    raise UserError(f"{nowhere}; there is {there}{'' if resumes else pretrained.listing()}")


def known_names(models: Path, name: str, usual: str) -> str:
    """List the checkpoints under models, one of each experiment, the nearest name first."""
    found = {path.parent: path for file in (*USUAL, usual) for path in models.rglob(file)}
    there = {str(path.relative_to(models)) for path in (*found.values(), *models.glob("*.pt"))}
    nearest = sorted(there, key=lambda other: (-SequenceMatcher(None, name, other).ratio(), other))
    more = f" and {len(there) - SHOWN} more" if len(there) > SHOWN else ""
    return f"{', '.join(nearest[:SHOWN])}{more}" if there else "no checkpoint"


def results_name(path: Path, output_folder: str) -> str:
    """Return the name of a checkpoint under models or with LooC; of others the whole path."""
    models = Path(output_folder) / "models"
    if path.parent == pretrained.FOLDER:
        return path.stem
    if not path.is_relative_to(models) or ".." in path.parts:
        path, models = path.resolve(), models.resolve()
    return str(path.relative_to(models if path.is_relative_to(models) else path.anchor))
