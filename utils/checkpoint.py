"""`load_model`, under the name that programs outside this repository import it by."""

from utils.checkpoints.checkpoint import load_model

__all__ = ["load_model"]
