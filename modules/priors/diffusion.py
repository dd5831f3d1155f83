"""Latent diffusion: a UNet that takes noise out of the latents before quantisation.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022: the
network predicts the noise ε in √ᾱ·z + √(1 − ᾱ)·ε, ᾱ of one of 1,000 noise levels (DDPM, Ho et al.,
NeurIPS 2020), or v = √ᾱ·ε − √(1 − ᾱ)·z (Salimans and Ho, ICLR 2022). Of a predicted ε, z follows by
a division by √ᾱ, which multiplies an error by up to 84; of a predicted v, errors never grow.
The quantiser belongs to the decoder. UNet and samplers are those of diffusers.

Symbols: B images, latents z (B, C, H, W).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..optional import require
from ..options import parse_numbers
from ..vqgan import default_groups
from .spaces import LatentSpace
from .spec import Noise, Prior, PriorSpec

if TYPE_CHECKING:
    from .config import PriorConfig
    from .sampling import Known, Sampling

NUM_LEVELS = 1000
SCHEDULE: dict[str, Any] = {  # of the published models
    "num_train_timesteps": NUM_LEVELS,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.0015,
    "beta_end": 0.0195,
}
DDIM = {**SCHEDULE, "clip_sample": False, "timestep_spacing": "trailing"}
# Class of diffusers, its settings, and η of Song et al., "Denoising Diffusion Implicit Models".
SAMPLERS: dict[str, tuple[str, dict[str, Any], float]] = {
    "ddim": ("DDIMScheduler", DDIM, 0.0),
    "ddpm": ("DDIMScheduler", DDIM, 1.0),
    "dpm-solver++": ("DPMSolverMultistepScheduler", SCHEDULE, 0.0),
}
REPEATS = 10  # of a step of inpainting


class LatentDiffusion(Prior):
    """A diffusion model by diffusers' UNet2DModel, of latents of mean 0 and variance 1 per channel.

    Sides that the UNet cannot halve often enough are padded with zeros, which are cut off again.
    Raises ValueError if diffusers cannot be imported.
    """

    space: LatentSpace
    mean: Tensor
    std: Tensor

    def __init__(self, config: PriorConfig, space: LatentSpace, num_classes: int = 0) -> None:
        super().__init__()
        self.space, self.num_classes = space, num_classes
        self.unit = 2 ** (len(parse_numbers(config.unet_multipliers)) - 1)  # its sides' divisor
        unet = require("diffusers.models.unets.unet_2d", "--prior diffusion").UNet2DModel
        self.unet = unet(**unet_settings(config, space, num_classes))
        schedulers = require("diffusers.schedulers", "--prior diffusion")
        self.prediction_type = config.prediction_type
        self.levels = schedulers.DDPMScheduler(**SCHEDULE)
        # Statistics of the training latents.
        self.register_buffer("mean", torch.zeros(space.channels, 1, 1))
        self.register_buffer("std", torch.ones(space.channels, 1, 1))

    def measure(self, batches: Iterable[Tensor]) -> None:
        """Set mean and standard deviation of each channel to those of the latents."""
        count, sums, squares = 0, torch.zeros(()), torch.zeros(())
        for latents in batches:
            by_channel = latents.double().transpose(0, 1).flatten(1)  # (C, n·H·W)
            count += by_channel.shape[1]
            sums, squares = sums + by_channel.sum(1), squares + by_channel.square().sum(1)
        mean = sums / count
        std = (squares / count - mean.square()).clamp_min(0).sqrt()
        self.mean.copy_(mean.view_as(self.mean))
        # A channel that never changes stays as it is.
        self.std.copy_(torch.where(std > 0, std, 1).view_as(self.std))

    def draws(self, size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Noise ε, its levels (size,), and uniform numbers (size,) that decide on label dropout."""
        return (
            torch.randn(size, *self.space.shape, generator=generator),
            torch.randint(NUM_LEVELS, (size,), generator=generator),
            torch.rand(size, generator=generator),
        )

    def forward(self, latents: Tensor, labels: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """Mean squared error of the prediction, of ε or v, for each image: (B,).

        Args:
            latents: z, (B, C, H, W).
            labels: (B,), int64; −1 stands for no class.
            noise: ε, of the shape of z.
            levels: (B,), int64 in [0, 1000).
        """
        scaled = (latents - self.mean) / self.std
        noisy, target = self.levels.add_noise(scaled, noise, levels), noise
        if self.prediction_type == "v_prediction":
            target = self.levels.get_velocity(scaled, noise, levels)
        return (self.predict(noisy, levels, labels) - target).square().flatten(1).mean(1)

    def predict(self, noisy: Tensor, levels: Tensor, labels: Tensor) -> Tensor:
        """Predict ε or v of noisy latents of mean 0 and variance 1, (B, C, H, W): same shape."""
        size, _, height, width = noisy.shape
        classes = labels % (self.num_classes + 1) if self.num_classes else None
        if not size:  # attention refuses an empty batch, whose backward pass has to reach all
            one = self.predict(
                *(F.pad(x, (0, 0) * (x.dim() - 1) + (0, 1)) for x in (noisy, levels, labels))
            )
            return one[:0]
        padded = F.pad(noisy, (0, -width % self.unit, 0, -height % self.unit))
        found: Tensor = self.unet(padded, levels, class_labels=classes).sample
        return found[..., :height, :width].float()


def unet_settings(config: PriorConfig, space: LatentSpace, num_classes: int) -> dict[str, Any]:
    """Arguments of diffusers' UNet2DModel; the last class stands for no class."""
    multipliers = parse_numbers(config.unet_multipliers)
    unit = 2 ** (len(multipliers) - 1)
    attention = parse_numbers(config.unet_attention)
    attentive = [2**level in attention for level in range(len(multipliers))]
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
    groups = default_groups(config.unet_channels)
    down, up = plain if config.unet_adm else ("DownBlock2D", "UpBlock2D")
    resample = "resnet" if config.unet_adm else "conv"
    return {
        "sample_size": (-(-space.height // unit) * unit, -(-space.width // unit) * unit),
        "in_channels": space.channels,
        "out_channels": space.channels,
        "block_out_channels": [config.unet_channels * number for number in multipliers],
        "layers_per_block": config.unet_blocks,
        "down_block_types": ["AttnDownBlock2D" if each else down for each in attentive],
        "up_block_types": ["AttnUpBlock2D" if each else up for each in attentive[::-1]],
        "attention_head_dim": config.unet_head_channels,
        "norm_num_groups": groups,
        "attn_norm_num_groups": groups,  # else --unet_adm has no norm in the middle
        "downsample_type": resample,
        "upsample_type": resample,
        "resnet_time_scale_shift": "scale_shift" if config.unet_adm else "default",
        "num_class_embeds": num_classes + 1 if num_classes else None,
    }


def check(config: PriorConfig) -> Iterator[str]:
    """Yield what the UNet's flags contradict, a line each."""
    given, head = f"--unet_multipliers {config.unet_multipliers}", config.unet_head_channels
    multipliers = parse_numbers(config.unet_multipliers)
    attention = parse_numbers(config.unet_attention)
    if not multipliers or len(multipliers) > 8 or max(multipliers) > 99:
        yield f"{given} is not a list of up to 8 numbers below 100, like 1,2,4"
    factors = [2**level for level in range(len(multipliers))]
    if not attention or not set(attention) <= set(factors):
        among = ",".join(map(str, factors))
        yield f"--unet_attention {config.unet_attention} is not among {among} of {given}"
    attentive = {
        config.unet_channels * number
        for factor, number in zip(factors, multipliers)
        if factor in (*attention, factors[-1])
    }
    for channels in sorted(attentive):
        if channels % head:
            yield f"--unet_head_channels {head} does not divide the {channels} channels of {given}"


@torch.no_grad()
def sample(
    model: LatentDiffusion,
    labels: Tensor,
    noise: Noise,
    how: Sampling,
    known: Known | None = None,
) -> Tensor:
    """Draw latents (B, C, H, W) of the classes `labels` (B,), −1 for no class.

    Given latents begin at a lower noise level (SDEdit, Meng et al., ICLR 2022). Where they are
    kept, they replace what is drawn at each level, with its noise, and each step is done REPEATS
    times, so that the rest agrees with them (RePaint, Lugmayr et al., CVPR 2022).
    """
    name, settings, eta = SAMPLERS[how.sampler]
    make = getattr(require("diffusers.schedulers", "--prior diffusion"), name)
    sampler = make(**settings, prediction_type=model.prediction_type)
    sampler.set_timesteps(how.sampling_steps, device=labels.device)
    alphas = sampler.alphas_cumprod.to(labels.device)

    def normals() -> Tensor:
        # From uniform numbers in [0, 1), by the inverse of the distribution function.
        uniform = noise(*model.space.shape).double().clamp_min(2**-54)
        found: Tensor = torch.special.ndtri(uniform).float().to(labels.device)
        return found

    x, levels, keep = normals(), sampler.timesteps, None
    if known is not None:
        given = (known.items - model.mean) / model.std
        levels = levels[-max(1, round(known.share * len(levels))) :]
        if len(levels) < len(sampler.timesteps):
            x = model.levels.add_noise(given, x, levels[:1])
        if known.mask.any():
            keep = known.mask.expand(len(x), *x.shape[2:])[:, None]
    guided = how.guidance != 1 and model.num_classes
    for level in levels:
        for number in range(1 if keep is None else REPEATS):
            if number:  # back to this level
                before = level - NUM_LEVELS // how.sampling_steps
                share = alphas[level] / (alphas[before] if before >= 0 else 1)
                x = share.sqrt() * x + (1 - share).sqrt() * normals()
            if keep is not None:
                x = torch.where(keep, model.levels.add_noise(given, normals(), level[None]), x)
            found = model.predict(x, level.expand(len(x)), labels)
            if guided:
                none = model.predict(x, level.expand(len(x)), torch.full_like(labels, -1))
                found = none + how.guidance * (found - none)
            random = {"eta": eta, "variance_noise": normals()} if eta else {}
            x = sampler.step(found, level, x, **random).prev_sample
    if keep is not None:
        x = torch.where(keep, given, x)
    latents: Tensor = x * model.std + model.mean
    return latents


SPEC = PriorSpec(
    LatentDiffusion,
    sample,
    LatentSpace,
    reads=frozenset(
        {
            *("unet_channels", "unet_multipliers", "unet_blocks"),
            *("unet_attention", "unet_head_channels", "unet_adm", "prediction_type"),
        }
    ),
    draws=frozenset({"sampler", "sampling_steps", "guidance"}),
    implies={"lr": 5e-4, "weight_ema": 0.999},
    checks=check,
)
