"""The device to compute on, and the seeds of all random generators."""

from __future__ import annotations

import ctypes
import os
import random
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from utils.errors import UserError


def resolve_device(name: str) -> torch.device:
    """Return the device of --device; "auto" is CUDA if available, else the CPU.

    A GPU with a number becomes the current one. Raises UserError for an unknown name, or a device
    that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("not supported")
    except RuntimeError as error:
        expected = "choose auto, cpu, cuda or cuda:N"
        raise UserError(f"--device {name} is not a supported device; {expected}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        built = "" if torch.version.cuda else " (this PyTorch was built without CUDA)"
        raise UserError(f"--device {name}: there is no CUDA device here{built}; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices"
        )
    if device.index is not None:  # the default of libraries
        torch.cuda.set_device(device)
    return device


def has_amx() -> bool:
    """Return whether the processor has units that multiply matrices of bf16."""
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and "amx_bf16" in cpu.read_text().split()


def memory_of(device: torch.device) -> int:
    """Bytes of memory of a GPU or of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks, which avoids page faults in every step."""
    trim_threshold, mmap_threshold = -1, -3  # of mallopt(3)
    with suppress(OSError, AttributeError):  # another C library, with other thresholds
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, 2**30)
        libc.mallopt(trim_threshold, 2**31 - 1)


def seed_everything(seed: int, device: torch.device) -> None:
    """Seed all generators; on CUDA choose deterministic algorithms where PyTorch has them."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002, libraries use the global generator
    torch.manual_seed(seed)
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or the order of sums varies
        torch.backends.cudnn.benchmark = False
        # Attention with other orders of summation, of which PyTorch only warns:
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
