"""The models: LooC's quantiser and others, the networks around them, and their configuration.

Needs torch only. Optional: diffusers for VQGAN, vector-quantize-pytorch for the other quantisers,
NumPy for the plug-in's remap files.
"""
# ruff: noqa: F401

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
