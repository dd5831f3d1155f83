"""Reconstruct the test images of a checkpoint and analyse its codebook.

Writes to <output_folder>/results/<model_name without .pt>/<data set>/: original/ and rec/ with one
picture per image, analysis.json, reconstructions.png, usage.png, slots.png, codebook.png and
report.html; docs/evaluation.md says which folder. A model flag that contradicts the checkpoint is
an error. Under torchrun the images are split over processes. --save_codes writes the indices of all
images, entropy-coded, to codes.looc, or to codes.npy; --from_codes makes the pictures of rec/ from
such a file and the checkpoint, without the data set. --images reconstructs whole pictures, each in
its own size.
"""

from __future__ import annotations

from utils.start import run  # isort: skip  # before those that take seconds

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from datasets import BatchLoader, ImageSet
from datasets.config import DataConfig
from datasets.pictures import Pictures, find_pictures, picture_names
from datasets.splits import check_fit, check_skipping, data_flags, open_tested
from modules import Autoencoder, ModelConfig
from modules.options import option
from utils.checkpoints.checkpoint import Checkpoint, find_checkpoint, read_named, results_name
from utils.codebook.codes.arrays import CodeArray, save_arrays
from utils.codebook.codes.coder import need_coder
from utils.codebook.codes.files import CodeFile, save_codes
from utils.codebook.codes.header import (
    CodesInfo,
    Header,
    PriorCodesInfo,
    by_position,
    codes_info,
    pictures_info,
)
from utils.codebook.codes.prior_coder import PriorCoder, open_prior
from utils.codebook.results import Format, reconstruct, reconstruct_codes, results_folder
from utils.devices import keep_freed_memory
from utils.distributed import first_goes_ahead, num_ranks, rank, start_ranks, stop_ranks
from utils.errors import UserError, memory_for
from utils.evaluation.schema import Analysis, Rate, SkippedImages
from utils.flags.arguments import build, check_stored, parse_flags
from utils.flags.command import this_command
from utils.flags.search import SearchConfig, apply_search
from utils.locks import locked
from utils.logger import log, start_logging


@dataclass(frozen=True)
class TestConfig:
    """Checkpoint that is tested, and files that are written."""

    output_folder: str = option("output", "folder of models, logs and results")
    model_name: str | None = option(
        None,
        "checkpoint: <exp_name>/best.pt under <output_folder>/models, a path, or the name of a "
        "model that comes with LooC",
    )
    batch_size: int = option(16, "images at a time", minimum=1, maximum=2**20)
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    image_format: str = option("png", "format of the pictures", choices=("png", "jpg"))
    jpeg_quality: int = option(75, "quality of jpg pictures", minimum=1, maximum=100)
    save_codes: bool = option(False, "write the indices, entropy-coded, to codes.looc")
    codes_format: str = option(
        "looc",
        "files of --save_codes: codes.looc, or codes.npy (N, H, W, m) with names and labels",
        choices=("looc", "npy"),
    )
    from_codes: str | None = option(
        None, "reconstruct from this code file, or .npy of codes (N, H, W, m), instead of images"
    )
    prior: str | None = option(
        None, "prior (of generate.py train) that codes the indices, or coded those of --from_codes"
    )
    images: tuple[str, ...] = option(
        (), "files and folders of pictures to reconstruct whole, each in its own size"
    )
    keep_names: bool = option(
        False,
        "name the pictures after their files, not by position (not with --images or --from_codes)",
    )
    data_split: str | None = option(
        None,
        "images that are tested (default: test for the data that the model was trained on, all for "
        "any other data)",
        choices=("test", "train", "all"),
    )

    def __post_init__(self) -> None:
        if self.image_format == "png" and self.jpeg_quality != TestConfig.jpeg_quality:
            raise ValueError(f"--jpeg_quality {self.jpeg_quality} needs --image_format jpg")
        if self.save_codes and self.from_codes is not None:
            raise ValueError("--save_codes contradicts --from_codes, which reads codes")
        if self.images and self.from_codes is not None:
            raise ValueError("--images contradicts --from_codes, which needs no images")
        for flag, given in (
            (f"--data_split {self.data_split}", self.data_split is not None),
            ("--keep_names", self.keep_names),
        ):
            if given and (self.images or self.from_codes is not None):
                other = "--images" if self.images else "--from_codes"
                raise ValueError(f"{flag} has no effect with {other}")
        if self.codes_format == "npy":
            if not self.save_codes:
                raise ValueError("--codes_format npy needs --save_codes")
            if self.images:
                raise ValueError("--codes_format npy needs images of one size, not --images")
            if self.prior is not None:
                raise ValueError(f"--prior {self.prior} codes codes.looc, not --codes_format npy")
        if self.prior is not None and self.images:
            raise ValueError(f"--prior {self.prior} models images of one size, not --images")
        if self.prior is not None and not self.save_codes and self.from_codes is None:
            raise ValueError(f"--prior {self.prior} needs --save_codes or --from_codes")


