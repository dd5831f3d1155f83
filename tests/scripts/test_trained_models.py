"""Trained models that come with the repository: their files, their names, their figures."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import modules
from datasets import DATASETS, ImageSet
from datasets.sampling import choose
from experiments import photographs
from experiments import pretrained as program
from experiments.children import Children, Flags
from modules import VQVAE, ModelConfig, pretrained
from modules.priors.config import PriorConfig
from modules.priors.spaces import CodeSpace
from modules.weights import SUFFIX
from tests.conftest import Outcome, refusal
from utils.checkpoints.checkpoint import (
    find_checkpoint,
    load_model,
    read_checkpoint,
    save_checkpoint,
    write_checkpoint,
)
from utils.flags.command import words
from utils.generation.checkpoints import FirstStage, new_prior

Script = Callable[..., Outcome]
METRICS = ("psnr", "ssim", "colour")  # those that need no weights
MOST_BYTES, MOST_MODELS = 25_000_000, 4
COMMAND = {
    "script": "main.py",
    "folder": "/home/me",
    "flags": {"data_folder": "/home/me/data", "lr": 0.5, "output_folder": "/home/me/output"},
}


@pytest.fixture
def child(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the programs of experiments in this process."""

    def run(_self: Children, _log: Path, name: str, flags: Flags) -> float:
        outcome = script(name, *words(flags), "--device", "cpu")
        assert outcome.code == 0, outcome.err
        return 0.0

    monkeypatch.setattr(Children, "run", run)


def figures(card: str) -> dict[str, float]:
    """The figures of a card's first table."""
    rows = card[card.index("### Figures") : card.index("### Training")].splitlines()
    found = (re.match(r"\| (.+) \| ([-+]?\d[\d,]*\.?\d*)", row) for row in rows)
    return {row[1]: float(row[2].replace(",", "")) for row in found if row}


def check_card(name: str, folder: Path) -> None:
    """The card has the figures that the model gives, those without weights of a network."""
    path = pretrained.find(name)
    assert path is not None
    card = path.with_suffix(".md").read_text()
    measured = program.measured(path, folder, Children(1), METRICS)
    rows = "".join(f"| {label} | {text} |\n" for label, text in measured.figures.items())
    found = figures(f"### Figures\n{rows}### Training\n")
    written = figures(card)
    assert written.keys() - found.keys() <= {"LPIPS"}
    for label, value in found.items():
        assert written[label] == pytest.approx(value, rel=2e-3, abs=0.02), label
    assert not re.search(r"[ =]/\w", card), "a path of the machine of training"
    for link in re.findall(r"\]\((.*?)\)", card):
        assert (path.parent / link).is_file()


def test_they_are_few_and_small() -> None:
    assert len(pretrained.names()) <= MOST_MODELS
    assert sum(path.stat().st_size for path in pretrained.FOLDER.glob("*.*")) <= MOST_BYTES
    listed = {f"{name}{SUFFIX}" for name in pretrained.names()}
    assert {path.name for path in pretrained.FOLDER.glob(f"*{SUFFIX}")} == listed


@pytest.mark.parametrize("name", pretrained.names())
@pytest.mark.usefixtures("child")
def test_the_figures_of_a_card_are_those_of_the_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "DRAWN", 1)  # only the picture needs more
    (tmp_path / "run").mkdir()
    check_card(name, tmp_path / "run")


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoints of two small models and of a prior of one; few images measure them."""
    entry = DATASETS[program.SAMPLE]

    def few(*where: Any) -> ImageSet:
        return choose(entry.open(*where), torch.arange(12))

    for place, name, value in (
        (photographs, "SIDE", 32),
        (program, "SIDE", 32),
        (program, "METRICS", METRICS),
        (program, "MODELLED", 8),
        (program, "DRAWN", 4),
        (pretrained, "FOLDER", tmp_path / "pretrained"),
    ):
        monkeypatch.setattr(place, name, value)
    monkeypatch.setitem(DATASETS, program.SAMPLE, replace(entry, open=few))
    models = tmp_path / "trained"
    torch.manual_seed(0)
    for name, channels in (("photos", 3), ("clothes", 1)):
        size = ModelConfig(hidden_size=8, num_residual_hidden=4, num_embedding=16)
        model = VQVAE(replace(size, in_channels=channels))
        content = {"data_config": {"data_folder": "/home/me/data"}, "command": COMMAND, "step": 7}
        save_checkpoint(models / f"{name}.pt", model, content)
    stage = read_checkpoint(models / "clothes.pt")
    config, space = PriorConfig(width=8, layers=1, heads=1), CodeSpace.of(stage.model(), 28)
    content = {
        "prior_config": asdict(config),
        "model": new_prior(config, space, 0).state_dict(),
        "train_config": {"label_dropout": 0.1, "seed": 5},
        "space": asdict(space),
        "first_stage": asdict(FirstStage.of(stage, 28)),
        "classes": [],
    }
    write_checkpoint(models / "prior.pt", content)
    return models


def make(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the files of the three in the folder of models that come with the repository."""
    (trained / "credits.csv").write_text(
        "photograph,split,author,licence\na,train,A. Author,CC-BY-SA-4.0\nb,test,B,CC0-1.0\n"
    )
    for name in ("photos", "clothes", "prior"):
        flags = {
            "model_name": str(trained / f"{name}.pt"),
            "name": name,
            "data": "pictures (MIT)",
            "credits": trained / "credits.csv" if name == "photos" else None,
            "data_folder": "data/pictures",
            "output": pretrained.FOLDER,
        }
        monkeypatch.setattr(sys, "argv", ["pretrained.py", *words(flags)])
        program.main()
    return pretrained.FOLDER


