"""Codes or latents of a set of images, computed once and kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from datasets.image_sets import ImageSet, TensorImages
from datasets.loader import BatchLoader
from datasets.sampling import choose, draws, generator_of, permutation
from modules import Autoencoder
from modules.priors.spaces import CodeSpace, Space
from utils.checkpoints.digest import model_digest
from utils.distributed import left_together, num_ranks, rank
from utils.errors import UserError, one_line
from utils.files import whole_file
from utils.images import to_signed
from utils.locks import locked
from utils.logger import progress

Codes: TypeAlias = npt.NDArray[Any]
SHARD = 2**13  # images of a file
MEASURED = 2**16  # images, at most, from which statistics are taken
TOGETHER = 2**8  # images whose statistics are taken at a time


class StoredCodes:
    """Codes or latents of a set of images in files of SHARD images each, memory-mapped.

    `compute` comes first. The files' folder is named by the digest of the model's weights and of
    the images, so that changed ones get new codes.

    Args:
        model: first stage that encodes.
        space: codes (n, H, W, m) or latents (n, C, H, W).
        folder: below it is the folder of the files.
        flipped: encode the mirror images.
        batch_size, num_workers: of the images that are encoded.
    """

    def __init__(
        self,
        model: Autoencoder,
        images: ImageSet,
        space: Space,
        folder: Path,
        *,
        flipped: bool,
        batch_size: int,
        num_workers: int,
    ) -> None:
        self.model, self.images, self.folder, self.flipped = model, images, folder, flipped
        self.batch_size, self.num_workers = batch_size, num_workers
        self.space = space
        self.shards: list[Codes] = []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, positions: Tensor) -> Tensor:
        """Those of the images at positions (b,), int64 or float32."""
        codes = [self.shards[p // SHARD][p % SHARD] for p in positions.tolist()]
        stacked = np.stack(codes) if codes else np.empty((0, *self.space.shape))
        return torch.from_numpy(stacked.astype(self.space.dtype))

    def batches(self) -> Iterator[Tensor]:
        """Yield all of them, or MEASURED that are evenly spread, in order."""
        count = min(len(self), MEASURED)
        for positions in torch.split(torch.arange(count) * len(self) // count, TOGETHER):
            yield self[positions]

    def compute(self) -> None:
        """Compute those that are not on disk, the processes different files, and open them.

        A run that is killed loses one file. Raises UserError naming a file that is damaged.
        """
        folder = self.folder / self.key()
        numbers = range(-(-len(self) // SHARD))
        with locked(folder, "--output_folder"), left_together():
            for number in numbers[rank() :: num_ranks()]:
                path = folder / f"{number:05d}.npy"
                if not path.exists():
                    codes = np.concatenate(list(self.encode(number)))
                    with whole_file(path) as temporary, temporary.open("w+b") as file:
                        np.save(file, codes)  # its errors have no reason with "wb"
        self.shards = [self.open(folder / f"{number:05d}.npy", number) for number in numbers]

    def key(self) -> str:
        """Return the digest of model and images."""
        digest = hashlib.sha256(f"{model_digest(self.model)} {self.flipped}".encode())
        if isinstance(self.images, TensorImages):
            digest.update(self.images.images.numpy().tobytes())
        else:
            for part in (str(self.images.image_size), *self.images.identity()):
                digest.update(part.encode(errors="surrogateescape") + b"\0")
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def encode(self, number: int) -> Iterator[Codes]:
        """Yield the content of one file, batch by batch."""
        chosen = torch.arange(number * SHARD, min((number + 1) * SHARD, len(self)))
        loader = BatchLoader(
            choose(self.images, chosen),
            self.batch_size,
            device=next(self.model.parameters()).device,
            num_workers=self.num_workers,
        )
        with progress(loader.size, "image", disable=rank() > 0) as bar:
            for images in loader.epoch():
                signed = to_signed(images.flip(-1) if self.flipped else images)
                found = self.space.encode(self.model, signed).cpu().numpy()
                with np.errstate(over="ignore"):
                    stored = found.astype(self.space.stored_dtype)
                if not np.isfinite(stored).all():
                    raise UserError(f"--first_stage has latents of up to {abs(found).max():.3g}")
                yield stored
                bar.update(len(images))

    def open(self, path: Path, number: int) -> Codes:
        """Map a file. Raises UserError if it does not hold the codes or latents of its images."""
        try:
            codes: Codes = np.load(path, mmap_mode="r", allow_pickle=False)
            expected = (min(SHARD, len(self) - number * SHARD), *self.space.shape)
            if codes.shape != expected or codes.dtype != self.space.stored_dtype:
                found, right = f"{codes.dtype} {codes.shape}", np.dtype(self.space.stored_dtype)
                raise ValueError(f"it holds {found}, not {right} {expected}")
            if isinstance(self.space, CodeSpace) and not (
                codes.min() >= 0 and codes.max() < self.space.num_embedding
            ):
                raise ValueError(f"its codes are not in [0, {self.space.num_embedding})")
        except (OSError, EOFError, ValueError) as error:
            raise UserError(f"{path} is damaged, remove it: {one_line(error)}") from error
        return codes


class CodeLoader:
    """Batches of codes or latents, labels (b,) and random numbers on a device.

    Each is a function of (seed, epoch).

    `compute` comes first. The ranks share each batch in training, with shuffle, and take whole
    batches in turn without.

    Args:
        codes: codes or latents of the images.
        labels: (n,), −1 for no class.
        random: size and generator → random numbers (size, …) for a batch, whatever the processes.
        mirrored: codes of the mirror images, which half of the images are replaced by.
    """

    def __init__(
        self,
        codes: StoredCodes,
        labels: Tensor,
        mirrored: StoredCodes | None = None,
        *,
        random: Callable[[int, torch.Generator], tuple[Tensor, ...]],
        batch_size: int,
        device: torch.device,
        shuffle: bool,
        seed: int,
    ) -> None:
        self.codes, self.mirrored, self.labels = codes, mirrored, labels
        self.random, self.batch_size, self.device = random, batch_size, device
        self.shuffle, self.seed = shuffle, seed
        self.bad_images: dict[int, str] = {}

    def __len__(self) -> int:
        return -(-len(self.codes) // self.batch_size)

    def compute(self) -> None:
        """Compute what is not on disk."""
        self.codes.compute()
        if self.mirrored is not None:
            self.mirrored.compute()

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, ...]]:
        size = len(self.codes)
        order = permutation(size, self.seed, epoch) if self.shuffle else torch.arange(size)
        flips = draws(size, "flip", self.seed, epoch) < 0.5
        for number, batch in enumerate(torch.split(order, self.batch_size)):
            own = slice(rank(), None, num_ranks()) if self.shuffle else slice(None)
            if number < start or not (self.shuffle or number % num_ranks() == rank()):
                continue
            random = self.random(len(batch), generator_of(("noise", self.seed, epoch, number)))
            batch = batch[own]
            codes = self.codes[batch]
            if self.mirrored is not None:
                which = flips[batch]
                codes[which] = self.mirrored[batch[which]]
            found = (codes, self.labels[batch], *(each[own] for each in random))
            yield tuple(each.to(self.device) for each in found)
