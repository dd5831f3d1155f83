"""Processes that tests start as forks of one that has imported torch, which takes seconds."""

from __future__ import annotations

import os
import resource
import runpy
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import multiprocessing

from tests.conftest import HANGS, ROOT, Outcome

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    ["tests.processes", "main", "evaluation", "torch._dynamo", "torch.utils.tensorboard"]
)


@contextmanager
def limited_files(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond size bytes, which stands for a full disk."""
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))


def run_python(
    words: Sequence[str], folder: Path, streams: Path, file_size: int, environment: dict[str, str]
) -> None:
    """Run `python words…` with stdout and stderr redirected to the files out and err of streams."""
    torch.set_num_threads(1)
    os.chdir(folder)
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(streams / name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(file, descriptor)
    os.environ.update(environment)
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    if words[0] == "-m":
        sys.argv = [*words[1:]]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [*words]
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")


def start(
    words: Sequence[str],
    folder: Path,
    streams: Path,
    file_size: int = 0,
    environment: Mapping[str, str] | None = None,
) -> BaseProcess:
    """Start `python words…` in a folder; no file may grow beyond file_size bytes, if given."""
    for name in ("out", "err"):
        (streams / name).write_text("")
    arguments = (tuple(words), folder, streams, file_size, dict(environment or {}))
    process = context.Process(target=run_python, args=arguments)
    process.start()
    return process


def finish(process: BaseProcess, streams: Path) -> Outcome:
    """Wait for the end of a process."""
    process.join(HANGS)
    process.kill()
    code = process.exitcode
    assert code is not None
    return Outcome(code, *((streams / name).read_text() for name in ("out", "err")))


def run_forked(words: Sequence[str], folder: Path, **environment: str) -> Outcome:
    """Run `python words…` in a folder, as run_process of conftest does, but without the imports."""
    with TemporaryDirectory() as streams:
        return finish(start(words, folder, Path(streams), 0, environment), Path(streams))


def run_ranks(words: Sequence[str], folder: Path, number: int = 2) -> list[Outcome]:
    """Run a script in several processes, with the environment that torchrun gives them."""
    with socket.socket() as probe, TemporaryDirectory() as streams:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        folders = [Path(streams) / str(rank) for rank in range(number)]
        processes = []
        for rank, own in enumerate(folders):
            own.mkdir()
            environment = {
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
                **{"TORCHELASTIC_RUN_ID": "tests", "OMP_NUM_THREADS": "1"},
            }
            processes.append(start(words, folder, own, 0, environment))
        return [finish(process, own) for process, own in zip(processes, folders)]
