"""The recipes of CONTRIBUTING.md, carried out in a copy of the repository."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, run_process

COPIED = ("main.py", "test.py", "evaluation.py", "modules", "datasets", "utils")
BLOCK = re.compile(r"^```python\n# (\S+)\n(.*?)^```$", re.M | re.S)
ENTRY = re.compile(r"^(.*?)  # in (\w+)$", re.M)
IMPORT = re.compile(r"^(?:from|import) .*\n", re.M)


def apply(path: Path, content: str) -> None:
    """Write a new file, or add imports and registry entries to one that exists."""
    if not path.exists():
        path.write_text(content)
        return
    text = path.read_text()
    first = "from __future__ import annotations\n"
    assert first in text
    text = text.replace(first, first + "".join(IMPORT.findall(content)), 1)
    for entry, registry in ENTRY.findall(content):
        text, number = re.subn(
            rf"^( *{registry}\b.*[{{\[(]\n)", rf"\g<1>{entry}\n", text, count=1, flags=re.M
        )
        assert number == 1, f"{path} has no {registry}"
    path.write_text(text)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this repository to which all recipes were applied."""
    folder = tmp_path_factory.mktemp("repository")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.pyc"))
        else:
            shutil.copy(ROOT / name, folder)
    blocks = BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text())
    assert len(blocks) == 11
    for path, content in blocks:
        apply(folder / path, content)
    return folder


# Runs the scripts of the copy one after another, to import torch once.
PROGRAM = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
for line in sys.argv[2:]:
    sys.argv = line.split()
    runpy.run_path(f"{sys.path[0]}/{sys.argv[0]}", run_name="__main__")
"""
COMMANDS = (
    "line.py",
    "main.py --dataset noise --quantizer sign --hidden_size 4 --num_residual_hidden 2 "
    "--batch_size 16 --max_steps 2 --exp_name new --device cpu --edge_weight 0.1",
    "test.py --model_name new/best.pt --save_codes --device cpu",
    "evaluation.py --metrics worst --gt_path output/results/new/best/noise/original "
    "--g_path output/results/new/best/noise/rec --num_workers 0",
)


def test_the_recipes_work(repository: Path, tmp_path: Path) -> None:
    outcome = run_process(["-c", PROGRAM, str(repository), *COMMANDS], tmp_path)
    assert outcome.code == 0, outcome.err
    results = tmp_path / "output/results/new/best/noise"
    checkpoint = torch.load(tmp_path / "output/models/new/last.pt")
    assert checkpoint["objective_config"]["edge_weight"] == 0.1
    line = torch.load(tmp_path / "output/models/line/best.pt")["model"]
    assert abs(line["weight"].item() - 3) < 0.05
    assert abs(line["bias"].item() - 1) < 0.05

    analysis = json.loads((results / "analysis.json").read_text())
    assert analysis["model"]["quantizer"] == "sign"
    assert analysis["data"]["dataset"] == "noise"
    assert analysis["rate"]["nominal_bits_per_pixel"] == 4 * 4 * 4 / 16**2  # one bit per channel

    assert "Worst pixel" in outcome.out
    assert 0 < json.loads((results / "metrics.json").read_text())["metrics"]["worst"]["mean"] <= 1
    assert (results / "worst_worst.png").is_file()
    report = (results / "report.html").read_text()
    assert "Worst pixel" in report
    assert "has 64 test images" in report
