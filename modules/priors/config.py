"""A prior's hyper-parameters, each declared once for flags, checkpoint and checks."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..options import option
from .registry import PRIORS
from .spec import PriorSpec


@dataclass(frozen=True)
class PriorConfig:
    """Everything needed to rebuild a prior of a space of codes or latents.

    Raises ValueError, naming the flags and both values, if fields contradict each other.
    """

    prior: str = option(
        "transformer",
        "model of the codes, one position after another (transformer) or all positions in a few "
        "rounds (masked), or of the latents before quantisation (diffusion)",
        choices=PRIORS,
    )
    width: int = option(256, "channels of the transformer", minimum=2, maximum=2**14)
    layers: int = option(6, "transformer blocks over the positions", minimum=1, maximum=256)
    heads: int = option(4, "attention heads of a block", minimum=1, maximum=256)
    depth_layers: int = option(
        2, "residual MLPs over the slots of a position", minimum=0, maximum=64
    )
    dropout: float = option(0.1, "dropout of the transformer", minimum=0, maximum=0.9)
    unet_channels: int = option(
        64, "channels of the UNet at full resolution", minimum=4, maximum=2**12
    )
    unet_multipliers: str = option(
        "1,2", "channels of the UNet at full, half, … resolution, as multiples of --unet_channels"
    )
    unet_blocks: int = option(
        2, "residual blocks of the UNet per resolution", minimum=1, maximum=32
    )
    unet_attention: str = option(
        "2", "downsampling factors at which the UNet has attention, like 2,4,8"
    )
    unet_head_channels: int = option(
        32, "channels of an attention head of the UNet", minimum=1, maximum=2**12
    )
    unet_adm: bool = option(
        False,
        "UNet blocks of ADM: the noise level scales and shifts features, residual blocks resample",
    )
    prediction_type: str = option(
        "v_prediction",
        "target of the UNet: the noise, as in the published models, or v, whose errors the sampler "
        "does not amplify",
        choices=("epsilon", "v_prediction"),
    )

    def __post_init__(self) -> None:
        for item in fields(self):
            name, value = item.name, getattr(self, item.name)
            if name not in {"prior", *self.spec.reads} and value != item.default:
                raise ValueError(f"--{name} {value} has no effect with --prior {self.prior}")
        if self.width % self.heads:
            raise ValueError(f"--heads {self.heads} does not divide --width {self.width}")
        for problem in self.spec.checks(self):
            raise ValueError(problem)

    @property
    def spec(self) -> PriorSpec:
        """The spec of the prior."""
        return PRIORS[self.prior]
