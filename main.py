"""Train an image autoencoder whose latents are quantised by LooC.

Writes <output_folder>/models/<exp_name>/best.pt and last.pt and TensorBoard's files under
<output_folder>/logs/<exp_name>. The same command again continues where the run stopped. Under
torchrun several processes train together; --batch_size is then that of all of them.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

from datasets import DATASETS, BatchLoader, ImageSet, open_dataset, pixel_variance, split_validation
from datasets.config import DataConfig
from modules import VQGAN, Autoencoder, ModelConfig
from utils.checkpoints.checkpoint import Checkpoint, read_checkpoint
from utils.checkpoints.pretrained import read_pretrained, start, with_pretrained
from utils.devices import keep_freed_memory, seed_everything
from utils.distributed import (
    first_goes_ahead,
    from_first,
    num_ranks,
    rank,
    seed_rank,
    start_ranks,
    stop_ranks,
)
from utils.errors import UserError, memory_for, one_line, out_of_memory, run
from utils.files import check_unicode, inside, remove_left_overs, writable_folder
from utils.flags.arguments import build, build_model_config, parse_flags
from utils.flags.presets import with_preset
from utils.flags.recipes import with_recipe
from utils.flags.search import SearchConfig, apply_search
from utils.logger import log, start_logging
from utils.training.objectives import (
    Adversarial,
    Objective,
    ObjectiveConfig,
    build_objective_config,
    make_objective,
)
from utils.training.trainer import PRECISIONS, TrainConfig, Trainer, contradictions, mixed_precision

GROUPS = (ModelConfig, DataConfig, TrainConfig, ObjectiveConfig, SearchConfig)


def main() -> None:
    given = with_preset(parse_flags(__doc__, *GROUPS), *GROUPS)
    pretrained = read_pretrained(given["pretrained"]) if "pretrained" in given else None
    flags = with_recipe(with_pretrained(given, pretrained))
    data, config = build(DataConfig, flags), build(TrainConfig, flags)
    start_logging(quiet=rank() > 0)
    keep_freed_memory()
    device = start_ranks(config.device)
    known = DATASETS[data.dataset]
    model_config = build_model_config(flags, known.channels)
    targets = build_objective_config(flags, model_config, data.image_size or known.image_size)
    with first_goes_ahead():
        training, validation = open_images(data, config)
    data, config = complete(data, config, model_config, training)
    seed_everything(config.seed, device)
    with memory_for(
        f"--num_embedding {model_config.num_embedding}, --hidden_size {model_config.hidden_size}"
    ):
        model = prepare(start(model_config, pretrained), config, training.image_size, device)
    del pretrained  # as large as the model, and needed no more
    objective = make_objective(
        *(model, targets),
        betas=config.adam_betas,
        dtype=PRECISIONS[config.precision],
        variance=partial(pixel_variance, training, data.skip_bad_images),
    )
    seed_rank(config.seed)
    apply_search(build(SearchConfig, flags), model, device)

    trainer = make_trainer(model, objective, training, validation, data, config)
    resume(trainer, data, len(training))
    from_first(lambda: writable_folder(trainer.models, "--exp_name"))
    log_to_file(trainer)
    if config.overwrite and rank() == 0:  # all is in order: not before
        remove_checkpoints(trainer.models)
    log.info(
        "%d training and %d validation images of %s, %d×%d; steps %d to %d on %s%s",
        *(len(training), len(validation), data.dataset, data.image_size, data.image_size),
        *(trainer.step, trainer.total_steps, device),
        f", {num_ranks()} processes" if num_ranks() > 1 else "",
    )
    with memory_for(f"--batch_size {config.batch_size} (--accumulate takes it in parts)"):
        trainer.fit()
    log.info("checkpoints: %s\nTensorBoard: %s", trainer.models, trainer.logs)
    stop_ranks()


def make_trainer(
    model: Autoencoder,
    objective: Objective,
    training: ImageSet,
    validation: ImageSet,
    data: DataConfig,
    config: TrainConfig,
) -> Trainer:
    """The trainer of this experiment, at its first step."""
    device = next(model.parameters()).device
    check_unicode(config.output_folder, "--output_folder")
    output, name = writable_folder(Path(config.output_folder), "--output_folder"), config.exp_name
    models, logs = (inside(output / kind, str(name), "--exp_name") for kind in ("models", "logs"))
    loader = partial(
        BatchLoader,
        device=device,
        seed=config.seed,
        num_workers=data.num_workers,
        rank=rank(),
        num_ranks=num_ranks(),
        skip_bad=data.skip_bad_images,
    )
    parts = num_ranks() * config.accumulate  # validation shall fit wherever training does
    return Trainer(
        model,
        loader(training, config.batch_size, shuffle=True, flip=data.flip, crop=data.crop),
        loader(validation, -(-config.batch_size // parts)),
        config,
        objective=objective,
        models=models,
        logs=logs,
        stored={"data_config": asdict(data), "num_images": len(training)},
    )


def open_images(data: DataConfig, config: TrainConfig) -> tuple[ImageSet, ImageSet]:
    """Training and validation images."""
    source = (data.dataset, data.data_folder)
    options = (data.image_size, data.image_cache)
    images = open_dataset(*source, "train", *options)
    if config.validation == "test":
        log.warning("--validation test chooses best.pt on the test images: its scores flatter")
        return images, open_dataset(*source, "test", *options)
    return split_validation(images)


def prepare(
    model: Autoencoder, config: TrainConfig, image_size: int, device: torch.device
) -> Autoencoder:
    """The model on its device, in the layout and form that the flags ask for."""
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    model = model.to(device)
    if config.channels_last:
        model = model.to(memory_format=memory_format)
    if isinstance(model, VQGAN) and config.checkpoint_gradients:
        model.checkpoint_gradients()
    if config.compile:
        model.compile_parts()
        size = -(-config.batch_size // (num_ranks() * config.accumulate))
        shape = (size, model.config.in_channels, image_size, image_size)
        images = torch.zeros(shape, device=device).contiguous(memory_format=memory_format)
        try:  # there and back, without the quantiser, which would learn of it
            with mixed_precision(config, device):
                there = model.pre_vq_conv(model.encoder(images))
                back = model.reconstruct(there)
            torch.autograd.backward(back.sum())
            model.zero_grad()
        except Exception as error:  # compilers fail in ways of their own
            with memory_for(f"--batch_size {config.batch_size}"):
                if out_of_memory(error):
                    raise
            # On a GPU compiled backward passes have failed in the other layout.
            other = device.type == "cuda" and not config.channels_last
            advice = "go without or add --channels_last" if other else "go without"
            raise UserError(f"--compile failed, {advice}: {one_line(error)[:200]}") from error
    return model


def complete(
    data: DataConfig, config: TrainConfig, model: ModelConfig, images: ImageSet
) -> tuple[DataConfig, TrainConfig]:
    """The flags with what was left to default, as a checkpoint stores them."""
    network = "" if model.model == ModelConfig.model else f"{model.model}_"
    size = f"{model.num_embedding}x{model.embedding_dim}"
    name = f"{data.dataset}_{network}{model.quantizer}_{size}"
    folder = None if data.data_folder is None else str(Path(data.data_folder).absolute())
    return (
        replace(data, image_size=images.image_size, data_folder=folder),
        replace(config, exp_name=name if config.exp_name is None else config.exp_name),
    )


def resume(trainer: Trainer, data: DataConfig, num_images: int) -> None:
    """Continue from the checkpoint that --resume names, where it fits flags and images."""
    checkpoint, has_best = from_first(lambda: checkpoint_to_resume(trainer, data, num_images))
    if checkpoint is not None:
        trainer.resume(checkpoint)
        if trainer.config.overwrite and trainer.step >= trainer.total_steps:
            raise UserError(
                f"--overwrite: --resume {checkpoint.path} is at step {trainer.step} of "
                f"{trainer.total_steps}, nothing is left to train"
            )
        if not has_best:
            trainer.best = -math.inf  # the best of another experiment is not ours
        log.info("resumed %s at step %d", checkpoint.path, trainer.step)


def remove_checkpoints(models: Path) -> None:
    for name in ("last.pt", "previous.pt", "best.pt"):
        (models / name).unlink(missing_ok=True)


def checkpoint_to_resume(
    trainer: Trainer, data: DataConfig, num_images: int
) -> tuple[Checkpoint | None, bool]:
    """The checkpoint, if there is one to continue, and whether its best.pt lies beside it.

    --resume PATH is where an experiment begins; its own last.pt is where it goes on.
    """
    config, models = trainer.config, trainer.models
    remove_left_overs(models)
    own = [models / name for name in ("last.pt", "previous.pt") if (models / name).exists()]
    given = None if config.resume in ("auto", "none") else Path(config.resume)
    if given is not None and given.resolve().parent == models.resolve():
        check_own(given, own, config)
    if config.overwrite:
        own = []
    if config.resume == "none" and own:
        raise UserError(f"--resume none: {own[0]} exists; give --overwrite to replace it")
    if own and given is not None and given.resolve() != own[0].resolve():
        log.info("going on from %s; --resume %s is where it began", own[0], given)
    if not own and given is None:
        return None, False
    checkpoint = read_first(own or [Path(config.resume)])
    path = checkpoint.path
    stored_data = checkpoint.group("data_config", DataConfig)
    differing = [
        *contradictions(checkpoint.model_config, trainer.model.config),
        *contradictions(stored_data, data),
        *contradictions(checkpoint.group("train_config", TrainConfig), config),
    ]
    if isinstance(trainer.objective, Adversarial) and checkpoint.model_config.model == "vqgan":
        stored = checkpoint.group("objective_config", ObjectiveConfig)
        differing += contradictions(stored, trainer.objective.config)
    if differing:
        raise UserError(
            f"{path} was trained with other flags: {', '.join(differing)}; "
            "choose another --exp_name, or --overwrite"
        )
    before = checkpoint.count("num_images")
    if before != num_images:
        raise UserError(f"{path} was trained on {before} images, --data_folder gives {num_images}")
    there, here = stored_data.data_folder, data.data_folder
    if there and here and Path(there).resolve() != Path(here).resolve():
        log.warning(
            "%s was trained on the images of %s and goes on with those of %s", path, there, here
        )
    return checkpoint, bool(own) and (models / "best.pt").exists()


def check_own(given: Path, own: list[Path], config: TrainConfig) -> None:
    """Raise UserError where --resume names a checkpoint of this experiment that it would lose."""
    if config.overwrite:
        raise UserError(f"--overwrite would remove --resume {given}; choose another --exp_name")
    if own and given.resolve() != own[0].resolve():
        raise UserError(
            f"--resume {given}: {own[0]} is where this experiment goes on; "
            "to begin at another of its checkpoints choose another --exp_name"
        )


def read_first(paths: list[Path]) -> Checkpoint:
    """The first checkpoint that is whole; raises UserError where the last one is not either.

    A damaged one is put aside, lest it become the one before the next.
    """
    for path, following in pairwise(paths):
        try:
            return read_checkpoint(path)
        except UserError as error:
            log.warning("%s; going back to %s", error, following)
            path.replace(path.with_name("damaged.pt"))
    return read_checkpoint(paths[-1])


def log_to_file(trainer: Trainer) -> None:
    """Have the first process write train.log besides."""
    if rank() == 0:
        start_logging(writable_folder(trainer.logs, "--output_folder") / "train.log")


if __name__ == "__main__":
    run(main)
