"""Train a prior on a first stage's codes or latents.

--first_stage is a checkpoint of main.py. Writes <output_folder>/models/<exp_name>/best.pt and
last.pt; the same command again continues.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from datasets import ImageSet, Labels, evenly_spread
from datasets.codes import CodeLoader, StoredCodes
from datasets.config import DataConfig
from datasets.splits import check_fit, check_images, data_flags, names_stored, open_training
from modules import Autoencoder
from modules.priors.config import PriorConfig
from modules.priors.registry import PRIORS
from modules.priors.sampling import Sampling
from modules.priors.spaces import CodeSpace, Space
from modules.priors.spec import Prior
from utils.checkpoints.checkpoint import Checkpoint, Stored, find_checkpoint, read_checkpoint
from utils.devices import seed_everything
from utils.distributed import first_goes_ahead, num_ranks, rank, seed_rank, start_ranks
from utils.errors import UserError, memory_for
from utils.flags.arguments import build, parse_flags, with_preset
from utils.flags.command import this_command
from utils.generation.checkpoints import FirstStage, check_weights, load_pretrained, new_prior
from utils.generation.config import PriorTrainingConfig
from utils.generation.samples import draw_images
from utils.locks import locked
from utils.logger import log, start_logging
from utils.training.denoising import Denoising
from utils.training.likelihood import Likelihood
from utils.training.prior import PriorTask
from utils.training.resume import experiment_folders, resume, start_files
from utils.training.trainer import Trainer, place

GROUPS = (PriorConfig, PriorTrainingConfig, DataConfig)


def main() -> None:
    given = parse_flags(__doc__, *GROUPS, command="train")
    flags = with_preset(given, *GROUPS)
    flags = {**PRIORS[flags.get("prior", PriorConfig.prior)].implies, **flags}
    config, prior_config = build(PriorTrainingConfig, flags), build(PriorConfig, flags)
    start_logging(quiet=rank() > 0)
    device = start_ranks(config.device)
    path = find_checkpoint("--first_stage", config.first_stage, config.output_folder)
    checkpoint = read_checkpoint(path)
    data = data_of(checkpoint, flags)
    with first_goes_ahead():
        training, validation = open_training(data, "split")
    if config.num_validation is not None:
        validation = evenly_spread(validation, config.num_validation)
    images = training, validation
    check_fit(checkpoint, data, images[0])
    first_stage = checkpoint.model().to(device)
    try:
        space = prior_config.spec.space.of(first_stage, images[0].image_size)
    except ValueError as error:
        raise UserError(f"--first_stage {path}: {error}") from error
    if config.exp_name is None:
        config = replace(config, exp_name=f"{path.parent.name}_{prior_config.prior}")
    labels = [labels_of(part, config) for part in images]
    prior = make_prior(config, prior_config, space, len(labels[0].names), device)
    loaders = make_loaders(config, data, first_stage, prior, images, labels)
    models, logs = experiment_folders(config)
    trainer = Trainer(
        make_task(config, prior_config, first_stage, prior),
        *loaders,
        config,
        models=models,
        logs=logs,
        configs={"prior_config": (prior_config,), "data_config": (data,)},
        stored={
            **names_stored(*images),
            "space": asdict(space),
            "first_stage": asdict(FirstStage.of(checkpoint, images[0].image_size)),
            "classes": list(labels[0].names),
            "command": asdict(this_command(given, num_ranks(), "train")),
        },
    )
    with locked(models, "--exp_name"):
        resume(trainer, partial(check_prior, data=data, current=trainer.stored))
        start_files(trainer)
        for loader in loaders:
            loader.compute()
        if trainer.step == 0:
            for each in {trainer.model, trainer.best_model}:
                each.measure(loaders[0].codes.batches())
        log.info(
            "%d training images of %s as %s; steps %d to %d on %s",
            *(len(images[0]), data.dataset, space),
            *(trainer.step, trainer.total_steps, place(config, device)),
        )
        with memory_for(f"--batch_size {config.batch_size} (--accumulate splits it)"):
            trainer.fit()
    log.info("checkpoints: %s\nTensorBoard: %s", models, logs)


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


def labels_of(images: ImageSet, config: PriorTrainingConfig) -> Labels:
    """Classes of the images; −1 each without --class_conditional."""
    if not config.class_conditional:
        return Labels(torch.full((len(images),), -1), ())
    try:
        return images.labels()
    except UserError as error:
        raise UserError(f"--class_conditional: {error}") from error


def make_prior(
    config: PriorTrainingConfig,
    prior_config: PriorConfig,
    space: Space,
    num_classes: int,
    device: torch.device,
) -> Prior:
    """A new prior, seeded, or with the weights of --pretrained."""
    check_weights(prior_config, space, device)
    seed_everything(config.seed, device)
    with memory_for(", ".join(f"--{name}" for name in sorted(prior_config.spec.reads))):
        prior = new_prior(prior_config, space, num_classes).to(device)
    if config.pretrained is not None:
        path = find_checkpoint("--pretrained", config.pretrained, config.output_folder)
        load_pretrained(prior, prior_config, path)
    seed_rank(config.seed)
    return prior


def make_loaders(
    config: PriorTrainingConfig,
    data: DataConfig,
    first_stage: Autoencoder,
    prior: Prior,
    images: tuple[ImageSet, ImageSet],
    labels: list[Labels],
) -> tuple[CodeLoader, CodeLoader]:
    """Loaders of the codes or latents of training and validation images."""
    encode = partial(
        StoredCodes,
        first_stage,
        space=prior.space,
        folder=Path(config.output_folder) / prior.space.items,
        batch_size=config.batch_size,
        num_workers=data.num_workers,
    )
    load = partial(
        CodeLoader,
        random=prior.draws,
        batch_size=config.batch_size,
        device=next(first_stage.parameters()).device,
        seed=config.seed,
    )
    training, validation = images
    mirrored = encode(training, flipped=True) if data.flip else None
    return (
        load(encode(training, flipped=False), labels[0].numbers, mirrored, shuffle=True),
        load(encode(validation, flipped=False), labels[1].numbers, shuffle=False),
    )


def make_task(
    config: PriorTrainingConfig, prior_config: PriorConfig, first_stage: Autoencoder, prior: Prior
) -> PriorTask:
    kind: type[PriorTask] = Likelihood if isinstance(prior.space, CodeSpace) else Denoising
    pixels = (prior.space.height * first_stage.config.downsampling) ** 2
    draw = partial(draw_images, prior_config.spec, first_stage, Sampling())
    return kind(prior, pixels, config.label_dropout, draw)


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
