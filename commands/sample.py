"""Draw images from a prior, or edit pictures with it.

--model_name is a checkpoint of generate.py train. Writes images, grid.png and
report.html to <output_folder>/samples/<model_name>/; the same command again writes the images that
are missing.
"""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from datasets.originals import open_editing
from modules import Autoencoder
from modules.priors.sampling import Sampling
from modules.priors.spec import Prior
from utils.checkpoints.checkpoint import find_checkpoint
from utils.checkpoints.digest import tensors_digest
from utils.distributed import num_ranks, rank, start_ranks
from utils.errors import UserError, memory_for
from utils.flags.arguments import build, parse_flags
from utils.flags.command import this_command
from utils.generation.checkpoints import StoredPrior, read_prior
from utils.generation.config import SampleConfig
from utils.generation.editing import Editing
from utils.generation.samples import (
    USUAL_COUNT,
    draw_images,
    labels_of,
    noise_of,
    remove_samples,
    write_samples,
)
from utils.locks import locked
from utils.logger import log, start_logging
from utils.report.samples import write_samples_report

GROUPS = (SampleConfig, Sampling)


def main() -> None:
    given = parse_flags(__doc__, *GROUPS, command="sample")
    config, how = build(SampleConfig, given), build(Sampling, given)
    start_logging(quiet=rank() > 0)
    device = start_ranks(config.device)
    stored = read_prior(find_checkpoint("--model_name", config.model_name, config.output_folder))
    check_flags(config, how, stored)
    below, first_stage = stored.open_first_stage(config.first_stage, config.output_folder)
    first_stage, prior = first_stage.to(device), stored.model().to(device)
    editing = open_editing(config, stored, first_stage)
    folder = stored.folder("samples", config.output_folder)
    if editing is not None:
        folder = folder.with_name(f"{folder.name}-{config.edit}")
    settings = settings_of(config, how, stored, prior, editing)
    count = config.num_samples or (editing.usual_count if editing else USUAL_COUNT)
    draw = partial(draw_numbers, config, how, stored, first_stage, prior, editing)
    with locked(folder, "--output_folder"), memory_for(f"--batch_size {config.batch_size}"):
        if config.overwrite and rank() == 0:
            remove_samples(folder)
        arrange = {"arrange": editing.arrange} if editing else {}
        write_samples(folder, settings, count, config.batch_size, draw, **arrange)
        if rank() == 0:
            command = this_command(given, num_ranks(), "sample")
            log.info("%s", write_samples_report(folder, stored, below, settings, command))


def settings_of(
    config: SampleConfig,
    how: Sampling,
    stored: StoredPrior,
    prior: Prior,
    editing: Editing | None,
) -> dict[str, Any]:
    """Everything that samples depend on, besides their number."""
    settings = {
        "prior": tensors_digest(prior.state_dict(), stored.first_stage.digest),
        "seed": config.seed,
        "label": config.label,
        **{name: getattr(how, name) for name in sorted(stored.config.spec.draws)},
    }
    if editing is not None:
        settings |= {name: getattr(config, name) for name in ("inpaint", "vary", "interpolate")}
        settings["images"] = editing.digest()
    return settings


def draw_numbers(
    config: SampleConfig,
    how: Sampling,
    stored: StoredPrior,
    first_stage: Autoencoder,
    prior: Prior,
    editing: Editing | None,
    numbers: list[int],
) -> Tensor:
    """Draw the samples of these numbers: (b, C, h, w), uint8."""
    if editing is None:
        labels = labels_of(numbers, config.label, len(stored.classes))
        noise, known = noise_of(config.seed, numbers), None
    else:
        labels = torch.full((len(numbers),), -1 if config.label is None else config.label)
        noise = editing.noise(config.seed, numbers)
        known = editing.start(first_stage, numbers, noise)
    labels = labels.to(next(prior.parameters()).device)
    return draw_images(stored.config.spec, first_stage, how, prior, labels, noise, known).cpu()


def check_flags(config: SampleConfig, how: Sampling, prior: StoredPrior) -> None:
    """Raise UserError where flags ask for what the prior does not have."""
    edit = f"--{config.edit}" if config.edit else None
    if config.inpaint is not None and how.sampler == "dpm-solver++":
        given = f"--inpaint {config.inpaint} contradicts --sampler {how.sampler}"
        raise UserError(f"{given}, whose steps cannot be repeated; ddim and ddpm can")
    if how.guidance != 1:
        given = f"--guidance {how.guidance}"
        if not prior.classes:
            raise UserError(f"{given}: {prior.path} has no classes")
        if not prior.knows_no_class:
            raise UserError(f"{given}: {prior.path} was trained with --label_dropout 0")
        if edit and config.label is None:
            raise UserError(f"{given} needs --label with {edit}")
    prior.check_label(config.label, edit)
    for item in fields(Sampling):
        value = getattr(how, item.name)
        if item.name not in prior.config.spec.draws and value != item.default:
            given = f"--{item.name} {value} has no effect with a {prior.config.prior} prior"
            raise UserError(f"{given}, {prior.path}")
    codevectors = getattr(prior.space, "num_embedding", 0)
    if how.top_k > codevectors:
        raise UserError(f"--top_k {how.top_k}: {prior.path} has {codevectors} codevectors")
