"""The quantisers by the name of --quantizer."""

from __future__ import annotations

from . import identity, library, looc_family, lookup_free
from .spec import QuantizerSpec

QUANTIZERS: dict[str, QuantizerSpec] = {
    "looc": looc_family.LOOC,
    "cvq": looc_family.CVQ,
    "vq": looc_family.VQ,
    "none": identity.NONE,
    "ema-vq": library.EMA_VQ,
    "cosine-vq": library.COSINE_VQ,
    "multihead-vq": library.MULTIHEAD_VQ,
    "product-vq": library.PRODUCT_VQ,
    "residual-vq": library.RESIDUAL_VQ,
    "fsq": lookup_free.FSQ,
    "lfq": lookup_free.LFQ,
    "sim-vq": library.SIM_VQ,
}
QUANTIZER_FLAGS = frozenset[str]().union(*(spec.reads for spec in QUANTIZERS.values()))
