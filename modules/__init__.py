"""LooC's quantiser for your own models, and the models of its repository.

LooCQuantizer: the quantiser, for latents of any rank. LooCPlugin: the same in a VQGAN. adapters:
the same in further projects. load_model: an autoencoder from its checkpoint or exported folder, or
a trained one by its name.

Needs torch only. Optional: diffusers for VQGAN, vector-quantize-pytorch for the other quantisers,
NumPy for the plug-in's remap files.
"""
# ruff: noqa: F401

from . import adapters
from .autoencoder import Autoencoder
from .checkpoint import load_model
from .config import ModelConfig
from .discriminator import PatchDiscriminator
from .quantizers.identity import NoQuantizer
from .quantizers.library import LibraryQuantizer
from .quantizers.looc import LooCPlugin, LooCQuantizer, Quantized
from .quantizers.spec import Quantizer
from .registry import make_model
from .vqgan import VQGAN
from .vqvae import VQVAE

__all__ = ["LooCPlugin", "LooCQuantizer", "Quantized", "adapters", "load_model"]
