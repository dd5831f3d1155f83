"""benchmarks.loader: files of the sizes that it names, a page of what was measured."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import loader

SMALL = (
    loader.Source("PNG", 40, 30, "PNG", None, 1.5, 32),
    loader.Source("JPEG in lmdb", 34, 26, "JPEG", 75, 1.5, 32, lmdb=True),
)


@pytest.mark.parametrize("source", [*loader.SOURCES[1:3], *SMALL])
def test_files_have_the_size_and_format(source: loader.Source) -> None:
    different = loader.contents(source)
    assert len(set(different)) == loader.DIFFERENT
    with Image.open(io.BytesIO(different[0])) as image:
        assert (image.width, image.height, image.format) == (
            *(source.width, source.height),
            source.format,
        )


@pytest.mark.parametrize(("need", "rate", "workers"), [(100, 30, 4), (90, 30, 3), (1, 30, 1)])
def test_workers_for_a_need(need: float, rate: float, workers: int) -> None:
    assert loader.workers_for(need, rate) == workers


def test_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lmdb")
    monkeypatch.setattr(loader, "SOURCES", SMALL)
    monkeypatch.setattr(loader, "WORKERS", (0, 1))
    monkeypatch.setattr(loader, "SIZE", 16)
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)  # it would outlast the test
    words = ["loader.py", "--quick", "--need", "100", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    loader.main()
    page = (tmp_path / "loader.md").read_text()
    assert "Made by `python -m benchmarks.loader --quick --need 100`" in page
    content = json.loads((tmp_path / "loader.json").read_text())
    rates, needs, parts = content["tables"]
    assert [row[:3] for row in rates["rows"]][1::2] == [
        [source.label, row[1], "from `--image_cache`"]
        for source, row in zip(SMALL, rates["rows"][1::2])
    ]
    assert all(len(row) == len(rates["columns"]) for row in rates["rows"])
    assert len(needs["rows"]) == len(parts["rows"]) == len(SMALL)
