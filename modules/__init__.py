"""The models: LooC's quantiser and its peers, the networks around them, and their configuration.

Needs torch alone; VQGAN needs diffusers besides, peers vector-quantize-pytorch, the plug-in's remap
files numpy.
"""

from modules.autoencoder import Autoencoder
from modules.config import ModelConfig
from modules.discriminator import PatchDiscriminator
from modules.quantizers.library import NoQuantizer, PeerQuantizer
from modules.quantizers.looc.plugin import LooCPlugin
from modules.quantizers.looc.quantizer import LooCQuantizer, Quantized
from modules.registry import make_model
from modules.vqgan import VQGAN
from modules.vqvae import VQVAE

__all__ = [
    "VQGAN",
    "VQVAE",
    "Autoencoder",
    "LooCPlugin",
    "LooCQuantizer",
    "ModelConfig",
    "NoQuantizer",
    "PatchDiscriminator",
    "PeerQuantizer",
    "Quantized",
    "make_model",
]
