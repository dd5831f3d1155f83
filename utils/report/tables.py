"""What the page tells in words: the lead, key figures, the configuration and the commands."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from modules.config import ModelConfig
from modules.quantizers.registry import QUANTIZER_FLAGS, QUANTIZERS
from modules.quantizers.spec import QuantizerSpec
from utils.evaluation.metrics import FID_ENOUGH, METRICS
from utils.report.files import Found, evaluation_command, finite, joined, part, stale, test_command
from utils.report.markup import Missing, Rows, command, shown, table, text

OF_SETS = ("kid", "precision", "recall")  # metrics that may lie beside the others
RATES = {
    "codes_per_image": ("codes per image", "positions × unit slots"),
    "nominal_bits_per_pixel": ("bits per pixel, nominal", "log2 K bits a code"),
    "entropy_bits_per_pixel": (
        "bits per pixel, entropy",
        "an ideal entropy coder with one table of frequencies",
    ),
    "entropy_bits_per_pixel_by_slot": (
        "bits per pixel, entropy by slot",
        "the same with one table a unit slot",
    ),
    "coded_bits_per_pixel": ("bits per pixel, coded", "files as an entropy coder wrote them"),
}


def lead(found: Found) -> str:
    """What this is, and quality with its rate, in two sentences."""
    model, data = part(found.analysis, "model"), part(found.analysis, "data")
    spec = spec_of(found)
    quantizer = spec.label if spec else "a vector-quantised autoencoder"
    size = (
        f" (K = {model['num_embedding']}, d = {model['embedding_dim']})"
        if {"num_embedding", "embedding_dim"} <= model.keys() and quantised(found)
        else ""
    )
    images = part(found.analysis, "codebook").get("images", found.metrics.get("pairs"))
    what = f"{shown(images)} images" if finite(images) else "Images"
    source = f" of {data['dataset']}" if "dataset" in data else ""
    quality = [f"{label} {value}" for label, value, *_ in quality_rows(found)][:3]
    content = f"{what}{source}, encoded and reconstructed by {quantizer}{size}."
    rate = best_rate(found)
    if not quantised(found):
        content += f" {', '.join(quality)}." if quality else ""
        content += " Latents are not quantised: there is no rate, and quality is an upper bound."
    elif quality and rate:
        content += f" {', '.join(quality)}, at {rate}."
    elif rate:
        content += f" It costs {rate}; quality is not measured yet."
    return f'<p class="lead">{text(content)}</p>'


def spec_of(found: Found) -> QuantizerSpec | None:
    """The spec of the quantiser."""
    return QUANTIZERS.get(str(part(found.analysis, "model").get("quantizer")))


def quantised(found: Found) -> bool:
    """Whether latents are quantised, as far as that is known."""
    return part(found.analysis, "model").get("quantizer") != "none"


def best_rate(found: Found) -> str:
    """Bits per pixel as coded, else their entropy, beside those of the raw image."""
    rate, raw = part(found.analysis, "rate"), raw_bits(found)
    for key, words in (("coded", "coded"), ("entropy", "entropy")):
        bits = rate.get(f"{key}_bits_per_pixel")
        if finite(bits):
            times = f"{bits / raw:.2g} times the raw image's {raw}"
            return f"{shown(bits)} bits per pixel ({words}; {times})"
    return ""


def raw_bits(found: Found) -> int:
    channels = part(found.analysis, "model").get("in_channels")
    return 8 * channels if isinstance(channels, int) and channels > 0 else 24


def quality_rows(found: Found) -> list[tuple[str, str, str]]:
    """(label, mean, how to read it) of every metric, the known ones first."""
    apart = {key: value for key, value in found.metrics.items() if key in OF_SETS}
    scores = {**apart, **part(found.metrics, "metrics")}
    order = ["psnr", "ssim", "lpips", "l1", *METRICS]
    rows = []
    for name in sorted(scores, key=lambda name: order.index(name) if name in order else len(order)):
        score = scores[name] if isinstance(scores[name], Mapping) else {"mean": scores[name]}
        known = METRICS.get(name)
        label, _, unit = (known.label if known else name).partition(" (")
        mean, variance = score.get("mean"), score.get("variance")
        notes = [known.direction] if known else []
        if finite(variance):
            spread = "between subsets" if name in OF_SETS else "from image to image"
            notes.append(f"± {shown(math.sqrt(max(variance, 0)), 3)} {spread}")
        if score.get("identical"):
            notes.append(f"{score['identical']} identical pairs, of infinite {label}, left out")
        if name == "fid" and finite(score.get("n")) and score["n"] < FID_ENOUGH:
            notes.append(f"of {score['n']} images, too few to compare with others")
        value = "∞" if mean is None and score.get("identical") else shown(mean)
        rows.append((label, f"{value} {unit.rstrip(')')}".strip(), "; ".join(notes)))
    return rows


def protocol_row(found: Found) -> list[tuple[object, object, object]]:
    """How images were prepared for the metrics, if that is known."""
    protocol = part(found.metrics, "protocol")
    name = protocol.get("name")
    return [("protocol", name, protocol.get("about", ""))] if name else []


def key_figures(found: Found) -> str:
    writers = {
        "analysis.json": ("Rate and codebook", "test.py writes it", test_command(found)),
        "metrics.json": ("Quality", "evaluation.py measures it", evaluation_command(found)),
    }
    notes = "".join(
        f'<div class="missing">{what} cannot be told: {name} {text(found.problems[name])}. '
        f"{how}:{command(line)}</div>"
        for name, (what, how, line) in writers.items()
        if name in found.problems
    )
    analysis, rate = found.analysis, part(found.analysis, "rate")
    codebook, data = part(analysis, "codebook"), part(analysis, "data")
    rates = []
    for key in (*RATES, *(key for key in rate if key not in RATES)):
        if key in rate:
            label, note = RATES.get(key, (key.replace("_", " "), ""))
            bits = rate[key]
            if "bits_per_pixel" in key and finite(bits):
                note += f"; {bits / raw_bits(found):.3g} times the raw {raw_bits(found)} bits"
            rates.append((label, shown(bits), note))
    if not quantised(found):
        rates = [("rate", "not quantised", "latents are numbers of 32 bits each")]
    skipped = part(analysis, "skipped_images").get("count")
    size = data.get("image_size")
    number = codebook.get("codevectors", part(analysis, "model").get("num_embedding"))
    groups: dict[str, Rows] = {
        "Quality": [*quality_rows(found), *protocol_row(found)],
        "Rate": rates,
        "Codebook": []
        if not quantised(found)
        else [
            ("usage", f"{shown(codebook.get('usage_percent'))} %", "of codevectors used at all"),
            (
                "perplexity",
                shown(codebook.get("perplexity")),
                f"of {shown(number)} codevectors",
            ),
        ],
        "Images": [
            ("data set", data.get("dataset", "–"), f"{size}×{size} pixels" if size else ""),
            ("images", shown(codebook.get("images")), "of the test set"),
            *([("left out", shown(skipped), "could not be decoded")] if skipped else []),
        ],
        "Training": trained(found),
    }

    known = ("Quality", "Training")
    content = table(
        "Quality and what it costs",
        ("figure", "value", "note"),
        {group: rows for group, rows in groups.items() if rows and (analysis or group in known)},
        "figures",
    )
    return (
        "<p>Compare quality only at equal rate. <b>Bad:</b> a rate above that of the raw image "
        "(which needs no model), or a nominal rate far above the entropy: codevectors are used "
        f"unequally.</p>{notes}{content}"
    )


def trained(found: Found) -> list[tuple[str, str, str]]:
    """Steps, epochs and seed of the checkpoint."""
    if found.checkpoint is None:
        return [("steps", "–", f"the checkpoint {found.problems.get('the checkpoint', '')}")]
    content = found.checkpoint.content
    config = part(content, "train_config")
    best, chosen = content.get("best"), config.get("validation", "split")
    merit = ("PSNR", f"{shown(best)} dB")
    if found.checkpoint.model_config.model == "vqgan" and finite(best):
        merit = ("L1 + LPIPS", shown(-float(best)))
    return [
        ("steps", shown(content.get("step")), f"{shown(content.get('epoch'))} whole epochs"),
        ("seed", f"{config.get('seed', '–')}", ""),
        ("training images", shown(content.get("num_images")), ""),
        (
            f"best validation {merit[0]}",
            merit[1],
            "on the test images: it flatters" if chosen == "test" else "on a tenth held out",
        ),
    ]


def flattened(mapping: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    """Names and values; those of inner mappings with a dot."""
    rows: list[tuple[str, str]] = []
    for name, value in mapping.items():
        if isinstance(value, Mapping):
            rows += flattened(value, f"{before}{name}.")
        else:
            rows.append((f"{before}{name}", "–" if value is None else str(value)[:300]))
    return rows


def configuration(found: Found) -> str:
    content = found.checkpoint.content if found.checkpoint else {}
    groups = {
        "Model": model_flags(found),
        "Test images": part(found.analysis, "data"),
        "Training": part(content, "train_config"),
        "Objective": part(content, "objective_config"),
        "Training images": part(content, "data_config"),
        "Evaluation": part(found.metrics, "settings"),
        "Protocol": part(found.metrics, "protocol"),
        "Network weights": part(found.metrics, "weights"),
    }
    settings = {"Evaluation", "Protocol", "Network weights"}
    tables = [
        table(
            *(name, ("setting" if name in settings else "flag", "value")),
            *({"": flattened(group)}, "flags"),
        )
        for name, group in groups.items()
        if group
    ]
    if not tables:
        raise Missing("Neither analysis.json nor metrics.json can be read.")
    without = "" if content else " What training was given is not known here."
    return (
        f"{stale(found)}<p>Everything that was set.{without} <b>Bad:</b> test images of another "
        f"data set or size than the training images, unless that is the question.</p>"
        f'<div class="flow">{"".join(tables)}</div>'
    )


def model_flags(found: Found) -> dict[str, Any]:
    """The model's flags that its quantiser reads."""
    spec = spec_of(found)
    unread = QUANTIZER_FLAGS - spec.reads if spec else set()
    model = part(found.analysis, "model")
    return {name: value for name, value in model.items() if name not in unread}


