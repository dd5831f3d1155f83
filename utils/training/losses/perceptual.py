"""The perceptual loss: LPIPS."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modules.options import option
from utils.distributed import first_goes_ahead
from utils.errors import UserError
from utils.evaluation.metrics import LPIPS_BACKBONES
from utils.evaluation.networks import lpips_network
from utils.flags.arguments import build
from utils.images import in_colour
from utils.training.losses.loss import Loss, Seen, Setting

WITHOUT_LPIPS = "name their folder with --weights_dir, or go without: --perceptual_weight 0"


@dataclass(frozen=True)
class PerceptualConfig:
    """Perceptual loss."""

    perceptual_weight: float = option(
        0.0, "weight of LPIPS-VGG (0: none; vqgan: 1)", minimum=0, maximum=1e6
    )
    weights_dir: str | None = option(
        None, "folder of the weights of the LPIPS network (default: torch hub's)"
    )


class Perceptual(Loss):
    """w · LPIPS: Zhang et al., CVPR 2018.

    Args:
        network: LPIPS, (b, 3, h, w) twice → (b, 1, 1, 1).
        weight: w.
        dtype: precision of the network under autocast.
    """

    config = PerceptualConfig
    switch = "perceptual_weight"
    measured = True

    def __init__(
        self, network: nn.Module, weight: float, dtype: torch.dtype = torch.float32
    ) -> None:
        self.network = network
        self.weight = weight
        self.dtype = dtype

    @classmethod
    def check(cls, config: PerceptualConfig, image_size: int) -> None:
        side = LPIPS_BACKBONES["vgg"]
        if config.perceptual_weight and image_size < side:
            raise UserError(
                f"--perceptual_weight {config.perceptual_weight} needs images of {side}×{side} or "
                f"more, not --image_size {image_size}"
            )

    @classmethod
    def make(cls, setting: Setting) -> Perceptual | None:
        """Raises UserError where the weights of LPIPS are missing."""
        config = build(PerceptualConfig, setting.flags)
        if not config.perceptual_weight:
            return None
        with first_goes_ahead():  # the others find the files that it has downloaded
            network = lpips_network("vgg", folder=config.weights_dir, without=WITHOUT_LPIPS)
        device = next(setting.model.parameters()).device
        return cls(network.module.to(device), config.perceptual_weight, setting.dtype)

    def __call__(self, seen: Seen) -> Tensor:
        with half_precision(seen.images.device, self.dtype):
            distances = self.distance(seen.images, seen.reconstruction)
            perceptual = distances.sum() / max(1, len(seen.images))
        seen.step.report(perceptual=perceptual)
        return self.weight * perceptual

    def distance(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        if not len(images):
            return images.new_zeros(0)
        lpips: Tensor = self.network(in_colour(images), in_colour(reconstruction))
        return lpips.flatten().to(images.dtype)


def half_precision(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Autocast for networks of a loss; none in fp32."""
    return torch.autocast(device.type, dtype, enabled=dtype in (torch.float16, torch.bfloat16))
