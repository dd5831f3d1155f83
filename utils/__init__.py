"""What the scripts share: flags, checkpoints, training, metrics, pictures."""
