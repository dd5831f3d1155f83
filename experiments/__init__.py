"""Experiments on quality: LooC and its peers under one protocol, ablations, photographs."""
