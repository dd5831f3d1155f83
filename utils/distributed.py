"""Training in several processes under torchrun; all functions also work in a single one."""

from __future__ import annotations

import atexit
import gc
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from modules.quantizers.looc.ranks import num_ranks
from utils.devices import resolve_device
from utils.errors import UserError
from utils.files import whole_folder

Value = TypeVar("Value")


# What torchrun, srun and mpirun set, with the value of a process that works alone. Not
# SLURM_NTASKS: a batch script of two tasks has 2 too, where it starts one process without srun.
ALONE = {
    **{"WORLD_SIZE": "1", "RANK": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
    **{"OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": "1"},
}


def launched() -> bool:
    """Return whether torchrun started this process as one of several.

    Raises UserError where something else started several: they would not train together.
    """
    if os.environ.get("WORLD_SIZE") == "1":
        return False
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "WORLD_SIZE" in os.environ
    for name, alone in ALONE.items():
        value = os.environ.get(name) or alone
        if value != alone:
            raise UserError(
                f"{name} is {value}, but torchrun did not start this process: start several that "
                "work together by torchrun, or set WORLD_SIZE=1 for one that works alone"
            )
    return False


def rank() -> int:
    """Return the number of this process, 0 for the first."""
    if num_ranks() > 1:
        return dist.get_rank()
    return int(os.environ["RANK"]) if launched() else 0


def start_ranks(device_flag: str) -> torch.device:
    """Join the processes that torchrun started, if any, and return this one's device."""
    device = resolve_device(device_flag)
    if not launched():
        return device
    if device.type == "cuda":
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if ":" in device_flag:
            raise UserError(f"--device {device_flag} is one GPU; under torchrun give cuda")
        if local >= count:
            raise UserError(f"--nproc_per_node {local + 1} or more, but there are {count} GPUs")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    # Imported after it, this module's defaults would hold the group, and threads of it, for ever.
    import_module("torch.distributed.nn")
    # CPU tensors use gloo in both cases: numbers for the host do not wait for the GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if device.type == "cpu":  # after a signal or an error too, where NCCL would wait for the others
        atexit.register(stop_ranks)
    atexit.register(gc.collect)  # first: models in cycles hold the group
    return device


def seed_rank(seed: int) -> None:
    """Give each process its own random numbers; the first keeps its generator as it is."""
    if rank() > 0:  # the generator of the CPU takes 32 bits of a seed and ignores the others
        torch.manual_seed(int(np.random.SeedSequence((seed, rank())).generate_state(1)[0]))


def stop_ranks() -> None:
    """Leave the process group; its threads end with the last model that uses it."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def share_gradients(model: nn.Module) -> nn.Module:
    """Wrap the model so that backward passes average gradients over all processes."""
    if num_ranks() == 1:
        return model
    # The memory layout of a kernel with one input channel is ambiguous, which costs nothing.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # older torch lacks the new name of the flag
        # Buffers belong to the quantiser, which keeps them equal in all processes.
        return DistributedDataParallel(model, broadcast_buffers=False)


def gradients_kept(model: nn.Module) -> AbstractContextManager[None]:
    """Accumulate gradients without averaging them over processes, in a with block."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def sum_numbers(*values: float) -> list[float]:
    """Sum each number over all processes."""
    if num_ranks() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()


def gather(value: Value) -> list[Value]:
    """Return the values of all processes, in the order of ranks, in every process."""
    if num_ranks() == 1:
        return [value]
    values: list[Any] = [None] * num_ranks()
    dist.all_gather_object(values, value)
    return values


def gather_items(items: Iterable[Value]) -> list[Value]:
    """Return the items of all processes, in the order of ranks, in every process."""
    return list(chain.from_iterable(gather(list(items))))


def from_first(make: Callable[[], Value]) -> Value:
    """Call make in the first process, and return its value in every process."""
    if num_ranks() == 1:
        return make()
    values: list[Any] = [make() if rank() == 0 else None]
    dist.broadcast_object_list(values, src=0)
    return values[0]  # type: ignore[no-any-return]


@contextmanager
def first_goes_ahead() -> Iterator[None]:
    """Run a block in the first process, then in the others: they find the files it downloaded.

    It may take hours to unpack them, longer than a process usually waits for another one.
    """
    if num_ranks() == 1:
        yield
        return
    patient: Any = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    if rank() > 0:
        dist.barrier(patient)
    yield
    if rank() == 0:
        dist.barrier(patient)
    dist.destroy_process_group(patient)


@contextmanager
def left_together() -> Iterator[None]:
    """Run a block in all processes, which leave it when the last one has finished.

    This may take hours too.
    """
    if num_ranks() == 1:
        yield
        return
    patient: Any = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    yield
    dist.barrier(patient)
    dist.destroy_process_group(patient)


@contextmanager
def shared_folder(path: Path) -> Iterator[Path]:
    """Yield a `whole_folder` to all processes, which share the file system."""
    with whole_folder(path) if rank() == 0 else nullcontext(path) as folder, left_together():
        yield from_first(lambda: folder)