def main() -> None:
    flags = parse_flags(__doc__, TestConfig, ModelConfig, DataConfig, SearchConfig)
    config = build(TestConfig, flags)
    start_logging(quiet=rank() > 0)
    keep_freed_memory()
    device = start_ranks(config.device)
    torch.backends.cudnn.deterministic = True  # the same codes and pictures in every run
    torch.backends.cudnn.allow_tf32 = False  # results of a GPU close to those of the CPU
    checkpoint = read_named(config.output_folder, config.model_name, flags)
    name = results_name(checkpoint.path, config.output_folder)
    config = replace(config, model_name=name)  # which a path elsewhere has for its results
    if config.save_codes and config.codes_format == "looc":
        need_coder("--save_codes")
    if config.images:
        test_pictures(checkpoint, config, flags, device)
    elif config.from_codes is None:
        with memory_for(f"--batch_size {config.batch_size}"):
            test(checkpoint, config, flags, device)
    else:  # the file sets the size of a batch
        test_from_codes(checkpoint, config, flags, device)
    stop_ranks()


def test(
    checkpoint: Checkpoint, config: TestConfig, flags: dict[str, Any], device: torch.device
) -> None:
    """Reconstruct the images of the data set, write everything and report."""
    data = data_of(checkpoint, flags)
    with first_goes_ahead():
        images, split = open_tested(checkpoint, data, config.data_split)
    check_fit(checkpoint, data, images)
    if split == "all" and config.data_split is None:
        source = data.data_folder or data.dataset
        unknown = "%s is not known as training data of %s: all its images are tested"
        log.info(unknown, source, checkpoint.path)
    model = checkpoint.model().to(device)
    apply_search(build(SearchConfig, flags), model, device)
    info, prior = None, None
    if config.save_codes:
        info = codes_info(model, data.dataset, images.image_size, len(images), config.batch_size)
        prior = prior_of(config, model, info, device)
        if prior is not None:
            info = PriorCodesInfo(**asdict(info), prior_digest=prior.digest)
    name = data.name if split == "test" else f"{data.name}-{split}"
    place = f" --data_folder {Path(data.data_folder).resolve()}" if data.data_folder else ""
    tested = f"--dataset {data.dataset}{place} --data_split {split}"
    results = results_folder(config.output_folder, str(config.model_name), name, tested)
    form = Format(config.image_format, config.jpeg_quality)
    names = names_of(images, data) if config.keep_names else None
    loader = BatchLoader(
        images,
        config.batch_size,
        device=device,
        num_workers=data.num_workers,
        rank=rank(),
        num_ranks=num_ranks(),
        skip_bad=data.skip_bad_images,
    )
    known = analysis_of(model, flags, form, tested, {**asdict(data), "data_split": split})
    arrays = partial(save_arrays, images=images, model=model, checkpoint=checkpoint.path)
    with locked(results, "--output_folder"):
        reconstruct(
            *(model, loader, form, results, info, known, images.name, names),
            prior=prior,
            save=save_codes if config.codes_format == "looc" else arrays,
        )


def names_of(images: ImageSet, data: DataConfig) -> list[str]:
    """Names of the images' files below the data set's folder, as `picture_names` has them."""
    paths = [images.name(index) for index in range(len(images))]
    if not Path(paths[0]).is_file():
        raise UserError(f"--keep_names: the images of --dataset {data.dataset} are not files")
    folder = data.data_folder or f"data/{data.dataset}"
    return picture_names([os.path.relpath(path, folder) for path in paths])


