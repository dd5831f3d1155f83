"""The quantiser and the training step on a GPU: python -m benchmarks.cuda writes docs/cuda.md.

Against dense code and a library, in one process, contenders taking turns. main.py has algorithms
chosen whose sums have one order; the tables say where that is so.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from benchmarks.common import SEED, Table, Times, interleaved, machine, peak_megabytes
from benchmarks.quantizer import SETTINGS, SHAPE, contenders
from benchmarks.training import epoch_table, some_images, ways
from utils.devices import resolve_device, seed_everything
from utils.errors import UserError, run
from utils.files import whole_file, writable_folder
from utils.flags.arguments import Parser

ROUNDS = 30
BATCH = 1024


def main() -> None:
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    if device.type != "cuda":
        raise UserError(f"--device {device}: python -m benchmarks measures what runs on the CPU")
    docs, tables = writable_folder(arguments.docs, "--docs"), []
    for measure in (quantizer_table, step_table, epoch_table):
        tables.append(measure(device))
        write(docs, tables)


def quantizer_table(device: torch.device) -> Table:
    names = ["ours", "ours, deterministic", "dense", "library"]
    peaks = ["ours", "dense", "library"]
    table = Table(
        f"Quantiser, forward and backward, z {SHAPE}: milliseconds, and MB above its input",
        [
            *("K", "d", *names, "dense / ours", "library / ours"),
            *(f"{name}, MB" for name in peaks),
        ],
    )
    for num_embedding, dim in SETTINGS:
        torch.compiler.reset()  # PyTorch compiles one function for eight shapes at most
        runs = contenders(num_embedding, dim, device)
        times = interleaved(runs, ROUNDS)
        memory = {name: f"{peak_megabytes(call):.0f}" for name, call in runs.items()}
        ours = times["ours"].median
        table.rows.append(
            [
                *(num_embedding, dim),
                *(milliseconds(times[name]) if name in times else "–" for name in names),
                *(times[n].median / ours if n in times else "–" for n in ("dense", "library")),
                *(memory.get(name, "–") for name in peaks),
            ]
        )
    return table


def step_table(device: torch.device) -> Table:
    """With the algorithms that main.py has chosen."""
    seed_everything(SEED, device)
    runs = ways(some_images(BATCH).to(device))
    table = Table(
        f"Training step, {BATCH} images of 28×28, K = 256, d = 4",
        ["", "milliseconds", "ratio to no quantiser", "images/s", "MB above weights"],
    )
    times = interleaved(runs, ROUNDS)
    for name, value in times.items():
        ratio, speed = value.median / times["no quantiser"].median, f"{BATCH / value.median:,.0f}"
        peak = f"{peak_megabytes(runs[name]):.0f}"
        table.rows.append([name, milliseconds(value), ratio, speed, peak])
    return table


def milliseconds(times: Times) -> Times:
    return Times(*(1e3 * value for value in (times.median, times.least, times.most)))


def write(docs: Path, tables: list[Table]) -> None:
    about = machine()
    versions = about["versions"]
    lines = [
        "# On a GPU",
        "",
        f"Made by `python -m benchmarks.cuda{''.join(' ' + word for word in sys.argv[1:])}`: "
        "medians, in brackets the least and the most;",
        "contenders take turns in one process.",
        "",
        f"{about['device']}, {about['processor']}, {about['cores']} cores, Python "
        f"{about['python']}, torch {versions['torch']}, vector-quantize-pytorch "
        f"{versions['vector-quantize-pytorch']}, seed {SEED}.",
        "",
        *(table.markdown() for table in tables),
    ]
    with whole_file(docs / "cuda.md") as temporary:
        temporary.write_text("\n".join(lines))


if __name__ == "__main__":
    run(main)
