"""The quantisers: one file or folder and one line of the registry each."""
