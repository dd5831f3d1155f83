"""Generate images: train a prior on a first stage's codes or latents, then draw samples from it.

generate.py train --first_stage <exp>/best.pt writes <output_folder>/models/<exp_name>/best.pt and
last.pt. The same command again continues.
generate.py sample --model_name <exp_name>/best.pt writes images, grid.png and report.html to
<output_folder>/samples/<model_name>/; --inpaint, --vary and --interpolate edit pictures. Both take
--help, and share work under torchrun.
"""

from __future__ import annotations

from utils.start import run  # isort: skip  # before those that take seconds

import sys
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datasets import ImageSet, Labels
from datasets.codes import CodeLoader, StoredCodes
from datasets.config import DataConfig
from datasets.originals import open_editing
from datasets.splits import check_fit, check_images, data_flags, names_stored, open_training
from modules import Autoencoder
from modules.priors.config import PriorConfig
from modules.priors.registry import PRIORS
from modules.priors.sampling import Known, Sampling
from modules.priors.spaces import CodeSpace, Space
from modules.priors.spec import Noise, Prior, PriorSpec
from utils.checkpoints.checkpoint import (
    Checkpoint,
    Stored,
    check_tensors,
    find_checkpoint,
    read_checkpoint,
    results_name,
)
from utils.checkpoints.digest import tensors_digest
from utils.devices import keep_freed_memory, memory_of, seed_everything
from utils.distributed import first_goes_ahead, num_ranks, rank, seed_rank, start_ranks, stop_ranks
from utils.errors import UserError, memory_for
from utils.flags.arguments import build, check_stored, parse_flags, with_preset
from utils.flags.command import this_command
from utils.generation.checkpoints import FirstStage, StoredPrior, new_prior, read_prior
from utils.generation.config import PriorTrainConfig, SampleConfig
from utils.generation.samples import labels_of, noise_of, remove_samples, write_samples
from utils.images import to_bytes
from utils.locks import locked
from utils.logger import log, start_logging
from utils.report.samples import write_samples_report
from utils.training.denoising import Denoising
from utils.training.likelihood import Likelihood
from utils.training.prior import PriorTask
from utils.training.resume import experiment_folders, resume, start_files
from utils.training.trainer import Trainer


def main() -> None:
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word not in COMMANDS:
        if word in ("-h", "--help"):
            parse_flags(__doc__)
        raise UserError(f"give {' or '.join(COMMANDS)} first, not {word!r}")
    keep_freed_memory()
    torch.backends.cudnn.allow_tf32 = False  # codes as those of test.py
    torch.backends.cudnn.deterministic = True
    COMMANDS[word]()
    stop_ranks()


def path_of(flag: str, name: str | None, config: PriorTrainConfig | SampleConfig) -> Path:
    """Path of a checkpoint that a flag names. Raises UserError if it is missing."""
    if name is None:
        raise UserError(f"{flag} is missing: a checkpoint under <output_folder>/models")
    return find_checkpoint(flag, name, config.output_folder)


# ------------------------------------------------------------------------------------------- train


def train() -> None:
    groups = PriorConfig, PriorTrainConfig, DataConfig
    given = parse_flags(__doc__, *groups, command="train")
    flags = with_preset(given, *groups)
    flags = {**PRIORS[flags.get("prior", PriorConfig.prior)].implies, **flags}
    config, prior_config = build(PriorTrainConfig, flags), build(PriorConfig, flags)
    start_logging(quiet=rank() > 0)
    device = start_ranks(config.device)
    checkpoint = read_checkpoint(path_of("--first_stage", config.first_stage, config))
    data = data_of(checkpoint, flags)
    with first_goes_ahead():
        images = open_training(data, "split")
    first_stage = checkpoint.model().to(device)
    check_fit(checkpoint, data, images[0])
    try:
        space = prior_config.spec.space.of(first_stage, images[0].image_size)
    except ValueError as error:
        raise UserError(f"--first_stage {checkpoint.path}: {error}") from error
    if config.exp_name is None:
        config = replace(config, exp_name=f"{checkpoint.path.parent.name}_{prior_config.prior}")
    trainer = make_trainer(config, prior_config, data, first_stage, space, images, checkpoint)
    trainer.stored["command"] = asdict(this_command(given, num_ranks(), "train"))
    with locked(trainer.models, "--exp_name"):
        resume(trainer, partial(check_prior, data=data, current=trainer.stored))
        start_files(trainer)
        for loader in (trainer.train_loader, trainer.validation_loader):
            assert isinstance(loader, CodeLoader)
            loader.compute()
        if trainer.step == 0:
            assert isinstance(trainer.train_loader, CodeLoader)
            for prior in {trainer.model, trainer.best_model}:
                prior.measure(trainer.train_loader.codes.batches())
        log.info(
            "%d training images of %s as %s; steps %d to %d on %s",
            *(len(images[0]), data.dataset, space),
            *(trainer.step, trainer.total_steps, device),
        )
        with memory_for(f"--batch_size {config.batch_size} (--accumulate splits it)"):
            trainer.fit()
    log.info("checkpoints: %s\nTensorBoard: %s", trainer.models, trainer.logs)


