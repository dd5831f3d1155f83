"""Evaluation: pairs of images, metrics, and what is written about them."""
