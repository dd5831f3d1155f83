"""Print one table of the results of test.py and evaluation.py, and the places of all files.

python -m utils.report.summary <results folder>
"""

from __future__ import annotations

import sys
from pathlib import Path

from modules.quantizers.registry import QUANTIZERS
from utils.errors import UserError, one_line, run
from utils.evaluation import schema
from utils.evaluation.metrics import METRICS
from utils.evaluation.results import print_rows
from utils.evaluation.schema import Analysis, Metrics
from utils.report.files import layout

FILES = {
    "originals": "original",
    "reconstructions": "rec",
    "side by side": "reconstructions.png",
    "report": "report.html",
    "usage": "usage.png",
    "slots": "slots.png",
    "codebook": "codebook.png",
}


def main() -> None:
    if len(sys.argv) != 2:
        raise UserError("usage: python -m utils.report.summary <results folder>")
    results = Path(sys.argv[1])
    try:
        analysis = schema.read(results / "analysis.json", Analysis)
        metrics = schema.read(results / "metrics.json", Metrics)
    except FileNotFoundError as error:
        raise UserError(f"{results} has no complete results: {one_line(error)}") from error
    places = {label: results / file for label, file in FILES.items()}
    if place := layout(results):
        output, name = place
        places = {"checkpoint": output / "models" / name, **places}
        places["TensorBoard"] = output / "logs" / Path(name).parent
    found = {label: str(path) for label, path in places.items() if path.exists()}
    for rows in (table(analysis, metrics), found):
        sys.stdout.write("\n")
        print_rows(rows)


def table(analysis: Analysis, metrics: Metrics) -> dict[str, str]:
    """Quality with its rate, by label."""
    model, rate = analysis.model, analysis.rate
    kind = str(model.get("quantizer"))
    size = f", K = {model.get('num_embedding')}, d = {model.get('embedding_dim')}"
    label = QUANTIZERS[kind].label if kind in QUANTIZERS else kind
    return {
        "model": f"{kind}{size}" if rate else label,
        "images": f"{metrics.pairs or metrics.compared} images of {analysis.data.get('dataset')}",
        **{
            METRICS[name].label: METRICS[name].text(score.shown)
            for name, score in metrics.metrics.items()
            if name in METRICS
        },
        **(rate.rows() | analysis.codebook.rows() if rate else {"rate": "not quantised"}),
    }


if __name__ == "__main__":
    run(main)
