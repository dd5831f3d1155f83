"""Random orders, draws and splits, each a function of its key alone: the same in every run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from datasets.image_sets import ChosenImages, ImageSet, TensorImages, chosen_labels
from utils.errors import UserError


def permutation(n: int, *key: int | str) -> Tensor:
    """Return the numbers 0 … n − 1 in random order, (n,), int64."""
    return torch.randperm(n, generator=generator_of(key))


def draws(n: int, *key: int | str) -> Tensor:
    """Return n numbers drawn from [0, 1), (n,)."""
    return torch.rand(n, generator=generator_of(key))


def generator_of(key: tuple[int | str, ...]) -> torch.Generator:
    """Return a generator seeded by the key."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def hold_out(n: int, purpose: str) -> tuple[Tensor, Tensor]:
    """Return indices (kept, held out), each ascending; a tenth is held out, and at least one."""
    order = permutation(n, purpose)
    tenth = max(1, (n + 5) // 10)
    return order[tenth:].sort().values, order[:tenth].sort().values


def hold_out_by_name(names: Sequence[str], purpose: str) -> tuple[Tensor, Tensor]:
    """Return indices (kept, held out), each by a hash of its name alone: no other name matters.

    About a tenth is held out; of two names, one.
    """
    places = torch.tensor([place_of(name, purpose) for name in names], dtype=torch.float64)
    held_out = places < 0.1
    held_out[places.argmin()] = True
    held_out[places.argmax()] = False
    return (~held_out).nonzero().flatten(), held_out.nonzero().flatten()


def place_of(name: str, purpose: str) -> float:
    """Return a hash of the name in [0, 1)."""
    digest = hashlib.sha256(os.fsencode(f"{purpose}/{name}")).digest()
    return int.from_bytes(digest[:4], "little") / 2**32


def split_validation(images: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Return (train, validation): about a tenth is for validation, images on disk by their names.

    Sets in memory stay there.
    """
    if len(images) < 2:
        raise UserError(
            f"--data_folder gives {len(images)} training image; a tenth is held out for "
            "validation, so that 2 training images are needed, or --validation test"
        )
    if isinstance(images, TensorImages):
        train, validation = hold_out(len(images), "validation")
    else:
        train, validation = hold_out_by_name(images.split_keys(), "validation")
    return choose(images, train), choose(images, validation)


def evenly_spread(images: ImageSet, most: int) -> ImageSet:
    """At most so many of the images, from the whole length of the set."""
    count = min(most, len(images))
    return choose(images, torch.arange(count) * len(images) // count)


def choose(images: ImageSet, indices: Tensor) -> ImageSet:
    """The images of these indices (n,), in memory if the set is."""
    if isinstance(images, TensorImages):
        return TensorImages(images.images[indices], partial(chosen_labels, images, indices))
    return ChosenImages(images, indices)
