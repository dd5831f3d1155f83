"""Globals of faiss and PyTorch that a search needs otherwise, changed for a while."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch


@contextmanager
def faiss_by_products(faiss: Any) -> Iterator[None]:
    """Let faiss use its fast kernels for few features too, up to 100 times as fast.

    The threshold is a global of faiss, N·d = 128,000 by default.
    """
    with globals_lock():
        before = faiss.cvar.distance_compute_blas_threshold
        faiss.cvar.distance_compute_blas_threshold = 1
        try:
            yield
        finally:
            faiss.cvar.distance_compute_blas_threshold = before


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Multiply float32 matrices in float32, where a program has allowed TF32 or bfloat16.

    That is a global of PyTorch, which it stores for each kind of device since version 2.9.
    """
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    stored = hasattr(torch.backends, "fp32_precision")

    def read() -> str:
        return backend.matmul.fp32_precision if stored else torch.get_float32_matmul_precision()

    def write(precision: str) -> None:
        if stored:
            backend.matmul.fp32_precision = precision
        else:
            torch.set_float32_matmul_precision(precision)

    with globals_lock():  # another thread may have it changed
        before = read()
    if before in ("none", "ieee", "highest"):
        yield
        return
    with globals_lock():
        write("ieee" if stored else "highest")
        try:
            yield
        finally:
            write(before)


@lru_cache
def globals_lock() -> threading.Lock:
    return threading.Lock()


if hasattr(os, "register_at_fork"):  # another thread may hold it at the fork
    os.register_at_fork(after_in_child=globals_lock.cache_clear)
