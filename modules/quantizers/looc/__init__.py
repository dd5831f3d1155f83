"""LooC: a folder that works when copied alone into another project; needs torch only."""
