"""Make the files of a trained model that comes with LooC: weights, card, picture, SHA-256.

python experiments/pretrained.py --model_name mine/best.pt --name photos --data "my photographs"
writes photos.safetensors, photos.md and photos.png to --output and lists the first in SHA256SUMS.
The weights have half precision where that costs less than 0.05 dB. Autoencoders are measured on
images that everybody has: of colour scikit-image's four photographs, grey ones the test images of
the bundled sample of Fashion-MNIST. Make an autoencoder's files before those of its prior.
"""

from __future__ import annotations

import csv
import json
import math
import re
import shlex
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import make_grid

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets.config import DataConfig
from datasets.splits import opener
from experiments.children import Children, Failure, stopping
from experiments.photographs import PHOTOGRAPHS, SIDE, write_originals
from modules import Autoencoder, pretrained
from modules.options import option
from modules.priors.sampling import Sampling
from modules.priors.transformer import CodeTransformer
from modules.weights import ENTRY, SUFFIX, SUMS, digests
from utils.checkpoints.checkpoint import find_checkpoint, read_checkpoint, read_stored
from utils.checkpoints.digest import model_digest
from utils.errors import UserError, run
from utils.evaluation import schema
from utils.evaluation.schema import Analysis, Metrics
from utils.export import plain
from utils.files import whole_file, writable_folder
from utils.flags.arguments import build, parse_flags
from utils.flags.command import Command, words
from utils.generation.checkpoints import read_prior
from utils.generation.samples import draw_images, labels_of, noise_of
from utils.images import comparison, to_picture, to_signed
from utils.logger import start_logging
from utils.packages import need
from utils.report.summary import table
from utils.tables import Table, machine, machine_line, write_page

SAMPLE = "fashion-mnist-sample"
LARGEST_COST = {"psnr": 0.05, "bits": 0.01}  # dB, bits per pixel, of half precision
METRICS = ("psnr", "ssim", "lpips", "colour")
DRAWN = 100  # samples of a prior's picture
MODELLED = 200  # images whose codes measure a prior
# Flags that only say where and how a command ran: of training, and of this program.
PLACES = {"output_folder", "exp_name", "data_folder", "device", "num_workers", "resume"}
OWN_PLACES = {"output_folder", "output", "weights_dir"}
CREDITS = "credits.csv"
Credits: TypeAlias = list[dict[str, str]]  # rows of that file


@dataclass(frozen=True)
class PretrainedConfig:
    """A trained model, and what its checkpoint does not know of its training."""

    model_name: str | None = option(None, "checkpoint, under <output_folder>/models, or a path")
    name: str | None = option(None, "name of the model that is made")
    data: str | None = option(None, "training data and licence, in words")
    credits: Path | None = option(None, "credits.csv of experiments/photos.py --source debian")
    core_hours: float | None = option(None, "core-hours of training", above=0)
    data_folder: str | None = option(None, "folder that the card names for the training images")
    output_folder: str = option("output", "folder of models")
    weights_dir: str | None = option(None, "folder of LPIPS's weights (default: torch hub's)")
    output: Path = option(pretrained.FOLDER, "folder of the files")

    def __post_init__(self) -> None:
        for name in ("name", "data"):
            if getattr(self, name) is None:
                raise ValueError(f"--{name} is missing")
        if not re.fullmatch(r"\w[\w-]*", str(self.name)):
            raise ValueError(f"--name {self.name} is not of letters, digits, - and _")


@dataclass(frozen=True)
class Measured:
    """Figures of the card by label, a picture, and the figure that half precision may worsen."""

    figures: Mapping[str, str]
    images: str  # in words
    picture: Tensor  # (C, H, W), uint8
    caption: str
    cost: float  # PSNR in dB; bits per pixel of a prior, negative


def main() -> None:
    flags = parse_flags(__doc__, PretrainedConfig)
    config = build(PretrainedConfig, flags)
    start_logging()
    path = find_checkpoint("--model_name", config.model_name, config.output_folder)
    entries, state_dict = entries_of(path, config), read_stored(path).content["model"]
    credits = [] if config.credits is None else read_credits(config.credits)
    output = writable_folder(config.output, "--output")
    children = Children(threads=1)
    files, found = {}, {}
    try:
        with TemporaryDirectory() as temporary, stopping(children):
            for kind in ("half", "float32"):
                folder = Path(temporary) / kind
                folder.mkdir()
                files[kind] = folder / f"{config.name}{SUFFIX}"
                write_weights(files[kind], entries, state_dict, half=kind == "half")
                found[kind] = measured(files[kind], folder, children, METRICS, config.weights_dir)
            worse = found["float32"].cost - found["half"].cost
            limit = LARGEST_COST["bits" if "prior_config" in entries else "psnr"]
            kind = "half" if worse < limit else "float32"
            size = (
                f"{files[kind].stat().st_size:,} bytes, {kind} precision; float32 has {worse:+.4f}"
            )
            write_files(output, config, files[kind], found[kind], credits)
            write_card(output, config, entries, found[kind], size, credits, flags)
    except Failure as error:
        raise UserError(f"--model_name {path}: {error}") from error
    sys.stdout.write(f"{output / f'{config.name}.md'}\n")


