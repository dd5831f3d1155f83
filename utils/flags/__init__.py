"""Command line: flags declared as dataclass fields, recipes, presets, and their tables."""
