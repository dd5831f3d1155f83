"""What training minimises besides the quantiser's loss, one class a network of --model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules import VQGAN, Autoencoder, ModelConfig, PatchDiscriminator
from modules.options import option
from modules.quantizers.looc.ranks import sum_over_ranks
from utils.checkpoints.checkpoint import check_tensors
from utils.distributed import first_goes_ahead
from utils.errors import UserError
from utils.evaluation.metrics import LPIPS_BACKBONES
from utils.evaluation.networks import lpips_network
from utils.flags.arguments import build
from utils.images import in_colour
from utils.training.optimizers import load_optimizer, make_adam

WITHOUT_LPIPS = "name their folder with --weights_dir, or go without: --perceptual_weight 0"
VGG_SIDE = LPIPS_BACKBONES["vgg"]


@dataclass(frozen=True)
class ObjectiveConfig:
    """What --model vqgan minimises: L1 + LPIPS, and from a step on a discriminator's judgement."""

    perceptual_weight: float = option(1.0, "of LPIPS-VGG; 0: none", minimum=0, maximum=1e6)
    disc_weight: float = option(
        0.8, "of the discriminator, times the adaptive weight; 0: none", minimum=0, maximum=1e6
    )
    disc_start: int = option(
        30001, "step after which the discriminator takes part", minimum=0, maximum=10**12
    )
    disc_channels: int = option(
        64, "channels of the discriminator's first layer", minimum=1, maximum=2**12
    )
    disc_layers: int = option(
        3, "its convolutions of stride 2, which set the size of its patches", minimum=1, maximum=8
    )
    weights_dir: str | None = option(
        None, "folder of the weights of LPIPS's network (default: torch hub's)"
    )


def build_objective_config(
    flags: Mapping[str, Any], model: ModelConfig, image_size: int
) -> ObjectiveConfig:
    """The objective of the given flags.

    Raises UserError where these do not suit the model, or the networks not the images.
    """
    config = build(ObjectiveConfig, flags)
    if image_size % model.downsampling:
        raise UserError(
            f"--image_size {image_size} is not a multiple of {model.downsampling}, "
            f"which --model {model.model} needs"
        )
    if model.model != "vqgan":
        for name in (*(item.name for item in fields(ObjectiveConfig)), "checkpoint_gradients"):
            if flags.get(name, False) is not False:
                raise UserError(f"--{name} {flags[name]} has no effect with --model {model.model}")
        return config
    smallest = {
        "disc_layers": 3 * 2**config.disc_layers if config.disc_weight else 0,
        "perceptual_weight": VGG_SIDE if config.perceptual_weight else 0,
    }
    for name, side in smallest.items():
        if image_size < side:
            raise UserError(
                f"--{name} {getattr(config, name)} needs images of {side}×{side} or more, "
                f"not --image_size {image_size}"
            )
    return config


def make_objective(
    model: Autoencoder,
    config: ObjectiveConfig,
    *,
    betas: tuple[float, float],
    dtype: torch.dtype,
    variance: Callable[[], float],
) -> Objective:
    """What this network is trained for; the variance of the images is asked for where it counts.

    Raises UserError where the weights of LPIPS are missing.
    """
    if not isinstance(model, VQGAN):
        return MeanSquaredError(variance())
    perceptual = None
    if config.perceptual_weight:
        with first_goes_ahead():  # the others find what it has downloaded
            network = lpips_network("vgg", folder=config.weights_dir, without=WITHOUT_LPIPS)
        perceptual = network.module.to(model.last_layer.device)
    return Adversarial(config, model, perceptual, betas=betas, dtype=dtype)