def entries_of(path: Path, config: PretrainedConfig) -> dict[str, Any]:
    """The entries of a checkpoint besides its weights, without places of the machine of training.

    A prior's first stage is the model that was made of it, found by the digest that it had.
    """
    entries = plain(read_stored(path).content)
    entries.pop("model", None)
    if "data_config" in entries:
        entries["data_config"]["data_folder"] = config.data_folder
    if "train_config" in entries:
        entries["train_config"] |= {"output_folder": "output", "exp_name": config.name}
    if "command" in entries:
        flags = entries["command"]["flags"]
        kept = {name: value for name, value in flags.items() if name not in PLACES}
        folder = {} if config.data_folder is None else {"data_folder": config.data_folder}
        entries["command"] |= {"folder": ".", "flags": {**kept, **folder, "exp_name": config.name}}
    if "first_stage" not in entries:
        return {**entries, "source": model_digest(read_checkpoint(path).model())}
    for name in pretrained.names():
        stage = read_checkpoint(pretrained.FOLDER / f"{name}{SUFFIX}")
        if stage.content.get("source") == entries["first_stage"]["digest"]:
            entries["first_stage"] |= {"path": name, "digest": model_digest(stage.model())}
            return entries
    raise UserError(f"--model_name {path}: no model that comes with LooC is its first stage")


def write_weights(
    path: Path, entries: Mapping[str, Any], state_dict: Mapping[str, Tensor], *, half: bool
) -> None:
    """Write one file of weights and entries. The quantiser's state is always as it was."""
    save = need("safetensors.torch", "--name").save_file
    kept = {}
    for name, value in state_dict.items():
        short = value.half() if half and value.dtype == torch.float32 else value
        exact = name.startswith("quantizer.") or not short.isfinite().all()
        kept[name] = (value if exact else short).contiguous()
    save(kept, path, metadata={ENTRY: json.dumps(entries)})


# ----------------------------------------------------------------------------------------- figures


def measured(
    path: Path,
    folder: Path,
    children: Children,
    metrics: tuple[str, ...],
    weights_dir: str | None = None,
) -> Measured:
    """Measure a file of weights on the images that everybody has."""
    if "prior_config" in read_stored(path).content:
        return measured_prior(path)
    model = read_checkpoint(path).model_config
    flags: dict[str, Any] = {"model_name": str(path), "output_folder": str(folder)}
    if model.in_channels == 3:
        write_originals(folder / "originals")
        images = f"{', '.join(PHOTOGRAPHS)} of scikit-image at {SIDE}×{SIDE}"
        flags["images"] = str(folder / "originals")
    else:
        images = "the test images of the bundled sample of Fashion-MNIST"
        metrics = tuple(name for name in metrics if name != "colour")
        flags |= {"dataset": SAMPLE, "data_split": "test"}
    children.run(folder / "log.txt", "test.py", {**flags, "save_codes": model.quantizer != "none"})
    results = next(folder.rglob("analysis.json")).parent
    paths = {"gt_path": str(results / "original"), "g_path": str(results / "rec")}
    flags = {**paths, "metrics": metrics, "weights_dir": weights_dir, "num_workers": 0}
    children.run(folder / "log.txt", "evaluation.py", flags)
    scores = schema.read(results / "metrics.json", Metrics)
    figures = table(schema.read(results / "analysis.json", Analysis), scores)
    shown = [sorted((results / name).iterdir())[:16] for name in ("original", "rec")]
    tiles = [torch.stack([pil_to_tensor(Image.open(file)) for file in part]) for part in shown]
    return Measured(
        {name: text for name, text in figures.items() if name != "images"},
        images,
        comparison(tiles[0], tiles[1]),
        "Originals above their reconstructions",
        scores.metrics["psnr"].mean or math.inf,
    )


