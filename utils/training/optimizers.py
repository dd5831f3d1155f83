"""Adam: fused, and restored from checkpoints whose content is checked first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modules.reference import describe


def make_adam(
    parameters: Sequence[nn.Parameter], lr: float = 0.0, betas: tuple[float, float] = (0.9, 0.999)
) -> torch.optim.Adam:
    """Fused Adam: the only variant that can skip a step without a host sync."""
    return torch.optim.Adam(parameters, lr=lr, betas=betas, fused=True)


def load_optimizer(optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Load Adam's moments; settings stay those of the flags. Raises ValueError if damaged."""
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    checked: dict[int, dict[str, Tensor]] = {index: {} for index in range(len(parameters))}
    for index, parameter in enumerate(parameters):
        stored = state[index] if isinstance(state, Mapping) else None
        if not isinstance(stored, Mapping):
            raise ValueError(f"there are no moments of parameter {index}")
        expected = {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
        for name, like in expected.items():
            value = stored[name]
            if describe(value) != describe(like) or not value.isfinite().all():
                raise ValueError(f"{name} of parameter {index} is misshapen or not finite")
            if name != "exp_avg" and value.min() < 0:
                raise ValueError(f"{name} of parameter {index} is negative")
            # A copy: stored tensors may be expanded or share memory.
            checked[index][name] = torch.empty_like(like).copy_(value)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": checked, "param_groups": groups})
