"""Whole pictures of any size: the files and folders that a user names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets.folders import list_images, warn_of_empty_bits
from datasets.image_sets import FileImages
from utils.errors import UserError
from utils.image_files import open_image, viewed

GREY_MODES = ("1", "L", "LA", "La", "I", "F")  # and I;16 in its variants


@dataclass(eq=False)
class Pictures:
    """Pictures decoded one at a time, each in its own size; the ranks take them in turn.

    A picture that cannot be decoded, or has colours where the model takes grey levels, raises
    UserError; skip_bad skips it and notes it in bad_images, position → message.
    """

    files: dict[str, Path]  # by name
    channels: int  # 1 or 3
    _: KW_ONLY
    device: torch.device
    rank: int = 0
    num_ranks: int = 1
    skip_bad: bool = False
    bits: int = FileImages.bits  # that 16-bit grey levels use
    bad_images: dict[int, str] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.names = list(self.files)
        self.size = len(self.files)
        if self.channels not in (1, 3):
            raise UserError(f"--images has 1 or 3 channels, the model takes {self.channels}")

    def shares(self, _epoch: int = 0, start: int = 0, /) -> list[Tensor]:
        """Return the positions of this rank's pictures, each a batch."""
        return list(torch.arange(self.size)[self.rank :: self.num_ranks, None][start:])

    def numbered(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this rank's pictures as batches of one: positions (1,) and images (1, C, h, w)."""
        for position in self.shares():
            try:
                image = self.decode(int(position))
            except UserError as error:
                if not self.skip_bad:
                    raise
                self.bad_images[int(position)] = str(error)
            else:
                yield position, image[None].to(self.device)

    def decode(self, position: int) -> Tensor:
        """Decode a picture → (C, h, w), uint8, as a viewer shows it."""
        path = self.files[self.names[position]]
        with open_image(path, str(path)) as image:
            grey = self.channels == 1 and image.mode.split(";")[0] in GREY_MODES
            pixels = np.asarray(viewed(image, "L" if grey else "RGB", self.bits))
        channels_first = pixels[None] if grey else pixels.transpose(2, 0, 1)
        if (channels_first[: self.channels] != channels_first).any():
            raise UserError(f"image {path} has colours, and the model takes grey levels only")
        return torch.from_numpy(channels_first[: self.channels].copy())

    def source(self, position: int) -> str:
        """Return the path of a picture's file."""
        return str(self.files[self.names[position]])


def find_pictures(given: Sequence[str], bits: int = FileImages.bits) -> dict[str, Path]:
    """Find the files of --images, and the images in its folders and below, by name.

    A name is that of the file, in a folder with the path below that folder, without suffix; where
    two differ in nothing but the suffix, they keep it. Raises UserError naming what is missing, or
    two files that would have one name. Warns where 16-bit pictures use fewer bits than these.
    """
    found: dict[Path, str] = {}  # file → its name with suffix
    for text in given:
        path = Path(text)
        if not text or not path.exists():
            raise UserError(f"--images {text} does not exist" if text else "--images is empty")
        names = list_images(path, "--images") if path.is_dir() else [path.name]
        folder = path if path.is_dir() else path.parent
        if bits == FileImages.bits:
            warn_of_empty_bits(folder, names)
        found |= {folder / name: name for name in names}
    files: dict[str, Path] = {}
    for name, file in zip(picture_names(list(found.values())), found):
        other = files.setdefault(name, file)
        if other != file:
            raise UserError(f"--images: {other} and {file} have one name; give the folder above")
    return files


def picture_names(names: Sequence[str]) -> list[str]:
    """Leave out the suffix of each file's name, unless another file would have the same name."""
    stems = list(map(without_suffix, names))
    taken = {*names, *(stem for stem, number in Counter(stems).items() if number > 1)}
    return [name if stem in taken else stem for name, stem in zip(names, stems)]


def without_suffix(name: str) -> str:
    return name.removesuffix(Path(name).suffix)
