"""Limits of the machine reach the user as one line, or do not matter."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import BatchLoader, FileImages
from tests.conftest import ROOT, Outcome, refusal
from tests.processes import run_forked
from utils.logger import log, progress, start_logging

READ = """
from pathlib import Path

import torch

from datasets import BatchLoader, FileImages
from utils.errors import run


def main():
    names = sorted(path.name for path in Path("pics").iterdir())
    images = FileImages(Path("pics"), names, 256)
    loader = BatchLoader(images, 8, device=torch.device("cpu"), num_workers=3)
    print(sum(len(batch) for epoch in range(9) for batch in loader.epoch(epoch)))


run(main)
"""


@pytest.fixture
def pics(tmp_path: Path) -> Path:
    """A folder with 20 pictures of 24×24 in pics/."""
    (tmp_path / "pics").mkdir()
    random = np.random.default_rng(0)
    for number in range(20):
        pixels = random.integers(0, 256, (24, 24, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pics" / f"{number:02}.png")
    return tmp_path


def read(pics: Path, limits: str) -> Outcome:
    """Read the pictures nine times, after shell commands that set limits."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        ["unshare", "-m", "sh", "-c", f'{limits} && exec "$@"', "-", sys.executable, "-c", READ],
        cwd=pics,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return Outcome(found.returncode, found.stdout, found.stderr)


def test_workers_need_no_shared_memory_and_few_open_files(pics: Path) -> None:
    """A megabyte is less than one of the batches."""
    mounted = "mount -t tmpfs -o size=1m tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mounted], check=False).returncode:
        pytest.skip("only root may mount another /dev/shm")
    outcome = read(pics, f"{mounted} && ulimit -n 32")
    assert (outcome.out, outcome.err) == ("180\n", "")


def no_thread(_: Thread) -> None:
    raise RuntimeError("can't start new thread")


def no_process() -> None:
    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


@pytest.mark.parametrize("start", [no_thread, no_process])
def test_processes_and_threads(
    start: Callable[..., None],
    pics: Path,
    script: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changed, name = (Thread, "start") if start is no_thread else (os, "fork")
    monkeypatch.setattr(changed, name, start)
    outcome = script(
        *("main.py", "--dataset", "folder", "--data_folder", str(pics / "pics")),
        *("--image_size", "16", "--batch_size", "4", "--num_epochs", "1", "--hidden_size", "8"),
    )
    last = outcome.err.splitlines()[-1]
    assert outcome.code == 2
    assert "too many processes and threads (ulimit -u: " in last
    assert "--num_workers" in last
    assert "Traceback" not in outcome.err


def test_open_files(pics: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_pipe(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    names = sorted(path.name for path in (pics / "pics").iterdir())
    images = FileImages(pics / "pics", names, 8)
    loader = BatchLoader(images, 8, device=torch.device("cpu"), num_workers=3)
    monkeypatch.setattr(os, "pipe", no_pipe)
    message = refusal(lambda: list(loader.epoch()))
    assert message.startswith("--num_workers 3: too many open files (ulimit -n: ")


def test_a_progress_bar_in_a_file_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str],
) -> None:
    start_logging()
    with progress(1000, "step") as bar:
        for number in range(1000):
            bar.set_postfix_str(f"loss {number}", False)
            bar.update()
        log.info("saved")
    first, saved, last = capsys.readouterr().err.splitlines()
    assert "0/1000" in first
    assert saved == "saved"
    assert last.startswith("100%")
    assert last.endswith("loss 999]")


def test_an_unwritable_cache_of_the_compiler_is_named(pics: Path) -> None:
    outcome = run_forked(
        [
            *("main.py", "--dataset", "folder", "--data_folder", "pics", "--image_size", "16"),
            *("--hidden_size", "8", "--batch_size", "4", "--num_workers", "0", "--compile"),
        ],
        pics,
        TORCHINDUCTOR_CACHE_DIR=str(pics / "pics/00.png/cache"),
    )
    last = outcome.err.splitlines()[-1]
    assert outcome.code == 2
    assert last.startswith(
        "main.py: error: --compile failed, go without, or let TORCHINDUCTOR_CACHE_DIR "
    )
    assert "Traceback" not in outcome.err
