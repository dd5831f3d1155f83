"""Weights of the metric networks: found, downloaded, rebuilt, checked."""
