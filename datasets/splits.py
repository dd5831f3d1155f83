"""The images that a run trains, validates and tests on, and how a checkpoint knows them again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from datasets.config import DataConfig
from datasets.image_sets import ImageSet, TensorImages
from datasets.registry import DATASETS, open_dataset
from datasets.sampling import split_validation
from utils.checkpoints.checkpoint import Checkpoint, Stored
from utils.errors import UserError
from utils.logger import log

BEFORE = "was trained before images were held out by name"


def opener(data: DataConfig) -> Callable[[Any], ImageSet]:
    """Return `open_dataset` with everything but the split."""
    return partial(
        open_dataset,
        data.dataset,
        data.data_folder,
        image_size=data.image_size,
        image_cache=data.image_cache,
        patch_scale=data.patch_scale,
        bits=data.bits,
    )


def open_training(data: DataConfig, validation: str) -> tuple[ImageSet, ImageSet]:
    """Open training and validation images; validation is that flag."""
    opened = opener(data)
    images = opened("train")
    if validation == "test":
        log.warning(
            "--validation test chooses best.pt on the test images, so its scores are too good"
        )
        return images, opened("test")
    if images.splits is not None and images.splits.has_val:
        return images, opened("val")
    return split_validation(images)


def names_stored(training: ImageSet, validation: ImageSet) -> dict[str, Any]:
    """Return the entries of a checkpoint by which its images are known again."""
    names = None
    if not isinstance(training, TensorImages):
        keys = "\0".join([*training.split_keys(), "", *validation.split_keys()])
        names = hashlib.sha256(keys.encode(errors="surrogateescape")).hexdigest()
    test = training.splits.test if training.splits else None
    return {"num_images": len(training), "names": names, "test_images": test}


def check_images(stored: Stored, data: DataConfig, current: dict[str, Any]) -> None:
    """Raise UserError where a checkpoint was trained or validated on other images.

    current: their `names_stored`.
    """
    path, folder = stored.path, data.data_folder
    before, now = stored.count("num_images"), current["num_images"]
    problem = ""
    if current["names"] is not None and "names" not in stored.content:
        problem = f"{BEFORE}, and its training images would be others now"
    elif before != now:
        problem = f"was trained on {before} images, --data_folder gives {now}"
    elif stored.content.get("names") != current["names"]:
        problem = f"was trained on images of other names than those of --data_folder {folder}"
    if problem:
        raise UserError(f"{path} {problem}; --pretrained {path} starts from its weights")
    there = stored.group("data_config", DataConfig).data_folder
    if there and folder and Path(there).resolve() != Path(folder).resolve():
        log.warning(
            "%s was trained on the images of %s and continues on those of %s",
            *(path, there, folder),
        )


def data_flags(checkpoint: Checkpoint, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data flags given, else those of training.

    A folder given without a data set implies --dataset folder, unless that of training has one.
    """
    stored = asdict(checkpoint.group("data_config", DataConfig)) if checkpoint.content else {}
    if not stored or DATASETS[stored["dataset"]].bundled:
        stored.pop("data_folder", None)
        if "data_folder" in flags:
            flags = {"dataset": "folder", **flags}
    if not stored and "dataset" not in flags:
        raise UserError(f"--dataset is missing: {checkpoint.path} does not name its data set")
    if flags.get("dataset", stored.get("dataset")) != stored.get("dataset"):
        stored = {}
    return {**stored, **flags}


def check_skipping(data: DataConfig, flags: Mapping[str, Any]) -> None:
    """Raise UserError for --skip_bad_images where no image is decoded."""
    if flags.get("skip_bad_images") and not DATASETS[data.dataset].resizable:
        memory = f"--dataset {data.dataset}, whose images are in memory"
        raise UserError(f"--skip_bad_images has no effect with {memory}")


def check_fit(checkpoint: Checkpoint, data: DataConfig, images: ImageSet) -> None:
    """Raise UserError if the images do not fit the model."""
    model, side, given = checkpoint.model_config, images.image_size, images.channels
    if given != model.in_channels:
        need = f"{checkpoint.path} takes {model.in_channels}-channel ones"
        raise UserError(f"--dataset {data.dataset} has {given}-channel images, {need}")
    if side % model.downsampling:
        raise UserError(f"--image_size {side} is not a multiple of {model.downsampling}")


def open_tested(
    checkpoint: Checkpoint, data: DataConfig, data_split: str | None
) -> tuple[ImageSet, str]:
    """Open the images to test; return them and their split.

    Without data_split those are the test images of the data that the model was trained on, and all
    images of other data. Raises UserError where training images may be among the test images.
    """
    path, stored, same = checkpoint.path, checkpoint.content, was_trained_on(checkpoint, data)
    split: Any = data_split or ("test" if same else "all")
    try:
        images = opener(data)(split)
    except UserError as error:
        if data_split is not None or same or data.dataset == "folder":
            raise
        raise UserError(f"{error}; --data_split test reads the test images alone") from error
    splits = images.splits
    if stored and same and split == "test" and splits and splits.by_name:
        if "test_images" not in stored:
            raise UserError(
                f"{path} {BEFORE}: most test images would be former training images; "
                "--data_split all tests all images"
            )
        if data_split is None and stored["test_images"] != splits.test:
            raise UserError(
                f"the test images of {data.data_folder} have changed since {path} was trained: "
                "renamed ones may have been trained on; --data_split test tests them nevertheless"
            )
    return images, split


def was_trained_on(checkpoint: Checkpoint, data: DataConfig) -> bool:
    """Return whether the model was trained on these data, or on a copy of this folder."""
    if not checkpoint.content:  # of the reference, which knows named sets only
        return data.dataset != "folder"
    trained = checkpoint.group("data_config", DataConfig)
    if data.dataset != "folder" or trained.dataset != "folder":
        return trained.dataset == data.dataset
    there, here = (Path(config.data_folder or "data/folder") for config in (trained, data))
    if there.resolve() == here.resolve():
        return True
    try:
        splits = open_dataset("folder", data.data_folder, "test").splits
    except UserError:
        return False
    return splits is not None and splits.test == checkpoint.content.get("test_images")
