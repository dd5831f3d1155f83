"""The losses that training minimises: one file each, and one line in LOSSES.

A loss is a term of a sum, in the order of LOSSES. It sees images, reconstruction and `Quantized`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modules import ModelConfig
from utils.errors import UserError
from utils.flags.arguments import build, flag_fields
from utils.training.losses.adversarial import (
    Adversarial,
    AdversarialConfig,
    check_adversarial,
    make_adversarial,
)
from utils.training.losses.loss import Loss, LossSpec, Seen, Setting
from utils.training.losses.perceptual import (
    Perceptual,
    PerceptualConfig,
    check_perceptual,
    make_perceptual,
)
from utils.training.losses.pixels import L1, MeanSquaredError, make_l1, make_mse
from utils.training.losses.quantizer import QuantizerLoss

VQGAN_ALONE = ("vqgan",)
LOSSES: dict[str, LossSpec] = {
    "reconstruction": LossSpec(make_mse),
    "l1": LossSpec(make_l1),
    "perceptual": LossSpec(make_perceptual, PerceptualConfig, VQGAN_ALONE, check_perceptual),
    "adversarial": LossSpec(make_adversarial, AdversarialConfig, VQGAN_ALONE, check_adversarial),
    "quantizer": LossSpec(lambda _: QuantizerLoss()),
}


def loss_configs() -> tuple[type, ...]:
    """Dataclasses of the losses' flags."""
    return tuple(spec.config for spec in LOSSES.values() if spec.config is not None)


def build_loss_configs(flags: Mapping[str, Any], model: ModelConfig, image_size: int) -> list[Any]:
    """Configurations of the losses that this model has, checked.

    Raises UserError for a flag that has no effect with this model, or images that are too small.
    """
    configs = []
    for spec in LOSSES.values():
        if spec.config is None:
            continue
        if spec.models is not None and model.model not in spec.models:
            for item in flag_fields(spec.config):
                if item.name in flags:
                    value = flags[item.name]
                    raise UserError(
                        f"--{item.name} {value} has no effect with --model {model.model}"
                    )
            continue
        config: Any = build(spec.config, flags)
        spec.check(config, image_size)
        configs.append(config)
    return configs


def make_losses(setting: Setting) -> dict[str, Loss]:
    """The losses of a run, by name, in the order of their sum."""
    made = {name: spec.make(setting) for name, spec in LOSSES.items()}
    return {name: loss for name, loss in made.items() if loss is not None}


__all__ = [
    "L1",
    "LOSSES",
    "Adversarial",
    "AdversarialConfig",
    "Loss",
    "LossSpec",
    "MeanSquaredError",
    "Perceptual",
    "PerceptualConfig",
    "QuantizerLoss",
    "Seen",
    "Setting",
    "build_loss_configs",
    "loss_configs",
    "make_losses",
]
