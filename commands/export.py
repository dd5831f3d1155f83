"""Export a diffusion prior as a folder of diffusers, which its LDMPipeline opens.

Writes model_index.json, unet/, scheduler/ and vqvae/, with LooC inside, to
<output_folder>/diffusers/<model_name>/.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from modules import Autoencoder
from modules.options import option
from modules.priors.config import PriorConfig
from modules.priors.diffusion import SAMPLERS, LatentDiffusion, unet_settings
from utils.checkpoints.checkpoint import find_checkpoint
from utils.errors import UserError
from utils.files import whole_folder, write_json
from utils.flags.arguments import build, parse_flags
from utils.generation.checkpoints import read_prior
from utils.logger import log, start_logging
from utils.packages import need


@dataclass(frozen=True)
class ExportConfig:
    """Export of a prior."""

    output_folder: str = option("output", "folder of models and exported folders")
    model_name: str | None = option(
        None, "checkpoint of a diffusion prior, under <output_folder>/models"
    )
    first_stage: str | None = option(
        None, "checkpoint of the first stage (default: where it was in training)"
    )
    label: int | None = option(
        None,
        "the one class that is exported of a prior with classes (default: none)",
        minimum=0,
        maximum=10**6,
    )


GROUPS = (ExportConfig,)


def main() -> None:
    config = build(ExportConfig, parse_flags(__doc__, *GROUPS, command="export"))
    start_logging()
    path = find_checkpoint("--model_name", config.model_name, config.output_folder)
    stored = read_prior(path)
    stored.check_label(config.label, "export")
    prior = stored.model()
    if not isinstance(prior, LatentDiffusion):
        raise UserError(f"{path} is a {stored.config.prior} prior; diffusion ones can be exported")
    _, first_stage = stored.open_first_stage(config.first_stage, config.output_folder)
    folder = stored.folder("diffusers", config.output_folder)
    with whole_folder(folder) as new:
        write_folder(new, prior, stored.config, first_stage, config.label)
    log.info("%s", folder)


def write_folder(
    folder: Path,
    prior: LatentDiffusion,
    config: PriorConfig,
    first_stage: Autoencoder,
    label: int | None,
) -> None:
    """Write the prior of a class, or of no class, in the format of diffusers."""
    diffusers = need("diffusers", "export")
    components: Any = import_module("utils.generation.components")
    vqvae = components.LooCAutoencoder(asdict(first_stage.config))
    vqvae.autoencoder.load_state_dict(first_stage.state_dict())
    vqvae.mean.copy_(prior.mean)
    vqvae.std.copy_(prior.std)
    side, weights = prior.space.height, prior.unet.state_dict()
    if prior.num_classes:  # an embedded class is added to the embedded noise level
        classes = weights.pop("class_embedding.weight")
        weights["time_embedding.linear_2.bias"] += classes[-1 if label is None else label]
    kind = components.PaddedUNet if side % prior.unit else components.UNet2DModel
    unet = kind(**{**unet_settings(config, prior.space, 0), "sample_size": side})
    unet.load_state_dict(weights)
    sampler, settings, _ = SAMPLERS["ddim"]
    scheduler = getattr(diffusers, sampler)(**settings, prediction_type=prior.prediction_type)
    parts = {"vqvae": vqvae, "unet": unet, "scheduler": scheduler}
    index = {"_class_name": "LDMPipeline", "_diffusers_version": diffusers.__version__}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
        own = type(part).__module__ == components.__name__
        if own:
            shutil.copy(components.__file__, folder / name / "looc_components.py")
        index[name] = ["looc_components" if own else "diffusers", type(part).__name__]
    write_json(folder / "model_index.json", index)
