"""Batches of an image set, in an order that is a function of (seed, epoch) alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from datasets.images import ImageSet, TensorImages, permutation
from utils.errors import UserError, one_line


class BatchLoader:
    """Batches of uint8 images (b, C, H, W) on a device; the last batch of an epoch may be smaller.

    Sets in memory move to the device once and are indexed there. Others are decoded by num_workers
    processes (0: in this one), ahead of their use. The global random number generator is never
    touched. One epoch is iterated at a time; it may be left early.
    """

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        *,
        device: torch.device,
        shuffle: bool = False,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} is less than 1")
        self.size = len(images)
        self.batch_size = batch_size
        self.device = device
        self.shuffle = shuffle
        self.seed = seed
        self.source = (
            MemoryBatches(images.images.to(device))
            if isinstance(images, TensorImages)
            else DecodedBatches(images, device, num_workers)
        )

    def __len__(self) -> int:
        """Batches an epoch."""
        return -(-self.size // self.batch_size)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Tensor]:
        """The epoch's batches from number start on; those before it are not decoded.

        Raises UserError naming an image that is damaged.
        """
        if self.shuffle:
            order = permutation(self.size, self.seed, epoch)
        else:
            order = torch.arange(self.size)
        first = range(start * self.batch_size, self.size, self.batch_size)
        return self.source.batches([order[i : i + self.batch_size] for i in first])


class MemoryBatches:
    """Batches by indexing one tensor (n, C, H, W)."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def batches(self, order: Sequence[Tensor]) -> Iterator[Tensor]:
        for indices in order:
            yield self.images[indices.to(self.images.device, non_blocking=True)]


class DecodedBatches:
    """Batches decoded by a DataLoader, whose workers live on from epoch to epoch."""

    def __init__(self, images: ImageSet, device: torch.device, num_workers: int) -> None:
        self.device = device
        self.num_workers = num_workers
        self.order = BatchOrder()
        self.loader: DataLoader[Tensor | str] = DataLoader(
            WholeBatches(images),
            batch_size=None,  # WholeBatches takes the indices of a batch, not of an image
            sampler=self.order,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # else the global one would be drawn from
        )

    def batches(self, order: Sequence[Tensor]) -> Iterator[Tensor]:
        if not order:
            return
        self.order.batches = [indices.tolist() for indices in order]
        try:
            for batch in self.loader:
                if isinstance(batch, str):
                    raise UserError(batch)
                yield batch.to(self.device, non_blocking=True)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise UserError(f"--num_workers {self.num_workers}: {one_line(error)}") from error


class BatchOrder(Sampler[list[int]]):
    """The indices of each batch of the epoch at hand."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class WholeBatches(Dataset["Tensor | str"]):
    """A set's batches: indices → (b, C, H, W), or the message of a UserError.

    An exception would reach the parent process with the worker's traceback in its message.
    """

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __getitem__(self, indices: list[int]) -> Tensor | str:
        try:
            return torch.stack([self.images[index] for index in indices])
        except UserError as error:
            return str(error)
