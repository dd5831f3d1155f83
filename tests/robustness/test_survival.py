"""Runs that are killed, stopped, or run out of disk, as a cluster does it; nothing is lost."""

from __future__ import annotations

import os
import pty
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from tests import processes
from tests.conftest import HANGS, ROOT, Outcome, write_mnist
from utils.checkpoints.checkpoint import read_checkpoint
from utils.training.signals import StopRequest

FLAGS = (
    *("--dataset", "mnist", "--exp_name", "e", "--device", "cpu", "--batch_size", "2"),
    *("--hidden_size", "8", "--num_embedding", "16", "--anchor", "random", "--num_epochs", "6"),
)


def start(folder: Path, *words: str, file_size: int = 0) -> BaseProcess:
    return processes.start(words, folder, folder, file_size=file_size)


def finish(process: BaseProcess, folder: Path) -> Outcome:
    return processes.finish(process, folder)


def last(folder: Path) -> Path:
    return folder / "output" / "models" / "e" / "last.pt"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def saved_step(folder: Path) -> int:
    """The step from which a run goes on; 0 where it has saved nothing."""
    path = last(folder)
    path = path if path.exists() else path.with_name("previous.pt")
    return int(read_checkpoint(path).content["step"]) if path.exists() else 0


def wait_for_writes(process: BaseProcess, path: Path, number: int) -> None:
    """Until the process has replaced the file so many times, or has ended."""
    seen = {identity(path)}
    limit = time.monotonic() + HANGS
    while len(seen) <= number and process.is_alive() and time.monotonic() < limit:
        seen.add(identity(path))
        time.sleep(0.001)


def identity(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, torch.Tensor]:
    """The weights at the end of the run that the tests interrupt."""
    folder = tmp_path_factory.mktemp("whole")
    write_mnist(folder / "data" / "mnist")
    assert finish(start(folder, "main.py", *FLAGS), folder).code == 0
    return dict(read_checkpoint(last(folder)).state_dict)


def assert_same_end(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """The same command again ends with these weights, bit for bit."""
    assert finish(start(folder, "main.py", *FLAGS), folder).code == 0
    checkpoint = read_checkpoint(last(folder))
    assert checkpoint.content["step"] == 108
    assert all(torch.equal(value, weights[name]) for name, value in checkpoint.state_dict.items())


@pytest.mark.usefixtures("mnist")
def test_killed_at_any_moment_and_resumed_equals_uninterrupted(
    tmp_path: Path, uninterrupted: dict[str, torch.Tensor]
) -> None:
    """SIGKILL at 10 random moments of a run that writes a checkpoint after every step."""
    seeded = random.Random(0)
    steps = []
    for _ in range(10):
        process = start(tmp_path, "main.py", *FLAGS, "--save_every", "1")
        wait_for_writes(process, last(tmp_path), seeded.randrange(1, 12))
        time.sleep(seeded.uniform(0.0, 0.03))
        process.kill()
        process.join()
        steps.append(saved_step(tmp_path))
    assert len(set(steps)) > 5, f"the kills missed the run: {steps}"
    assert_same_end(tmp_path, uninterrupted)
    assert names(last(tmp_path).parent) == ["best.pt", "last.pt", "previous.pt"]


@pytest.mark.usefixtures("mnist")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_a_signal_finishes_the_step_and_saves(
    name: str, tmp_path: Path, uninterrupted: dict[str, torch.Tensor]
) -> None:
    process = start(tmp_path, "main.py", *FLAGS, "--save_every", "1")
    wait_for_writes(process, last(tmp_path), 1)
    number = getattr(signal, name)
    assert process.pid is not None
    os.kill(process.pid, number)
    outcome = finish(process, tmp_path)
    step = read_checkpoint(last(tmp_path)).content["step"]
    assert outcome.code == 128 + number
    assert f"main.py: stopped by {name} after step {step}; output/models/e/last.pt" in outcome.err
    assert "Traceback" not in outcome.err
    assert 0 < step < 108
    assert_same_end(tmp_path, uninterrupted)


def test_the_second_signal_stops_at_once() -> None:
    """A terminal that closes, or a scheduler, may send its own several times."""
    with StopRequest() as stop:
        for _ in range(2):
            for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
                signal.raise_signal(number)
        assert stop.signal == signal.SIGHUP
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_under_nohup_a_run_goes_on() -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.signal is None
    finally:
        signal.signal(signal.SIGHUP, previous)


@pytest.mark.usefixtures("mnist")
def test_a_terminal_that_closes_ends_the_run_in_order(tmp_path: Path) -> None:
    """Whatever is written to it from then on is an error."""
    words = (*FLAGS, "--num_epochs", "100000", "--save_every", "1")
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(tmp_path)
        os.execv(sys.executable, [sys.executable, str(ROOT / "main.py"), *words])
    limit = time.monotonic() + HANGS
    os.set_blocking(terminal, False)
    while not last(tmp_path).exists() and time.monotonic() < limit:
        with suppress(BlockingIOError):
            os.read(terminal, 2**16)
        time.sleep(0.05)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    assert names(last(tmp_path).parent) == ["last.pt", "previous.pt"]


@pytest.mark.usefixtures("mnist")
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk."""
    assert finish(start(tmp_path, "main.py", *FLAGS, "--max_steps", "20"), tmp_path).code == 0
    before = last(tmp_path).read_bytes()
    outcome = finish(start(tmp_path, "main.py", *FLAGS, file_size=len(before) // 2), tmp_path)
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1].startswith("main.py: error: cannot write output/models/e/")
    assert "Traceback" not in outcome.err
    assert last(tmp_path).read_bytes() == before
    assert names(last(tmp_path).parent) == ["best.pt", "last.pt", "previous.pt"]


@pytest.mark.usefixtures("mnist")
def test_a_truncated_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, uninterrupted: dict[str, torch.Tensor]
) -> None:
    flags = (*FLAGS, "--save_every", "3", "--max_steps", "13")
    assert finish(start(tmp_path, "main.py", *flags), tmp_path).code == 0
    last(tmp_path).write_bytes(last(tmp_path).read_bytes()[:1000])
    (last(tmp_path).parent / ".last.pt.999.tmp").write_bytes(b"half")
    outcome = finish(start(tmp_path, "main.py", *flags), tmp_path)
    assert outcome.code == 0
    assert "last.pt is refused: it is truncated" in outcome.err
    assert "going back to output/models/e/previous.pt" in outcome.err
    assert "resumed output/models/e/previous.pt at step 12" in outcome.err
    last(tmp_path).unlink()  # killed between two renamings
    assert_same_end(tmp_path, uninterrupted)
    assert names(last(tmp_path).parent) == ["best.pt", "damaged.pt", "last.pt", "previous.pt"]


FORK = """
import os, time
from utils.workers import start_worker
if os.fork() == 0:
    start_worker(0)
    print(os.getpid(), flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_ends_with_the_process_that_is_killed() -> None:
    """It may wait for ever otherwise: its pipe is full, and nobody reads it any more."""
    command = [sys.executable, "-c", FORK]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        worker = process.stdout.readline().strip()
        assert running(worker)
        process.kill()
    limit = time.monotonic() + 60
    while running(worker):
        assert time.monotonic() < limit
        time.sleep(0.1)


def running(pid: str) -> bool:
    """Return whether a process is there, and is no zombie."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
