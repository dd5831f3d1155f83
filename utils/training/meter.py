"""What a run tells of its steps: averages of the losses, and steps that are not finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from modules.quantizers.looc.counting import count_indices
from modules.quantizers.looc.ranks import sum_over_ranks
from utils.codebook.statistics import numbered, use_of


class Meter:
    """Averages over images since the last look, kept on the device so that no step waits."""

    def __init__(
        self,
        num_embedding: int,
        device: torch.device,
        num_codebooks: int = 1,
        further: Sequence[str] = (),
    ) -> None:
        self.num_embedding, self.num_codebooks = num_embedding, num_codebooks
        self.names = ("loss", "reconstruction", "quantizer", "psnr", *further)
        # The last two: of images that have means, and of all.
        self.sums = torch.zeros(len(self.names) + 2, dtype=torch.float64, device=device)
        length = num_embedding * num_codebooks
        self.counts = torch.zeros(length, dtype=torch.int64, device=device)

    def add(self, terms: Mapping[str, Tensor], indices: Tensor) -> None:
        """Take the means by name, and the indices, of one batch, or of a part of it.

        Of images that have a mean which is not finite nothing but the indices counts.
        """
        values = [terms[name] for name in self.names]
        means = torch.stack([*values, torch.ones_like(values[0])]).detach()
        self.sums[:-1] += torch.where(means.isfinite().all(), means * len(indices), 0)
        self.sums[-1] += len(indices)
        numbers = numbered(indices, self.num_embedding, self.num_codebooks)
        self.counts += count_indices(numbers.flatten(), len(self.counts))

    def read(self) -> dict[str, float]:
        """The averages over all processes, which start anew; empty where there was no image."""
        *sums, measured, num_images = sum_over_ranks(self.sums).tolist()
        counts = sum_over_ranks(self.counts).clone()
        self.sums.zero_()
        self.counts.zero_()
        if not measured:
            return {}
        means = {name: value / measured for name, value in zip(self.names, sums)}
        return {**means, **use_of(counts), "num_images": num_images}


class BadSteps:
    """Steps whose loss or gradient is not finite, counted on the device so that no step waits."""

    LOSSES = ("the reconstruction loss", "the quantiser loss")

    def __init__(self, model: nn.Module, device: torch.device, further: Sequence[str] = ()) -> None:
        trained = [name for name, value in model.named_parameters() if value.requires_grad]
        gradients = (f"the gradient of {name}" for name in trained)
        self.names = [*self.LOSSES, *further, *gradients]
        # In a row now; in a row at most, all of them, the first one and its tensor since last read.
        self.state = torch.zeros(5, dtype=torch.int64, device=device)

    def add(self, step: int, values: Tensor) -> Tensor:
        """Take the losses and the gradients' norms, (names,); returns whether any is not finite."""
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
        """(most in a row, how many, the first's step, its first tensor that is not finite)."""
        row, longest, count, step, culprit = self.state.tolist()
        self.state.zero_()
        self.state[0] = row
        return longest, count, step, self.names[culprit]
