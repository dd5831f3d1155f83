"""Measure samples of a trained prior: classes, nearest training images, seconds per sample.

Takes a prior and the folder that generate.py sample has written:
python experiments/samples.py --model_name mine_prior/best.pt. A small classifier, trained once on
the real training images, says how many samples are of the class that they were drawn for. Writes
<name of the prior>.md and a picture of the nearest training images to --output.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets import ImageSet, Labels
from datasets.config import DataConfig
from datasets.splits import opener
from experiments.classifier import AT_ONCE, classes_of, trained_classifier
from experiments.neighbours import COUNT, nearest, save_neighbours
from modules import Autoencoder
from modules.options import option
from modules.priors.registry import PRIORS
from modules.priors.sampling import Sampling, sample
from modules.priors.spec import Prior
from modules.priors.transformer import CodeTransformer
from utils.checkpoints.checkpoint import find_checkpoint
from utils.checkpoints.digest import tensors_digest
from utils.errors import UserError, one_line, run
from utils.files import writable_folder
from utils.flags.arguments import build, parse_flags
from utils.flags.command import words
from utils.generation.checkpoints import StoredPrior, read_prior
from utils.generation.samples import SETTINGS, labels_of, name_of, noise_of
from utils.image_files import open_image
from utils.images import to_bytes, to_signed
from utils.logger import log, start_logging
from utils.tables import Table, machine, machine_line, write_page

SHOWN = 10  # samples whose neighbours are shown
MANY = 1000  # samples and test images whose distances have a median
ROUNDS = (4, 8, 12, 16)  # of a masked prior
BATCHES = (1, 64)  # images that are drawn together


@dataclass(frozen=True)
class SamplesConfig:
    """A prior, its samples and the real images."""

    model_name: str = option(None, "the prior's checkpoint, under <output_folder>/models")
    output_folder: str = option("output", "folder of models and samples")
    first_stage: str | None = option(
        None, "checkpoint of the first stage (default: where it was in training)"
    )
    samples: Path | None = option(
        None, "folder of its samples (default: where generate.py sample writes them)"
    )
    num_samples: int | None = option(None, "measure the first N (default: all)", minimum=SHOWN)
    data_folder: str | None = option(None, "folder of the real images (default: as in training)")
    epochs: int = option(4, "epochs of the classifier", minimum=1, maximum=1000)
    classifiers: Path = option(Path("output/classifiers"), "folder of trained classifiers")
    output: Path = option(Path("output/measured"), "folder of page and picture")


def main() -> None:
    flags = parse_flags(__doc__, SamplesConfig)
    config = build(SamplesConfig, flags)
    start_logging()
    path = find_checkpoint("--model_name", config.model_name, config.output_folder)
    stored = read_prior(path)
    _, first_stage = stored.open_first_stage(config.first_stage, config.output_folder)
    prior = stored.model()
    folder = config.samples or stored.folder("samples", config.output_folder)
    settings = settings_of(folder, prior, stored)
    samples = read_samples(folder, config.num_samples, stored)
    training, test = (open_split(config, stored, split) for split in ("train", "test"))
    output = writable_folder(config.output, "--output")
    real = whole(training), whole(test)
    title = path.parent.name
    page = output / f"{title}.md"
    picture = output / f"{title}-neighbours.png"
    parts: list[str | Table] = [f"`python experiments/samples.py {' '.join(words(flags))}`"]
    if stored.classes:
        labels = labels_of_sets(stored, training, test)
        model = trained_classifier(real[0], labels[0], config.epochs, config.classifiers)
        intended = labels_of(list(range(len(samples))), settings.get("label"), len(stored.classes))
        sets = {
            "real test images": (real[1], labels[1].numbers),
            "their reconstructions": (reconstructions(first_stage, real[1]), labels[1].numbers),
            "samples": (samples, intended),
        }
        found = {name: (classes_of(model, images), own) for name, (images, own) in sets.items()}
        parts += class_tables(found, stored.classes)
    else:
        parts.append("The prior has no classes, so that no class is intended.")
    parts += neighbour_parts(samples, *real, picture)
    parts += [timings(prior, first_stage, settings), machine_line(machine(), "1 thread")]
    write_page(page, f"Samples of {title}", *parts)
    for part in parts:
        sys.stdout.write(f"{part.markdown() if isinstance(part, Table) else part}\n\n")
    sys.stdout.write(f"{page}\n{picture}\n")


# ------------------------------------------------------------------------------------------ images


def settings_of(folder: Path, prior: Prior, stored: StoredPrior) -> Mapping[str, Any]:
    """The settings of the samples in the folder. Raises UserError if they are of another prior."""
    record = folder / SETTINGS
    try:
        settings = json.loads(record.read_text())
        if not isinstance(settings, dict):
            raise ValueError("it holds no settings")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"--samples {folder} is not a folder of generate.py sample: {record.name}: "
            f"{one_line(error)}"
        ) from error
    digest = tensors_digest(prior.state_dict(), stored.first_stage.digest)
    if settings.get("prior") != digest:
        raise UserError(f"--samples {folder} holds samples of another prior than {stored.path}")
    return settings


def read_samples(folder: Path, number: int | None, stored: StoredPrior) -> Tensor:
    """The first samples, (n, C, h, w). Raises UserError if there are too few."""
    there = 0
    while (folder / name_of(there)).is_file():
        there += 1
    needed = SHOWN if number is None else number
    if there < needed:
        raise UserError(f"--samples {folder} has {there} samples, and {needed} are needed")
    images = []
    for path in (folder / name_of(n) for n in range(there if number is None else number)):
        with open_image(path, str(path)) as image:
            images.append(pil_to_tensor(image))
    side = stored.first_stage.image_size
    if {image.shape[1:] for image in images} != {(side, side)}:
        raise UserError(f"--samples {folder}: its images are not of {side}×{side} pixels")
    return torch.stack(images)


def open_split(config: SamplesConfig, stored: StoredPrior, split: str) -> ImageSet:
    """Training or test images that the prior was trained on, or those of --data_folder."""
    data = stored.group("data_config", DataConfig)
    folder = config.data_folder or data.data_folder
    return opener(replace(data, data_folder=folder))(split)


def whole(images: ImageSet) -> Tensor:
    """All images, (n, C, H, W), in memory."""
    return torch.stack([images[index] for index in range(len(images))])


@torch.no_grad()
def reconstructions(first_stage: Autoencoder, images: Tensor) -> Tensor:
    """Images (n, C, H, W) encoded to codes and decoded."""
    parts = torch.split(images, AT_ONCE)
    codes = (first_stage.encode(to_signed(part)) for part in parts)
    return torch.cat([to_bytes(first_stage.decode(own)) for own in codes])


# ----------------------------------------------------------------------------------------- classes


def labels_of_sets(stored: StoredPrior, *sets: ImageSet) -> list[Labels]:
    """Labels of the real images. Raises UserError if the classes are not those of the prior."""
    labels = [images.labels() for images in sets]
    for own in labels:
        if tuple(own.names) != stored.classes:
            raise UserError(
                f"--data_folder: the images have {len(own.names)} classes ({own.names[0]} …), "
                f"{stored.path} has {len(stored.classes)} ({stored.classes[0]} …)"
            )
    return labels


def class_tables(
    sets: Mapping[str, tuple[Tensor, Tensor]], classes: tuple[str, ...]
) -> list[str | Table]:
    """Share of images that the classifier gives the right or intended class, also by class."""
    right = {name: found == intended for name, (found, intended) in sets.items()}
    shares = {name: 100 * float(own.float().mean()) for name, own in right.items()}
    ceiling = next(iter(shares.values()))
    log.info("classifier: %.2f %% of the test images right", ceiling)
    overall = Table(
        "Right or intended class by a classifier of real images",
        ["images", "number", "share", "beside real test images"],
        [
            (name, len(right[name]), f"{share:.1f} %", f"{share - ceiling:+.1f} points")
            for name, share in shares.items()
        ],
    )
    by_class = Table("The same by class", ["class", *sets])
    for number, label in enumerate(classes):
        own = [right[name][intended == number] for name, (_, intended) in sets.items()]
        cells = (f"{100 * float(part.float().mean()):.0f} %" if len(part) else "–" for part in own)
        by_class.rows.append((label, *cells))
    return [overall, by_class]


# -------------------------------------------------------------------------------------- neighbours


def neighbour_parts(
    samples: Tensor, training: Tensor, test: Tensor, picture: Path
) -> list[str | Table]:
    """Distances of samples, and of test images, to the training images; write their picture."""
    sets = {"sample": samples[:MANY], "test image": test[:MANY]}
    found = {name: nearest(images, training) for name, images in sets.items()}
    shown = {
        name: (images[:SHOWN], type(found[name])(*(part[:SHOWN] for part in found[name])))
        for name, images in sets.items()
    }
    save_neighbours(picture, shown, training)
    table = Table(
        f"Distance to the nearest of {len(training):,} training images",
        ["", f"of the first {SHOWN}", "least", "median", "of images"],
    )
    for name, own in found.items():
        least = own.distances[:, 0]
        first, median = least[:SHOWN].tolist(), float(least.median())
        shown_values = (
            ", ".join(f"{value:.1f}" for value in values)
            for values in (first, [float(least.min())], [median])
        )
        table.rows.append((name, *shown_values, len(least)))
    text = (
        "The distance is the root mean squared difference of pixels, of 255. A copy of a training "
        "image would have a distance near 0."
    )
    return [
        table,
        text,
        f"![The first samples, and the {COUNT} nearest training images of each]({picture.name})",
    ]


# ------------------------------------------------------------------------------------------ timing


def ways(prior: Prior, how: Sampling) -> dict[str, Callable[..., Tensor]]:
    """Functions of prior, labels and noise that draw codes or latents, by the name of the way."""
    if not isinstance(prior, CodeTransformer):
        name = f"{how.sampler}, {how.sampling_steps} steps"
        return {name: partial(PRIORS["diffusion"].sample, how=how)}
    if prior.causal:
        draw = partial(sample, how=how)
        return {
            "with the cache of keys and values": draw,
            "without the cache": partial(draw, cached=False),
        }
    return {f"{n} rounds": partial(sample, how=replace(how, rounds=n)) for n in ROUNDS}


def timings(prior: Prior, first_stage: Autoencoder, settings: Mapping[str, Any]) -> Table:
    """Seconds per image of each way, decoding included."""
    names = {item.name for item in fields(Sampling)} & settings.keys()
    how = Sampling(**{name: settings[name] for name in names})
    columns = [f"{size} at a time" for size in BATCHES]
    table = Table("Seconds per sample on one core", ["", *columns])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, draw in ways(prior, how).items():
        table.rows.append((name, *(seconds(draw, prior, first_stage, size) for size in BATCHES)))
    torch.set_num_threads(threads)
    return table


@torch.no_grad()
def seconds(
    draw: Callable[..., Tensor],
    prior: Prior,
    first_stage: Autoencoder,
    size: int,
) -> float:
    """Seconds per image of a batch: the faster of two runs."""
    numbers, classes = list(range(size)), prior.num_classes
    took = []
    for _ in range(2):
        start = time.perf_counter()
        drawn = draw(prior, labels_of(numbers, None, classes), noise_of(0, numbers))
        prior.space.decode(first_stage, drawn)
        took.append((time.perf_counter() - start) / size)
    return min(took)


if __name__ == "__main__":
    run(main)
