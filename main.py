"""Train an image autoencoder whose latents are quantised by LooC.

Writes <output_folder>/models/<exp_name>/best.pt and last.pt and TensorBoard's files under
<output_folder>/logs/<exp_name>. The same command again continues where the run stopped. Under
torchrun several processes train together; --batch_size is then that of all of them.
"""

from __future__ import annotations

from utils.start import run  # isort: skip  # before those that take seconds

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from datasets import DATASETS, BatchLoader, ImageSet, evenly_spread, pixel_variance
from datasets.config import DataConfig
from datasets.splits import check_images, check_skipping, names_stored, open_training
from modules import ModelConfig, make_model
from utils.checkpoints.pretrained import Pretrained, load_pretrained
from utils.devices import keep_freed_memory, seed_everything
from utils.distributed import (
    first_goes_ahead,
    num_ranks,
    rank,
    seed_rank,
    start_ranks,
    stop_ranks,
)
from utils.errors import UserError, memory_for
from utils.flags.arguments import build, build_model_config, parse_flags, resolve
from utils.flags.command import this_command
from utils.flags.recipes import RECIPES
from utils.flags.search import SearchConfig, apply_search
from utils.locks import locked
from utils.logger import log, start_logging
from utils.training.config import PRECISIONS, TrainConfig
from utils.training.losses import Setting, build_loss_configs, loss_configs, make_losses
from utils.training.reconstruction import Reconstruction, check_network, prepare
from utils.training.resume import experiment_folders, resume, start_files
from utils.training.trainer import Trainer, flags_of, place

GROUPS = (ModelConfig, DataConfig, TrainConfig, *loss_configs(), SearchConfig)


@dataclass(frozen=True)
class Settings:
    """Everything that the command line asks for."""

    given: Mapping[str, Any]
    flags: Mapping[str, Any]  # with those of preset, pretrained weights and recipe
    data: DataConfig
    train: TrainConfig
    model: ModelConfig
    losses: tuple[Any, ...]  # dataclasses of their flags
    pretrained: Pretrained | None


def main() -> None:
    settings = read_settings()
    start_logging(quiet=rank() > 0)
    device = start_ranks(settings.train.device)
    training, validation = open_images(settings)
    settings = complete(settings, training)
    task, start = make_task(settings, training, device)
    settings = replace(settings, pretrained=None)  # as large as the model
    trainer = make_trainer(task, training, validation, settings)
    with locked(trainer.models, "--exp_name"):
        resume(trainer, partial(check_images, data=settings.data, current=trainer.stored))
        start_files(trainer)
        if start and not trainer.step:
            log.info("starting from %s", start)
        log_plan(trainer, training, validation, settings)
        with memory_for(f"--batch_size {settings.train.batch_size} (--accumulate splits it)"):
            trainer.fit()
    log.info("checkpoints: %s\nTensorBoard: %s", trainer.models, trainer.logs)
    stop_ranks()


def read_settings() -> Settings:
    """Everything that the flags given, with preset, pretrained weights and recipe, ask for."""
    given = parse_flags(__doc__, *GROUPS)
    flags, pretrained = resolve(given, *GROUPS)
    if "data_folder" in flags:
        flags = {"dataset": "folder", **flags}
    data, train = build(DataConfig, flags), build(TrainConfig, flags)
    check_skipping(data, flags)
    known = DATASETS[data.dataset]
    if pretrained is not None and pretrained.flags["in_channels"] != known.channels:
        raise UserError(
            f"--pretrained {pretrained.path} takes {pretrained.flags['in_channels']}-channel "
            f"images, --dataset {data.dataset} has {known.channels}-channel ones"
        )
    model = build_model_config(flags, known.channels)
    image_size = data.image_size or known.image_size
    check_network(model, train, image_size)
    losses = build_loss_configs(flags, model, image_size)
    return Settings(given, flags, data, train, model, tuple(losses), pretrained)


def open_images(settings: Settings) -> tuple[ImageSet, ImageSet]:
    """Training and validation images; the first process downloads what is missing."""
    with first_goes_ahead():
        training, validation = open_training(settings.data, settings.train.validation)
    if settings.train.num_validation is not None:
        validation = evenly_spread(validation, settings.train.num_validation)
    return training, validation


