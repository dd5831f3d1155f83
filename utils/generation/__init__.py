"""Priors on the codes of a first stage: their data, their training and their samples."""
