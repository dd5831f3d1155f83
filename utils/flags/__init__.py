"""Command-line flags: parsing, presets, recipes, and their tables in the documentation."""
