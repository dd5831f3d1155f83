"""Codebooks: statistics of their use, plots, and entropy-coded indices."""
