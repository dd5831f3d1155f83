"""One table of what test.py and evaluation.py found, and where everything lies.

python -m utils.report.summary <output_folder> <model_name>
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modules.quantizers.registry import QUANTIZERS
from utils.errors import UserError, one_line, run
from utils.evaluation.metrics import METRICS

LABELS = {
    "checkpoint": "models/{name}",
    "originals": "results/{name}/original",
    "reconstructions": "results/{name}/rec",
    "side by side": "results/{name}/reconstructions.png",
    "report": "results/{name}/report.html",
    "codebook plots": "results/{name}/{{usage,slots,codebook}}.png",
    "TensorBoard": "logs/{experiment}",
}


def main() -> None:
    if len(sys.argv) != 3:
        raise UserError("usage: python -m utils.report.summary <output_folder> <model_name>")
    output, name = Path(sys.argv[1]), sys.argv[2]
    results = output / "results" / name
    try:
        analysis = json.loads((results / "analysis.json").read_text())
        metrics = json.loads((results / "metrics.json").read_text())
        rows = table(analysis, metrics)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{results} has no whole results: {one_line(error)}") from error
    lines = [f"{label:26} {value}" for label, value in rows.items()]
    places = [
        f"{label:26} {output / place.format(name=name, experiment=Path(name).parent)}"
        for label, place in LABELS.items()
    ]
    sys.stdout.write("\n" + "\n".join([*lines, "", *places]) + "\n")


def table(analysis: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, str]:
    """Quality with its rate, by label."""
    model, data = analysis["model"], analysis["data"]
    rate, codebook = analysis["rate"], analysis["codebook"]
    quality = {
        METRICS[name].label: "infinite" if score["mean"] is None else f"{score['mean']:.4f}"
        for name, score in metrics["metrics"].items()
    }
    images = f"{metrics['pairs']} test images of {data['dataset']}"
    if not rate:
        name = QUANTIZERS[model["quantizer"]].label
        return {"model": name, "images": images, **quality, "rate": "not quantised"}
    return {
        "model": "{quantizer}, K = {num_embedding}, d = {embedding_dim}".format(**model),
        "images": images,
        **quality,
        "codes per image": f"{rate['codes_per_image']}",
        "bits per pixel, nominal": f"{rate['nominal_bits_per_pixel']:.3f}",
        "bits per pixel, entropy": f"{rate['entropy_bits_per_pixel']:.3f}",
        **(
            {"bits per pixel, coded": f"{rate['coded_bits_per_pixel']:.3f}"}
            if "coded_bytes" in rate
            else {}
        ),
        "codebook usage": f"{codebook['usage_percent']:.1f} %",
        "perplexity": f"{codebook['perplexity']:.1f} of {len(codebook['counts'])}",
    }


if __name__ == "__main__":
    run(main)
