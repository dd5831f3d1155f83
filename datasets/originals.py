"""The pictures that generate.py edits, as squares of the size that the model takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from datasets.config import DataConfig
from datasets.image_sets import square_of
from datasets.pictures import Pictures, find_pictures
from datasets.splits import opener
from modules import Autoencoder
from utils.distributed import first_goes_ahead
from utils.errors import UserError
from utils.generation.checkpoints import StoredPrior
from utils.generation.config import SampleConfig
from utils.generation.editing import SIDES, Editing, known_positions
from utils.images import to_picture

NUM_TEST_IMAGES = 10  # that are edited, unless --images names others
CPU = torch.device("cpu")


def open_editing(
    config: SampleConfig, prior: StoredPrior, first_stage: Autoencoder
) -> Editing | None:
    """Open the pictures that flags ask to edit, if any, and say how."""
    if config.edit is None:
        return None
    space = prior.space
    data = prior.group("data_config", DataConfig)
    size, channels = prior.first_stage.image_size, first_stage.config.in_channels
    with first_goes_ahead():
        originals = squares(config.images, data, channels, size)
    if config.interpolate is not None:
        if len(originals) < 2:
            raise UserError(f"--interpolate {config.interpolate} needs two pictures or more")
        return Editing(originals, space, share=config.vary or 0.5, steps=config.interpolate)
    if config.vary is not None:
        return Editing(originals, space, share=config.vary)
    part: Any = config.inpaint
    if part not in SIDES:
        if not Path(part).is_file():
            raise UserError(f"--inpaint {part} is neither {', '.join(SIDES)} nor a picture")
        part = mask_of(part, config.images, size)
    return Editing(originals, space, known_positions(part, space))


def squares(given: Sequence[str], data: DataConfig, channels: int, size: int) -> Tensor:
    """Open the pictures of --images, or else the first test images: (n, C, size, size), uint8.

    As in training, a picture is its square in the middle, resized.
    """
    if not given:
        images = opener(data)("test")
        return torch.stack([images[i] for i in range(min(NUM_TEST_IMAGES, len(images)))])
    pictures = Pictures(find_pictures(given, data.bits), channels, device=CPU, bits=data.bits)
    return torch.stack([square(pictures.decode(i), size) for i in range(pictures.size)])


def square(picture: Tensor, size: int) -> Tensor:
    """Cut a picture (C, h, w) to its square in the middle and resize it: (C, size, size)."""
    cut = square_of(to_picture(picture)).resize((size, size), Image.Resampling.BICUBIC)
    pixels: Tensor = pil_to_tensor(cut)
    return pixels


def mask_of(name: str, given: Sequence[str], size: int) -> Tensor:
    """Open a mask that is cut as the pictures are: (size, size), True where it is white.

    Raises UserError where it is not of the size of the pictures of --images, or has no white.
    """
    mask = Pictures({name: Path(name)}, 3, device=CPU).decode(0)
    pictures = Pictures(find_pictures(given), 3, device=CPU)
    for index in range(pictures.size):
        (height, width), (other_height, other_width) = (
            x.shape[1:] for x in (mask, pictures.decode(index))
        )
        if (height, width) != (other_height, other_width):
            raise UserError(
                f"--inpaint {name} is {width}×{height}, and {pictures.source(index)} "
                f"{other_width}×{other_height}"
            )
    white = square(mask, size).float().mean(0) > 127.5
    if not white.any():
        raise UserError(f"--inpaint {name} has nothing white in its square, which is drawn anew")
    return white
