"""The files of a results folder, what belongs to them, and the commands that write them."""

from __future__ import annotations

import csv
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from modules import pretrained
from utils.checkpoints.checkpoint import Checkpoint, read_checkpoint
from utils.errors import one_line
from utils.evaluation.extremes import Shown
from utils.evaluation.schema import Analysis, Metrics, Rate, parse, read
from utils.flags.command import Command, words
from utils.image_files import image_names
from utils.report.markup import Missing, command, text

Point = tuple[float, float]


@dataclass(frozen=True)
class Found:
    """Content of the results folder and what belongs to it, as far as it can be read."""

    results: Path
    logs: Path | None
    analysis: Analysis
    metrics: Metrics
    values: Mapping[str, Mapping[str, float]]  # name → metric → value
    curves: Mapping[str, Sequence[Point]]  # scalar → (step, value)
    checkpoint: Checkpoint | None
    pairs: Mapping[str, tuple[Path, Path]]  # name → both pictures
    problems: Mapping[str, str]  # what could not be read, and why
    kept: dict[str, Shown]  # pairs that were read, by name

    @property
    def sets_only(self) -> bool:
        """Return whether these are two sets without a model, as samples are."""
        return bool(self.metrics.images) and "analysis.json" in self.problems

    def need(self, name: str, command: str) -> None:
        """Raise Missing if that could not be read."""
        if name in self.problems:
            raise Missing(f"{text(name)} {text(self.problems[name])}. {command}")

    def stored(self, key: str) -> Mapping[str, Any]:
        """Return what the checkpoint holds under a key; empty if that is no mapping."""
        value = self.checkpoint.content.get(key) if self.checkpoint else None
        return value if isinstance(value, Mapping) else {}


def find(results: Path, kept: Mapping[str, Shown] | None = None) -> Found:
    """Read everything; problems say what cannot be read, and why."""
    problems: dict[str, str] = {}

    def attempt(name: str, read: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return read()
        except Missing as gap:
            problems[name] = str(gap)
        except FileNotFoundError:
            problems[name] = "is not there"
        except Exception as error:  # as varied as the damage
            problems[name] = f"cannot be read: {one_line(error)[:200]}"
        return otherwise

    model, logs, empty = None, None, Analysis(rate=Rate())
    if place := layout(results):
        output, name = place
        model, logs = output / "models" / name, output / "logs" / Path(name).parent
        if not model.is_file():
            other = Path("/", name)  # a checkpoint elsewhere
            model = pretrained.find(name.removesuffix(".pt")) or other
    metrics = attempt("metrics.json", lambda: read(results / "metrics.json", Metrics), Metrics())
    values = attempt("metrics.csv", lambda: read_values(results / "metrics.csv"), {})
    return Found(
        results,
        logs,
        attempt("analysis.json", lambda: read(results / "analysis.json", Analysis), empty),
        metrics,
        values,
        attempt("TensorBoard's folder", lambda: read_curves(logs), {}),
        attempt("the checkpoint", lambda: read_model(model), None),
        attempt("the pair of original/ and rec/", lambda: find_pairs(results, metrics, values), {}),
        problems,
        dict(kept or {}),
    )


def layout(results: Path) -> tuple[Path, str] | None:
    """Return the output folder and the checkpoint's name; None for a folder elsewhere."""
    place = results.resolve().parent  # results/<model_name without .pt>/<data set>
    folder = next((folder for folder in place.parents if folder.name == "results"), None)
    return (folder.parent, f"{place.relative_to(folder)}.pt") if folder else None


def read_values(path: Path) -> dict[str, dict[str, float]]:
    """Read the metrics of each pair, by name."""
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return {
            row["name"]: {
                metric: float(value)
                for metric, value in row.items()
                if metric not in ("name", "source")
            }
            for row in csv.DictReader(file)
        }


def read_model(path: Path | None) -> Checkpoint:
    if path is None or not path.is_file():
        raise Missing("is neither in models/ beside results/ nor elsewhere")
    return read_checkpoint(path)


def read_curves(folder: Path | None) -> dict[str, list[Point]]:
    """Read TensorBoard's scalars, without those of an interrupted run after its last checkpoint."""
    if folder is None or not any(folder.glob("events.out.tfevents.*")):
        raise Missing("has no event files")
    from tensorboard.backend.event_processing import event_accumulator as events

    few = dict.fromkeys(events.DEFAULT_SIZE_GUIDANCE, 1)
    board = events.EventAccumulator(str(folder), {**few, events.SCALARS: 0})
    board.Reload()
    return {
        name: [(item.step, item.value) for item in board.Scalars(name) if finite(item.value)]
        for name in board.Tags()[events.SCALARS]
    }


def find_pairs(
    results: Path, metrics: Metrics, values: Mapping[str, Any]
) -> dict[str, tuple[Path, Path]]:
    """Original and reconstruction by name without suffix: those measured, or those here."""
    settings = metrics.settings
    measured = [Path(str(settings.get(key) or "-")) for key in ("gt_path", "g_path")]
    own = [results / "original", results / "rec"]
    paired = not metrics.images and all(folder.is_dir() for folder in measured)
    originals, others = (
        {name[: name.rindex(".")]: folder / name for name in image_names(folder)}
        for folder in (measured if paired else own)
    )
    names = originals.keys() & others
    names = names & values.keys() or names
    return {name: (originals[name], others[name]) for name in sorted(names)}


def finite(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and math.isfinite(value)


def stale(found: Found) -> str:
    """A warning if the checkpoint is newer than the results."""
    results = found.results / "analysis.json"
    if found.checkpoint is None or not results.exists():
        return ""
    if found.checkpoint.path.stat().st_mtime <= results.stat().st_mtime:
        return ""
    return (
        '<div class="missing"><p>The checkpoint is newer than these results, which are of an '
        f"earlier one. Run test.py again:</p>{command(test_command(found))}</div>"
    )


def train_command(found: Found) -> str:
    """The command that was given; empty if it is not known."""
    stored = found.stored("command")
    return parse(stored, Command).line() if stored else ""


def test_command(found: Found) -> str:
    """The command that was given; if it is not known, that for the model's own data set."""
    if found.analysis.command:
        return found.analysis.command.line()
    if place := layout(found.results):
        flags = dict(zip(("output_folder", "model_name"), place))
        return shlex.join(["python", "test.py", *words(flags)])
    return "python test.py --output_folder <output_folder> --model_name <experiment>/best.pt"


def evaluation_command(found: Found) -> str:
    """The command that was given; if it is not known, that with all metrics without weights."""
    if found.metrics.command:
        return found.metrics.command.line()
    folders = (str((found.results / name).resolve()) for name in ("original", "rec"))
    flags = dict(zip(("gt_path", "g_path"), folders), metrics=["l1", "ssim", "psnr"])
    return shlex.join(["python", "evaluation.py", *words(flags)])
