"""Drawing samples to a folder: one PNG for each, a grid of the first ones, and their settings."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import make_grid

from modules import Autoencoder
from modules.priors.sampling import Known, Sampling
from modules.priors.spec import Noise, Prior, PriorSpec
from utils.distributed import from_first, left_together, num_ranks, rank
from utils.errors import UserError
from utils.files import whole_file, write_json
from utils.image_files import open_image
from utils.images import fitted, to_bytes, to_picture
from utils.logger import log, progress

USUAL_COUNT = 100  # samples, unless the user says another
GRID = 100  # images of the grid
WRITERS = 8  # threads, as each one waits for the disk
GRID_NAME, SETTINGS = "grid.png", "samples.json"
SAMPLES = 8 * "[0-9]" + ".png"  # pattern of their names


def noise_of(seed: int, numbers: list[int]) -> Noise:
    """Uniform numbers for the samples of these numbers: the same in any batch and process."""
    generators = [np.random.default_rng((seed, number)) for number in numbers]

    def noise(*sizes: int) -> Tensor:
        return torch.from_numpy(np.stack([generator.random(sizes) for generator in generators]))

    return noise


def labels_of(numbers: list[int], label: int | None, num_classes: int) -> Tensor:
    """Classes of the samples: the given one, else all in turn; −1 for a prior without."""
    if not num_classes:
        return torch.full((len(numbers),), -1)
    return torch.tensor([number % num_classes if label is None else label for number in numbers])


@torch.no_grad()
def draw_images(
    spec: PriorSpec,
    first_stage: Autoencoder,
    how: Sampling,
    prior: Prior,
    labels: Tensor,
    noise: Noise,
    known: Known | None = None,
) -> Tensor:
    """Draw images (b, C, h, w), uint8, of the classes `labels`."""
    drawn = spec.sample(prior, labels, noise, how, known)
    return to_bytes(prior.space.decode(first_stage, drawn))


def write_samples(
    folder: Path,
    settings: Mapping[str, Any],
    num_samples: int,
    batch_size: int,
    draw: Callable[[list[int]], Tensor],
    arrange: Callable[[Tensor], tuple[Tensor, int]] = lambda images: (images, 10),
) -> None:
    """Write the samples that the folder lacks, and grid.png; all processes call this together.

    arrange: the first samples (n, C, h, w) → the pictures of the grid, and how many make a row.

    Raises UserError if the folder holds samples of other settings.
    """
    missing = from_first(lambda: missing_samples(folder, settings, num_samples))

    def write(number: int, image: Tensor) -> None:
        with whole_file(folder / name_of(number)) as temporary:
            to_picture(image).save(temporary, format="PNG", compress_level=1)

    bar = progress(len(missing), "image", disable=rank() > 0 or not missing)
    with left_together(), bar, ThreadPoolExecutor(WRITERS) as pool:
        for start in range(rank() * batch_size, len(missing), batch_size * num_ranks()):
            numbers = missing[start : start + batch_size]
            list(pool.map(write, numbers, draw(numbers)))
            bar.update(min(batch_size * num_ranks(), len(missing) - bar.n))
    if rank() == 0:
        save_grid(folder, min(num_samples, GRID), arrange)


def name_of(number: int) -> str:
    return f"{number:08d}.png"


def missing_samples(folder: Path, settings: Mapping[str, Any], num_samples: int) -> list[int]:
    """Numbers of the samples that are not in the folder, whose settings are written first."""
    record = folder / SETTINGS
    present = {path.name for path in folder.glob(SAMPLES)}
    if record.exists():
        check_settings(record, settings)
    elif present:
        raise UserError(f"{folder} holds pictures without {SETTINGS}; --overwrite replaces them")
    write_json(record, dict(settings))
    if len(present) > num_samples:
        log.info("%s keeps %d samples of an earlier run", folder, len(present))
    return [number for number in range(num_samples) if name_of(number) not in present]


def check_settings(record: Path, settings: Mapping[str, Any]) -> None:
    """Raise UserError naming the first flag in which earlier samples in the folder differ."""
    try:
        before = json.loads(record.read_text())
        if not isinstance(before, dict):
            raise ValueError("no settings")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{record} is damaged; --overwrite replaces its samples") from error
    if before.get("prior") != settings["prior"]:
        raise UserError(
            f"{record.parent} holds samples of another prior; --overwrite replaces them"
        )
    for name, value in settings.items():
        if before.get(name) != value:
            raise UserError(
                f"{record.parent} holds samples with --{name} {before.get(name)}, not {value}; "
                "give --overwrite to replace them"
            )


def remove_samples(folder: Path) -> None:
    """Remove the samples of a folder, its grid, its settings and its report."""
    for path in folder.glob(SAMPLES):
        path.unlink(missing_ok=True)
    for name in (GRID_NAME, SETTINGS, "report.html"):
        (folder / name).unlink(missing_ok=True)


def save_grid(folder: Path, count: int, arrange: Callable[[Tensor], tuple[Tensor, int]]) -> None:
    """Write the first samples as one picture."""
    images, columns = arrange(torch.stack(first_samples(folder, count)))
    with whole_file(folder / GRID_NAME) as temporary:
        picture = to_picture(make_grid(images, nrow=columns, pad_value=255))
        fitted(picture, 800, 2400).save(temporary, format="PNG")
    log.info("%s", folder / GRID_NAME)


def first_samples(folder: Path, count: int) -> list[Tensor]:
    """Read the first samples. Raises UserError naming one that is damaged or of another size."""
    images: list[Tensor] = []
    for number in range(count):
        path = folder / name_of(number)
        try:
            with open_image(path, str(path)) as picture:
                images.append(pil_to_tensor(picture))
                if images[-1].shape != images[0].shape:
                    raise ValueError(f"it differs from {name_of(0)} in size or colours")
        except UserError as error:
            raise UserError(f"{error}; remove it, and it is drawn again") from error
    return images
