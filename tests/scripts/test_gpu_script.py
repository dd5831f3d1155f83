"""The script for a GPU, with a stand-in for Python that notes its commands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest

from datasets import DATASETS
from tests.conftest import ROOT, Outcome

ACCEPTED = re.compile(r"--(model_name|gt_path) .*(does not exist|cannot be read)")


class Script:
    """benchmarks/gpu.sh; the stand-in fails for commands that hold a word."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.notes = folder / "gpu", folder / "notes"
        self.python = folder / "python"

    def run(self, failing: str = "nothing", **environment: str) -> tuple[int, str, list[str]]:
        """Return exit code, output and the commands that were called."""
        self.notes.write_text("")
        self.python.write_text(
            f'#!/bin/sh\nflock {self.notes} sh -c \'echo "$*" >> {self.notes}\' x "$@"\n'
            f'case "$*" in *"{failing}"*) echo broken; exit 3;; esac\n'
        )
        self.python.chmod(0o755)
        words = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), str(self.folder)]
        whole = {**os.environ, "PYTHON": str(self.python), **environment}
        ended = subprocess.run(words, env=whole, capture_output=True, text=True, check=False)
        assert ended.stderr == ""
        return ended.returncode, ended.stdout, self.notes.read_text().splitlines()


@pytest.fixture
def gpu(tmp_path: Path) -> Script:
    return Script(tmp_path)


def test_parts_are_done_once_in_their_order(gpu: Script) -> None:
    code, out, calls = gpu.run(failing="cuda")
    assert code == 1
    assert "benchmarks: failed with 3: broken\n" in out
    assert out.endswith("left: benchmarks\n")
    assert calls[0].startswith("-m pytest")
    assert calls[1].startswith("-m benchmarks.cuda")
    assert len(calls) == 2 + 5 * 4  # train, test and two protocols
    assert "--exp_name photos " in calls[-4]
    for kind, count in (("main.py", 5), ("test.py", 5), ("--protocol reference", 5)):
        assert sum(kind in call for call in calls) == count
    code, out, calls = gpu.run()
    assert (code, len(calls)) == (0, 1)
    assert gpu.run() == (0, "", [])


def test_a_training_that_stopped_goes_on(gpu: Script) -> None:
    gpu.run(failing="main.py")
    code, out, calls = gpu.run(LIMIT="0")
    assert (code, calls) == (1, [])
    assert "photos: no time was left" in out
    _, _, calls = gpu.run(TRIAL="--max_steps 2 --device cpu")
    trainings = [call for call in calls if call.startswith("main.py")]
    assert len(trainings) == 5
    assert all(call.endswith(" --max_steps 2 --device cpu") for call in trainings)


def test_the_scripts_accept_the_flags(
    gpu: Script, script: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    def reached(*_: object) -> NoReturn:
        raise SystemExit(77)

    for name, entry in DATASETS.items():
        monkeypatch.setitem(DATASETS, name, replace(entry, open=reached))
    _, _, calls = gpu.run()
    for call in calls:
        if not call.startswith("-m"):
            outcome = script(*shlex.split(call))
            assert outcome.code == 77 or ACCEPTED.search(outcome.err), (call, outcome.err)
