"""One table of what test.py and evaluation.py found, and where everything lies.

python -m utils.summary <output_folder> <model_name>
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    output, model_name = Path(sys.argv[1]), sys.argv[2]
    results = output / "results" / model_name
    analysis = json.loads((results / "analysis.json").read_text())
    metrics = json.loads((results / "metrics.json").read_text())["metrics"]
    sys.stdout.write("\n".join([*table(analysis, metrics), "", *paths(output, model_name)]) + "\n")


if __name__ == "__main__":
    main()
