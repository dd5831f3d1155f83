"""Several processes under torchrun; each function also works in a single one."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from modules.quantizers.looc.ranks import num_ranks
from utils.devices import resolve_device
from utils.errors import UserError
from utils.files import whole_folder

Value = TypeVar("Value")


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return several and "TORCHELASTIC_RUN_ID" in os.environ


def rank() -> int:
    """This process's number, 0 for the first."""
    if num_ranks() > 1:
        return dist.get_rank()
    return int(os.environ["RANK"]) if launched() else 0


def start_ranks(device_flag: str) -> torch.device:
    """Join the processes that torchrun started, if it did; returns this one's device.

    Raises UserError where --device is not there, or not there for every process.
    """
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
    # CPU tensors go by gloo in both cases: what the host has to know does not wait for the GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def seed_rank(seed: int) -> None:
    """Have each process draw numbers of its own; the first goes on with its generator as it is."""
    if rank() > 0:
        torch.manual_seed(seed + 2**32 * rank())


def stop_ranks() -> None:
    """Leave the others, at the end of the work."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def share_gradients(model: nn.Module) -> nn.Module:
    """The model, with its gradients averaged over all processes in the backward pass."""
    if num_ranks() == 1:
        return model
    # Of a kernel with one input channel the memory layout is ambiguous, which costs nothing.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the flag's new name is not in older torch
        # Buffers are the quantiser's, which keeps them the same everywhere by itself.
        return DistributedDataParallel(model, broadcast_buffers=False)


def gradients_kept(model: nn.Module) -> AbstractContextManager[None]:
    """While it lasts, backward passes add up gradients without averaging them."""
    if isinstance(model, DistributedDataParallel):
        kept: AbstractContextManager[None] = model.no_sync()
        return kept
    return nullcontext()


def sum_numbers(*values: float) -> list[float]:
    """The sums over all processes of numbers that the host knows."""
    if num_ranks() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    found: list[float] = sums.tolist()
    return found


def gather(value: Value) -> list[Value]:
    """Every process's value, in the order of ranks, in every process."""
    if num_ranks() == 1:
        return [value]
    values: list[Any] = [None] * num_ranks()
    dist.all_gather_object(values, value)
    return values


def gather_items(items: Iterable[Value]) -> list[Value]:
    """The items of every process, in the order of ranks, in every process."""
    return list(chain.from_iterable(gather(list(items))))


def from_first(make: Callable[[], Value]) -> Value:
    """What the first process made, in every process."""
    if num_ranks() == 1:
        return make()
    values: list[Any] = [make() if rank() == 0 else None]
    dist.broadcast_object_list(values, src=0)
    value: Value = values[0]
    return value


@contextmanager
def first_goes_ahead() -> Iterator[None]:
    """Let the first process through, then all others: it downloads, they find the files."""
    if rank() > 0:
        wait_for_all()
    yield
    if rank() == 0:
        wait_for_all()


def wait_for_all() -> None:
    """Until every process is here."""
    sum_numbers(0)


@contextmanager
def shared_folder(path: Path) -> Iterator[Path]:
    """`whole_folder` of the first process, for all to write to; it appears when all have written.

    All processes have to see the same file system.
    """
    if rank() == 0:
        with whole_folder(path) as folder:
            from_first(lambda: folder)
            yield folder
            wait_for_all()
    else:
        yield from_first(lambda: path)
        wait_for_all()
