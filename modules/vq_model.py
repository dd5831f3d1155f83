"""LooC in diffusers' VQModel: needs diffusers."""
# mypy: disable-error-code="attr-defined, no-untyped-call, misc"

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from diffusers import VQModel

from .quantizers.looc import LooCPlugin

ARGUMENTS = inspect.signature(VQModel.__init__)
LOOC = inspect.Parameter("looc", inspect.Parameter.KEYWORD_ONLY, default=None)


class LooCVQModel(VQModel):
    """VQModel whose quantiser is LooCPlugin; save_pretrained and from_pretrained keep its settings.

    Args:
        settings: arguments of VQModel.
        looc: further arguments of LooCPlugin, which config.json stores. Give them to
            from_pretrained for a folder of VQModel, whose codebook is replaced by a new one.
    """

    def __init__(self, *, looc: Mapping[str, Any] | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        vq = self.config
        channels = vq.latent_channels if vq.vq_embed_dim is None else vq.vq_embed_dim
        self.quantize = LooCPlugin(
            **{"n_e": vq.num_vq_embeddings, "e_dim": channels, **(looc or {})}
        )
        self.register_to_config(looc=self.quantize.config)

    # from_pretrained takes those arguments from config.json that are named here.
    __init__.__signature__ = ARGUMENTS.replace(parameters=[*ARGUMENTS.parameters.values(), LOOC])
