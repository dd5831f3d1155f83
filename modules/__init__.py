"""The model: LooC's quantiser and its peers, the VQ-VAE around them, and their configuration.

Needs torch alone; peers need vector-quantize-pytorch besides, the plug-in's remap files numpy.
"""

from modules.config import ModelConfig
from modules.peers import NoQuantizer, PeerQuantizer
from modules.plugin import LooCPlugin
from modules.quantizer import LooCQuantizer, Quantized
from modules.vqvae import VQVAE

__all__ = [
    "VQVAE",
    "LooCPlugin",
    "LooCQuantizer",
    "ModelConfig",
    "NoQuantizer",
    "PeerQuantizer",
    "Quantized",
]
