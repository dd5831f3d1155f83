"""LooC: compositional vector quantisation with one small codebook of low dimension.

This folder works when copied alone into another project. It needs torch only; faiss is used where
it is installed, and numpy where the plug-in reads a remap file.

Li, Wong, Han, "LooC: Effective Low-Dimensional Codebook for Compositional Vector Quantization",
WACV 2026 (arXiv 2601.00222). The online re-initialisation is from Zheng and Vedaldi, "Online
Clustered Codebook", ICCV 2023 (arXiv 2307.15139).

Symbols, in all files: B images of C channels and H × W positions; β interpolation scale;
K codevectors of dimension d; m units per position; N = B·H·W·m features (all units of a batch);
λ commitment weight; γ decay of the usage average.

quantizer.py has the whole method, whose steps are in the other files: units, norms, search, losses,
usage, anchors. plugin.py puts it into models of other projects.
"""

from .plugin import LooCPlugin
from .quantizer import LooCQuantizer, Quantized

__all__ = ["LooCPlugin", "LooCQuantizer", "Quantized"]
