"""LooC: compositional vector quantisation with one small codebook of low dimension.

This folder works when copied alone into another project. It needs torch only; faiss is used where
it is installed, and numpy where the plug-in reads a remap file.

Li, Wong, Han, "LooC: Effective Low-Dimensional Codebook for Compositional Vector Quantization",
WACV 2026 (arXiv 2601.00222). The online re-initialisation is from Zheng and Vedaldi, "Online
Clustered Codebook", ICCV 2023 (arXiv 2307.15139).

Symbols, in all files: B images of C channels and H × W positions; β interpolation scale;
K codevectors of dimension d; m units per position; N = B·H·W·m features (all units of a batch);
λ commitment weight; γ decay of the usage average.

    quantizer.py    LooCQuantizer: forward, encode, decode, update
    units.py        extrapolation, split of channels into units
    norms.py        normalisation of the latents
    distances.py    cosine and l2, in blocks of bounded memory
    search.py       most similar codevector of each feature: faiss, compiled kernel, torch
    gradients.py    straight-through or rotation gradient, the loss of the codebook
    contrastive.py  contrastive loss
    usage.py        usage average, re-initialisation rate, bits per code
    anchors.py      features that dead codevectors move to
    starts.py       first codebook
    updates.py      statistics of a step, codebook as moving average
    counting.py     counts and sums per codevector
    ranks.py        several processes
    checks.py       checks of arguments
    tracing.py      exclusion from torch.compile
    plugin.py       LooCPlugin, for VQGAN, latent diffusion and diffusers
"""

from .plugin import LooCPlugin
from .quantizer import LooCQuantizer, Quantized

__all__ = ["LooCPlugin", "LooCQuantizer", "Quantized"]
