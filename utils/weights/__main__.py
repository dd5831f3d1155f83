"""The command python -m utils.weights <metric> [<folder>]."""

import sys

from utils.errors import run
from utils.weights.sources import main

if __name__ == "__main__":
    sys.argv[0] = "utils.weights"  # names the command in messages, not __main__.py
    run(main)
