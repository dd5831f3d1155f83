"""Flags of the codevector search."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from modules import Autoencoder, LooCQuantizer
from modules.options import option
from modules.quantizers.looc.search import SEARCHES, faiss_installed
from utils.errors import UserError
from utils.packages import need


@dataclass(frozen=True)
class SearchConfig:
    """Backend of the codevector search: affects speed and memory, not results."""

    search: str = option(
        "auto", "backend of the search (auto: the fastest installed)", choices=("auto", *SEARCHES)
    )
    search_memory: int | None = option(
        None, "MiB of similarities at a time (default: 4, on CUDA 256)", minimum=1, maximum=2**20
    )


def apply_search(config: SearchConfig, model: Autoencoder, device: torch.device) -> None:
    """Set the model's search. Raises UserError if it cannot run here or the model has no search."""
    if not isinstance(model.quantizer, LooCQuantizer):
        quantizer = f"--quantizer {model.config.quantizer}"
        for name, value in asdict(config).items():
            if value != getattr(SearchConfig, name):
                raise UserError(f"--{name} {value} has no effect with {quantizer}")
        return
    if config.search == "faiss":
        if not faiss_installed():
            raise UserError("--search faiss: faiss is not installed (pip install faiss-cpu)")
        if device.type != "cpu":
            raise UserError(f"--search faiss runs on the CPU, not on --device {device}")
        need("faiss", "--search faiss")
    model.quantizer.search = config.search
    model.quantizer.search_memory = config.search_memory
