"""Measure reconstructions against originals, two folders of images; see docs/evaluation.md.

Images are paired by name, without suffix, and compared as a viewer shows them; subfolders count,
hidden files do not. With --unpaired the folders are two sets, of any names and numbers of images.
Writes metrics.json (means, variances, settings), metrics.csv (one line per pair),
worst_<metric>.png (the worst and best pairs) and report.html, by default beside the folder of the
reconstructions. A run that succeeds replaces the results of an earlier one; a run that fails leaves
them in previous_metrics/.
"""

from __future__ import annotations

from utils.start import run  # isort: skip  # before those that take seconds

from importlib import import_module
from pathlib import Path

from utils.devices import keep_freed_memory, resolve_device
from utils.distributed import launched
from utils.errors import UserError, memory_for
from utils.evaluation.config import EvaluationConfig
from utils.evaluation.networks import fetch_weights, load_networks
from utils.evaluation.pairs import find_images, open_entries
from utils.evaluation.results import analysis_of, print_rows, record, set_aside, show, write_results
from utils.evaluation.scores import check_entries, measure
from utils.flags.arguments import build, parse_flags
from utils.flags.command import Command, this_command
from utils.locks import locked
from utils.logger import start_logging
from utils.report import write_report
from utils.report.markup import spread
from utils.report.pictures import NUM_SHOWN


def main() -> None:
    flags = parse_flags(__doc__, EvaluationConfig)
    config = build(EvaluationConfig, flags)
    start_logging()
    if launched():
        raise UserError("it runs as one process; start it without torchrun")
    if config.fetch_weights:
        print_rows({}, fetch_weights(config.weights_dir))
    else:
        evaluate(config, this_command(flags))


def evaluate(config: EvaluationConfig, command: Command) -> None:
    """Measure all images, write everything and report."""
    keep_freed_memory()
    device = resolve_device(config.device)
    if not {"ssim", "psnr", "colour"}.isdisjoint(config.metrics):
        import_module("skimage.metrics")  # workers inherit it, and their errors name no package
        import_module("skimage.color")
    files = find_images(config)
    output = config.output_folder
    with locked(output, "--output"):
        try:
            entries, skipped = open_entries(config, files)
        except UserError:  # earlier results, if any, are of other images
            set_aside(output)
            raise
        check_entries(config, entries, skipped)
        networks = load_networks(config, device)
        set_aside(output)
        named = spread([entry.name for entry in entries], NUM_SHOWN)
        with memory_for(f"--batch_size {config.batch_size}"):
            scores = measure(config, entries, skipped, networks, device, named)
        tested = analysis_of(Path(config.g_path))
        metrics = record(config, command, scores, networks, tested)
        written = write_results(output, config, scores, metrics, tested)
        show(metrics, [*written, write_report(output, kept=scores.shown)])


if __name__ == "__main__":
    run(main)
