"""Draw images from a prior, or edit pictures with it.

--model_name is a checkpoint of generate.py train. Writes images, grid.png and
report.html to <output_folder>/samples/<model_name>/; the same command again writes the images that
are missing.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datasets.originals import open_editing
from modules.priors.sampling import Known, Sampling
from utils.checkpoints.checkpoint import find_checkpoint, results_name
from utils.checkpoints.digest import tensors_digest
from utils.distributed import num_ranks, rank, start_ranks
from utils.errors import UserError, memory_for
from utils.flags.arguments import build, parse_flags
from utils.flags.command import this_command
from utils.generation.checkpoints import StoredPrior, read_prior
from utils.generation.config import SampleConfig
from utils.generation.samples import (
    draw_images,
    labels_of,
    noise_of,
    remove_samples,
    write_samples,
)
from utils.locks import locked
from utils.logger import log, start_logging
from utils.report.samples import write_samples_report

GROUPS = (SampleConfig,)


def main() -> None:
    given = parse_flags(__doc__, *GROUPS, command="sample")
    config = build(SampleConfig, given)
    start_logging(quiet=rank() > 0)
    device = start_ranks(config.device)
    path = find_checkpoint("--model_name", config.model_name, config.output_folder)
    stored = read_prior(path)
    check_flags(config, stored)
    below = stored.first_stage_path(config.first_stage, config.output_folder)
    first_stage = stored.open_first_stage(below).to(device)
    prior = stored.model().to(device)
    spec = stored.config.spec
    how = Sampling(**{name: getattr(config, name) for name in spec.draws})
    classes = len(stored.classes)
    name = Path(results_name(path, config.output_folder)).with_suffix("")
    editing = open_editing(config, stored, first_stage)
    folder = Path(config.output_folder) / "samples" / name
    settings: dict[str, Any] = {
        "prior": tensors_digest(prior.state_dict(), stored.first_stage.digest),
        "seed": config.seed,
        "label": config.label,
        **{name: getattr(how, name) for name in sorted(spec.draws)},
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
        return draw_images(spec, first_stage, how, prior, labels.to(device), noise, **known).cpu()

    with locked(folder, "--output_folder"), memory_for(f"--batch_size {config.batch_size}"):
        if config.overwrite and rank() == 0:
            remove_samples(folder)
        write_samples(folder, settings, count, config.batch_size, draw_numbers, **arrange)
        if rank() == 0:
            command = this_command(given, num_ranks(), "sample")
            log.info("%s", write_samples_report(folder, stored, below, settings, command))


def check_flags(config: SampleConfig, prior: StoredPrior) -> None:
    """Raise UserError where flags ask for what the prior does not have."""
    edit = f"--{config.edit}" if config.edit else None
    if config.guidance != 1:
        given = f"--guidance {config.guidance}"
        if not prior.classes:
            raise UserError(f"{given}: {prior.path} has no classes")
        if not prior.knows_no_class:
            raise UserError(f"{given}: {prior.path} was trained with --label_dropout 0")
        if edit and config.label is None:
            raise UserError(f"{given} needs --label with {edit}")
    prior.check_label(config.label, edit)
    for item in fields(Sampling):
        value = getattr(config, item.name)
        if item.name not in prior.config.spec.draws and value != item.default:
            given = f"--{item.name} {value} has no effect with a {prior.config.prior} prior"
            raise UserError(f"{given}, {prior.path}")
    codevectors = getattr(prior.space, "num_embedding", 0)
    if config.top_k > codevectors:
        raise UserError(f"--top_k {config.top_k}: {prior.path} has {codevectors} codevectors")
