"""The patch discriminator of VQGAN."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .quantizers.looc.ranks import SumOverRanks, num_ranks, sum_over_ranks


class PatchDiscriminator(nn.Module):
    """Images (B, C, h, w) → logits (B, 1, h', w') of overlapping patches; high means real.

    Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks", CVPR 2017, in
    the form of VQGAN: `num_layers` convolutions of stride 2, then two of stride 1.
    """

    def __init__(self, in_channels: int, width: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        widths = [width * min(2**n, 8) for n in range(num_layers + 1)]
        layers = [nn.Conv2d(in_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for n in range(1, num_layers + 1):
            stride = 2 if n < num_layers else 1
            layers += [
                nn.Conv2d(widths[n - 1], widths[n], 4, stride=stride, padding=1, bias=False),
                BatchNorm(widths[n]),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0, 0.02)
            elif isinstance(layer, BatchNorm):
                nn.init.normal_(layer.weight, 1, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits


class BatchNorm(nn.Module):
    """Normalise each channel of (B, C, h, w) over the images of all processes.

    There are no running averages, since a discriminator is used in training only. nn.SyncBatchNorm
    would need GPUs, and images in every process.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        if num_ranks() == 1 and x.numel() > x.shape[1]:  # PyTorch refuses a single value
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True)
        values = x.to(self.weight.dtype)  # sums overflow in half precision
        count = sum_over_ranks(values.new_tensor(float(x.numel() // x.shape[1]))).clamp_min(1)
        mean = SumOverRanks.apply(values.sum((0, 2, 3))) / count
        centred = values - mean[:, None, None]
        variance = SumOverRanks.apply(centred.square().sum((0, 2, 3))) / count
        scale = self.weight * (variance + 1e-5).rsqrt()
        normalised: Tensor = centred * scale[:, None, None] + self.bias[:, None, None]
        return normalised.to(x.dtype)
