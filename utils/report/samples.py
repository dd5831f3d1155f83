"""report.html of a folder of samples: the grid, the prior, its training, and the commands."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from utils.checkpoints.checkpoint import read_checkpoint
from utils.evaluation.schema import parse
from utils.files import whole_file
from utils.flags.command import Command
from utils.generation.checkpoints import StoredPrior
from utils.generation.samples import GRID_NAME, SAMPLES
from utils.images import fitted
from utils.report.files import finite, read_curves
from utils.report.markup import Missing, command, document, figure, origin, shown, table, text
from utils.report.pictures import uri
from utils.report.scalar_curves import curve_charts
from utils.report.tables import flattened

LARGEST_SIDE = 1200  # of the grid in pixels
SCORES = {
    "transformer": "bits per pixel",
    "masked": "masked bits per pixel, no rate",
    "diffusion": "denoising loss",
}
DRAWN = (
    "The first samples, none chosen. <b>One should see</b> variety and whole objects. <b>Bad:</b> "
    "images that repeat, or objects in pieces: the prior has not learnt how distant positions "
    "belong together."
)
EDITED = (
    "The first samples, none chosen, behind the picture that they are made from. <b>One should "
    "see</b> results that differ, and parts that fit together. <b>Bad:</b> results that are alike, "
    "or visible borders between what is kept and what is drawn anew."
)


def write_samples_report(
    folder: Path, prior: StoredPrior, first_stage: Path, settings: Mapping[str, Any], drawn: Command
) -> Path:
    """Write report.html into a folder of samples and return its path."""
    edited = "images" in settings
    count = sum(1 for _ in folder.glob(SAMPLES))
    verb = "edited by" if edited else "drawn from"
    lead = f"{count:,} images {verb} the {prior.config.prior} prior {prior.path}."

    def samples() -> str:
        with Image.open(folder / GRID_NAME) as image:
            picture = fitted(image, 0, LARGEST_SIDE)
        grid = f'<img src="{uri(picture)}" width="{picture.width}" alt="The first samples">'
        return figure(grid, EDITED if edited else DRAWN)

    def commands() -> str:
        checkpoints = read_checkpoint(first_stage), prior
        stored = (checkpoint.content.get("command") for checkpoint in checkpoints)
        lines = [parse(each, Command).line() for each in stored if each]
        return command(*lines, drawn.line())

    sections = {
        "samples": ("Samples", samples),
        "figures": ("Key figures", lambda: key_figures(prior, count)),
        "training": ("Training of the prior", lambda: training(prior)),
        "configuration": ("Configuration", lambda: configuration(prior, settings)),
        "reproduce": ("Commands", commands),
    }
    name = f"{folder.parent.name}/{folder.name}"
    path = folder / "report.html"
    with whole_file(path) as temporary:
        page = document(name, f'<p class="lead">{text(lead)}</p>', sections, origin(folder))
        temporary.write_text(page, encoding="utf-8")
    return path


def key_figures(prior: StoredPrior, count: int) -> str:
    """Images and their codes, validation and size of the prior."""
    content, stage, space = prior.content, prior.first_stage, asdict(prior.space)
    best = content.get("best")
    rate = "latents before quantisation"
    if "num_embedding" in space:
        bits = math.prod(prior.space.shape) * math.log2(space["num_embedding"])
        rate = f"{shown(bits / stage.image_size**2, 3)} bits per pixel nominal"
    rows = [
        ("images", shown(count), f"{stage.image_size}×{stage.image_size} pixels"),
        ("modelled", str(prior.space), rate),
        ("classes", shown(len(prior.classes)) if prior.classes else "none", ""),
        (
            "best validation",
            shown(-best if finite(best) else None),
            f"{SCORES[prior.config.prior]}, on images held out",
        ),
        ("steps", shown(content.get("step")), f"{shown(content.get('epoch'))} whole epochs"),
        ("weights", shown(sum(value.numel() for value in content["model"].values())), ""),
        ("first stage", stage.path, f"digest {stage.digest[:16]}"),
    ]
    return table("The prior", ("figure", "value", "note"), {"": rows}, "figures")


def training(prior: StoredPrior) -> str:
    folder = prior.path.resolve().parent
    models = next((parent for parent in folder.parents if parent.name == "models"), None)
    if models is None:
        raise Missing("The prior is not below a folder models/, beside which its curves would be.")
    return curve_charts(read_curves(models.with_name("logs") / folder.relative_to(models)))


def configuration(prior: StoredPrior, settings: Mapping[str, Any]) -> str:
    reads = {"prior", *prior.config.spec.reads}
    groups = {
        "Samples": {**settings, "prior": str(settings["prior"])[:16]},
        "Prior": {name: value for name, value in asdict(prior.config).items() if name in reads},
        "Training": prior.content["train_config"],
        "Training images": prior.content.get("data_config", {}),
    }
    tables = (
        table(name, ("setting", "value"), {"": flattened(group)}, "flags")
        for name, group in groups.items()
    )
    return f'<p>Everything that was set.</p><div class="flow">{"".join(tables)}</div>'
