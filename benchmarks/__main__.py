"""Measure speed and memory against peers: python -m benchmarks.

Writes docs/results/benchmarks.md, .json and .png.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from benchmarks import evaluation, quantizer, training
from benchmarks.measure import SEED, printed
from utils.devices import keep_freed_memory
from utils.errors import run
from utils.files import write_json
from utils.flags.arguments import Parser
from utils.tables import machine, machine_line, write_page

PARTS = {
    "quantizer": quantizer.tables,
    "training": training.tables,
    "evaluation": evaluation.tables,
}
ABOUT = """\
Made by `make bench`. Seconds are medians, in brackets the least and the most; contenders
take turns in one process."""
SCALING = """\
### How the cost grows

![Seconds against batch, K, d and interpolation scale](benchmarks.png)"""


def main() -> None:
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("parts", nargs="*", metavar="|".join(PARTS), help="default: all")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="folder of pages")
    arguments = parser.parse_args()
    keep_freed_memory()
    parts = arguments.parts or PARTS
    tables = printed(table for part in parts for table in PARTS[part](arguments.quick))
    page, about = arguments.output / "benchmarks.md", {**machine(), "seed": SEED}
    curves = {} if arguments.quick else quantizer.scaling(page.with_suffix(".png"))
    write_page(
        page, "Benchmarks", ABOUT, f"{machine_line(about, f'seed {SEED}')}.", *tables, SCALING
    )
    content = {"machine": about, "tables": [asdict(table) for table in tables], "curves": curves}
    write_json(page.with_suffix(".json"), content)


if __name__ == "__main__":
    run(main)
