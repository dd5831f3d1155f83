"""The file that each picture of test.py is from, and pictures named after these files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.pictures import picture_names
from tests.processes import run_ranks
from tests.scripts.test_cli import TINY, Script, error_line, train

NAMES = ("a.jpg", "a.png", "bad.png", "cats/b.v2.PNG", "cats/c.png", "dogs/c.png")
TEST = ("test.py", "--model_name", "e/best.pt", "--data_split", "all", "--batch_size", "2")
QUIET = ("--skip_bad_images", "--num_workers", "0", "--device", "cpu")


@pytest.fixture
def trained(script: Script, tmp_path: Path) -> Path:
    """A model of pictures in subfolders, two of which differ by their suffix alone; one is bad."""
    random = np.random.default_rng(0)
    for name in NAMES:
        path = tmp_path / "my pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(256, size=(20, 16, 3), dtype=np.uint8)).save(path)
    words = ("--data_folder", "my pictures", "--image_size", "16", "--max_steps", "1")
    outcome = script("main.py", *words, *TINY, *QUIET, "--exp_name", "e")
    assert outcome.code == 0, outcome.err
    (tmp_path / "my pictures/bad.png").write_bytes(b"bad")
    return tmp_path / "output/results/e/best/my pictures-all"


def evaluated(script: Script, results: Path) -> list[dict[str, str]]:
    """The lines of metrics.csv."""
    folders = ("--gt_path", str(results / "original"), "--g_path", str(results / "rec"))
    outcome = script("evaluation.py", *folders, "--metrics", "l1", "--num_workers", "0")
    assert outcome.code == 0, outcome.err
    with (results / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_source_of_every_image(script: Script, trained: Path, tmp_path: Path) -> None:
    outcome = script(*TEST, *QUIET)
    assert outcome.code == 0, outcome.err
    sources = json.loads((trained / "analysis.json").read_text())["sources"]
    files = [f"{tmp_path}/my pictures/{name}" for name in NAMES]
    expected = {f"{number:08d}": file for number, file in enumerate(files) if "bad" not in file}
    assert sources == expected
    assert {row["name"]: row["source"] for row in evaluated(script, trained)} == expected
    page = (trained / "report.html").read_text()
    assert all(f">{name}, {file}<" in page for name, file in expected.items())


def test_a_failed_test_leaves_earlier_results(script: Script, trained: Path) -> None:
    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}

    assert script(*TEST, *QUIET).code == 0
    evaluated(script, trained)
    before = contents()
    message = script(*TEST, *QUIET, "--no-skip_bad_images").err.splitlines()[-1]
    assert "my pictures/bad.png cannot be decoded" in message
    assert contents() == before


@pytest.mark.parametrize("number", [1, 2])
def test_names_are_kept(number: int, script: Script, trained: Path, tmp_path: Path) -> None:
    words = (*TEST, *QUIET, "--keep_names", "--save_codes")
    outcomes = [script(*words)] if number == 1 else run_ranks(words, tmp_path, number)
    assert not any(outcome.code for outcome in outcomes), outcomes
    names = ["a.jpg", "a.png", "cats/b.v2", "cats/c", "dogs/c"]
    for kind in ("original", "rec"):
        found = sorted(path for path in (trained / kind).rglob("*") if path.is_file())
        assert [str(path.relative_to(trained / kind)) for path in found] == [
            f"{name}.png" for name in names
        ]
    rows = evaluated(script, trained)
    assert [row["name"] for row in rows] == names
    assert [Path(row["source"]).name for row in rows] == [
        Path(name).name for name in NAMES if "bad" not in name
    ]


def test_what_has_no_files_has_no_names(script: Script, mnist: Path, tmp_path: Path) -> None:
    train(script, mnist)
    words = ("test.py", "--output_folder", "out", "--model_name", "e/best.pt")
    message = error_line(script(*words, "--keep_names"))
    assert "--keep_names: the images of --dataset mnist are not files" in message
    for more in (["--images", str(mnist)], ["--from_codes", "x.looc"]):
        message = error_line(script(*words, "--keep_names", *more))
        assert f"--keep_names has no effect with {more[0]}" in message
    assert script(*words).code == 0
    results = tmp_path / "out/results/e/best/mnist"
    assert json.loads((results / "analysis.json").read_text())["sources"] == {}
    assert "source" not in evaluated(script, results)[0]


def test_names_without_suffix() -> None:
    names = ["a.jpg", "b.png", "b.png.gif", "b.jpg", "d/b.jpg"]
    assert picture_names(names) == ["a", "b.png", "b.png.gif", "b.jpg", "d/b"]
