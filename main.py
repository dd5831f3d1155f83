"""Train an image autoencoder whose latents are quantised by LooC.

Writes <output_folder>/models/<exp_name>/best.pt and last.pt and TensorBoard's files under
<output_folder>/logs/<exp_name>. The same command again continues where the run stopped.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from datasets import BatchLoader, ImageSet, open_dataset, pixel_variance, split_validation
from datasets.config import DataConfig
from modules import VQVAE, ModelConfig
from modules.vqvae import DOWNSAMPLING
from utils.arguments import build, build_model_config, parse_flags
from utils.checkpoint import read_checkpoint
from utils.devices import keep_freed_memory, resolve_device, seed_everything
from utils.errors import UserError, one_line, run
from utils.files import inside, writable_folder
from utils.logger import log, start_logging
from utils.search import SearchConfig, apply_search
from utils.trainer import TrainConfig, Trainer, contradictions


def main() -> None:
    flags = parse_flags(__doc__, ModelConfig, DataConfig, TrainConfig, SearchConfig)
    data, config = build(DataConfig, flags), build(TrainConfig, flags)
    start_logging()
    keep_freed_memory()
    device = resolve_device(config.device)
    training, validation = open_images(data, config)
    model_config = build_model_config(flags, training.channels)
    data, config = complete(data, config, model_config, training)
    seed_everything(config.seed, device)
    model = prepare(VQVAE(model_config), config, device)
    apply_search(build(SearchConfig, flags), model, device)

    trainer = make_trainer(model, training, validation, data, config)
    resume(trainer, data, len(training))
    start_logging(writable_folder(trainer.logs, "--output_folder") / "train.log")
    log.info(
        "%d training and %d validation images of %s, %d×%d; steps %d to %d on %s",
        *(len(training), len(validation), data.dataset, data.image_size, data.image_size),
        *(trainer.step, trainer.total_steps, device),
    )
    trainer.fit()
    log.info("checkpoints: %s\nTensorBoard: %s", trainer.models, trainer.logs)


def make_trainer(
    model: VQVAE, training: ImageSet, validation: ImageSet, data: DataConfig, config: TrainConfig
) -> Trainer:
    """The trainer of this experiment, at its first step."""
    device = next(model.parameters()).device
    output, name = writable_folder(Path(config.output_folder), "--output_folder"), config.exp_name
    models, logs = (inside(output / kind, str(name), "--exp_name") for kind in ("models", "logs"))
    loader = partial(BatchLoader, device=device, seed=config.seed, num_workers=data.num_workers)
    return Trainer(
        model,
        loader(training, config.batch_size, shuffle=True),
        loader(validation, config.batch_size),
        config,
        data_variance=pixel_variance(training),
        models=models,
        logs=logs,
        stored={"data_config": asdict(data), "num_images": len(training)},
    )


def open_images(data: DataConfig, config: TrainConfig) -> tuple[ImageSet, ImageSet]:
    """Training and validation images."""
    if data.image_size is not None and data.image_size % DOWNSAMPLING:
        raise UserError(
            f"--image_size {data.image_size} is not a multiple of {DOWNSAMPLING}, "
            "which the network needs"
        )
    images = open_dataset(data.dataset, data.data_folder, "train", data.image_size)
    if config.validation == "test":
        log.warning("--validation test chooses best.pt on the test images: its scores flatter")
        return images, open_dataset(data.dataset, data.data_folder, "test", data.image_size)
    return split_validation(images)


def prepare(model: VQVAE, config: TrainConfig, device: torch.device) -> VQVAE:
    """The model on its device, in the layout and form that the flags ask for."""
    if config.precision == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs CUDA; on --device cpu choose bf16 or fp32")
    model = model.to(device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if config.compile:
        model.encoder.compile()
        model.decoder.compile()
        try:
            with torch.no_grad():
                model.eval()(torch.zeros(1, model.config.in_channels, 8, 8, device=device))
        except Exception as error:  # compilers fail in ways of their own
            raise UserError(f"--compile failed, go without: {one_line(error)[:200]}") from error
    return model


def complete(
    data: DataConfig, config: TrainConfig, model: ModelConfig, images: ImageSet
) -> tuple[DataConfig, TrainConfig]:
    """The flags with what was left to default, as a checkpoint stores them."""
    name = f"{data.dataset}_{model.quantizer}_{model.num_embedding}x{model.embedding_dim}"
    folder = None if data.data_folder is None else str(Path(data.data_folder).absolute())
    return (
        replace(data, image_size=images.image_size, data_folder=folder),
        replace(config, exp_name=name if config.exp_name is None else config.exp_name),
    )


def resume(trainer: Trainer, data: DataConfig, num_images: int) -> None:
    """Continue from the checkpoint that --resume names, where it fits flags and images."""
    config, last = trainer.config, trainer.models / "last.pt"
    if config.overwrite:
        for path in (last, last.with_name("best.pt")):
            path.unlink(missing_ok=True)
    if config.resume == "none" and last.exists():
        raise UserError(f"--resume none: {last} exists; give --overwrite to replace it")
    if config.resume == "none" or (config.resume == "auto" and not last.exists()):
        return
    path = last if config.resume == "auto" else Path(config.resume)
    checkpoint = read_checkpoint(path)
    differing = [
        *contradictions(checkpoint.model_config, trainer.model.config),
        *contradictions(checkpoint.group("data_config", DataConfig), data),
        *contradictions(checkpoint.group("train_config", TrainConfig), config),
    ]
    if differing:
        raise UserError(
            f"{path} was trained with other flags: {', '.join(differing)}; "
            "choose another --exp_name, or --overwrite"
        )
    if checkpoint.content.get("num_images") != num_images:
        before = checkpoint.content.get("num_images")
        raise UserError(f"{path} was trained on {before} images, --data_folder gives {num_images}")
    trainer.resume(checkpoint)
    if not last.with_name("best.pt").exists():
        trainer.best = -math.inf  # the best of another experiment is not ours
    log.info("resumed %s at step %d", path, trainer.step)


if __name__ == "__main__":
    run(main)
