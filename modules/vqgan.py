"""The network of VQGAN around the quantiser, built of the diffusers library's blocks."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modules.autoencoder import MAKERS, Autoencoder, of_any_number
from modules.config import ModelConfig, parse_multipliers


class VQGAN(Autoencoder):
    """The encoder and decoder of Esser, Rombach, Ommer, "Taming Transformers", CVPR 2021.

    Residual blocks at each resolution, attention at the lowest ones and in the middle: the blocks
    of latent diffusion and of diffusers too, whose weights fit. Raises ValueError where diffusers
    is not installed.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        need_diffusers()
        from diffusers.models.autoencoders.vae import Decoder, Encoder

        widths = [config.hidden_size * k for k in parse_multipliers(config.channel_multipliers)]
        attentive, plain = config.attention_levels, len(widths) - config.attention_levels
        z_channels = config.z_channels or config.channels
        shared: dict[str, Any] = {
            "block_out_channels": widths,
            "layers_per_block": config.num_residual_layers,
            "norm_num_groups": config.num_groups,
        }
        self.encoder = Encoder(
            config.in_channels,
            z_channels,
            ("DownEncoderBlock2D",) * plain + ("AttnDownEncoderBlock2D",) * attentive,
            double_z=False,
            **shared,
        )
        self.pre_vq_conv = nn.Conv2d(z_channels, config.channels, 1)
        self.quantizer = MAKERS[config.quantizer](config)
        self.post_vq_conv = nn.Conv2d(config.channels, z_channels, 1)
        self.decoder = Decoder(
            z_channels,
            config.in_channels,
            ("AttnUpDecoderBlock2D",) * attentive + ("UpDecoderBlock2D",) * plain,
            **shared,
        )

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight of the last convolution, at which losses are weighed against each other."""
        weight: nn.Parameter = self.decoder.conv_out.weight
        return weight

    def reconstruct(self, latents: Tensor) -> Tensor:
        return of_any_number(self.decoder, self.post_vq_conv(latents))

    def compile_parts(self) -> None:
        """As for others, but block by block, as gradients of the last layer are asked for apart.

        Blocks differ in shape alone, which would else be compiled as one of any shape.
        """
        blocks = [*self.encoder.down_blocks, self.encoder.mid_block]
        for block in [*blocks, self.decoder.mid_block, *self.decoder.up_blocks]:
            block.compile(dynamic=False)

    def checkpoint_gradients(self) -> None:
        """Keep of each block its input alone, and compute the rest again in the backward pass."""
        for part in (self.encoder, self.decoder):
            part.gradient_checkpointing = True
            # As diffusers' own models set it on their parts.
            part._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def need_diffusers() -> None:
    """Raise ValueError where diffusers is not installed."""
    try:
        import diffusers  # noqa: F401
    except ImportError as error:
        raise ValueError("--model vqgan needs diffusers: pip install diffusers") from error
