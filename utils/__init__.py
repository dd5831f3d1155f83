"""Shared parts of the scripts: flags, checkpoints, training, metrics, pictures."""
