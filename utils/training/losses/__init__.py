"""The losses that training minimises: one file each, and one line in LOSSES.

A loss is a term of a sum, in the order of LOSSES. It sees images, reconstruction and `Quantized`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modules import ModelConfig
from modules.registry import MODELS
from utils.errors import UserError
from utils.flags.arguments import build, flag_fields
from utils.training.losses.adversarial import Adversarial
from utils.training.losses.loss import Loss, Setting
from utils.training.losses.perceptual import Perceptual
from utils.training.losses.pixels import L1, MeanSquaredError
from utils.training.losses.quantizer import QuantizerLoss

LOSSES: dict[str, type[Loss]] = {
    "reconstruction": MeanSquaredError,
    "l1": L1,
    "perceptual": Perceptual,
    "adversarial": Adversarial,
    "quantizer": QuantizerLoss,
}


def losses_of(model: ModelConfig) -> dict[str, type[Loss]]:
    """The losses that this model has, by name."""
    others = frozenset[str]().union(*(spec.losses for spec in MODELS.values()))
    left_out = others - model.network.losses
    return {name: loss for name, loss in LOSSES.items() if name not in left_out}


def loss_configs() -> tuple[type, ...]:
    """Dataclasses of the losses' flags."""
    return tuple(loss.config for loss in LOSSES.values() if loss.config is not None)


def build_loss_configs(flags: Mapping[str, Any], model: ModelConfig, image_size: int) -> list[Any]:
    """Configurations of the losses that this model has, checked.

    Raises UserError for a flag that has no effect, or images that are too small.
    """
    own, known = losses_of(model).values(), {**model.network.implies, **flags}
    configs: list[Any] = []
    for loss in LOSSES.values():
        if loss.config is None:
            continue
        given = [
            f"--{item.name} {flags[item.name]}"
            for item in flag_fields(loss.config)
            if item.name in flags
        ]
        if given and loss not in own:
            raise UserError(f"{given[0]} has no effect with --model {model.model}")
        if given and loss.switch not in {None, *known}:
            raise UserError(f"{given[0]} has no effect without --{loss.switch}")
        if loss in own:
            configs.append(build(loss.config, known))
            loss.check(configs[-1], image_size)
    return configs


def make_losses(setting: Setting) -> dict[str, Loss]:
    """The losses of a run, by name, in the order of their sum."""
    made = {name: loss.make(setting) for name, loss in losses_of(setting.model.config).items()}
    return {name: loss for name, loss in made.items() if loss is not None}
