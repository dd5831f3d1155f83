"""Text and tables of the page: lead, key figures, configuration and commands."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from modules.quantizers.registry import QUANTIZER_FLAGS, QUANTIZERS
from modules.quantizers.spec import QuantizerSpec
from utils.evaluation.metrics import FID_ENOUGH, METRICS, Metric
from utils.evaluation.schema import CODEBOOK, RATES
from utils.report.files import Found, evaluation_command, finite, stale, test_command, train_command
from utils.report.markup import Missing, Rows, command, shown, table, text


def lead(found: Found) -> str:
    """Model, images, quality and rate in two sentences."""
    model, data, spec = found.analysis.model, found.analysis.data, spec_of(found)
    quantizer = spec.label if spec else "a vector-quantised autoencoder"
    if {"num_embedding", "embedding_dim"} <= model.keys() and quantised(found):
        quantizer += f" (K = {model['num_embedding']}, d = {model['embedding_dim']})"
    images = found.analysis.codebook.images or found.metrics.pairs
    what = f"{shown(images)} images" if images else "Images"
    source = f" of {data['dataset']}" if "dataset" in data else ""
    content = f"{what}{source}, encoded and reconstructed by {quantizer}."
    quality = ", ".join(f"{label} {value}" for label, value, _ in quality_rows(found)[:3])
    rate = best_rate(found)
    if not quantised(found):
        content += f" {quality}." if quality else ""
        content += " Latents are not quantised: there is no rate, and quality is an upper bound."
    elif rate and quality:
        content += f" {quality}, at {rate}."
    elif rate:
        content += f" It costs {rate}; quality is not measured yet."
    return f'<p class="lead">{text(content)}</p>'


def spec_of(found: Found) -> QuantizerSpec | None:
    """The spec of the quantiser."""
    return QUANTIZERS.get(str(found.analysis.model.get("quantizer")))


def quantised(found: Found) -> bool:
    """Return whether latents are quantised, as far as that is known."""
    return found.analysis.model.get("quantizer") != "none"


def best_rate(found: Found) -> str:
    """Coded bits per pixel, or their entropy, relative to the raw image."""
    rate, raw = found.analysis.rate, raw_bits(found)
    for key in ("coded", "entropy"):
        name = f"{key}_bits_per_pixel"
        bits = getattr(rate, name)
        if bits is not None:
            times = f"{bits / raw:.2g} times the raw image's {raw}"
            return f"{RATES[name].format(bits)} bits per pixel ({key}; {times})"
    return ""


def raw_bits(found: Found) -> int:
    channels = found.analysis.model.get("in_channels")
    return 8 * channels if isinstance(channels, int) and channels > 0 else 24


def quality_rows(found: Found) -> list[tuple[str, str, str]]:
    """(label, mean, note) of every metric, the known ones first."""
    scores = found.metrics.metrics
    order = ["psnr", "ssim", "lpips", "l1", *METRICS]
    rows = []
    for name in sorted(scores, key=lambda name: order.index(name) if name in order else len(order)):
        score, metric = scores[name], METRICS.get(name, Metric(name))
        notes = [metric.direction] if metric.direction else []
        if score.variance is not None:
            spread = "between subsets" if metric.network == "inception" else "from image to image"
            notes.append(f"± {metric.format(math.sqrt(max(score.variance, 0)))} {spread}")
        if score.identical:
            notes.append(f"without {score.identical} identical pairs, of infinite {metric.label}")
        if name == "fid" and score.n < FID_ENOUGH:
            notes.append(f"of {score.n} images, too few to compare with others")
        rows.append((metric.label, metric.text(score.shown), "; ".join(notes)))
    return rows


def protocol_row(found: Found) -> list[tuple[str, str, str]]:
    """(label, name, what it is) of the protocol, if it is known."""
    protocol = found.metrics.protocol
    name, about = protocol.get("name"), protocol.get("about", "")
    return [("protocol", str(name), str(about))] if name else []


def key_figures(found: Found) -> str:
    writers = {
        "analysis.json": ("Rate and codebook", "test.py writes it", test_command(found)),
        "metrics.json": ("Quality", "evaluation.py measures it", evaluation_command(found)),
    }
    gaps = "".join(
        f'<div class="missing">{what}: unknown, {name} {text(found.problems[name])}. '
        f"{how}:{command(line)}</div>"
        for name, (what, how, line) in writers.items()
        if name in found.problems
    )
    codebook, data = found.analysis.codebook, found.analysis.data
    notes = {figure.label: figure.note for figure in CODEBOOK.values()}
    rates = []
    for name, figure in RATES.items():
        value, note = getattr(found.analysis.rate, name), figure.note
        if value is not None:
            if "bits_per_pixel" in name:
                raw = raw_bits(found)
                note += f"; {value / raw:.3g} times the raw {raw} bits"
            rates.append((figure.label, figure.text(value), note))
    if not quantised(found):
        rates = [("rate", "not quantised", "latents are numbers of 32 bits each")]
    whole = {"train": "of the training set", "all": "all of the data set"}
    part = whole.get(str(data.get("data_split")), "of the test set")
    skipped, size = found.analysis.skipped_images.count, data.get("image_size")
    if data and "image_size" not in data:
        part = "whole, each in its own size"
    groups: dict[str, Rows] = {
        "Quality": [*quality_rows(found), *protocol_row(found)],
        "Rate": rates,
        "Codebook": [(label, value, notes[label]) for label, value in codebook.rows().items()],
        "Images": [
            ("data set", data.get("dataset", "–"), f"{size}×{size} pixels" if size else ""),
            ("images", shown(codebook.images), part),
            *([("skipped", shown(skipped), "could not be decoded")] if skipped else []),
        ],
        "Training": trained(found),
    }
    if "analysis.json" in found.problems:
        groups = {group: groups[group] for group in ("Quality", "Training")}
    header, groups = ("figure", "value", "note"), {k: rows for k, rows in groups.items() if rows}
    content = table("Quality and what it costs", header, groups, "figures")
    return (
        "<p>Compare quality only at equal rate. <b>Bad:</b> a rate above that of the raw image "
        "(which needs no model), or a nominal rate far above the entropy: codevectors are used "
        f"unequally.</p>{gaps}{content}"
    )


def trained(found: Found) -> list[tuple[str, str, str]]:
    """Steps, epochs, seed and best score of the checkpoint."""
    if found.checkpoint is None:
        return [("steps", "–", f"the checkpoint {found.problems.get('the checkpoint', '')}")]
    content, config = found.checkpoint.content, found.stored("train_config")
    best, on_test = content.get("best"), config.get("validation") == "test"
    images = "the test images, which is too optimistic" if on_test else "images held out"
    score, value = METRICS["psnr"], float(best) if finite(best) else None
    l1 = found.checkpoint.model_config.model == "vqgan"
    if l1 or found.stored("objective_config").get("perceptual_weight"):  # minus this sum
        label = "L1 + LPIPS" if l1 else "MSE / variance + LPIPS"
        score, value = Metric(label), None if value is None else -value
    return [
        ("steps", shown(content.get("step")), f"{shown(content.get('epoch'))} whole epochs"),
        ("seed", f"{config.get('seed', '–')}", ""),
        ("training images", shown(content.get("num_images")), ""),
        (f"best validation {score.label}", score.text(value), f"on {images}"),
    ]


def flattened(mapping: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    """Names and values; names in inner mappings are joined by a dot."""
    rows: list[tuple[str, str]] = []
    for name, value in mapping.items():
        if isinstance(value, Mapping):
            rows += flattened(value, f"{before}{name}.")
        else:
            rows.append((f"{before}{name}", "–" if value is None else str(value)[:300]))
    return rows


def configuration(found: Found) -> str:
    spec = spec_of(found)
    unread = QUANTIZER_FLAGS - spec.reads if spec else set()
    groups = {
        "Model": {k: value for k, value in found.analysis.model.items() if k not in unread},
        "Test images": found.analysis.data,
        "Training": found.stored("train_config"),
        "Objective": found.stored("objective_config"),
        "Training images": found.stored("data_config"),
        "Evaluation": found.metrics.settings,
        "Protocol": found.metrics.protocol,
        "Network weights": found.metrics.weights,
    }
    tables = [
        table(name, ("setting", "value"), {"": flattened(group)}, "flags")
        for name, group in groups.items()
        if group
    ]
    if not tables:
        raise Missing("Neither analysis.json nor metrics.json can be read.")
    flow = f'<div class="flow">{"".join(tables)}</div>'
    if found.sets_only:
        return f"<p>Everything that was set.</p>{flow}"
    without = "" if found.checkpoint else " The settings of training are not known."
    return (
        f"{stale(found)}<p>Everything that was set.{without} <b>Bad:</b> test images of another "
        f"data set or size than the training images, unless that is the question.</p>{flow}"
    )


def commands(found: Found) -> str:
    known = "These train, reconstruct and measure again, as they were given."
    lines = [train_command(found), test_command(found), evaluation_command(found)]
    if found.sets_only:
        return f"<p>This measures again.</p>{command(lines[2])}"
    if not lines[0]:
        known = "The checkpoint does not say how it was trained."
    return f"<p>{known}</p>{command(*filter(None, lines))}"