@pytest.mark.usefixtures("child")
def test_the_files_of_a_model(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half precision, a card with its figures and licences, no place of the training machine."""
    made = make(trained, monkeypatch)
    assert pretrained.names() == ["clothes", "photos", "prior"]
    for name in ("photos", "prior"):
        (tmp_path / name).mkdir()
        check_card(name, tmp_path / name)
    card = (made / "photos.md").read_text()
    assert {"PSNR", "SSIM", "delta E", "bits per pixel, coded"} <= figures(card).keys()
    assert "CC-BY-SA-4.0 (1)" in card
    assert "A. Author" in card
    assert "--lr 0.5 --data_folder data/pictures" in card
    assert (made / "credits.csv").read_text().count("\n") == 2
    assert "bits per pixel" in figures((made / "prior.md").read_text())
    for name in ("photos", "clothes"):
        before = load_model(trained / f"{name}.pt").state_dict()
        after = modules.load_model(name).state_dict()
        for key, value in before.items():
            same = value if key.startswith("quantizer.") else value.half().float()
            assert torch.equal(after[key], same)
    content = read_checkpoint(made / "photos.safetensors").content
    assert content["step"] == 7
    assert "/home/me" not in str({name: content[name] for name in content if name != "model"})


def test_a_name_opens_a_model_everywhere(
    trained: Path, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = program.Measured({}, "", torch.zeros(1, 8, 8, dtype=torch.uint8), "", 0.0)
    monkeypatch.setattr(program, "measured", lambda *_: nothing)
    made = make(trained, monkeypatch)
    Image.new("RGB", (24, 20), "red").save(tmp_path / "a.png")
    (tmp_path / "photos").mkdir()  # a folder of pictures, for instance
    outcome = script("test.py", "--model_name", "photos", "--images", "a.png", "--device", "cpu")
    assert outcome.code == 0, outcome.err
    assert f"--model_name photos: {made / 'photos.safetensors'}" in outcome.err + outcome.out
    results = tmp_path / "output/results/photos/a-whole"
    assert (results / "rec/a.png").is_file()
    assert "is neither in models/" not in (results / "report.html").read_text()
    flags = "--dataset fashion-mnist-sample --max_steps 1 --batch_size 4 --device cpu"
    outcome = script("main.py", "--pretrained", "clothes", *flags.split(), "--exp_name", "photos")
    assert outcome.code == 0, outcome.err
    assert f"starting from {made / 'clothes.safetensors'}" in outcome.err + outcome.out
    flags = "--num_samples 2 --device cpu"
    outcome = script("generate.py", "sample", "--model_name", "prior", *flags.split())
    assert outcome.code == 0, outcome.err
    assert len(list((tmp_path / "output/samples/prior").glob("0*.png"))) == 2
    # The experiment that has been trained above is the user's own.
    assert find_checkpoint("--model_name", "photos", "output") == Path(
        "output/models/photos/best.pt"
    )
    (tmp_path / "photos/config.json").touch()
    assert pretrained.locate("photos") == Path("photos")
    # An unknown name, a damaged file, and a prior whose first stage is not there.
    listed = "; models that come with LooC: clothes, photos, prior"
    assert refusal(lambda: load_model("foto")) == f"checkpoint foto does not exist{listed}"
    outcome = script("test.py", "--model_name", "foto", "--images", "a.png")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert outcome.err.endswith(f"{listed}\n")
    content = bytearray((made / "clothes.safetensors").read_bytes())
    content[-9] ^= 1
    (made / "clothes.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="is truncated or damaged"):
        modules.load_model("clothes")
    outcome = script("test.py", "--model_name", "clothes")
    assert (outcome.code, outcome.err.count("error: ")) == (2, 1)
    assert outcome.err.endswith("is refused: it is truncated or damaged (DigestDiffers)\n")
    (made / "SHA256SUMS").write_text("")
    again = ["--model_name", str(trained / "prior.pt"), "--name", "p", "--data", "d"]
    outcome = script("experiments/pretrained.py", *again, "--output", str(made))
    assert outcome.code == 2
    assert outcome.err.endswith("no model that comes with LooC is its first stage\n")
    assert not (made / "p.md").exists()
    (tmp_path / "c.csv").write_text("author,licence\n")
    again[1] = str(trained / "photos.pt")
    outcome = script("experiments/pretrained.py", *again, "--credits", "c.csv")
    message = "--credits c.csv has no columns split, author and licence\n"
    assert (outcome.code, outcome.err) == (2, f"pretrained.py: error: {message}")
    outcome = script("experiments/pretrained.py", "--name", "../p", "--data", "d")
    assert outcome.err.endswith("--name ../p is not of letters, digits, - and _\n")