def commands(found: Found) -> str:
    first = train_command(found)
    known = f"<p>They train, reconstruct and measure anew.</p>{command(first)}" if first else (
        "<p>The checkpoint does not tell how it was trained.</p>"
    )  # fmt: skip
    return known + command(test_command(found), evaluation_command(found))


def train_command(found: Found) -> str:
    """main.py with every flag that is not the default; empty where they are not known."""
    from utils.training.objectives import ObjectiveConfig
    from utils.training.trainer import TrainConfig

    content = found.checkpoint.content if found.checkpoint else {}
    train, data = part(content, "train_config"), part(content, "data_config")
    if found.checkpoint is None or not train:
        return ""
    model = part(found.analysis, "model") or vars(found.checkpoint.model_config)
    spec = QUANTIZERS.get(str(model.get("quantizer")))
    words = ["python", "main.py"]
    for group, base in (
        (data, {}),
        (model, {**defaults(ModelConfig), **(spec.implies if spec else {})}),
        (part(content, "objective_config"), defaults(ObjectiveConfig)),
        (train, defaults(TrainConfig)),
    ):
        for name, value in group.items():
            if value == base.get(name) or name in ("in_channels", "resume", "overwrite"):
                continue
            if value is False and not base:
                continue
            words += (
                [f"--{name}" if value else f"--no-{name}"]
                if isinstance(value, bool)
                else [f"--{name}", str(value)]
            )
    return joined(words)


def defaults(group: type) -> dict[str, Any]:
    return {item.name: item.default for item in fields(group)}
