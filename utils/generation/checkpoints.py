"""A prior's checkpoint, and the first stage that decodes its samples."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from modules import Autoencoder
from modules.options import option
from modules.priors.config import PriorConfig
from modules.priors.spaces import Space
from modules.priors.spec import Prior
from utils.checkpoints.checkpoint import (
    Checkpoint,
    Stored,
    check_tensors,
    read_checkpoint,
    read_stored,
)
from utils.checkpoints.digest import model_digest
from utils.errors import UserError
from utils.generation.config import PriorTrainConfig


@dataclass(frozen=True)
class FirstStage:
    """The autoencoder below a prior, as the prior's checkpoint describes it."""

    path: str = option("", "its checkpoint, an absolute path", flag=False)
    digest: str = option("", "SHA-256 of its configuration and weights", flag=False)
    image_size: int = option(28, "side of its images in pixels", minimum=4, flag=False)

    @classmethod
    def of(cls, checkpoint: Checkpoint, image_size: int) -> FirstStage:
        """Describe an open checkpoint."""
        return cls(str(checkpoint.path.resolve()), model_digest(checkpoint.model()), image_size)

    def open(self, elsewhere: Path | None, prior: Path) -> Autoencoder:
        """Open it where it was, or elsewhere. Raises UserError if it is missing or changed."""
        path = elsewhere or Path(self.path)
        if not path.is_file():
            raise UserError(
                f"{prior} needs its first stage, and {path} does not exist: give --first_stage"
            )
        model = read_checkpoint(path).model()
        digest = model_digest(model)
        if digest != self.digest:
            raise UserError(
                f"{path} is not the first stage of {prior}: the digest of its weights is "
                f"{digest[:16]}, not {self.digest[:16]}"
            )
        return model


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


def new_prior(config: PriorConfig, space: Space, num_classes: int) -> Prior:
    """Make a new prior. Raises UserError if it needs a package that is missing."""
    try:
        return config.spec.make(config, space, num_classes)
    except ValueError as error:
        raise UserError(str(error)) from error


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
        label_dropout=stored.group("train_config", PriorTrainConfig).label_dropout,
    )