def complete(settings: Settings, images: ImageSet) -> Settings:
    """The settings with their defaults filled in, as a checkpoint stores them."""
    data, train, model = settings.data, settings.train, settings.model
    network = "" if model.model == ModelConfig.model else f"{model.model}_"
    size = f"{model.num_embedding}x{model.embedding_dim}"
    name = f"{data.dataset}_{network}{model.quantizer}_{size}"
    folder = None if data.data_folder is None else str(Path(data.data_folder).absolute())
    return replace(
        settings,
        data=replace(data, image_size=images.image_size, data_folder=folder),
        train=replace(train, exp_name=name if train.exp_name is None else train.exp_name),
    )


def make_task(
    settings: Settings, training: ImageSet, device: torch.device
) -> tuple[Reconstruction, str]:
    """The model and its losses, seeded, and the weights that it starts from, in words."""
    config, model_config, start = settings.train, settings.model, ""
    keep_freed_memory()
    seed_everything(config.seed, device)
    with memory_for(
        f"--num_embedding {model_config.num_embedding}, --hidden_size {model_config.hidden_size}"
    ):
        model = make_model(model_config)
        if settings.pretrained is not None:
            start = load_pretrained(model, settings.pretrained, settings.flags)
            start += overridden(settings)
        model = prepare(model, config, training.image_size, device)
    setting = Setting(
        model,
        flags_of(settings.losses),
        variance=partial(pixel_variance, training, settings.data.skip_bad_images),
        betas=config.adam_betas,
        dtype=PRECISIONS[config.precision],
        start={} if settings.pretrained is None else settings.pretrained.further,
    )
    losses = make_losses(setting)
    seed_rank(config.seed)
    apply_search(build(SearchConfig, settings.flags), model, device)
    return Reconstruction(model, losses, config), start


def overridden(settings: Settings) -> str:
    """Return the flags of --recipe that --pretrained overrides, in words."""
    model, own = settings.model, settings.pretrained.flags if settings.pretrained else {}
    found = [
        f"--{name} {own[name]}"
        for name, value in RECIPES[settings.train.recipe].items()
        if name in model.spec.reads and own.get(name, value) != value and name not in settings.given
    ]
    return f"; of --recipe {settings.train.recipe} it overrides {', '.join(found)}" if found else ""


def make_trainer(
    task: Reconstruction, training: ImageSet, validation: ImageSet, settings: Settings
) -> Trainer:
    """The trainer of this experiment, at its first step."""
    data, config = settings.data, settings.train
    models, logs = experiment_folders(config)
    loader = partial(
        BatchLoader,
        device=next(task.model.parameters()).device,
        seed=config.seed,
        num_workers=data.num_workers,
        rank=rank(),
        num_ranks=num_ranks(),
        skip_bad=data.skip_bad_images,
    )
    parts = num_ranks() * config.accumulate  # validation shall fit wherever training does
    command = this_command(settings.given, num_ranks())
    configs = {"model_config": (settings.model,), "data_config": (data,)}
    configs["objective_config"] = settings.losses
    return Trainer(
        task,
        loader(training, config.batch_size, shuffle=True, flip=data.flip, crop=data.crop),
        loader(validation, -(-config.batch_size // parts)),
        config,
        models=models,
        logs=logs,
        configs=configs,
        stored={**names_stored(training, validation), "command": asdict(command)},
    )


def log_plan(
    trainer: Trainer, training: ImageSet, validation: ImageSet, settings: Settings
) -> None:
    """Log the model's size and rate, images, steps and device of this run."""
    data, train, model = settings.data, settings.train, settings.model
    side = training.image_size
    codes = model.codes_per_image(side)
    log.info(
        "%s parameters; %s codes per image (K = %s), %#.3g bits per pixel nominal",
        *(f"{sum(item.numel() for item in trainer.model.parameters()):,}", f"{codes:,}"),
        *(f"{model.num_embedding:,}", codes * math.log2(model.num_embedding) / side**2),
    )
    log.info(
        "images of %s, %s%d×%d: %d for training, %d for validation; steps %d to %d on %s%s",
        *(data.dataset, "patches of " if data.crop == "patch" else "", side, side),
        *(len(training), len(validation)),
        *(trainer.step, trainer.total_steps, place(train, trainer.device)),
        f", {num_ranks()} processes" if num_ranks() > 1 else "",
    )
    if train.num_epochs and train.max_steps:
        epochs = train.num_epochs * len(trainer.train_loader)
        log.info(
            "--num_epochs %d are %d steps, --max_steps is %d: the run ends after %d",
            *(train.num_epochs, epochs, train.max_steps, trainer.total_steps),
        )


if __name__ == "__main__":
    run(main)
