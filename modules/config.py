"""The model's hyper-parameters, each declared once: flags, checkpoint and checks come from here."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from modules.options import option
from modules.quantizers.looc.quantizer import (
    ANCHORS,
    CODEBOOK_UPDATES,
    DISTANCES,
    GRADIENTS,
    LATENT_NORMS,
    SPLITS,
    STARTS,
)

LARGEST_CODEBOOK = 2**20
LEAST_LEVEL, LARGEST_LEVEL = 3, 16  # of --quantizer fsq, where they are chosen here

# ------------------------------------------------------------------------------------- quantisers


@dataclass(frozen=True)
class Kind:
    """A quantiser: which flags it reads, what it implies, and what it makes of the latents."""

    label: str
    reads: frozenset[str] = frozenset()
    implies: Mapping[str, Any] = field(default_factory=dict)  # for flags that were not given
    derive: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda _: {}  # more, from those given
    checks: Sequence[Callable[[ModelConfig], None]] = ()
    any_channels: bool = False  # or as many as a codevector
    slots: Callable[[ModelConfig], int] = lambda _: 1  # indices m of a position
    codebooks: Callable[[ModelConfig], int] = lambda _: 1
    parts: bool = False  # whether a batch may be passed in parts, or by several processes

    def default(self, name: str) -> Any:
        """Of a flag that is not given, apart from those that are derived."""
        return self.implies.get(name, getattr(ModelConfig, name))


def units(config: ModelConfig) -> int:
    """m = C·max(β,1)²/d."""
    return config.channels * max(config.interpolation_scale, 1) ** 2 // config.embedding_dim


def check_units(config: ModelConfig) -> None:
    """d divides the channels."""
    scale = max(config.interpolation_scale, 1)
    if config.channels * scale**2 % config.embedding_dim:
        flag = "--hidden_size" if config.latent_channels is None else "--latent_channels"
        times = f" times {scale}² of --interpolation_scale" if scale > 1 else ""
        raise ValueError(
            f"--embedding_dim {config.embedding_dim} does not divide "
            f"the {config.channels} channels of {flag}{times}"
        )


def check_position(config: ModelConfig) -> None:
    """The channels are those of one codevector."""
    if config.channels != config.embedding_dim:
        raise ValueError(
            f"--latent_channels {config.latent_channels} is not --embedding_dim "
            f"{config.embedding_dim}, the channels of --quantizer {config.quantizer}"
        )
    if config.interpolation_scale > 1:
        raise ValueError(
            f"--interpolation_scale {config.interpolation_scale} needs --quantizer looc, "
            f"not {config.quantizer}"
        )


def check_start(config: ModelConfig) -> None:
    if config.codebook_start == "features":
        raise ValueError(
            f"--codebook_start features needs --quantizer looc, cvq or vq, not {config.quantizer}, "
            "which has uniform and kmeans"
        )


def check_own(config: ModelConfig) -> None:
    """What LooCQuantizer refuses, by the names of flags."""
    if config.contras_loss and config.codebook_update != "gradient":
        raise ValueError(
            f"--contras_loss has no effect with --codebook_update {config.codebook_update}, "
            "only with gradient"
        )
    if config.rate_weight and config.distance != "l2":
        raise ValueError(
            f"--rate_weight {config.rate_weight:g} needs --distance l2, not {config.distance}"
        )


def even_levels(product: int, count: int, largest: int = LARGEST_LEVEL) -> tuple[int, ...] | None:
    """So many levels of this product, falling, as even as can be; None where there are none."""
    if not count:
        return () if product == 1 else None
    found = []
    for level in range(LEAST_LEVEL, min(largest, product) + 1):
        rest = even_levels(product // level, count - 1, level) if product % level == 0 else None
        if rest is not None:
            found.append((level, *rest))
    return min(found, key=sum, default=None)


def parse_levels(text: str) -> tuple[int, ...]:
    """8,5,5,5 as numbers; none at all where it is nothing of the kind."""
    matches = re.fullmatch(r"[1-9]\d{0,6}(,[1-9]\d{0,6}){0,11}", text)
    return tuple(map(int, text.split(","))) if matches else ()


def fsq_sizes(flags: Mapping[str, Any]) -> dict[str, Any]:
    """K and d of the levels given, else levels for K and d.

    d is near the usual one, and divides the channels, where neither levels nor d are given.
    """
    if flags.get("levels") is not None:
        levels = parse_levels(flags["levels"])
        return {"num_embedding": math.prod(levels), "embedding_dim": len(levels)} if levels else {}
    channels = flags.get("latent_channels") or flags.get("hidden_size", ModelConfig.hidden_size)
    near = sorted(range(1, 13), key=lambda dim: abs(dim - ModelConfig.embedding_dim))
    dims = sorted(near, key=lambda dim: channels % dim > 0)
    for dim in [flags["embedding_dim"]] if "embedding_dim" in flags else dims:
        chosen = even_levels(flags.get("num_embedding", ModelConfig.num_embedding), dim)
        if chosen is not None:
            return {"levels": ",".join(map(str, chosen)), "embedding_dim": dim}
    return {}


def check_levels(config: ModelConfig) -> None:
    """There are d levels, and K is their product."""
    if config.levels is None:
        raise ValueError(
            f"--num_embedding {config.num_embedding} is no product of levels from {LEAST_LEVEL} to "
            f"{LARGEST_LEVEL}, --embedding_dim {config.embedding_dim} of them; give --levels"
        )
    levels = parse_levels(config.levels)
    if not levels or min(levels) < LEAST_LEVEL:
        raise ValueError(
            f"--levels {config.levels} is no list of up to 12 numbers from {LEAST_LEVEL} on, "
            "like 8,5,5,5"
        )
    product = math.prod(levels)
    if product > LARGEST_CODEBOOK:
        raise ValueError(
            f"--levels {config.levels} makes {product} codevectors, more than {LARGEST_CODEBOOK}"
        )
    if product != config.num_embedding:
        raise ValueError(
            f"--levels {config.levels} makes {product} codevectors, "
            f"not --num_embedding {config.num_embedding}"
        )
    if len(levels) != config.embedding_dim:
        raise ValueError(
            f"--levels {config.levels} has {len(levels)} dimensions, "
            f"not --embedding_dim {config.embedding_dim}"
        )


def lfq_sizes(flags: Mapping[str, Any]) -> dict[str, Any]:
    """K = 2^d, whichever of them is not given."""
    dim = flags.get("embedding_dim")
    if dim is None:
        num_embedding = flags.get("num_embedding", ModelConfig.num_embedding)
        return {"embedding_dim": max(1, num_embedding.bit_length() - 1)}
    return {"num_embedding": 2**dim} if 2**dim <= LARGEST_CODEBOOK else {}


def check_bits(config: ModelConfig) -> None:
    """K = 2^d."""
    if config.num_embedding != 2**config.embedding_dim:
        raise ValueError(
            f"--num_embedding {config.num_embedding} is not 2 to the power of --embedding_dim "
            f"{config.embedding_dim}, as --quantizer lfq needs it"
        )


COMMON = frozenset({"num_embedding", "embedding_dim", "latent_norm"})
OWN = COMMON | {
    *("distance", "anchor", "split", "interpolation_scale", "first_batch", "contras_loss"),
    *("commitment_cost", "codebook_update", "ema_decay", "codebook_start", "gradient"),
    "rate_weight",
}
BY_EMA = COMMON | {
    *("commitment_cost", "ema_decay", "codebook_start", "gradient", "dead_code_threshold")
}
LIKE_LIBRARY = {
    "anchor": "none",
    "codebook_start": "uniform",
    "commitment_cost": 1.0,
    "distance": "l2",
    "gradient": "rotation",
}
QUANTIZERS = {
    "looc": Kind(
        "LooC",
        OWN,
        checks=(check_units, check_own),
        any_channels=True,
        slots=units,
        parts=True,
    ),
    "cvq": Kind("CVQ-VAE", OWN, checks=(check_position, check_own), parts=True),
    "vq": Kind(
        "plain VQ",
        OWN - {"anchor"},
        {"distance": "l2", "anchor": "none"},
        checks=(check_position, check_own),
        parts=True,
    ),
    "none": Kind(
        "an autoencoder without quantiser",
        frozenset({"latent_norm"}),
        implies={"anchor": "none"},
        any_channels=True,
        slots=lambda _: 0,
        codebooks=lambda _: 0,
        parts=True,
    ),
    "ema-vq": Kind(
        "VQ by moving averages",
        BY_EMA,
        LIKE_LIBRARY,
        checks=(check_position, check_start),
    ),
    "cosine-vq": Kind(
        "VQ by cosine similarity",
        BY_EMA,
        {**LIKE_LIBRARY, "distance": "cos"},
        checks=(check_position, check_start),
    ),
    "multihead-vq": Kind(
        "multi-headed VQ",
        BY_EMA | {"distance"},
        LIKE_LIBRARY,
        checks=(check_units, check_start),
        any_channels=True,
        slots=units,
    ),
    "product-vq": Kind(
        "product VQ",
        BY_EMA | {"distance"},
        LIKE_LIBRARY,
        checks=(check_units, check_start),
        any_channels=True,
        slots=units,
        codebooks=units,
    ),
    "residual-vq": Kind(
        "residual VQ",
        BY_EMA | {"num_quantizers"},
        LIKE_LIBRARY,
        checks=(check_position, check_start),
        slots=lambda config: config.num_quantizers,
        codebooks=lambda config: config.num_quantizers,
    ),
    "fsq": Kind(
        "FSQ",
        COMMON | {"levels"},
        {"anchor": "none"},
        fsq_sizes,
        checks=(check_levels, check_units),
        any_channels=True,
        slots=units,
        parts=True,
    ),
    "lfq": Kind(
        "LFQ",
        COMMON | {"commitment_cost"},
        {"anchor": "none", "commitment_cost": 0.0},
        lfq_sizes,
        checks=(check_bits, check_units),
        any_channels=True,
        slots=units,
    ),
    "sim-vq": Kind(
        "SimVQ",
        COMMON | {"commitment_cost", "gradient"},
        {"anchor": "none", "distance": "l2", "gradient": "rotation"},
        checks=(check_position,),
    ),
}
QUANTIZER_FLAGS = OWN | {"levels", "num_quantizers", "dead_code_threshold"}

# --------------------------------------------------------------------------------------- networks


@dataclass(frozen=True)
class Network:
    """A network around the quantiser: the flags that are its own, and how it divides the side."""

    label: str
    own: frozenset[str]
    downsampling: Callable[[ModelConfig], int]
    checks: Sequence[Callable[[ModelConfig], None]] = ()


def parse_multipliers(text: str) -> tuple[int, ...]:
    """1,1,2,2,4 as numbers; none at all where it is nothing of the kind."""
    matches = re.fullmatch(r"[1-9]\d?(,[1-9]\d?){0,7}", text)
    return tuple(map(int, text.split(","))) if matches else ()


def check_halves(config: ModelConfig) -> None:
    """The first convolution has half the channels."""
    if config.hidden_size % 2:
        raise ValueError(
            f"--hidden_size {config.hidden_size} is odd; "
            "the first convolution has half as many channels"
        )


def check_resolutions(config: ModelConfig) -> None:
    """There is a multiplier for each resolution, and no more of them have attention."""
    multipliers = parse_multipliers(config.channel_multipliers)
    if not multipliers:
        raise ValueError(
            f"--channel_multipliers {config.channel_multipliers} is no list of up to 8 numbers "
            "below 100, like 1,1,2,2,4"
        )
    if config.num_residual_layers < 1:
        raise ValueError(
            f"--num_residual_layers {config.num_residual_layers} is less than the 1 that "
            "--model vqgan needs"
        )
    if config.attention_levels > len(multipliers):
        raise ValueError(
            f"--attention_levels {config.attention_levels} is more than the {len(multipliers)} "
            f"of --channel_multipliers {config.channel_multipliers}"
        )


def default_groups(channels: int) -> int:
    """Of a normalisation; one of a single channel would forget how bright that is."""
    most = max(1, min(32, channels // 4))
    return next(number for number in range(most, 0, -1) if channels % number == 0)


def check_groups(config: ModelConfig) -> None:
    """The normalisations have as many channels in each group."""
    if config.hidden_size % config.num_groups:
        raise ValueError(
            f"--norm_groups {config.num_groups} does not divide --hidden_size {config.hidden_size}"
        )


NETWORKS = {
    "vqvae": Network(
        "VQ-VAE",
        frozenset({"num_residual_hidden"}),
        lambda _: 4,
        checks=(check_halves,),
    ),
    "vqgan": Network(
        "VQGAN",
        frozenset({"channel_multipliers", "attention_levels", "norm_groups", "z_channels"}),
        lambda config: 2 ** config.channel_multipliers.count(","),
        checks=(check_resolutions, check_groups),
    ),
}
NETWORK_FLAGS = frozenset[str]().union(*(network.own for network in NETWORKS.values()))


def implied_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """What the quantiser of these flags implies for those that are not among them."""
    kind = QUANTIZERS[flags.get("quantizer", ModelConfig.quantizer)]
    implied = {**kind.implies, **kind.derive(flags)}
    return {name: value for name, value in implied.items() if name not in flags}


# ------------------------------------------------------------------------------------------- flags


@dataclass(frozen=True)
class ModelConfig:
    """Everything needed to rebuild the model.

    Raises ValueError, naming the flags and both values, where fields contradict each other.
    """

    model: str = option("vqvae", "network around the quantiser", choices=tuple(NETWORKS))
    quantizer: str = option("looc", "quantiser", choices=tuple(QUANTIZERS))
    num_embedding: int = option(
        256, "codevectors K in a codebook", minimum=1, maximum=LARGEST_CODEBOOK
    )
    embedding_dim: int = option(4, "dimension d of one codevector", minimum=1, maximum=2**14)
    distance: str = option("cos", "similarity of the match", choices=tuple(DISTANCES))
    anchor: str = option("closest", "re-initialisation rule", choices=tuple(ANCHORS))
    split: str = option("fixed", "how channels are cut into units", choices=tuple(SPLITS))
    interpolation_scale: int = option(
        0, "spatial scale of extrapolation-by-interpolation (0 or 1: off)", minimum=0, maximum=8
    )
    first_batch: bool = option(False, "re-initialise on the first training batch only")
    contras_loss: bool = option(False, "add the contrastive loss")
    commitment_cost: float = option(0.25, "commitment weight λ", minimum=0, maximum=1e6)
    codebook_update: str = option(
        "gradient", "what moves codevectors in use", choices=CODEBOOK_UPDATES
    )
    ema_decay: float = option(
        0.8, "decay of the running mean of --codebook_update ema", minimum=0, maximum=1 - 1e-6
    )
    codebook_start: str = option("uniform", "where codevectors begin", choices=tuple(STARTS))
    latent_norm: str = option(
        "none", "what of the latents is brought to mean square one", choices=tuple(LATENT_NORMS)
    )
    gradient: str = option(
        "straight_through", "gradient through the match", choices=tuple(GRADIENTS)
    )
    rate_weight: float = option(
        0.0,
        "squared distance that a bit of a code is worth in the match; needs --distance l2",
        minimum=0,
        maximum=1e6,
    )
    levels: str | None = option(
        None, "levels of --quantizer fsq, like 8,5,5,5 (default: d of them, as K asks for)"
    )
    num_quantizers: int = option(
        4, "codebooks of --quantizer residual-vq, one after another", minimum=1, maximum=64
    )
    dead_code_threshold: int = option(
        0,
        "mean matches a step below which the library's EMA quantisers replace a codevector",
        minimum=0,
        maximum=10**6,
    )
    latent_channels: int | None = option(
        None,
        "channels of the latents (default: those of --hidden_size where they are cut into units, "
        "else d)",
        minimum=1,
        maximum=2**14,
    )
    hidden_size: int = option(
        128,
        "channels of encoder and decoder; of --model vqgan at the full resolution",
        minimum=2,
        maximum=2**14,
    )
    num_residual_hidden: int = option(
        32, "channels inside a residual block of --model vqvae", minimum=1, maximum=2**14
    )
    num_residual_layers: int = option(
        2,
        "residual blocks in encoder and decoder; of --model vqgan at each resolution, with one "
        "more in the decoder",
        minimum=0,
        maximum=1024,
    )
    channel_multipliers: str = option(
        "1,1,2,2,4",
        "channels of --model vqgan at each resolution, in units of --hidden_size; each after the "
        "first halves the side",
    )
    attention_levels: int = option(
        1,
        "lowest resolutions of --model vqgan with attention in their residual blocks",
        minimum=0,
        maximum=8,
    )
    norm_groups: int | None = option(
        None,
        "groups of channels that --model vqgan normalises, each together (default: at most 32, of "
        "at least 4 channels of --hidden_size)",
        minimum=1,
        maximum=2**14,
    )
    z_channels: int | None = option(
        None,
        "channels that encoder and decoder of --model vqgan have towards the quantiser, mapped to "
        "its own by 1×1 convolutions (default: those of the latents)",
        minimum=1,
        maximum=2**14,
    )
    in_channels: int = option(
        1, "image channels, set by the data set", minimum=1, maximum=1024, flag=False
    )

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            unread = item.name in QUANTIZER_FLAGS - self.kind.reads
            if unread and value != self.kind.default(item.name):
                raise ValueError(
                    f"--{item.name} {value} has no effect with --quantizer {self.quantizer}"
                )
            if item.name in NETWORK_FLAGS - self.network.own and value != item.default:
                raise ValueError(f"--{item.name} {value} has no effect with --model {self.model}")
        if self.latent_norm == "unit" and self.embedding_dim == 1:
            raise ValueError("--latent_norm unit makes ±1 of all units of --embedding_dim 1")
        for check in (*self.network.checks, *self.kind.checks):
            check(self)

    @property
    def network(self) -> Network:
        """What is known of the network."""
        return NETWORKS[self.model]

    @property
    def downsampling(self) -> int:
        """The side of an image, in positions of the latents' one."""
        return self.network.downsampling(self)

    @property
    def kind(self) -> Kind:
        """What is known of the quantiser."""
        return QUANTIZERS[self.quantizer]

    @property
    def channels(self) -> int:
        """Channels C of the quantiser's input; by default one unit's where it takes no more."""
        if self.latent_channels is not None:
            return self.latent_channels
        return self.hidden_size if self.kind.any_channels else self.embedding_dim

    @property
    def num_groups(self) -> int:
        """Groups of a normalisation."""
        return self.norm_groups or default_groups(self.hidden_size)

    @property
    def num_slots(self) -> int:
        """Indices m of a position."""
        return self.kind.slots(self)

    @property
    def num_codebooks(self) -> int:
        """1 where all slots share a codebook, m where each has its own, 0 where there is none."""
        return self.kind.codebooks(self)
