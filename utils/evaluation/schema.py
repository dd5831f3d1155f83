"""analysis.json and metrics.json as dataclasses, with the label and format of each figure."""

from __future__ import annotations

import json
import math
import types
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from utils.errors import UserError, one_line
from utils.files import write_json
from utils.flags.command import Command

Content = TypeVar("Content")


@dataclass(frozen=True)
class Figure:
    """Label, decimals, unit and better direction of a number that is shown."""

    label: str
    decimals: int = 4
    unit: str = ""
    better: Literal["", "lower", "higher", "nearer 0"] = ""
    note: str = ""  # its definition

    @property
    def title(self) -> str:
        """The label with the unit: PSNR (dB)."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    @property
    def direction(self) -> str:
        return f"{self.better} is better" if self.better else ""

    def format(self, value: float | None) -> str:
        """The number alone; a dash if it is not known."""
        if value is None or math.isnan(value):
            return "–"
        if math.isinf(value):
            return "∞" if value > 0 else "-∞"
        return f"{value:.{self.decimals}f}"

    def text(self, value: float | None) -> str:
        """The number with its unit."""
        return f"{self.format(value)} {self.unit}".rstrip()


def figure(label: str, note: str, decimals: int = 3, unit: str = "") -> Any:
    """Declare a field whose value is a figure; None if it is not known."""
    return field(default=None, metadata={"figure": Figure(label, decimals, unit, note=note)})


def figures(group: type) -> dict[str, Figure]:
    """The figures declared in the fields of a dataclass, by name."""
    return {f.name: f.metadata["figure"] for f in fields(group) if "figure" in f.metadata}


def rows(group: Rate | CodebookUse, **endings: str) -> dict[str, str]:
    """Label → value, with its ending, of the figures that are known."""
    found = {}
    for name, shown in figures(type(group)).items():
        value = getattr(group, name)
        if value is not None:
            found[shown.label] = shown.text(value) + endings.get(name, "")
    return found


@dataclass(frozen=True)
class Rate:
    """Size of the codes of an image; empty without a quantiser."""

    codes_per_image: float | None = figure("codes per image", "positions × unit slots", 0)
    nominal_bits_per_pixel: float | None = figure("bits per pixel, nominal", "log2 K bits per code")
    entropy_bits_per_pixel: float | None = figure(
        "bits per pixel, entropy", "ideal entropy coder with one frequency table"
    )
    entropy_bits_per_pixel_by_slot: float | None = figure(
        "bits per pixel, entropy by slot", "the same with one frequency table per unit slot"
    )
    coded_bytes: int | None = None  # with test.py --save_codes
    coded_bits_per_pixel: float | None = figure(
        "bits per pixel, coded", "size of the file that --save_codes wrote"
    )
    coded_tables: int | None = None

    def __bool__(self) -> bool:
        return self.codes_per_image is not None

    def rows(self) -> dict[str, str]:
        """Label → value of the headline's figures that are known."""
        tables = self.coded_tables
        plural = "" if tables == 1 else "s"
        ending = "" if tables is None else f" (with {tables} frequency table{plural})"
        return rows(self.headline(), coded_bits_per_pixel=ending)

    def headline(self) -> Rate:
        """The figures that accompany those of quality."""
        details = ("entropy_bits_per_pixel_by_slot", "coded_bytes", "coded_tables")
        return replace(self, **dict.fromkeys(details))


@dataclass(frozen=True)
class CodebookUse:
    """Usage of the codevectors over all images; without a quantiser only the images are known."""

    images: int | None = None
    codevectors: int | None = None
    usage_percent: float | None = figure(
        "codebook usage", "share of codevectors that are used at all", 1, "%"
    )
    perplexity: float | None = figure(
        "perplexity", "2 to the entropy of the usage, at most the codevectors", 1
    )
    slots: int | None = None
    slot_usage_percent: list[float] | None = None  # (m)
    slot_perplexity: list[float] | None = None  # (m)
    counts: list[int] | None = None  # (K), or (m·K) if each slot has its own codebook
    slot_counts: list[list[int]] | None = None  # (m, K)
    slots_per_codevector: list[int] | None = None  # (K)

    def rows(self) -> dict[str, str]:
        """Label → value of the figures that are known."""
        ending = "" if self.codevectors is None else f" of {self.codevectors}"
        return rows(self, perplexity=ending)


