"""Code files: the indices of a whole image set, entropy-coded, with their frequency tables."""