class Objective(ABC):
    """A loss of images and their reconstructions, with what it trains and remembers besides.

    Images are (b, C, h, w) in [−1, 1], one part of one process's share of a batch. `share` is that
    part of the batch, so that the sums over parts and processes are the batch's means.
    """

    terms: tuple[str, ...] = ()  # what it reports of a part, by name
    watched: tuple[str, ...] = ()  # losses and gradients of its own, which have to be finite
    measures: tuple[str, ...] = ()  # what validation measures of an image besides its PSNR

    @abstractmethod
    def loss(
        self, images: Tensor, reconstruction: Tensor, mse: Tensor, share: float, step: int,
        scaler: torch.amp.GradScaler,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """The loss, a scalar, and `terms` as far as they are known. mse is that of the images."""

    def backward(
        self, images: Tensor, reconstruction: Tensor, share: float, step: int,
        scaler: torch.amp.GradScaler,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """Add the gradients of its own networks; returns their losses, (n,), and further terms."""
        del reconstruction, share, step, scaler
        return images.new_zeros(0), {}

    def gradients(self) -> Tensor:
        """Sum the gradients of its own networks over all processes; returns their norms, (k,)."""
        return torch.zeros(0)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """What takes the step of its own networks, as far as they have gradients."""
        return []

    def distances(self, images: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        """`measures` of each image: name → (b,)."""
        del images, reconstruction
        return {}

    def merit(self, scores: Mapping[str, float]) -> float:
        """What best.pt is the best of, of the scores of a validation."""
        return scores["psnr"]

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold."""
        return {}

    def load(self, content: Mapping[str, Any]) -> None:
        """Take up the state in a checkpoint's content. Raises ValueError where it is damaged."""
        del content


class MeanSquaredError(Objective):
    """mse / variance of the training pixels in [0, 1], as published for the VQ-VAE."""

    def __init__(self, data_variance: float) -> None:
        self.data_variance = max(data_variance, 1e-6)  # images of one colour have none

    def loss(
        self, images: Tensor, reconstruction: Tensor, mse: Tensor, share: float, step: int,
        scaler: torch.amp.GradScaler,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        del images, reconstruction, share, step, scaler
        return mse / self.data_variance, {}

    def state(self) -> dict[str, Any]:
        return {"data_variance": self.data_variance}


class Adversarial(Objective):
    """L1 + w·LPIPS − v·a·mean D(x̂), the last term from a step on; D learns by the hinge loss.

    The adaptive weight a is ‖∇(L1 + w·LPIPS)‖ / (‖∇ mean D(x̂)‖ + 10⁻⁴), at most 10⁴, with the
    gradients of the decoder's last layer, over the images of all processes: Esser, Rombach, Ommer,
    "Taming Transformers", CVPR 2021, equation 7. D sees the reconstructions that the model was
    just trained with, where the published code encodes and decodes the batch once more.

    Args:
        config: weights and start.
        model: whose last layer the adaptive weight looks at.
        perceptual: LPIPS, (b, 3, h, w) twice → (b, 1, 1, 1); None for none.
        betas: of the discriminator's Adam.
        dtype: of the networks under autocast.
    """

    judged = ("discriminator", "logits_real", "logits_fake")
    terms = ("l1", "perceptual", "adversarial", "adaptive_weight", *judged)
    watched = ("the discriminator's loss", "the gradient of the discriminator")
    measures = ("l1", "perceptual")

    def __init__(
        self,
        config: ObjectiveConfig,
        model: VQGAN,
        perceptual: nn.Module | None,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config = config
        self.last_layer = model.last_layer
        self.perceptual = perceptual
        self.device, self.dtype = self.last_layer.device, dtype
        self.discriminator = PatchDiscriminator(
            model.config.in_channels, config.disc_channels, config.disc_layers
        ).to(self.last_layer)
        self.parameters = list(self.discriminator.parameters())
        self.optimizer = make_adam(self.parameters, betas=betas)

    def takes_part(self, step: int) -> bool:
        """Whether the discriminator does, in this step; the first is 1."""
        return self.config.disc_weight > 0 and step > self.config.disc_start

    def autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, self.dtype, enabled=self.dtype in (torch.float16, torch.bfloat16)
        )

    def loss(
        self, images: Tensor, reconstruction: Tensor, mse: Tensor, share: float, step: int,
        scaler: torch.amp.GradScaler,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        del mse
        with self.autocast():
            distances = {
                name: values.sum() / max(1, len(images))
                for name, values in self.distances(images, reconstruction).items()
            }
        loss = distances["l1"] + self.config.perceptual_weight * distances["perceptual"]
        zero = torch.zeros_like(loss)
        terms = {**distances, "adversarial": zero, "adaptive_weight": zero}
        if self.takes_part(step):
            self.discriminator.requires_grad_(False)
            with self.autocast():
                adversarial = -self._mean_logit(reconstruction)
            weight = self._adaptive_weight(loss, adversarial, share, scaler)
            loss = loss + self.config.disc_weight * weight * adversarial
            terms |= {"adversarial": adversarial, "adaptive_weight": weight}
        return loss, terms

    def backward(
        self, images: Tensor, reconstruction: Tensor, share: float, step: int,
        scaler: torch.amp.GradScaler,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        zero = torch.zeros((), dtype=images.dtype, device=images.device)
        if not self.takes_part(step):
            return zero[None], dict.fromkeys(self.judged, zero)
        self.discriminator.requires_grad_(True)
        with self.autocast():
            real = self.discriminator(images).float()
            fake = self.discriminator(reconstruction).float()
        loss = (mean(F.relu(1 - real)) + mean(F.relu(1 + fake))) / 2
        scaler.scale(loss * share).backward()  # type: ignore[no-untyped-call]
        values = (loss.detach(), mean(real).detach(), mean(fake).detach())
        return values[0][None], dict(zip(self.judged, values))

    def gradients(self) -> Tensor:
        gradients = [value.grad for value in self.parameters if value.grad is not None]
        if not gradients:
            return torch.zeros(1, device=self.device)
        flat = sum_over_ranks(torch.cat([gradient.flatten() for gradient in gradients]))
        nn.utils.vector_to_parameters(flat, gradients)
        norm: Tensor = flat.norm()
        return norm[None]

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.optimizer] if any(p.grad is not None for p in self.parameters) else []

    def distances(self, images: Tensor, reconstruction: Tensor) -> dict[str, Tensor]:
        l1 = (images - reconstruction).abs().flatten(1).mean(1)
        if self.perceptual is None or not len(images):
            return {"l1": l1, "perceptual": torch.zeros_like(l1)}
        lpips = self.perceptual(in_colour(images), in_colour(reconstruction))
        return {"l1": l1, "perceptual": lpips.flatten().to(l1.dtype)}

    def merit(self, scores: Mapping[str, float]) -> float:
        return -(scores["l1"] + self.config.perceptual_weight * scores["perceptual"])

    def state(self) -> dict[str, Any]:
        return {
            "objective_config": asdict(self.config),
            "discriminator": self.discriminator.state_dict(),
            "discriminator_optimizer": self.optimizer.state_dict(),
        }

    def load(self, content: Mapping[str, Any]) -> None:
        check_tensors(self.discriminator.state_dict(), content["discriminator"])
        self.discriminator.load_state_dict(content["discriminator"])
        averages = content["discriminator_optimizer"]["state"]
        if averages:  # none before its first step
            load_optimizer(self.optimizer, averages)

    def _mean_logit(self, images: Tensor) -> Tensor:
        return mean(self.discriminator(images).float())

    def _adaptive_weight(
        self, loss: Tensor, adversarial: Tensor, share: float, scaler: torch.amp.GradScaler
    ) -> Tensor:
        gradients = [
            torch.autograd.grad(scaler.scale(value * share), self.last_layer, retain_graph=True)[0]
            for value in (loss, adversarial)
        ]
        unit = scaler.scale(loss.detach().new_tensor(share))
        flat = sum_over_ranks(torch.cat([*(g.flatten() for g in gradients), unit[None]]))
        own, theirs = flat[:-1].chunk(2)
        # Both have the scale of this part of the batch, and of the scaler.
        weight: Tensor = own.norm() / (theirs.norm() + 1e-4 * flat[-1])
        return weight.clamp(0, 1e4)


def mean(values: Tensor) -> Tensor:
    """The mean, or 0 where there are none, with a gradient: any shape → scalar."""
    return values.sum() / max(1, values.numel())
