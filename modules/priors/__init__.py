"""Priors: models of a first stage's codes or latents, from which new images are drawn."""
