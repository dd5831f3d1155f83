"""The model's hyper-parameters, each declared once: flags, checkpoint and checks come from here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from modules.quantizer import (
    ANCHORS,
    CODEBOOK_UPDATES,
    DISTANCES,
    GRADIENTS,
    LATENT_NORMS,
    SPLITS,
    STARTS,
)

# What each quantiser implies for flags that were not given.
QUANTIZERS: dict[str, dict[str, Any]] = {
    "looc": {},
    "cvq": {},
    "vq": {"distance": "l2", "anchor": "none"},
}


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    aliases: Sequence[str] = (),
    flag: bool = True,
) -> Any:
    """A dataclass field that is also a command-line flag.

    minimum and maximum are inclusive bounds, above an exclusive lower one. A field with flag=False
    is stored in checkpoints but not offered on the command line.
    """
    metadata = {
        "help": help,
        "choices": None if choices is None else tuple(choices),
        "minimum": minimum,
        "above": above,
        "maximum": maximum,
        "aliases": tuple(aliases),
        "flag": flag,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ModelConfig:
    """Everything needed to rebuild the model.

    Raises ValueError, naming the flags and both values, where fields contradict each other.
    """

    quantizer: str = option("looc", "quantiser", choices=tuple(QUANTIZERS))
    num_embedding: int = option(
        256, "codevectors K in the shared codebook", minimum=1, maximum=2**20
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
    latent_channels: int | None = option(
        None,
        "channels of the latents (default: those of --hidden_size for looc, else d)",
        minimum=1,
        maximum=2**14,
    )
    hidden_size: int = option(128, "channels of encoder and decoder", minimum=2, maximum=2**14)
    num_residual_hidden: int = option(
        32, "channels inside a residual block", minimum=1, maximum=2**14
    )
    num_residual_layers: int = option(
        2, "residual blocks in encoder and decoder", minimum=0, maximum=1024
    )
    in_channels: int = option(
        1, "image channels, set by the data set", minimum=1, maximum=1024, flag=False
    )

    def __post_init__(self) -> None:
        if self.hidden_size % 2:
            raise ValueError(
                f"--hidden_size {self.hidden_size} is odd; "
                "the first convolution has half as many channels"
            )
        if self.quantizer == "looc":
            scale = max(self.interpolation_scale, 1)
            if self.channels * scale**2 % self.embedding_dim:
                flag = "--hidden_size" if self.latent_channels is None else "--latent_channels"
                times = f" times {scale}² of --interpolation_scale" if scale > 1 else ""
                raise ValueError(
                    f"--embedding_dim {self.embedding_dim} does not divide "
                    f"the {self.channels} channels of {flag}{times}"
                )
        elif self.interpolation_scale > 1:
            raise ValueError(
                f"--interpolation_scale {self.interpolation_scale} needs --quantizer looc, "
                f"not {self.quantizer}"
            )
        if self.quantizer == "vq" and self.anchor != "none":
            raise ValueError(
                f"--anchor {self.anchor} contradicts --quantizer vq, which has no re-initialisation"
            )

    @property
    def channels(self) -> int:
        """Channels C of the quantiser's input; by default one unit's for CVQ and VQ."""
        if self.latent_channels is not None:
            return self.latent_channels
        return self.hidden_size if self.quantizer == "looc" else self.embedding_dim
