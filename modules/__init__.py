"""The model: LooC's quantiser, the VQ-VAE around it, and their configuration. Needs torch alone."""

from modules.config import ModelConfig
from modules.quantizer import LooCQuantizer, Quantized
from modules.vqvae import VQVAE

__all__ = ["VQVAE", "LooCQuantizer", "ModelConfig", "Quantized"]
