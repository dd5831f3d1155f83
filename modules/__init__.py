"""The models: LooC's quantiser and its peers, the networks around them, and their configuration.

Needs torch alone; VQGAN needs diffusers besides, peers vector-quantize-pytorch, the plug-in's remap
files numpy.
"""

from modules.config import ModelConfig
from modules.discriminator import PatchDiscriminator
from modules.model import Autoencoder
from modules.models import make_model
from modules.peers import NoQuantizer, PeerQuantizer
from modules.plugin import LooCPlugin
from modules.quantizer import LooCQuantizer, Quantized
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
