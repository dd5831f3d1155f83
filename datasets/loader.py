"""Batches of an image set, in an order that is a function of (seed, epoch) alone."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass, field
from itertools import repeat
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from datasets.image_sets import ImageSet, Place, TensorImages
from datasets.sampling import draws, permutation
from utils.errors import UserError, one_line
from utils.training.signals import SIGNALS

# --num_workers is the user's choice, and more than the cores may suit a slow disk.
warnings.filterwarnings("ignore", "This DataLoader will create")


# Images to decode: their positions in the set, and the places of their cuts.
Share: TypeAlias = list[tuple[int, Place | None]]


class Decoded(NamedTuple):
    """A batch, or a rank's share of one."""

    positions: Tensor  # (b,), int64, on the CPU: where in the set each image is
    images: Tensor  # (b, C, H, W), uint8
    bad: dict[int, str]  # position → why that image could not be decoded and is not among them
    fault: str = ""  # an error that no image caused: the image cache cannot be read or written


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
            else DecodedBatches(images, self.device, min(num_workers, len(self)))
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
        for positions, images, bad, fault in self.source.batches(self.shares(epoch, start), places):
            if fault:
                raise UserError(fault)
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
    """Batches decoded by a DataLoader, whose workers stay alive between epochs."""

    def __init__(self, images: ImageSet, device: torch.device, num_workers: int) -> None:
        self.device = device
        self.num_workers = num_workers
        self.order: list[Share] = []  # the batches of the current epoch
        self.loader: DataLoader[Decoded] = DataLoader(
            WholeBatches(images),
            batch_size=None,  # WholeBatches is indexed by batch, not by image
            sampler=self.order,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=device.type == "cuda",
            worker_init_fn=ignore_signals,
            generator=torch.Generator(),  # instead of the global one
        )

    def batches(self, order: Sequence[Tensor], places: Tensor | None) -> Iterator[Decoded]:
        if not order:
            return
        self.order.clear()
        for own in order:
            cuts = repeat(None) if places is None else map(tuple, places[own].tolist())
            self.order.append(list(zip(own.tolist(), cuts)))
        try:
            for batch in self.loader:
                yield batch._replace(images=batch.images.to(self.device, non_blocking=True))
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise UserError(f"--num_workers {self.num_workers}: {one_line(error)}") from error


def ignore_signals(_worker: int) -> None:
    """Leave Ctrl-C and the like to the main process: the workers end with it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_workers() -> None:
    """Kill the remaining workers: multiprocessing would wait, as they ignore SIGTERM."""
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # by which a DataLoader would report it
    for worker in workers:
        worker.kill()


atexit.register(end_workers)  # runs before multiprocessing's own handler


class WholeBatches(Dataset[Decoded]):
    """A set's batches; errors come as messages, without the worker's traceback."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __getitem__(self, share: Share) -> Decoded:
        decoded: dict[int, Tensor] = {}
        bad: dict[int, str] = {}
        fault = ""
        for position, place in share:
            try:
                decoded[position] = self.images.cropped(position, place)
            except UserError as error:
                bad[position] = str(error)
            except OSError as error:  # of the image cache
                fault = f"{error.filename or 'reading images'}: {error.strerror}"
                break
        side = self.images.image_size
        empty = torch.empty(0, self.images.channels, side, side, dtype=torch.uint8)
        # Unlike torch.stack, default_collate writes to memory shared with the parent.
        images = default_collate(list(decoded.values())) if decoded else empty
        return Decoded(torch.tensor(list(decoded), dtype=torch.int64), images, bad, fault)
