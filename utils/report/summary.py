"""Print one table of the results of test.py and evaluation.py, and the places of all files.

python -m utils.report.summary <output_folder> <model_name>
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
        analysis = schema.read(results / "analysis.json", Analysis)
        metrics = schema.read(results / "metrics.json", Metrics)
    except FileNotFoundError as error:
        raise UserError(f"{results} has no complete results: {one_line(error)}") from error
    places = {
        label: str(output / place.format(name=name, experiment=Path(name).parent))
        for label, place in LABELS.items()
    }
    for rows in (table(analysis, metrics), places):
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
        "images": f"{metrics.pairs} test images of {analysis.data.get('dataset')}",
        **{
            METRICS[name].label: METRICS[name].text(score.shown)
            for name, score in metrics.metrics.items()
            if name in METRICS
        },
        **(rate.rows() | analysis.codebook.rows() if rate else {"rate": "not quantised"}),
    }


if __name__ == "__main__":
    run(main)
