"""Measure everything; write docs/results/benchmarks.md, .json and .png: python -m benchmarks."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks import evaluation, quantizer, training
from benchmarks.common import Table, machine
from utils.devices import keep_freed_memory
from utils.files import whole_file, write_json

PARTS = {
    "quantizer": quantizer.tables,
    "training": training.tables,
    "evaluation": evaluation.tables,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="|".join(PARTS), help="default: all")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    parser.add_argument("--output", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    keep_freed_memory()
    tables: list[Table] = []
    for part in arguments.parts or PARTS:
        for table in PARTS[part](arguments.quick):
            sys.stdout.write(table.markdown() + "\n")
            sys.stdout.flush()
            tables.append(table)
    curves = {} if arguments.quick else quantizer.scaling(arguments.output / "benchmarks.png")
    write(arguments.output, tables, curves)


def write(output: Path, tables: list[Table], curves: object) -> None:
    """The tables in Markdown and JSON, with the machine."""
    about = machine()
    lines = [
        "# Benchmarks",
        "",
        "Made by `make bench`. Seconds are medians, in brackets the least and the most; contenders",
        "take turns in one process.",
        "",
        f"{about['processor']}, {about['cores']} cores, Python {about['python']}, seed "
        f"{about['seed']}; "
        + ", ".join(f"{name} {number}" for name, number in about["versions"].items())
        + ".",
        "",
        *(table.markdown() for table in tables),
        "### How the cost grows",
        "",
        "![Seconds against batch, K, d and interpolation scale](benchmarks.png)",
    ]
    with whole_file(output / "benchmarks.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    content = {"machine": about, "tables": [asdict(table) for table in tables], "curves": curves}
    write_json(output / "benchmarks.json", content)


if __name__ == "__main__":
    main()
