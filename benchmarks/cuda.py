"""Measure the quantiser and the training step on a GPU: python -m benchmarks.cuda.

Writes docs/results/cuda.md. Dense code, a library and LooC take turns in one process. main.py uses
deterministic algorithms; the tables say where they are used here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure import SEED, Times, interleaved, peak_megabytes
from benchmarks.quantizer import SETTINGS, SHAPE, contenders
from benchmarks.training import UNQUANTISED, compiled, epoch_table, make, some_images, ways
from utils.devices import resolve_device, seed_everything
from utils.errors import UserError, run
from utils.files import writable_folder
from utils.flags.arguments import Parser
from utils.tables import Table, machine, machine_line, write_page

ROUNDS = 30
BATCH = 1024


def main() -> None:
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--docs", type=Path, default=Path("docs/results"), help="folder of pages")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    if device.type != "cuda":
        raise UserError(f"--device {device}: python -m benchmarks measures what runs on the CPU")
    docs, tables = writable_folder(arguments.docs, "--docs"), []
    for measure in (quantizer_table, step_table, epoch_table, compiled_table):
        tables.append(measure(device))
        write(docs, tables)  # so that an interrupted run leaves a page


def quantizer_table(device: torch.device) -> Table:
    names = ["ours", "ours, deterministic", "ours, not compiled", "dense", "library"]
    peaks = ["ours", "dense", "library"]
    table = Table(
        f"Quantiser, forward and backward, z {SHAPE}: milliseconds, and MB above its input",
        [*("K", "d", *names, "dense / ours", "library / ours"), *(f"{name}, MB" for name in peaks)],
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
    return table_of_steps("Training step", ways, device)


def compiled_table(device: torch.device) -> Table:
    """The last table, as compiling may fail."""

    def runs(images: Tensor) -> dict[str, Callable[[], object]]:
        return {"no quantiser": make(UNQUANTISED, images), **compiled(images)}

    return table_of_steps("Compiled training step", runs, device)


def table_of_steps(
    title: str, make_runs: Callable[[Tensor], dict[str, Callable[[], object]]], device: torch.device
) -> Table:
    """Times and memory of steps by deterministic algorithms, as in main.py."""
    seed_everything(SEED, device)
    runs = make_runs(some_images(BATCH).to(device))
    table = Table(
        f"{title}, {BATCH} images of 28×28, K = 256, d = 4",
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


def write(docs: Path, tables: Sequence[Table]) -> None:
    made = (
        f"Made by `{' '.join(['python -m benchmarks.cuda', *sys.argv[1:]])}`: medians,\n"
        "in brackets the least and the most; contenders take turns in one process."
    )
    line = machine_line(machine(), f"seed {SEED}")
    write_page(docs / "cuda.md", "On a GPU", made, f"{line}.", *tables)


if __name__ == "__main__":
    run(main)
