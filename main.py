"""Train an image autoencoder whose latents are quantised by LooC.

Writes <output_folder>/models/<exp_name>/best.pt and last.pt and TensorBoard's files under
<output_folder>/logs/<exp_name>. The same command again continues where the run stopped.
"""

from __future__ import annotations

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
from utils.devices import resolve_device, seed_everything
from utils.errors import UserError, one_line, run
from utils.files import inside, writable_folder
from utils.logger import log, start_logging
from utils.search import SearchConfig, apply_search
from utils.trainer import TrainConfig, Trainer, contradictions


def main() -> None:
    flags = parse_flags(__doc__, ModelConfig, DataConfig, TrainConfig, SearchConfig)
    data, config = build(DataConfig, flags), build(TrainConfig, flags)
    start_logging()
    device = resolve_device(config.device)
    training, validation = open_images(data, config)
    model_config = build_model_config(flags, training.channels)
    config = replace(config, exp_name=config.exp_name or default_name(data, model_config))

    seed_everything(config.seed, device)
    model = prepare(VQVAE(model_config), config, device)
    apply_search(build(SearchConfig, flags), model, device)

    models, logs = experiment_folders(config)
    start_logging(logs / "train.log")
    data = replace(data, image_size=training.image_size)
    loader = partial(BatchLoader, device=device, seed=config.seed, num_workers=data.num_workers)
    trainer = Trainer(
        model,
        loader(training, config.batch_size, shuffle=True),
        loader(validation, config.batch_size),
        config,
        data_variance=pixel_variance(training),
        models=models,
        logs=logs,
        stored={"data_config": asdict(data)},
    )
    resume(trainer, data)
    log.info(
        "%d training and %d validation images of %s, %d×%d; %d steps on %s",
        *(len(training), len(validation), data.dataset, data.image_size, data.image_size),
        *(trainer.total_steps, device),
    )
    trainer.fit()
    log.info("checkpoints: %s\nTensorBoard: %s", models / "best.pt", logs)


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


def default_name(data: DataConfig, model: ModelConfig) -> str:
    return f"{data.dataset}_{model.quantizer}_{model.num_embedding}x{model.embedding_dim}"


def experiment_folders(config: TrainConfig) -> tuple[Path, Path]:
    """The folders of checkpoints and logs, created."""
    output = writable_folder(Path(config.output_folder), "--output_folder")
    name = str(config.exp_name)
    return (
        writable_folder(inside(output / "models", name, "--exp_name"), "--output_folder"),
        writable_folder(inside(output / "logs", name, "--exp_name"), "--output_folder"),
    )


def resume(trainer: Trainer, data: DataConfig) -> None:
    """Continue from the checkpoint that --resume names, where it fits the flags."""
    config, last = trainer.config, trainer.models / "last.pt"
    if config.overwrite or (config.resume == "auto" and not last.exists()):
        return
    if config.resume == "none":
        if last.exists():
            raise UserError(f"--resume none: {last} exists; give --overwrite to replace it")
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
    trainer.resume(checkpoint)
    log.info("resumed %s at step %d", path, trainer.step)


if __name__ == "__main__":
    run(main)
