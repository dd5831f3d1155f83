"""Weights of the networks behind LPIPS and FID."""