def data_of(checkpoint: Checkpoint, flags: dict[str, Any]) -> DataConfig:
    """The data flags given, else those of the first stage without its --flip and --crop."""
    ignored = ("crop", "crop_scale", "skip_bad_images", "image_cache")
    for name in ignored:
        if name in flags:
            raise UserError(f"--{name} has no effect on codes and latents, which are computed once")
    found = {**data_flags(checkpoint, flags), "flip": flags.get("flip", False)}
    data = build(DataConfig, {name: found[name] for name in found if name not in ignored})
    folder = None if data.data_folder is None else str(Path(data.data_folder).absolute())
    return replace(data, data_folder=folder)


def make_trainer(
    config: PriorTrainConfig,
    prior_config: PriorConfig,
    data: DataConfig,
    first_stage: Autoencoder,
    space: Space,
    images: tuple[ImageSet, ImageSet],
    checkpoint: Checkpoint,
) -> Trainer:
    """The trainer of this prior, at its first step."""
    device = next(first_stage.parameters()).device
    models, logs = experiment_folders(config)
    encode = partial(
        StoredCodes,
        first_stage,
        space=space,
        folder=Path(config.output_folder) / space.items,
        batch_size=config.batch_size,
        num_workers=data.num_workers,
    )
    training, validation = images
    labels = [labels_of_set(part, config) for part in images]
    classes = labels[0].names
    check_weights(prior_config, space, device)
    seed_everything(config.seed, device)
    shape = ", ".join(f"--{name}" for name in sorted(prior_config.spec.reads))
    with memory_for(shape):
        prior = new_prior(prior_config, space, len(classes)).to(device)
    if config.pretrained is not None:
        path = path_of("--pretrained", config.pretrained, config)
        load_pretrained(prior, prior_config, path)
    seed_rank(config.seed)
    kind: type[PriorTask] = Likelihood if isinstance(space, CodeSpace) else Denoising
    task = kind(
        prior,
        training.image_size**2,
        config.label_dropout,
        partial(draw_images, prior_config.spec, first_stage, Sampling()),
    )
    load = partial(
        CodeLoader,
        random=prior.draws,
        batch_size=config.batch_size,
        device=device,
        seed=config.seed,
    )
    return Trainer(
        task,
        load(
            encode(training, flipped=False),
            labels[0].numbers,
            encode(training, flipped=True) if data.flip else None,
            shuffle=True,
        ),
        load(encode(validation, flipped=False), labels[1].numbers, shuffle=False),
        config,
        models=models,
        logs=logs,
        configs={"prior_config": (prior_config,), "data_config": (data,)},
        stored={
            **names_stored(training, validation),
            "space": asdict(space),
            "first_stage": asdict(FirstStage.of(checkpoint, training.image_size)),
            "classes": list(classes),
        },
    )


def check_weights(config: PriorConfig, space: Space, device: torch.device) -> None:
    """Raise UserError if weights, gradients and Adam's moments alone do not fit into memory."""
    with torch.device("meta"):
        count = sum(weight.numel() for weight in new_prior(config, space, 0).parameters())
    needed, there = 4 * 4 * count, memory_of(device)
    if needed > there:
        names = sorted(name for name in config.spec.reads if "dropout" not in name)
        sizes = ", ".join(f"--{name} {getattr(config, name)}" for name in names)
        raise UserError(
            f"{sizes}: a prior of {space} has {count:,} weights; training takes "
            f"{needed / 1e9:,.0f} GB for them, {device} has {there / 1e9:,.0f}"
        )


def labels_of_set(images: ImageSet, config: PriorTrainConfig) -> Labels:
    """Classes of the images; −1 each without --class_conditional."""
    if not config.class_conditional:
        return Labels(torch.full((len(images),), -1), ())
    try:
        return images.labels()
    except UserError as error:
        raise UserError(f"--class_conditional: {error}") from error


def load_pretrained(prior: Prior, config: PriorConfig, path: Path) -> None:
    """Load the weights of another prior. Raises UserError if they do not fit."""
    stored = read_prior(path)
    without_shape = ("prior", "heads", "unet_head_channels")  # the tensors do not tell these
    shared = {name: getattr(config, name) for name in without_shape}
    check_stored(shared, asdict(stored.config), f"--pretrained {path}")
    try:
        check_tensors(prior.state_dict(), stored.content.get("model"))
    except ValueError as error:
        raise UserError(f"--pretrained {path} is {error}") from error
    prior.load_state_dict(stored.content["model"])