def test_pictures(
    checkpoint: Checkpoint, config: TestConfig, flags: dict[str, Any], device: torch.device
) -> None:
    """Reconstruct the pictures of --images, write everything and report."""
    for name in ("batch_size", *(item.name for item in fields(DataConfig))):
        if name in flags and name not in ("skip_bad_images", "bits"):
            raise UserError(f"--{name} has no effect with --images")
    has_data = "data_config" in checkpoint.content
    trained = checkpoint.group("data_config", DataConfig) if has_data else DataConfig()
    bits = flags.get("bits", trained.bits)
    pictures = Pictures(
        find_pictures(config.images, bits),
        checkpoint.model_config.in_channels,
        device=device,
        rank=rank(),
        num_ranks=num_ranks(),
        skip_bad=flags.get("skip_bad_images", False),
        bits=bits,
    )
    model = checkpoint.model().to(device)
    apply_search(build(SearchConfig, flags), model, device)
    info = pictures_info(model, pictures.names) if config.save_codes else None
    name, tested = name_of(config.images)
    results = results_folder(config.output_folder, str(config.model_name), name, tested)
    form = Format(config.image_format, config.jpeg_quality)
    known = analysis_of(model, flags, form, tested, {"dataset": name})
    with locked(results, "--output_folder"):
        reconstruct(
            *(model, pictures, form, results, info, known, pictures.source, pictures.names),
            whole=True,
        )


def name_of(given: Sequence[str]) -> tuple[str, str]:
    """A name for the results of these files and folders, and a text that tells them from others."""
    paths = [Path(text).resolve() for text in given]
    name = paths[0].stem if paths[0].is_file() else paths[0].name
    tested = f"the whole pictures {paths[0]}"
    if more := len(paths) - 1:
        digest = sha256("\n".join(map(str, paths)).encode(errors="surrogateescape")).hexdigest()
        name, tested = f"{name}-and-{more}-more", f"{tested} and {more} more ({digest[:8]})"
    return f"{name}-whole", tested


def test_from_codes(
    checkpoint: Checkpoint, config: TestConfig, flags: dict[str, Any], device: torch.device
) -> None:
    """Make the pictures of rec/ from a code file, and report."""
    path = Path(str(config.from_codes))
    array = path.suffix == ".npy"
    model = checkpoint.model().to(device)
    if not array:
        need_coder("--from_codes")
    codes = CodeArray(path, model, config.batch_size) if array else CodeFile(path)
    stored = asdict(codes.info)
    check_stored(flags, stored, codes.path)
    for name in (
        "batch_size",
        *(item.name for item in (*fields(DataConfig), *fields(SearchConfig))),
    ):
        if name in flags and name not in stored:
            raise UserError(f"--{name} has no effect with --from_codes")
    codes.check_model(model, checkpoint.path)
    codes.use_prior(prior_of(config, model, codes.info, device))
    path, info = codes.path.resolve(), codes.info
    tested, name = f"--from_codes {path}", f"{path.parent.name}-{path.stem}{'-npy' * array}"
    results = results_folder(config.output_folder, str(config.model_name), name, tested)
    form = Format(config.image_format, config.jpeg_quality)
    data: dict[str, Any] = {k: stored[k] for k in ("dataset", "image_size") if k in stored}
    known = analysis_of(model, flags, form, tested, data)
    skipped = SkippedImages(len(info.left_out), list(map(by_position, info.left_out)))
    with locked(results, "--output_folder"):
        reconstruct_codes(model, codes, form, results, replace(known, skipped_images=skipped))


def prior_of(
    config: TestConfig, model: Autoencoder, info: Header, device: torch.device
) -> PriorCoder | None:
    """The prior of --prior, if given, as a coder of these codes."""
    if config.prior is None:
        return None
    if not isinstance(info, CodesInfo):
        raise UserError(f"--prior {config.prior} has no effect: the codes are of whole pictures")
    path = find_checkpoint("--prior", config.prior, config.output_folder)
    return open_prior(path, model, info, device)


def analysis_of(
    model: Autoencoder, flags: dict[str, Any], form: Format, tested: str, data: dict[str, Any]
) -> Analysis:
    """The analysis, as far as it is known before an image is seen."""
    return Analysis(
        images=tested,
        command=this_command(flags),
        model=asdict(model.config),
        data=data,
        image_format=form.suffix,
        rate=Rate(),
    )


def data_of(checkpoint: Checkpoint, flags: dict[str, Any]) -> DataConfig:
    """The data flags given, else those of training, except those for training images alone."""
    for name, value in (("flip", True), ("crop", "random")):
        if flags.get(name) == value:
            raise UserError(f"--{name} has no effect on test images")
    # Test images are read once: a cache would cost more than it saves.
    found = {
        **data_flags(checkpoint, flags),
        "flip": False,
        "image_cache": flags.get("image_cache"),
    }
    if found.get("crop") != "patch":
        found |= {"crop": "centre", "crop_scale": flags.get("crop_scale", 1.0)}
    data = build(DataConfig, found)
    check_skipping(data, flags)  # an old checkpoint may have it from training
    return data


if __name__ == "__main__":
    run(main)
