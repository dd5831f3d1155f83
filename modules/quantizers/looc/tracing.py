"""Exclusion of a module's methods from torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import torch
from torch import Tensor, nn

Result = TypeVar("Result")


def untraced(method: Callable[..., Result]) -> Callable[..., Result]:
    """Decorate a method that torch.compile calls as it is, between the graphs around it.

    The state of the module changes in each call: tracing would fail, or compile again each time.
    torch.compiler.disable does the same, but imports the compiler at once, which takes seconds.
    """
    excluded: Callable[..., Result] = torch._disable_dynamo(method)

    @wraps(method)
    def call(module: nn.Module, z: Tensor) -> Result:
        return (excluded if torch.compiler.is_compiling() else method)(module, z)

    return call
