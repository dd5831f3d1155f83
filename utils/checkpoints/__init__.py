"""Checkpoints: written, read without executing anything, translated from other projects."""
