"""The files that evaluation.py writes, and its lines on the screen."""

from __future__ import annotations

import csv
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from utils.errors import UserError, one_line
from utils.evaluation import metrics, schema
from utils.evaluation.config import EvaluationConfig
from utils.evaluation.extremes import write_extremes
from utils.evaluation.metrics import METRICS
from utils.evaluation.networks import Network
from utils.evaluation.pairs import first_few
from utils.evaluation.protocols import PROTOCOLS
from utils.evaluation.schema import Analysis, Metrics
from utils.evaluation.scores import Scores, summarise
from utils.files import whole_file
from utils.flags.command import Command
from utils.logger import log

PREVIOUS = "previous_metrics"


def set_aside(output: Path) -> None:
    """Move the results of an earlier run, and its report, to previous_metrics/.

    Incomplete results of a run that ended while writing, without metrics.json, are removed.
    """
    if not (output / "metrics.json").exists():
        for path in own_files(output):
            path.unlink()
        return
    previous, report = output / PREVIOUS, output / "report.html"
    shutil.rmtree(previous, ignore_errors=True)
    previous.mkdir()
    for path in [*own_files(output), *([report] if report.exists() else [])]:
        path.rename(previous / path.name)


def own_files(output: Path) -> list[Path]:
    """Files that evaluation.py has written there, without the report."""
    names = ["metrics.json", "metrics.csv", *(f"worst_{metric}.png" for metric in METRICS)]
    return [output / name for name in names if (output / name).is_file()]


def write_results(
    output: Path,
    config: EvaluationConfig,
    scores: Scores,
    content: Metrics,
    tested: Analysis | None,
) -> list[Path]:
    """Write pictures and metrics.csv, if there are pairs, and metrics.json; returns the paths."""
    table, whole = output / "metrics.csv", output / "metrics.json"
    written = [whole]
    if scores.names:
        measured = Path(config.gt_path), Path(config.g_path)
        pictures = write_extremes(output, scores.names, scores.values, scores.shown, measured)
        write_table(table, scores, tested)
        written = [*pictures, whole, table]
    schema.write(whole, content)  # last: it marks the results as complete
    shutil.rmtree(output / PREVIOUS, ignore_errors=True)
    return written


def write_table(table: Path, scores: Scores, tested: Analysis | None) -> None:
    """Write metrics.csv, with the source of each image if the analysis knows it."""
    columns: dict[str, Sequence[float | str]]
    columns = {name: scores.values[name] for name in METRICS if name in scores.values}
    if tested and tested.sources:
        columns["source"] = [tested.sources.get(name, "") for name in scores.names]
    with (
        whole_file(table) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["name", *columns])
        writer.writerows(zip(scores.names, *columns.values()))


def record(
    config: EvaluationConfig,
    command: Command,
    scores: Scores,
    networks: Mapping[str, Network],
    tested: Analysis | None,
) -> Metrics:
    """The results, and everything needed to reproduce them."""
    protocol = PROTOCOLS[config.protocol]
    return Metrics(
        metrics=summarise(config.metrics, scores),
        pairs=len(scores.names),
        images=scores.images if config.unpaired else {},
        skipped=scores.skipped,
        rate=tested.rate.headline() if tested else None,
        command=command,
        protocol={"name": config.protocol, **asdict(protocol)},
        settings={
            **{name: getattr(config, name) for name in ("gt_path", "g_path", "num_test")},
            **metrics.settings(scores.number),
            "ssim": {"window": metrics.SSIM_WINDOW, **protocol.ssim},
            "lpips_net": config.lpips_net,
        },
        weights={
            choice: {"file": str(networks[name].path), "sha256": networks[name].sha256}
            for choice, name in config.networks.items()
        },
        versions=metrics.versions(),
    )


def analysis_of(reconstructions: Path) -> Analysis | None:
    """The analysis.json beside test.py's folder rec; None if there is none."""
    folder = reconstructions.resolve()
    file = folder.parent / "analysis.json"
    if folder.name != "rec" or not file.is_file():
        return None
    try:
        return schema.read(file, Analysis)
    except (OSError, UserError) as error:
        log.warning("%s has no rate: %s", file, one_line(error))
        return None


def show(content: Metrics, written: list[Path]) -> None:
    """Print the metrics, the rate if it is known, and the paths of the files."""
    skipped = content.skipped
    if skipped:
        log.warning(
            "skipped %d of %d %s, which cannot be decoded: %s",
            *(len(skipped), len(skipped) + (content.pairs or sum(content.images.values()))),
            *("images" if content.images else "pairs", first_few(list(skipped))),
        )
    lines, notes = [f"{'metric':10} {'mean':>12} {'variance':>12}"], []
    for name, score in content.metrics.items():
        metric = METRICS[name]
        variance = "–" if score.variance is None else f"{score.variance:.4g}"
        mean = metric.format(score.shown)
        lines.append(f"{metric.title:10} {mean:>12} {variance:>12}  {metric.direction}")
        if score.identical:
            infinite = f"{score.identical} identical pairs, of infinite {metric.label}"
            notes.append(f"{infinite}, are excluded from its mean")
    sys.stdout.writelines(f"{line}\n" for line in [*lines, *notes])
    print_rows({"images": content.compared} if content.images else {})
    print_rows(content.rate.rows() if content.rate else {}, written)


def print_rows(rows: Mapping[str, str], paths: Iterable[object] = ()) -> None:
    """Print labels with their values, then paths."""
    for label, value in rows.items():
        sys.stdout.write(f"{label:24} {value}\n")
    for path in paths:
        sys.stdout.write(f"{path}\n")