@torch.no_grad()
def measured_prior(path: Path) -> Measured:
    """Measure a prior: the first samples and, of a causal one, the bits of test images' codes."""
    stored = read_prior(path)
    below, first_stage = stored.open_first_stage(None, "output")
    prior, numbers = stored.model(), list(range(DRAWN))
    labels, noise = labels_of(numbers, None, len(stored.classes)), noise_of(42, numbers)
    drawn = draw_images(stored.config.spec, first_stage, Sampling(), prior, labels, noise)
    figures, images, bits = {"prior": f"{stored.config.prior}, first stage {below.stem}"}, "", 0.0
    if isinstance(prior, CodeTransformer) and prior.causal and stored.knows_no_class:
        bits = bits_per_pixel(prior, first_stage, stored.first_stage.image_size)
        figures["bits per pixel"] = f"{bits:.4f} (entropy of the codes given those before them)"
        images = f"the first {MODELLED} test images of the bundled sample of Fashion-MNIST"
    return Measured(figures, images, make_grid(drawn, 10, pad_value=255), "Samples", -bits)


def bits_per_pixel(prior: CodeTransformer, first_stage: Autoencoder, side: int) -> float:
    """Bits per pixel of the codes of the bundled test images; their classes are not given."""
    images = opener(DataConfig(dataset=SAMPLE))("test")
    if images[0].shape != (first_stage.config.in_channels, side, side):
        raise UserError(f"the first stage has other images than --dataset {SAMPLE}")
    batch = torch.stack([images[number] for number in range(MODELLED)])
    nats = prior(first_stage.encode(to_signed(batch))).sum()
    return float(nats) / (math.log(2) * MODELLED * side**2)


# -------------------------------------------------------------------------------------------- card


def write_files(
    output: Path, config: PretrainedConfig, weights: Path, found: Measured, credits: Credits
) -> None:
    """Write weights, picture, SHA256SUMS and the credits if there are any, each whole."""
    content = weights.read_bytes()
    listed = {**digests(output), weights.name: sha256(content).hexdigest()}
    with whole_file(output / weights.name) as temporary:
        temporary.write_bytes(content)
    with whole_file(output / SUMS) as temporary:
        temporary.write_text("".join(f"{listed[name]}  {name}\n" for name in sorted(listed)))
    with whole_file(output / f"{config.name}.png") as temporary:
        to_picture(found.picture).save(temporary, format="PNG", optimize=True)
    if credits:
        with whole_file(output / CREDITS) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, credits[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(credits)


def write_card(
    output: Path,
    config: PretrainedConfig,
    entries: Mapping[str, Any],
    found: Measured,
    size: str,
    credits: Credits,
    flags: Mapping[str, Any],
) -> None:
    """Write the card: picture, figures, training, licences."""
    unit = "bits per pixel" if "prior_config" in entries else "dB"
    own = {name: value for name, value in flags.items() if name not in OWN_PLACES}
    own["model_name"] = f"{config.name}/best.pt"
    own |= {"credits": CREDITS} if credits else {}
    write_page(
        output / f"{config.name}.md",
        str(config.name),
        f"![{found.caption}]({config.name}.png)",
        Table("Figures", ["", found.images], [*found.figures.items()]),
        Table("Training", ["", ""], [*training(config, entries)]),
        f"LooC's licence (MIT) applies to the weights. {licences(credits)}".strip(),
        f"Weights: {size} {unit}. This page was written by "
        f"`python experiments/pretrained.py {shlex.join(words(own))}` on {machine_line(machine())}",
    )


def training(config: PretrainedConfig, entries: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows on data, command and length of the training."""
    train = entries.get("train_config", {})
    rows = {"data": config.data, "core-hours": config.core_hours, "seed": train.get("seed")}
    rows |= {name: entries.get(key) for name, key in (("images", "num_images"), ("steps", "step"))}
    if "command" in entries:
        rows["command"] = f"`{Command(**entries['command']).line().partition(' && ')[2]}`"
    return [(name, str(value)) for name, value in rows.items() if value is not None]


def read_credits(path: Path) -> Credits:
    """Read the rows of the photographs that are trained on."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if not {"split", "author", "licence"} <= set(reader.fieldnames or ()):
            raise UserError(f"--credits {path} has no columns split, author and licence")
        return [row for row in reader if row["split"] == "train"]


def licences(credits: Credits) -> str:
    """Licences and authors of the photographs, in words; empty without photographs."""
    if not credits:
        return ""
    found = Counter(row["licence"] for row in credits).most_common()
    counts = ", ".join(f"{licence} ({count})" for licence, count in found)
    return (
        f"It was trained on {len(credits)} photographs, which keep the licences of their authors, "
        f"some of them share-alike: {counts}. [{CREDITS}]({CREDITS}) has author and licence of "
        f"each. The authors: {'; '.join(sorted({row['author'] for row in credits}))}."
    )


if __name__ == "__main__":
    run(main)
