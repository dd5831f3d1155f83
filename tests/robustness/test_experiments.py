"""A comparison of models from end to end, and one that is stopped."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

from experiments.contenders import SUITES
from tests.conftest import ROOT, run_process


def test_the_smoke_suite_from_end_to_end(tmp_path: Path) -> None:
    command = [str(ROOT / "experiments" / "compare.py"), "--suite", "smoke", "--jobs", "2"]
    outcome = run_process([*command, "--weights_dir", str(tmp_path)], tmp_path)
    assert outcome.code == 0, outcome.err
    content = json.loads(
        (tmp_path / "output" / "compare" / "docs" / "compare-smoke-60.json").read_text()
    )
    figures = {row["name"]: row["figures"] for row in content["rows"]}
    assert set(figures) == {contender.name for contender in SUITES["smoke"]}
    assert all(math.isfinite(values["psnr"][0]) for values in figures.values())
    assert (tmp_path / "output" / "compare" / "docs" / "compare-smoke-60-psnr.png").exists()


def test_a_signal_ends_the_children_and_the_same_command_goes_on(tmp_path: Path) -> None:
    command = [str(ROOT / "experiments" / "compare.py"), "--suite", "smoke", "--only", "looc-m4"]
    words = [sys.executable, *command, "--steps", "100000"]
    with subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as parent:
        logs = tmp_path / "output" / "compare" / "smoke" / "logs"
        while not list(logs.glob("*/events*")):
            assert parent.poll() is None
            time.sleep(0.2)
        time.sleep(2)
        parent.send_signal(signal.SIGTERM)
        _, errors = parent.communicate()
    assert parent.returncode == 143
    assert errors.strip().endswith("compare.py: interrupted; the same command continues")
    assert len(list(tmp_path.glob("output/compare/smoke/models/*/last.pt"))) == 1