RATES, CODEBOOK = figures(Rate), figures(CodebookUse)


@dataclass(frozen=True)
class SkippedImages:
    """Images that could not be decoded."""

    count: int = 0
    names: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """Content of analysis.json, written by test.py."""

    images: str = ""  # those that were reconstructed, in words
    command: Command | None = None
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    image_format: str = "png"
    rate: Rate
    codebook: CodebookUse = CodebookUse()
    skipped_images: SkippedImages = SkippedImages()
    sources: dict[str, str] = field(default_factory=dict)  # name of a picture → path of its image


@dataclass(frozen=True)
class Score:
    """Mean and population variance over n images (KID: over subsets); None if there is none.

    n of two sets without pairs is that of the smaller one.

    Identical images, whose PSNR is infinite, are counted, not averaged. FID, precision and recall
    of the whole set are a mean without variance.
    """

    mean: float | None
    variance: float | None = None
    n: int = 0
    identical: int = 0

    @property
    def shown(self) -> float | None:
        """The mean; infinite if all images are identical."""
        return math.inf if self.mean is None and self.identical else self.mean


@dataclass(frozen=True)
class Metrics:
    """Content of metrics.json, written by evaluation.py."""

    metrics: dict[str, Score] = field(default_factory=dict)
    pairs: int = 0
    skipped: dict[str, str] = field(default_factory=dict)  # name → reason
    rate: Rate | None = None  # None: the reconstructions are not test.py's
    command: Command | None = None
    protocol: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, dict[str, str]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)  # --unpaired: of gt_path and g_path

    @property
    def compared(self) -> str:
        """The images in words."""
        if not self.images:
            return f"{self.pairs:,}"
        return f"{self.images['g_path']:,} against {self.images['gt_path']:,}"


def write(path: Path, content: Analysis | Metrics) -> None:
    """Write a file, without the unknown figures of rate and codebook."""
    whole = asdict(content)
    for name in ("rate", "codebook"):
        if whole.get(name) is not None:
            whole[name] = {key: value for key, value in whole[name].items() if value is not None}
    write_json(path, whole)


def read(path: Path, schema: type[Content]) -> Content:
    """Read a file; unknown keys are ignored, missing ones have their defaults, as in older files.

    Raises FileNotFoundError, or UserError naming file and value if a type is wrong.
    """
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")), schema)  # type: ignore[no-any-return]
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {one_line(error)[:200]}") from error


KINDS = {dict: "an object", list: "a list", str: "text", int: "a whole number", float: "a number"}


def parse(value: Any, kind: Any, place: str = "") -> Any:
    """Convert a value of JSON to this type. Raises ValueError naming its place if it cannot."""
    if kind is Any:
        return value
    if isinstance(kind, types.UnionType):  # X | None
        return None if value is None else parse(value, get_args(kind)[0], place)
    if is_dataclass(kind):
        values, hints = parse(value, dict[str, Any], place), get_type_hints(kind)
        known: dict[str, Any] = {}
        for item in fields(kind):
            if item.name in values:
                own = values[item.name]
                known[item.name] = parse(own, hints[item.name], f"{place}.{item.name}")
            elif item.default is item.default_factory is MISSING:
                raise ValueError(f"{place[1:] or 'it'} lacks {item.name}")
        make: Any = kind
        return make(**known)
    base, inner = get_origin(kind) or kind, get_args(kind)
    right = isinstance(value, (int, float) if base is float else base)
    if not right or isinstance(value, bool) or (base is float and not math.isfinite(value)):
        raise ValueError(f"{place[1:] or 'it'} is {json.dumps(value)[:40]}, not {KINDS[base]}")
    if base is dict:
        return {name: parse(own, inner[1], f"{place}.{name}") for name, own in value.items()}
    if base is list:
        return [parse(own, inner[0], place) for own in value]
    return base(value)
