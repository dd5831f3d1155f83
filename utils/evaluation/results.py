"""What evaluation.py leaves in the output folder, and the rate that belongs to it."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.errors import one_line
from utils.evaluation.metrics import METRICS, Summary
from utils.evaluation.pairs import first_few
from utils.evaluation.scores import Scores
from utils.files import whole_file
from utils.logger import log

PREVIOUS = "previous_metrics"
RATES = {
    "codes_per_image": "codes per image",
    "nominal_bits_per_pixel": "bits per pixel, nominal",
    "entropy_bits_per_pixel": "bits per pixel, entropy",
    "coded_bits_per_pixel": "bits per pixel, coded",  # where test.py --save_codes has written them
}


def set_aside(output: Path) -> None:
    """Move the results of an earlier run to previous_metrics/: they are no longer current.

    Left-overs of a run that ended while writing, without metrics.json, are removed.
    """
    whole = (output / "metrics.json").exists()
    previous = output / PREVIOUS
    if whole:
        shutil.rmtree(previous, ignore_errors=True)
        previous.mkdir()
    for path in own_files(output):
        if whole:
            path.rename(previous / path.name)
        else:
            path.unlink()
    report = output / "report.html"
    if whole and report.exists():  # which tells of them
        report.rename(previous / report.name)


def own_files(output: Path) -> list[Path]:
    """What evaluation.py has written there."""
    names = ["metrics.json", "metrics.csv", *(f"worst_{metric}.png" for metric in METRICS)]
    return [output / name for name in names if (output / name).is_file()]


def remove_results(output: Path) -> None:
    """Remove the results of all earlier runs: the pictures they tell of are replaced."""
    for path in own_files(output):
        path.unlink()
    remove_previous(output)


def remove_previous(output: Path) -> None:
    """Remove what was set aside, once its successor is there."""
    shutil.rmtree(output / PREVIOUS, ignore_errors=True)


def write_csv(path: Path, scores: Scores) -> None:
    """A header, then the name and the values of each pair."""
    columns = [name for name in METRICS if name in scores.values]
    with (
        whole_file(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["name", *columns])
        for index, pair in enumerate(scores.names):
            writer.writerow([pair, *(scores.values[name][index] for name in columns)])


def rate_of(reconstructions: Path) -> Mapping[str, float] | None:
    """The rate in the analysis.json beside test.py's folder rec, by the keys of RATES, or None."""
    folder = reconstructions.resolve()
    file = folder.parent / "analysis.json"
    if folder.name != "rec" or not file.is_file():
        return None
    try:
        stored: Any = json.loads(file.read_text())["rate"]
        return {name: float(stored[name]) for name in RATES if name in stored}
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s has no rate: %s", file, one_line(error))
        return None


def show(content: Mapping[str, Any], summaries: Mapping[str, Summary], written: list[Path]) -> None:
    """Print the table, with the rate where it is known, and the paths of what was written."""
    skipped = content["skipped"]
    if skipped:
        log.warning(
            "left out %d of %d pairs, which cannot be decoded: %s",
            *(len(skipped), len(skipped) + content["pairs"], first_few(list(skipped))),
        )
    sys.stdout.write(f"{'metric':10} {'mean':>12} {'variance':>12}\n")
    for name, summary in summaries.items():
        mean = "inf" if summary.mean is None else f"{summary.mean:.6g}"
        variance = "-" if summary.variance is None else f"{summary.variance:.6g}"
        metric = METRICS[name]
        sys.stdout.write(f"{metric.label:10} {mean:>12} {variance:>12}  {metric.direction}\n")
    for name, summary in summaries.items():
        if summary.identical:
            sys.stdout.write(
                f"{summary.identical} identical pairs, of infinite {METRICS[name].label}, "
                "are left out of its mean\n"
            )
    for name, value in (content["rate"] or {}).items():
        sys.stdout.write(f"{RATES[name]:24} {value:.6g}\n")
    for path in written:
        sys.stdout.write(f"{path}\n")
