"""The adversarial loss: a patch discriminator that is trained besides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modules import Autoencoder, PatchDiscriminator
from modules.checkpoint import check_tensors
from modules.options import option
from utils.errors import UserError
from utils.flags.arguments import build
from utils.training.losses.loss import Loss, Seen, Setting
from utils.training.losses.perceptual import half_precision
from utils.training.optimizers import make_adam


@dataclass(frozen=True)
class AdversarialConfig:
    """Adversarial loss."""

    disc_weight: float = option(
        0.0,
        "weight of the adversarial loss, times the adaptive weight (0: none; vqgan: 0.8)",
        minimum=0,
        maximum=1e6,
    )
    disc_start: int = option(
        30001, "step after which the discriminator takes part", minimum=0, maximum=10**12
    )
    disc_channels: int = option(
        64, "channels of the discriminator's first layer", minimum=1, maximum=2**12
    )
    disc_layers: int = option(
        3,
        "convolutions of stride 2 in the discriminator, which set the size of its patches",
        minimum=1,
        maximum=8,
    )


class Adversarial(Loss):
    """−v·a·mean D(x̂), from a step on; D learns by the hinge loss.

    The adaptive weight a is ‖∇L‖ / (‖∇ mean D(x̂)‖ + 10⁻⁴), at most 10⁴, L being the sum of the
    losses before this one and the gradients those of the decoder's last layer, over the images of
    all processes: Esser, Rombach, Ommer, "Taming Transformers", CVPR 2021, equation 7. D sees the
    reconstructions that the model was just trained with, where the published code encodes and
    decodes the batch once more.

    Args:
        config: weight, start and size.
        model: its last layer is that of the adaptive weight.
        betas: of the discriminator's Adam.
        dtype: precision of the discriminator under autocast.
    """

    config = AdversarialConfig
    switch = "disc_weight"

    def __init__(
        self,
        config: AdversarialConfig,
        model: Autoencoder,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.flags = config
        self.last_layer = model.last_layer
        self.device, self.dtype = self.last_layer.device, dtype
        self.discriminator = PatchDiscriminator(
            model.config.in_channels, config.disc_channels, config.disc_layers
        ).to(self.last_layer)
        self.optimizer = make_adam(list(self.discriminator.parameters()), betas=betas)

    @classmethod
    def check(cls, config: AdversarialConfig, image_size: int) -> None:
        side = 3 * 2**config.disc_layers
        if config.disc_weight and image_size < side:
            raise UserError(
                f"--disc_layers {config.disc_layers} needs images of {side}×{side} or more, "
                f"not --image_size {image_size}"
            )

    @classmethod
    def make(cls, setting: Setting) -> Adversarial | None:
        config = build(AdversarialConfig, setting.flags)
        if not config.disc_weight:
            return None
        made = cls(config, setting.model, betas=setting.betas, dtype=setting.dtype)
        try:
            if setting.start:
                made.load(setting.start)
        except ValueError as error:
            raise UserError(f"--pretrained: its discriminator is {error}") from error
        return made

    def takes_part(self, step: int) -> bool:
        """Return whether the discriminator takes part in this step; the first is 1."""
        return step > self.flags.disc_start

    def __call__(self, seen: Seen) -> Tensor:
        zero = torch.zeros_like(seen.total)
        if not self.takes_part(seen.step.number):
            seen.step.report(adversarial=zero, adaptive_weight=zero)
            return zero
        self.discriminator.requires_grad_(False)
        with half_precision(self.device, self.dtype):
            adversarial = -mean(self.discriminator(seen.reconstruction).float())
        (own, theirs), scale = seen.step.gradients((seen.total, adversarial), self.last_layer)
        weight: Tensor = (own.norm() / (theirs.norm() + 1e-4 * scale)).clamp(0, 1e4)
        seen.step.report(adversarial=adversarial, adaptive_weight=weight)
        weighted: Tensor = self.flags.disc_weight * weight * adversarial
        return weighted

    def own_loss(self, seen: Seen) -> Tensor:
        zero = torch.zeros((), dtype=seen.images.dtype, device=seen.images.device)
        if not self.takes_part(seen.step.number):
            seen.step.report(discriminator=zero, logits_real=zero, logits_fake=zero)
            return zero
        self.discriminator.requires_grad_(True)
        with half_precision(self.device, self.dtype):
            real = self.discriminator(seen.images).float()
            fake = self.discriminator(seen.reconstruction.detach()).float()
        loss = (mean(F.relu(1 - real)) + mean(F.relu(1 + fake))) / 2
        seen.step.report(discriminator=loss, logits_real=mean(real), logits_fake=mean(fake))
        return loss

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"discriminator": self.optimizer}

    def state(self) -> dict[str, Any]:
        return {"discriminator": self.discriminator.state_dict()}

    def load(self, content: Mapping[str, Any]) -> None:
        check_tensors(self.discriminator.state_dict(), content["discriminator"])
        self.discriminator.load_state_dict(content["discriminator"])


def mean(values: Tensor) -> Tensor:
    """Mean of a tensor of any shape; 0 where it is empty, with a gradient."""
    return values.sum() / max(1, values.numel())
