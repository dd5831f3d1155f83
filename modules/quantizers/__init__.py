"""The quantisers, one file or folder each, and their registry."""
