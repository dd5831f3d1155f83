"""Public name of `load_model`, for programs outside this repository."""

from utils.checkpoints.checkpoint import load_model  # noqa: F401
