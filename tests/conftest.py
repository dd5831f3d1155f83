"""Running the scripts as a user would, and tiny data sets in the real layout."""

from __future__ import annotations

import gc
import os
import runpy
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure

import utils.training.trainer
from utils.errors import UserError
from utils.logger import log

ROOT = Path(__file__).parent.parent

# Tests run side by side, and their models are too small for several threads.
torch.set_num_threads(1)
# Processes that tests start have one too, and find the modules from any folder.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))

# Drawing takes most of the time of a short run: pictures of figures are blank but for draw_figures.
DRAW = Figure.draw


def blank(figure: Figure, renderer: RendererBase) -> None:
    """Draw nothing into a raster image."""
    if not isinstance(renderer, RendererAgg):
        DRAW(figure, renderer)


Figure.draw = blank  # type: ignore[assignment, method-assign]
utils.training.trainer.NUM_PICTURES = 1


def pytest_collection_finish() -> None:
    """Spare the garbage collector, which every validation calls, what the imports have made."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def draw_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw figures in full."""
    monkeypatch.setattr(Figure, "draw", DRAW)


HANGS = 1200  # seconds after which a process hangs: a busy machine is only slow


@dataclass(frozen=True)
class Outcome:
    """End of a run of a script: its exit code and its text."""

    code: int
    out: str
    err: str


@pytest.fixture
def script(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Outcome]:
    """Run a script in this process, which saves importing torch anew, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *words: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", [name, *words])
        code = 0
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as stop:
            code = int(stop.code or 0)
        log.handlers.clear()
        streams = capfd.readouterr()
        return Outcome(code, streams.out, streams.err)

    return run


def run_process(words: Sequence[str], folder: Path) -> Outcome:
    """Run `python words…` in a folder as a process of its own."""
    result = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )
    return Outcome(result.returncode, result.stdout, result.stderr)


def refusal(call: Callable[[], object]) -> str:
    """The one line of the UserError that call raises."""
    with pytest.raises(UserError) as raised:
        call()
    message = str(raised.value)
    del raised  # it is in a circle with this frame, which would keep worker processes alive
    assert "\n" not in message
    return message


def write_idx(path: Path, array: np.ndarray) -> None:
    """A uint8 array as the IDX file of MNIST."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.tobytes())


def write_mnist(folder: Path) -> None:
    """40 + 12 pictures of soft blobs in the files of MNIST."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:28, :28]
    for name, count in (("train", 40), ("t10k", 12)):
        centres = random.uniform(6, 22, (count, 2, 1, 1))
        distance = (x - centres[:, 0]) ** 2 + (y - centres[:, 1]) ** 2
        images = (255 * np.exp(-distance / 30)).astype(np.uint8)
        write_idx(folder / "MNIST" / "raw" / f"{name}-images-idx3-ubyte", images)
        write_idx(folder / "MNIST" / "raw" / f"{name}-labels-idx1-ubyte", np.zeros(count, np.uint8))


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """The folder of a tiny MNIST."""
    write_mnist(tmp_path / "data" / "mnist")
    return tmp_path / "data" / "mnist"
