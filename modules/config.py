"""The model's hyper-parameters, each declared once for flags, checkpoint and checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .autoencoder import NetworkSpec
from .optional import require
from .options import option
from .quantizers.looc.anchors import ANCHORS, STARTS
from .quantizers.looc.losses import GRADIENTS
from .quantizers.looc.norms import LATENT_NORMS
from .quantizers.looc.search import DISTANCES
from .quantizers.looc.units import SPLITS
from .quantizers.looc.usage import CODEBOOK_UPDATES
from .quantizers.registry import QUANTIZER_FLAGS, QUANTIZERS
from .quantizers.spec import LARGEST_CODEBOOK, QuantizerSpec
from .registry import MODELS, NETWORK_FLAGS

CHANNELS: dict[str, Any] = {"minimum": 1, "maximum": 2**14}


@dataclass(frozen=True)
class ModelConfig:
    """Everything needed to rebuild the model.

    Raises ValueError, naming the flags and both values, if fields contradict each other.
    """

    model: str = option("vqvae", "network around the quantiser", choices=MODELS)
    quantizer: str = option("looc", "quantiser", choices=QUANTIZERS)
    num_embedding: int = option(256, "number of codevectors K", minimum=1, maximum=LARGEST_CODEBOOK)
    embedding_dim: int = option(4, "dimension d of a codevector", **CHANNELS)
    distance: str = option(
        "cos", "measure of the match: cosine similarity or Euclidean distance", choices=DISTANCES
    )
    anchor: str = option(
        "closest",
        "feature to which an unused codevector is moved (none: it stays)",
        choices=ANCHORS,
    )
    split: str = option("fixed", "channels of a unit: contiguous or every m-th", choices=SPLITS)
    interpolation_scale: int = option(
        0, "scale β of extrapolation-by-interpolation (0 or 1: off)", minimum=0, maximum=8
    )
    first_batch: bool = option(False, "re-initialise on the first training batch only")
    contras_loss: bool = option(False, "add the contrastive loss")
    commitment_cost: float = option(0.25, "commitment weight λ", minimum=0, maximum=1e6)
    codebook_update: str = option(
        "gradient", "codebook update, by gradients or moving averages", choices=CODEBOOK_UPDATES
    )
    ema_decay: float = option(
        0.8, "decay of the moving averages of --codebook_update ema", minimum=0, maximum=1 - 1e-6
    )
    codebook_start: str = option(
        "uniform",
        "initial codevectors: random, features of the first batch, or their k-means centres",
        choices=STARTS,
    )
    latent_norm: str = option(
        "none",
        "normalisation of the latents: each unit, position or channel (by the batch's or "
        "running statistics)",
        choices=LATENT_NORMS,
    )
    gradient: str = option("straight_through", "gradient through the quantiser", choices=GRADIENTS)
    rate_weight: float = option(
        0.0,
        "cost of one bit in the match, as squared distance; needs --distance l2",
        minimum=0,
        maximum=1e6,
    )
    num_passes: int = option(
        1,
        "passes of the codebook, each over what is left by those before it",
        minimum=1,
        maximum=64,
    )
    levels: str | None = option(None, "levels of fsq, like 8,5,5,5 (default: from K and d)")
    num_quantizers: int = option(4, "number of codebooks of residual-vq", minimum=1, maximum=64)
    dead_code_threshold: int = option(
        0,
        "matches per step below which the library's EMA quantisers replace a codevector",
        minimum=0,
        maximum=10**6,
    )
    latent_channels: int | None = option(
        None, "latent channels C (default: --hidden_size, or d where C has to be d)", **CHANNELS
    )
    hidden_size: int = option(
        128, "encoder and decoder channels (VQGAN: at full resolution)", minimum=2, maximum=2**14
    )
    num_residual_hidden: int = option(
        32, "channels inside the residual blocks of vqvae and dct", **CHANNELS
    )
    num_residual_layers: int = option(
        2, "residual blocks (VQGAN: per resolution; decoder one more)", minimum=0, maximum=1024
    )
    block_size: int = option(4, "side of dct's blocks in pixels", minimum=2, maximum=64)
    channel_multipliers: str = option(
        "1,1,2,2,4", "VQGAN's channels at full, half, … resolution, as multiples of --hidden_size"
    )
    attention_levels: int = option(
        1, "number of VQGAN's lowest resolutions with attention", minimum=0, maximum=8
    )
    norm_groups: int | None = option(
        None, "VQGAN's normalisation groups (default: up to 32, of 4 channels or more)", **CHANNELS
    )
    z_channels: int | None = option(
        None, "channels from VQGAN's encoder and into its decoder (default: C)", **CHANNELS
    )
    in_channels: int = option(1, "image channels", minimum=1, maximum=1024, flag=False)

    def __post_init__(self) -> None:
        for item in fields(self):
            name, value = item.name, getattr(self, item.name)
            given = f"--{name} {value} has no effect with"
            default = self.spec.implies.get(name, item.default)
            if name in QUANTIZER_FLAGS - self.spec.reads and value != default:
                raise ValueError(f"{given} --quantizer {self.quantizer}")
            if name in NETWORK_FLAGS - self.network.reads and value != item.default:
                raise ValueError(f"{given} --model {self.model}")
        if self.latent_norm == "unit" and self.embedding_dim == 1:
            raise ValueError("--latent_norm unit turns all units of --embedding_dim 1 into ±1")
        for check in (*self.network.checks, *self.spec.checks):
            for problem in check(self):
                raise ValueError(problem)

    @property
    def network(self) -> NetworkSpec:
        """The spec of the network."""
        return MODELS[self.model]

    @property
    def spec(self) -> QuantizerSpec:
        """The spec of the quantiser."""
        return QUANTIZERS[self.quantizer]

    @property
    def downsampling(self) -> int:
        """Factor f between the sides of an image and of its latents."""
        return self.network.downsampling(self)

    @property
    def channels(self) -> int:
        """Channels C of the latents; by default d where the quantiser takes no other number."""
        if self.latent_channels is not None:
            return self.latent_channels
        return self.hidden_size if self.spec.any_channels else self.embedding_dim

    @property
    def num_slots(self) -> int:
        """Indices m per position."""
        return self.spec.slots(self)

    @property
    def num_codebooks(self) -> int:
        """1 if all slots share a codebook, m if each has its own, 0 without any."""
        return self.spec.codebooks(self)

    def codes_per_image(self, side: int) -> int:
        """Return the number of indices of a square image."""
        return self.num_slots * (side // self.downsampling) ** 2

    def need_libraries(self) -> None:
        """Raise ValueError if a library that the model needs cannot be imported."""
        for name, spec in (("model", self.network), ("quantizer", self.spec)):
            if spec.library:
                require(spec.library, f"--{name} {getattr(self, name)}")


for network in MODELS.values():  # resolved, so that PyTorchModelHubMixin can make the configuration
    network.make.__init__.__annotations__["config"] = ModelConfig


def implied_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the quantiser's own defaults of the flags that are not given."""
    spec = QUANTIZERS[flags.get("quantizer", ModelConfig.quantizer)]
    implied = {**spec.implies, **spec.derive(flags, ModelConfig)}
    return {name: value for name, value in implied.items() if name not in flags}
