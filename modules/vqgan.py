"""The network of VQGAN around the quantiser, made of blocks of the diffusers library."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .autoencoder import Autoencoder, NetworkSpec, apply
from .optional import require
from .options import parse_numbers
from .quantizers.spec import Problems

if TYPE_CHECKING:
    from .config import ModelConfig


LIBRARY = "diffusers.models.autoencoders.vae"


class VQGAN(Autoencoder):
    """Encoder and decoder of Esser, Rombach, Ommer, "Taming Transformers", CVPR 2021.

    Residual blocks at each resolution, attention at the lowest ones and in the middle, as in
    latent diffusion and diffusers, whose weights fit. Raises ValueError if diffusers cannot be
    imported.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        blocks = require(LIBRARY, "--model vqgan")
        widths = [config.hidden_size * k for k in parse_numbers(config.channel_multipliers)]
        attentive, plain = config.attention_levels, len(widths) - config.attention_levels
        z_channels = config.z_channels or config.channels
        shared: dict[str, Any] = {
            "block_out_channels": widths,
            "layers_per_block": config.num_residual_layers,
            "norm_num_groups": num_groups(config),
        }
        self.encoder = blocks.Encoder(
            config.in_channels,
            z_channels,
            ("DownEncoderBlock2D",) * plain + ("AttnDownEncoderBlock2D",) * attentive,
            double_z=False,
            **shared,
        )
        self.pre_vq_conv = nn.Conv2d(z_channels, config.channels, 1)
        self.quantizer = config.spec.make(config)
        self.post_vq_conv = nn.Conv2d(config.channels, z_channels, 1)
        self.decoder = blocks.Decoder(
            z_channels,
            config.in_channels,
            ("AttnUpDecoderBlock2D",) * attentive + ("UpDecoderBlock2D",) * plain,
            **shared,
        )

    @property
    def last_layer(self) -> nn.Parameter:
        weight: nn.Parameter = self.decoder.conv_out.weight
        return weight

    def reconstruct(self, latents: Tensor) -> Tensor:
        return apply(self.decoder, self.post_vq_conv(latents))

    def compile_parts(self) -> None:
        """Compile block by block, since the gradients of the last layer are also needed alone.

        Blocks that differ only in shape get a kernel each, not one for any shape.
        """
        blocks = [*self.encoder.down_blocks, self.encoder.mid_block]
        for block in [*blocks, self.decoder.mid_block, *self.decoder.up_blocks]:
            block.compile(dynamic=False)

    def checkpoint_gradients(self) -> None:
        """Keep only the input of each block, and recompute the rest in the backward pass."""
        for part in (self.encoder, self.decoder):
            part.gradient_checkpointing = True
            # diffusers' own models set it in the same way.
            part._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def default_groups(channels: int) -> int:
    """Default number of normalisation groups; a group of one channel would lose its mean."""
    most = max(1, min(32, channels // 4))
    return next(number for number in range(most, 0, -1) if channels % number == 0)


def num_groups(config: ModelConfig) -> int:
    """Number of normalisation groups."""
    return config.norm_groups or default_groups(config.hidden_size)


def check(config: ModelConfig) -> Problems:
    given = f"--channel_multipliers {config.channel_multipliers}"
    multipliers, levels = parse_numbers(config.channel_multipliers), config.attention_levels
    if not multipliers or len(multipliers) > 8 or max(multipliers) > 99:
        yield f"{given} is not a list of up to 8 numbers below 100, like 1,1,2,2,4"
    if config.num_residual_layers < 1:
        yield "--num_residual_layers 0 is less than the 1 that --model vqgan needs"
    if levels > len(multipliers):
        yield f"--attention_levels {levels} is more than the {len(multipliers)} of {given}"
    size, groups = config.hidden_size, num_groups(config)
    if size % groups:
        yield f"--norm_groups {groups} does not divide --hidden_size {size}"


SPEC = NetworkSpec(
    "VQGAN",
    VQGAN,
    frozenset({"channel_multipliers", "attention_levels", "norm_groups", "z_channels"}),
    lambda config: 2 ** config.channel_multipliers.count(","),
    checks=(check,),
    library=LIBRARY,
    losses=frozenset({"l1"}),
    implies={"perceptual_weight": 1.0, "disc_weight": 0.8},
)