@torch.no_grad()
def draw_images(
    spec: PriorSpec,
    first_stage: Autoencoder,
    how: Sampling,
    prior: Prior,
    labels: Tensor,
    noise: Noise,
    **known: Known,
) -> Tensor:
    """Draw images (b, C, h, w), uint8, of the classes `labels`."""
    drawn = spec.sample(prior, labels, noise, how, **known)
    return to_bytes(prior.space.decode(first_stage, drawn))


def check_prior(stored: Stored, data: DataConfig, current: Mapping[str, Any]) -> None:
    """Raise UserError where a checkpoint is of another first stage or of other images."""
    before = stored.group("first_stage", FirstStage).digest
    here = current["first_stage"]["digest"]
    if before != here:
        raise UserError(
            f"{stored.path} is a prior of another --first_stage: the digest of its weights is "
            f"{before[:16]}, that of the given one {here[:16]}"
        )
    check_images(stored, data, dict(current))


# ------------------------------------------------------------------------------------------ sample


def draw() -> None:
    given = parse_flags(__doc__, SampleConfig, command="sample")
    config = build(SampleConfig, given)
    start_logging(quiet=rank() > 0)
    device = start_ranks(config.device)
    path = path_of("--model_name", config.model_name, config)
    stored = read_prior(path)
    check_flags(config, stored)
    elsewhere = config.first_stage and path_of("--first_stage", config.first_stage, config)
    first_stage = stored.first_stage.open(elsewhere or None, path).to(device)
    prior = stored.model().to(device)
    names = stored.config.spec.draws
    how = Sampling(**{name: getattr(config, name) for name in names})
    classes = len(stored.classes)
    name = Path(results_name(path, config.output_folder)).with_suffix("")
    editing = open_editing(config, stored, first_stage)
    folder = Path(config.output_folder) / "samples" / name
    settings: dict[str, Any] = {
        "prior": tensors_digest(prior.state_dict(), stored.first_stage.digest),
        "seed": config.seed,
        "label": config.label,
        **{name: getattr(how, name) for name in sorted(names)},
    }
    count, arrange = config.num_samples or 100, {}
    if editing is not None:
        folder = folder.with_name(f"{folder.name}-{config.edit}")
        flags = {name: getattr(config, name) for name in ("inpaint", "vary", "interpolate")}
        settings |= {**flags, "images": editing.digest()}
        count, arrange = config.num_samples or editing.usual_count, {"arrange": editing.arrange}

    def draw_numbers(numbers: list[int]) -> Tensor:
        known: dict[str, Known] = {}
        if editing is None:
            labels = labels_of(numbers, config.label, classes)
            noise = noise_of(config.seed, numbers)
        else:
            labels = torch.full((len(numbers),), -1 if config.label is None else config.label)
            noise = editing.noise(config.seed, numbers)
            known["known"] = editing.start(first_stage, numbers, noise)
        spec = stored.config.spec
        return draw_images(spec, first_stage, how, prior, labels.to(device), noise, **known).cpu()

    with locked(folder, "--output_folder"), memory_for(f"--batch_size {config.batch_size}"):
        if config.overwrite and rank() == 0:
            remove_samples(folder)
        write_samples(folder, settings, count, config.batch_size, draw_numbers, **arrange)
        if rank() == 0:
            below = elsewhere or Path(stored.first_stage.path)
            command = this_command(given, num_ranks(), "sample")
            log.info("%s", write_samples_report(folder, stored, below, settings, command))


def check_flags(config: SampleConfig, prior: StoredPrior) -> None:
    """Raise UserError where flags ask for what the prior does not have."""
    classes = len(prior.classes)
    if config.label is not None and config.label >= classes:
        have = f"has the classes 0 to {classes - 1}" if classes else "has no classes"
        raise UserError(f"--label {config.label}: {prior.path} {have}")
    if config.guidance != 1 and not (classes and prior.knows_no_class):
        have = (
            "models images given their class (--label_dropout 0)" if classes else "has no classes"
        )
        raise UserError(f"--guidance {config.guidance}: {prior.path} {have}")
    if config.edit is not None and config.label is None:
        if config.guidance != 1:
            raise UserError(f"--guidance {config.guidance} needs --label with --{config.edit}")
        if not prior.knows_no_class:
            have = "models images given their class (--label_dropout 0)"
            raise UserError(f"--{config.edit} needs --label: {prior.path} {have}")
    for item in fields(Sampling):
        value = getattr(config, item.name)
        if item.name not in prior.config.spec.draws and value != item.default:
            given = f"--{item.name} {value} has no effect with a {prior.config.prior} prior"
            raise UserError(f"{given}, {prior.path}")
    codevectors = getattr(prior.space, "num_embedding", 0)
    if config.top_k > codevectors:
        raise UserError(f"--top_k {config.top_k}: {prior.path} has {codevectors} codevectors")


COMMANDS = {"train": train, "sample": draw}

if __name__ == "__main__":
    run(main)
