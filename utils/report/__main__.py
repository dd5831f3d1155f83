"""The command python -m utils.report <results folder>."""

from __future__ import annotations

import sys
from pathlib import Path

from utils.errors import UserError, run
from utils.report import write_report

MADE_OF = ("analysis.json", "metrics.json")


def main() -> None:
    if len(sys.argv) != 2:
        raise UserError("usage: python -m utils.report <results folder>")
    results = Path(sys.argv[1])
    if results.is_dir() and not any((results / name).exists() for name in MADE_OF):
        raise UserError(f"{results} holds neither {' nor '.join(MADE_OF)}")
    sys.stdout.write(f"{write_report(results)}\n")


if __name__ == "__main__":
    sys.argv[0] = "utils.report"  # names the command in messages, not __main__.py
    run(main)
