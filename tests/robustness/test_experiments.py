"""A comparison of models from end to end, and one that is stopped."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from experiments.contenders import SUITES
from tests.conftest import ROOT, run_process
from utils.checkpoints.checkpoint import read_checkpoint


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


def test_a_killed_suite_ends_as_one_that_ran_through(tmp_path: Path) -> None:
    """SIGKILL, then a budget that is too small, then the rest: the same weights and figures."""
    script = str(ROOT / "experiments" / "compare.py")
    words = [script, "--suite", "smoke", "--only", "looc-m4", "--steps", "400"]
    words += ["--threads", "1", "--weights_dir", str(tmp_path)]
    assert run_process([*words, "--output", "through"], tmp_path).code == 0
    words += ["--output", "killed"]
    models = tmp_path / "killed" / "smoke" / "models"
    with subprocess.Popen([sys.executable, *words], cwd=tmp_path) as suite:
        while not list((tmp_path / "killed/smoke/logs").glob("*/events*")):
            time.sleep(0.1)
        suite.kill()
    while not list(models.glob("*/last.pt")):  # its child saves what it has
        time.sleep(0.1)
    outcome = run_process([*words, "--budget", "0"], tmp_path)
    assert outcome.code == 0
    assert "missing: results 1, trainings 1, core-hours ?" in outcome.err
    page = (tmp_path / "killed/docs/compare-smoke-missing.md").read_text()
    assert "| looc-m4 | 400 | 1 | ? |" in page
    assert run_process(words, tmp_path).code == 0
    assert not (tmp_path / "killed/docs/compare-smoke-missing.md").exists()
    (run,) = models.iterdir()
    contents = []
    for name in ("through", "killed"):
        best = tmp_path / name / "smoke" / "models" / run.name / "best.pt"
        content = json.loads((tmp_path / name / "docs" / "compare-smoke-400.json").read_text())
        figures = content["rows"][0]["figures"]
        weights = read_checkpoint(best).content["model"]
        contents.append(
            (weights, {k: v for k, v in figures.items() if k not in ("step", "core_hours")})
        )
    assert contents[0][1] == contents[1][1]
    assert all(torch.equal(x, contents[1][0][name]) for name, x in contents[0][0].items())


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
