"""The priors by the name of --prior."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from . import diffusion
from .sampling import sample
from .spaces import CodeSpace
from .spec import PriorSpec
from .transformer import CodeTransformer

TRANSFORMER = PriorSpec(
    CodeTransformer,
    sample,
    CodeSpace,
    reads=frozenset({"width", "layers", "heads", "depth_layers", "dropout"}),
    draws=frozenset({"temperature", "top_k", "top_p", "guidance"}),
)

PRIORS: dict[str, PriorSpec] = {
    "transformer": TRANSFORMER,
    "masked": replace(
        TRANSFORMER,
        make=partial(CodeTransformer, causal=False),
        draws=TRANSFORMER.draws | {"rounds"},
    ),
    "diffusion": diffusion.SPEC,
}
