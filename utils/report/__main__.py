"""The command python -m utils.report <results folder>."""

from __future__ import annotations

import sys
from pathlib import Path

from utils.errors import UserError, run
from utils.report import write_report


def main() -> None:
    if len(sys.argv) != 2:
        raise UserError("usage: python -m utils.report <results folder>")
    results = Path(sys.argv[1])
    made_of = (results / "analysis.json", results / "metrics.json")
    if results.is_dir() and not any(path.exists() for path in made_of):
        raise UserError(f"{results} holds neither analysis.json nor metrics.json")
    sys.stdout.write(f"{write_report(results)}\n")


if __name__ == "__main__":
    sys.argv[0] = "utils.report"  # names the command in messages, not __main__.py
    run(main)
