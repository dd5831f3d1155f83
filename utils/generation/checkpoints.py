"""A prior's checkpoint, and the first stage that decodes its samples."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from modules import Autoencoder, pretrained
from modules.checkpoint import check_tensors
from modules.options import option
from modules.priors.config import PriorConfig
from modules.priors.spaces import Space
from modules.priors.spec import Prior
from utils.checkpoints.checkpoint import (
    Checkpoint,
    Stored,
    find_checkpoint,
    read_checkpoint,
    read_stored,
    results_name,
)
from utils.checkpoints.digest import model_digest
from utils.devices import memory_of
from utils.errors import UserError
from utils.flags.arguments import check_stored
from utils.generation.config import PriorTrainingConfig


@dataclass(frozen=True)
class FirstStage:
    """The autoencoder below a prior, as the prior's checkpoint describes it."""

    path: str = option("", "its checkpoint, an absolute path or a name of ours", flag=False)
    digest: str = option("", "SHA-256 of its configuration and weights", flag=False)
    image_size: int = option(28, "side of its images in pixels", minimum=4, flag=False)

    @classmethod
    def of(cls, checkpoint: Checkpoint, image_size: int) -> FirstStage:
        """Describe an open checkpoint."""
        return cls(str(checkpoint.path.resolve()), model_digest(checkpoint.model()), image_size)


@dataclass(frozen=True)
class StoredPrior(Stored):
    """A prior's checkpoint."""

    config: PriorConfig
    space: Space
    first_stage: FirstStage
    classes: tuple[str, ...]  # their names; empty for a prior without classes
    label_dropout: float

    @property
    def knows_no_class(self) -> bool:
        """Return whether it models images without their class, as label −1 asks for."""
        return not self.classes or self.label_dropout > 0

    def check_label(self, label: int | None, user: str | None) -> None:
        """Raise UserError if there is no such class, or none where `user`, if any, needs one."""
        classes = len(self.classes)
        if label is not None and label >= classes:
            have = f"has the classes 0 to {classes - 1}" if classes else "has no classes"
            raise UserError(f"--label {label}: {self.path} {have}")
        if user is not None and label is None and not self.knows_no_class:
            have = "models images given their class (--label_dropout 0)"
            raise UserError(f"{user} needs --label: {self.path} {have}")

    def model(self) -> Prior:
        """Make the prior, in evaluation mode, on the CPU. Raises UserError if damaged."""
        make = partial(new_prior, self.config, self.space, len(self.classes))
        with torch.device("meta"):
            expected = make().state_dict()
        try:
            check_tensors(expected, self.content.get("model"))
        except ValueError as error:
            raise UserError(f"checkpoint {self.path} is {error}") from error
        model = make()
        model.load_state_dict(self.content["model"])
        return model.eval()

    def open_first_stage(self, given: str | None, output_folder: str) -> tuple[Path, Autoencoder]:
        """Open --first_stage, if given, or else that of training, and say where it is.

        Raises UserError if it is missing or changed.
        """
        if given is None:
            path = pretrained.find(self.first_stage.path) or Path(self.first_stage.path)
        else:
            path = find_checkpoint("--first_stage", given, output_folder)
        if not path.is_file():
            raise UserError(
                f"{self.path} needs its first stage, and {path} does not exist: give --first_stage"
            )
        model = read_checkpoint(path).model()
        digest, before = model_digest(model), self.first_stage.digest
        if digest != before:
            raise UserError(
                f"{path} is not the first stage of {self.path}: the digest of its weights is "
                f"{digest[:16]}, not {before[:16]}"
            )
        return path, model

    def folder(self, kind: str, output_folder: str) -> Path:
        """Return the folder of its results of a kind, like samples."""
        name = Path(results_name(self.path, output_folder)).with_suffix("")
        return Path(output_folder) / kind / name


def new_prior(config: PriorConfig, space: Space, num_classes: int) -> Prior:
    """Make a new prior. Raises UserError if it needs a package that is missing."""
    try:
        return config.spec.make(config, space, num_classes)
    except ValueError as error:
        raise UserError(str(error)) from error


def check_weights(config: PriorConfig, space: Space, device: torch.device) -> None:
    """Raise UserError if weights, gradients and Adam's moments alone do not fit into memory."""
    with torch.device("meta"):
        count = sum(weight.numel() for weight in new_prior(config, space, 0).parameters())
    needed, there = 4 * 4 * count, memory_of(device)
    if needed > there:
        names = sorted(name for name in config.spec.reads if "dropout" not in name)
        sizes = ", ".join(f"--{name} {getattr(config, name)}" for name in names)
        raise UserError(
            f"{sizes}: a prior of {space} has {count:,} weights; training takes "
            f"{needed / 1e9:,.0f} GB for them, {device} has {there / 1e9:,.0f}"
        )


def load_pretrained(prior: Prior, config: PriorConfig, path: Path) -> None:
    """Load the weights of another prior. Raises UserError if they do not fit."""
    stored = read_prior(path)
    without_shape = ("prior", "heads", "unet_head_channels", "prediction_type")  # no tensor tells
    shared = {name: getattr(config, name) for name in without_shape}
    check_stored(shared, asdict(stored.config), f"--pretrained {path}")
    try:
        check_tensors(prior.state_dict(), stored.content.get("model"))
    except ValueError as error:
        raise UserError(f"--pretrained {path} is {error}") from error
    prior.load_state_dict(stored.content["model"])


def read_prior(path: Path) -> StoredPrior:
    """Open a prior's checkpoint. Raises UserError if it is not one or is damaged."""
    stored = read_stored(path)
    if "prior_config" not in stored.content:
        raise UserError(f"checkpoint {path} is not a prior, which generate.py train makes")
    classes = stored.content.get("classes")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(f"checkpoint {path} is damaged: its classes are not names")
    config = stored.group("prior_config", PriorConfig)
    return StoredPrior(
        path,
        stored.content,
        config=config,
        space=stored.group("space", config.spec.space),
        first_stage=stored.group("first_stage", FirstStage),
        classes=tuple(classes),
        label_dropout=stored.group("train_config", PriorTrainingConfig).label_dropout,
    )
