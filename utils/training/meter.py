"""Statistics of training steps: averages of figures, and steps that are not finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from modules.quantizers.looc.ranks import sum_over_ranks


class Meter:
    """Averages over items since the last look, kept on the device so that no step waits."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.names: tuple[str, ...] = ()
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, means: Mapping[str, Tensor], size: int) -> None:
        """Add the means of so many items by name; the names are the same in every call.

        Items are not counted where one of their means is not finite.
        """
        if not self.names:
            self.names = tuple(means)
            # The last two: items whose means are finite, and all.
            self.sums = torch.zeros(len(means) + 2, dtype=torch.float64, device=self.device)
        values = [means[name] for name in self.names]
        stacked = torch.stack([*values, torch.ones_like(values[0])]).detach()
        self.sums[:-1] += torch.where(stacked.isfinite().all(), stacked * size, 0)
        self.sums[-1] += size

    def read(self) -> dict[str, float]:
        """Averages over all processes, and `num_items`; starts anew. Empty without any item."""
        *sums, measured, num_items = sum_over_ranks(self.sums).tolist()
        self.sums.zero_()
        if not measured:
            return {}
        means = {name: value / measured for name, value in zip(self.names, sums)}
        return {**means, "num_items": num_items}


class BadSteps:
    """Steps whose loss or gradient is not finite, counted on the device so that no step waits."""

    def __init__(self, device: torch.device) -> None:
        self.names: Sequence[str] = ()
        # In a row now; in a row at most, all of them, the first one and its value since last read.
        self.state = torch.zeros(5, dtype=torch.int64, device=device)

    def add(self, step: int, names: Sequence[str], values: Tensor) -> Tensor:
        """Add losses and norms of gradients, (names,); returns whether any is not finite."""
        self.names = names
        finite = values.isfinite()
        bad = ~finite.all()
        row, longest, count, first, culprit = self.state
        row = (row + 1) * bad
        new = bad & (count == 0)
        self.state = torch.stack(
            [
                row,
                torch.maximum(longest, row),
                count + bad,
                torch.where(new, step, first),
                torch.where(new, finite.int().argmin(), culprit),
            ]
        )
        return bad

    def read(self) -> tuple[int, int, int, str]:
        """Return (most in a row, how many, the first's step, its first value not finite)."""
        row, longest, count, step, culprit = self.state.tolist()
        self.state.zero_()
        self.state[0] = row
        return longest, count, step, self.names[culprit] if count else ""
