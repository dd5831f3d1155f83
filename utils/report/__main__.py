"""The command python -m utils.report <results folder>."""

from __future__ import annotations

import sys
from pathlib import Path

from utils.errors import UserError, run
from utils.report import write_report


def main() -> None:
    if len(sys.argv) != 2:
        raise UserError("usage: python -m utils.report <results folder>")
    sys.stdout.write(f"{write_report(Path(sys.argv[1]))}\n")


if __name__ == "__main__":
    sys.argv[0] = "utils.report"  # names the command in messages, not __main__.py
    run(main)
