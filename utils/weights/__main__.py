"""The command python -m utils.weights <metric> [<folder>].

It prints the metric if the weights of its default network are there.
"""

import sys

from modules.options import unknown_name
from utils.errors import UserError, run
from utils.weights.registry import METRIC_WEIGHTS, WEIGHTS, find, weights_folder


def main() -> None:
    if len(sys.argv) not in (2, 3):
        raise UserError("usage: python -m utils.weights <metric> [<folder>]")
    metric, *folder = sys.argv[1:]
    if metric not in METRIC_WEIGHTS:
        raise UserError(unknown_name("metric", metric, METRIC_WEIGHTS))
    if find(WEIGHTS[METRIC_WEIGHTS[metric]], weights_folder(*folder)) is not None:
        sys.stdout.write(f"{metric}\n")


if __name__ == "__main__":
    sys.argv[0] = "utils.weights"  # names the command in messages, not __main__.py
    run(main)
