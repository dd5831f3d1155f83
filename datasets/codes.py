"""Codes of a set of images, computed once and kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets.image_sets import ImageSet, TensorImages
from datasets.loader import BatchLoader
from datasets.sampling import choose, draws, permutation
from modules import Autoencoder
from utils.checkpoints.digest import model_digest
from utils.distributed import num_ranks, rank, wait_for_all
from utils.errors import UserError, one_line
from utils.files import remove_left_overs, whole_file, writable_folder
from utils.images import to_signed
from utils.logger import progress

SHARD = 2**16  # images of a file


class StoredCodes:
    """Codes (n, H, W, m) of a set of images in files of SHARD images each, memory-mapped."""

    def __init__(self, folder: Path, num_images: int) -> None:
        """Raises UserError if a file is missing or is not of that many images."""
        self.num_images = num_images
        self.shards = []
        for number in range(-(-num_images // SHARD)):
            path = shard_path(folder, number)
            expected = min(SHARD, num_images - number * SHARD)
            try:
                shard = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, EOFError, ValueError) as error:
                raise UserError(f"{path} cannot be read: {one_line(error)}; remove it") from error
            if len(shard) != expected:
                raise UserError(
                    f"{path} has codes of {len(shard)} images, not {expected}; remove it"
                )
            self.shards.append(shard)

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, positions: Tensor) -> Tensor:
        """Codes of the images at positions (b,): (b, H, W, m), int64."""
        codes = [self.shards[p // SHARD][p % SHARD] for p in positions.tolist()]
        shape = (0, *self.shards[0].shape[1:])
        stacked = np.stack(codes).astype(np.int64) if codes else np.empty(shape, np.int64)
        return torch.from_numpy(stacked)


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.npy"


def stored_codes(
    model: Autoencoder,
    images: ImageSet,
    folder: Path,
    *,
    flipped: bool,
    batch_size: int,
    num_workers: int,
) -> StoredCodes:
    """Codes of all images, or of their mirror images; those not on disk are computed first.

    The folder's subfolder is named by the digest of the model's weights and of the images, so that
    changed ones get new codes. Several processes compute different files. A killed run loses one
    file of SHARD images at most.
    """
    device = next(model.parameters()).device
    key = hashlib.sha256(f"{model_digest(model)} {flipped}".encode())
    for part in identity(images):
        key.update(part.encode(errors="surrogateescape") + b"\0")
    folder = writable_folder(folder / key.hexdigest()[:16], "--output_folder")
    remove_left_overs(folder)
    for number in range(rank(), -(-len(images) // SHARD), num_ranks()):
        path = shard_path(folder, number)
        if path.exists():
            continue
        chosen = torch.arange(number * SHARD, min((number + 1) * SHARD, len(images)))
        loader = BatchLoader(
            choose(images, chosen), batch_size, device=device, num_workers=num_workers
        )
        codes = np.concatenate(list(encoded(model, loader, flipped=flipped)))
        with whole_file(path) as temporary, temporary.open("wb") as file:
            np.save(file, codes)
    wait_for_all()
    return StoredCodes(folder, len(images))


def identity(images: ImageSet) -> Iterator[str]:
    """Strings that change whenever the images do."""
    if isinstance(images, TensorImages):
        yield hashlib.sha256(images.images.numpy().tobytes()).hexdigest()
    else:
        yield str(images.image_size)
        yield from images.identity()


@torch.no_grad()
def encoded(model: Autoencoder, loader: BatchLoader, *, flipped: bool) -> Iterator[np.ndarray]:
    """Yield the codes of each batch, (b, H, W, m), in the smallest integer type."""
    bits = (model.config.num_embedding - 1).bit_length()
    dtype = np.dtype("u1" if bits <= 8 else "<u2" if bits <= 16 else "<i4")
    with progress(loader.size, "image", disable=rank() > 0) as bar:
        for images in loader.epoch():
            signed = to_signed(images.flip(-1) if flipped else images)
            yield model.encode(signed).cpu().numpy().astype(dtype)
            bar.update(len(images))


class CodeLoader:
    """Batches of codes (b, H, W, m) and labels (b,) on a device, as a function of (seed, epoch).

    The ranks share each batch in training, with shuffle, and take whole batches in turn without.

    Args:
        codes: those of the images.
        labels: (n,), −1 for no class.
        mirrored: codes of the mirror images, which half of the images are replaced by.
    """

    def __init__(
        self,
        codes: StoredCodes,
        labels: Tensor,
        mirrored: StoredCodes | None = None,
        *,
        batch_size: int,
        device: torch.device,
        shuffle: bool,
        seed: int,
    ) -> None:
        self.codes, self.mirrored, self.labels = codes, mirrored, labels
        self.batch_size, self.device, self.shuffle, self.seed = batch_size, device, shuffle, seed
        self.bad_images: dict[int, str] = {}

    def __len__(self) -> int:
        return -(-len(self.codes) // self.batch_size)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        size = len(self.codes)
        order = permutation(size, self.seed, epoch) if self.shuffle else torch.arange(size)
        flips = draws(size, "flip", self.seed, epoch) < 0.5
        for number, batch in enumerate(torch.split(order, self.batch_size)):
            if self.shuffle:
                batch = batch[rank() :: num_ranks()]
            if number >= start and (self.shuffle or number % num_ranks() == rank()):
                codes = self.codes[batch]
                if self.mirrored is not None:
                    which = flips[batch]
                    codes[which] = self.mirrored[batch[which]]
                yield codes.to(self.device), self.labels[batch].to(self.device)
