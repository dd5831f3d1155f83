"""One run at a time in a folder; several processes only by torchrun."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import processes
from tests.conftest import HANGS, Outcome
from tests.processes import context, limited_files, run_forked, run_ranks
from utils.errors import UserError
from utils.locks import locked

SMALL = ("--device", "cpu", "--hidden_size", "8", "--num_embedding", "16", "--batch_size", "64")
TRAIN = ("main.py", *SMALL, "--exp_name", "e", "--max_steps")
TEST = ("test.py", "--model_name", "e/best.pt", "--device", "cpu", "--batch_size", "500")


def error_line(outcome: Outcome) -> str:
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    return line


def wait_until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + HANGS
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_the_same_command_twice_runs_once(tmp_path: Path) -> None:
    """The lock ends with its holder, even a killed one."""
    first = processes.start((*TRAIN, "100000", "--save_every", "1"), tmp_path, tmp_path)
    models = tmp_path / "output/models/e"
    wait_until(lambda: (models / "last.pt").exists())
    for words in (("--seed", "7"), ("--overwrite",)):
        assert error_line(run_forked((*TRAIN, "2", *words), tmp_path)) == (
            f"main.py: error: --exp_name output/models/e is in use by process {first.pid} on "
            f"{socket.gethostname()}; wait until that ends, or choose another --exp_name"
        )
    assert first.is_alive()
    first.kill()
    first.join()
    outcome = run_forked((*TRAIN, "2", "--overwrite"), tmp_path)
    assert outcome.code == 0, outcome.err
    assert sorted(path.name for path in models.iterdir()) == ["best.pt", "last.pt"]


def test_results_have_one_writer(tmp_path: Path) -> None:
    outcome = run_forked((*TRAIN, "1"), tmp_path)
    assert outcome.code == 0, outcome.err
    assert run_forked(TEST, tmp_path).code == 0
    (rec,) = (tmp_path / "output/results").rglob("rec")
    results = rec.parent
    pictures = ("--gt_path", str(results / "original"), "--g_path", str(rec))
    measure = ("evaluation.py", *pictures, "--metrics", "l1", "--num_workers", "0")
    before = sorted(results.rglob("*"))
    with locked(results, "--output_folder"):
        for words, flag in ((TEST, "--output_folder"), (measure, "--output")):
            line = error_line(run_forked(words, tmp_path))
            assert f": {flag} " in line
            assert f"is in use by process {os.getpid()} on" in line
        assert sorted(results.rglob("*")) == sorted([*before, results / ".lock"])
    assert run_forked(measure, tmp_path).code == 0
    assert not (results / ".lock").exists()


def test_a_full_disk_is_told_with_flag_and_file(tmp_path: Path) -> None:
    """The message had neither, on resume and in test.py."""
    folder = tmp_path / "e"
    with limited_files(0), pytest.raises(UserError) as raised, locked(folder, "--exp_name"):
        pass
    assert str(raised.value) == f"--exp_name: cannot write {folder}/.lock: File too large"
    assert not folder.exists()


def test_the_first_process_holds_the_lock_for_all(tmp_path: Path) -> None:
    with locked(tmp_path / "output/models/e", "--exp_name"):
        outcomes = run_ranks((*TRAIN, "1"), tmp_path)
    assert [outcome.code for outcome in outcomes] == [2, 2]
    assert "is in use by process" in outcomes[0].err


def take_turns(folder: Path, number: int) -> None:
    """Add two lines that belong together, again and again."""
    done = 0
    while done < 30:
        try:
            with locked(folder, "--exp_name"), (folder / "log").open("a") as log:
                print(number, file=log, flush=True)
                print(number, file=log, flush=True)
                done += 1
        except UserError:
            pass


def test_a_lock_that_is_removed_at_its_end_keeps_others_out(tmp_path: Path) -> None:
    folder = tmp_path / "e"
    workers = [context.Process(target=take_turns, args=(folder, number)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    lines = (folder / "log").read_text().split()
    assert len(lines) == 180
    assert lines[::2] == lines[1::2]
    assert [path.name for path in folder.iterdir()] == ["log"]


def test_a_disk_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.lockf", refuse)
    with locked(tmp_path / "e", "--exp_name"):
        (tmp_path / "e/last.pt").touch()
    assert "cannot be locked ([Errno 37] No locks available): start no second run" in caplog.text
    assert [path.name for path in (tmp_path / "e").iterdir()] == ["last.pt"]


def test_files_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    for name in (".metrics.json.123.tmp", ".mine.tmp"):
        (tmp_path / name).touch()
    with locked(tmp_path, "--output"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".mine.tmp"]


def test_an_empty_folder_does_not_stay(tmp_path: Path) -> None:
    line = error_line(run_forked((*TRAIN, "1", "--resume", "absent.pt"), tmp_path))
    assert "absent.pt does not exist" in line
    assert not list((tmp_path / "output").rglob("e"))


@pytest.mark.parametrize(
    ("script", "name"),
    [
        *(("main.py", "WORLD_SIZE"), ("main.py", "SLURM_STEP_NUM_TASKS"), ("main.py", "PMI_SIZE")),
        *(("main.py", "SLURM_PROCID"), ("test.py", "RANK"), ("test.py", "WORLD_SIZE")),
        ("evaluation.py", "OMPI_COMM_WORLD_SIZE"),
    ],
)
def test_several_processes_without_torchrun_are_refused(
    script: str, name: str, tmp_path: Path
) -> None:
    pictures = ("--gt_path", "a", "--g_path", "b") if script == "evaluation.py" else ()
    line = error_line(run_forked((script, *pictures), tmp_path, **{name: "2"}))
    assert f"{script}: error: {name} is 2, but torchrun did not start this process" in line
    assert not list(tmp_path.iterdir())


def test_one_task_of_srun_works_alone_if_it_says_so(tmp_path: Path) -> None:
    alone = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1", "WORLD_SIZE": "1"}
    outcome = run_forked((*TRAIN, "1"), tmp_path, **alone)
    assert outcome.code == 0, outcome.err
