"""Batches of an image set, in an order that is a function of (seed, epoch) alone."""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass, field
from itertools import repeat
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datasets.image_sets import ImageSet, Place, TensorImages
from datasets.sampling import draws, permutation
from utils.errors import UserError, one_line
from utils.workers import from_workers, start_worker

AHEAD = 2  # batches that each worker decodes ahead of their use

# Images to decode: their positions in the set, and the places of their cuts.
Share: TypeAlias = list[tuple[int, Place | None]]


class Decoded(NamedTuple):
    """A batch, or a rank's share of one."""

    positions: Tensor  # (b,), int64, on the CPU: where in the set each image is
    images: Tensor  # (b, C, H, W), uint8
    bad: dict[int, str]  # position → why that image could not be decoded and is not among them


class Written(NamedTuple):
    """The message of a worker that has written a batch's images to a slot."""

    slot: int
    positions: list[int]
    bad: dict[int, str]  # as in Decoded
    fault: str  # an error that no image caused: the image cache cannot be read or written


@dataclass(eq=False)
class BatchLoader:
    """Batches of uint8 images (b, C, H, W) on a device; the last batch of an epoch may be smaller.

    batch_size is that of all ranks together. With shuffle, for training, each rank has its share
    of every batch, which may be empty; without, the ranks take whole batches in turn.

    In training, flip mirrors half of the images, and crop "random" or "patch" (for `Patches`) cuts
    the square out of a random place of an image on disk: both a function of (seed, epoch, position
    in the set) alone.

    Sets in memory move to the device once and are indexed there. Others are decoded ahead of their
    use by num_workers processes (0: by this one). The global random number generator is not used.
    One epoch is iterated at a time; it may be left early.

    An image that cannot be decoded raises UserError; skip_bad skips it and notes it in bad_images,
    position in the set → message.
    """

    images: InitVar[ImageSet]
    batch_size: int
    _: KW_ONLY
    device: torch.device
    shuffle: bool = False
    seed: int = 0
    num_workers: InitVar[int] = 0
    rank: int = 0
    num_ranks: int = 1
    skip_bad: bool = False
    flip: bool = False
    crop: str = "centre"
    bad_images: dict[int, str] = field(default_factory=dict, init=False)

    def __post_init__(self, images: ImageSet, num_workers: int) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size {self.batch_size} is less than 1")
        if not 0 <= self.rank < self.num_ranks:
            raise ValueError(f"rank {self.rank} is not one of {self.num_ranks}")
        if (self.flip or self.crop != "centre") and not self.shuffle:
            raise ValueError("flip and crop are for training, with shuffle")
        self.size = len(images)
        self.source = (
            MemoryBatches(images.images.to(self.device))
            if isinstance(images, TensorImages)
            else DecodedBatches(
                images, min(self.batch_size, self.size), self.device, min(num_workers, len(self))
            )
        )

    def __len__(self) -> int:
        """Batches per epoch, of all ranks together."""
        return -(-self.size // self.batch_size)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Tensor]:
        """Yield the images of `numbered`."""
        return (images for _, images in self.numbered(epoch, start))

    def numbered(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this rank's part of the epoch's batches from number start on: (positions, images).

        positions (b,), int64, on the CPU, are those of the images (b, C, H, W) in the set. Batches
        before start are not decoded. Raises UserError naming a damaged image.
        """
        flips = draws(self.size, "flip", self.seed, epoch) < 0.5 if self.flip else None
        places = places_of(self.crop, self.size, self.seed, epoch)
        for positions, images, bad in self.source.batches(self.shares(epoch, start), places):
            if bad and not self.skip_bad:
                raise UserError(next(iter(bad.values())))
            self.bad_images.update(bad)
            if len(positions) or self.shuffle:  # in training every rank makes every step
                yield positions, images if flips is None else mirrored(images, flips[positions])

    def shares(self, epoch: int, start: int) -> list[Tensor]:
        """Return the positions (b,) of this rank's images, batch by batch."""
        if self.shuffle:
            order = permutation(self.size, self.seed, epoch)
            batches = torch.split(order, self.batch_size)[start:]
            return [batch[self.rank :: self.num_ranks] for batch in batches]
        batches = torch.split(torch.arange(self.size), self.batch_size)
        mine = range(self.rank, len(batches), self.num_ranks)
        return [batches[number] for number in mine if number >= start]


def places_of(crop: str, size: int, seed: int, epoch: int) -> Tensor | None:
    """Draw the places (n, 2) of an epoch's cuts; None: in the middle."""
    if crop == "patch":
        return draws(2 * size, "patch", seed, epoch).view(-1, 2)
    if crop == "random":  # a whole square has a place along one side only
        return draws(size, "crop", seed, epoch)[:, None].expand(-1, 2)
    return None


def mirrored(images: Tensor, which: Tensor) -> Tensor:
    """Mirror those images (b, C, H, W) left to right that which (b,), bool, selects."""
    which = which.to(images.device, non_blocking=True)
    return torch.where(which[:, None, None, None], images.flip(-1), images)


class MemoryBatches:
    """Batches by indexing one tensor (n, C, H, W)."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def batches(self, order: Sequence[Tensor], _places: Tensor | None) -> Iterator[Decoded]:
        for positions in order:
            images = self.images[positions.to(self.images.device, non_blocking=True)]
            yield Decoded(positions, images, {})


class DecodedBatches:
    """Batches decoded by a DataLoader, whose workers stay alive between epochs.

    They write to memory that they inherit by fork: unlike tensors that processes send to each
    other, it needs no open files and no room in /dev/shm, which is 64 MB in a Docker container.
    """

    def __init__(
        self, images: ImageSet, batch_size: int, device: torch.device, num_workers: int
    ) -> None:
        self.device = device
        self.num_workers = num_workers
        # With one slot more than are in work none is written to while this process reads it.
        num_slots = AHEAD * num_workers + 1
        shape = (num_slots, batch_size, images.channels, images.image_size, images.image_size)
        try:
            memory = mmap.mmap(-1, math.prod(shape))
        except (OSError, OverflowError) as error:
            raise MemoryError(f"--num_workers {num_workers}: {one_line(error)}") from error
        self.slots = torch.frombuffer(memory, dtype=torch.uint8).view(shape)
        self.order: list[tuple[int, Share]] = []  # slots and batches of the current epoch
        self.loader: DataLoader[Written] = DataLoader(
            WholeBatches(images, self.slots),
            batch_size=None,  # WholeBatches is indexed by batch, not by image
            sampler=self.order,
            num_workers=num_workers,
            prefetch_factor=AHEAD if num_workers else None,
            persistent_workers=num_workers > 0,
            worker_init_fn=start_worker,
            multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
            generator=torch.Generator(),  # instead of the global one
        )

    def batches(self, order: Sequence[Tensor], places: Tensor | None) -> Iterator[Decoded]:
        if not order:
            return
        self.order.clear()
        for number, own in enumerate(order):
            cuts = repeat(None) if places is None else map(tuple, places[own].tolist())
            self.order.append((number % len(self.slots), list(zip(own.tolist(), cuts))))
        for written in from_workers(self.loader, self.num_workers):
            if written.fault:
                raise UserError(written.fault)
            positions = torch.tensor(written.positions, dtype=torch.int64)
            images = self.slots[written.slot, : len(positions)]
            images = images.pin_memory() if self.device.type == "cuda" else images.clone()
            yield Decoded(positions, images.to(self.device, non_blocking=True), written.bad)


class WholeBatches(Dataset[Written]):
    """A set's batches; errors come as messages, without the worker's traceback."""

    def __init__(self, images: ImageSet, slots: Tensor) -> None:
        self.images = images
        self.slots = slots

    def __getitem__(self, batch: tuple[int, Share]) -> Written:
        slot, share = batch
        positions: list[int] = []
        bad: dict[int, str] = {}
        for position, place in share:
            try:
                self.slots[slot, len(positions)] = self.images.cropped(position, place)
                positions.append(position)
            except UserError as error:
                bad[position] = str(error)
            except OSError as error:  # of the image cache
                fault = f"{error.filename}: {error.strerror}"
                return Written(slot, positions, bad, fault)
        return Written(slot, positions, bad, "")
