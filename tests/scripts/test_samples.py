"""experiments/samples.py: classes, neighbours and seconds of the samples of a prior."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import Labels
from experiments import classifier
from experiments.classifier import classes_of, trained_classifier
from experiments.neighbours import nearest
from experiments.samples import class_tables
from tests.conftest import Outcome, refusal, write_idx
from tests.scripts.test_generate import SAMPLE, STAGE, TRAIN
from utils.tables import Table

Script = Callable[..., Outcome]
MEASURE = ("experiments/samples.py", "--model_name", "prior/best.pt", "--epochs", "1")
FOLDER = Path("output/samples/prior/best")


@pytest.fixture
def samples(script: Script, mnist: Path) -> Path:
    """The folder of 12 samples of a prior of ten classes."""
    for part, number in (("train", 40), ("t10k", 12)):
        labels = mnist / "MNIST" / "raw" / f"{part}-labels-idx1-ubyte"
        write_idx(labels, (np.arange(number) % 10).astype(np.uint8))
    assert script(*STAGE, "--max_steps", "2").code == 0
    assert script(*TRAIN, "--max_steps", "2", "--class_conditional").code == 0
    assert script(*SAMPLE, "--num_samples", "12").code == 0
    return FOLDER


def test_a_page_and_a_picture(script: Script, samples: Path) -> None:
    outcome = script(*MEASURE)
    assert outcome.code == 0, outcome.err
    page = Path("output/measured/prior.md").read_text()
    assert f"{page.splitlines()[2]}" in outcome.out
    assert re.search(r"\| samples \| 12 \| [\d.]+ % \| [+-][\d.]+ points \|", page)
    assert "| real test images | 12 |" in page
    assert "with the cache of keys and values" in page
    assert Image.open("output/measured/prior-neighbours.png").width == 120 + 10 * 90
    kept = list(Path("output/classifiers").iterdir())
    changed = kept[0].stat().st_mtime_ns
    assert script(*MEASURE, "--num_samples", "10").code == 0  # the classifier is there
    assert [path.stat().st_mtime_ns for path in kept] == [changed]
    assert "| samples | 10 |" in Path("output/measured/prior.md").read_text()
    # What does not fit is one line, and the page of before stays.
    record = samples / "samples.json"
    settings = record.read_text()
    for content, part in (
        ("[]", "it holds no settings"),
        ('{"prior": "x"}', "holds samples of another prior"),
    ):
        record.write_text(content)
        assert_refused(script(*MEASURE), part)
    record.write_text(settings)
    kept[0].write_bytes(kept[0].read_bytes()[:100])
    assert_refused(script(*MEASURE), f"classifier {kept[0]}")
    torch.save({"0.0.weight": torch.zeros(1)}, kept[0])
    assert_refused(script(*MEASURE), "no such classifier; without it, one is trained")
    assert_refused(script(*MEASURE, "--num_samples", "13"), "has 12 samples, and 13 are needed")
    assert_refused(script(*MEASURE, "--samples", "nowhere"), "No such file")
    Image.new("L", (20, 20)).save(samples / "00000003.png")
    assert_refused(script(*MEASURE), "its images are not of 28×28 pixels")
    (samples / "00000003.png").write_bytes(b"nothing")
    assert_refused(script(*MEASURE), "00000003.png cannot be decoded")
    assert "| samples | 10 |" in Path("output/measured/prior.md").read_text()


@pytest.mark.usefixtures("mnist")
def test_a_masked_prior_without_classes(script: Script) -> None:
    assert script(*STAGE, "--max_steps", "2").code == 0
    assert script(*TRAIN, "--max_steps", "2", "--prior", "masked").code == 0
    assert script(*SAMPLE, "--num_samples", "10").code == 0
    outcome = script(*MEASURE)
    assert outcome.code == 0, outcome.err
    assert "The prior has no classes" in outcome.out
    assert "| 12 rounds |" in outcome.out


def assert_refused(outcome: Outcome, part: str) -> None:
    assert outcome.code == 2, outcome.err
    assert outcome.err.count("\n") == 1, outcome.err
    assert part in outcome.err


def test_a_classifier_learns_and_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = torch.arange(256) % 2
    random = torch.Generator().manual_seed(0)
    images = torch.randint(100, (256, 1, 16, 16), generator=random, dtype=torch.uint8)
    images[numbers == 1, :, :, 8:] += 100
    labels = Labels(numbers, ("dark", "half"))
    state = torch.get_rng_state()
    first = trained_classifier(images, labels, 4, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(classes_of(first, images), numbers)
    monkeypatch.setattr(classifier, "train", None)
    again = trained_classifier(images, labels, 4, tmp_path)
    for name, value in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    with pytest.raises(TypeError, match="not callable"):  # other images need another one
        trained_classifier(images.flip(3), labels, 4, tmp_path)
    path = next(tmp_path.iterdir())
    path.write_text("nothing")
    assert str(path) in refusal(lambda: trained_classifier(images, labels, 4, tmp_path))


def test_neighbours_are_those_of_all_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.neighbours.AT_ONCE", 7)
    random = torch.Generator().manual_seed(1)
    training = torch.randint(256, (30, 3, 8, 8), generator=random, dtype=torch.uint8)
    images = torch.cat([training[11:12], 255 - training[:4]])
    found = nearest(images, training)
    differences = images[:, None].double() - training.double()  # (5, 30, C, H, W)
    distances, positions = differences.square().flatten(2).mean(2).sqrt().sort(1)
    assert torch.allclose(found.distances.double(), distances[:, :3], atol=0.1)
    assert torch.equal(found.positions, positions[:, :3])
    assert int(found.positions[0, 0]) == 11


def test_shares_count_each_set_by_its_own_classes() -> None:
    real = torch.tensor([0, 1, 1, 1]), torch.tensor([0, 1, 1, 0])
    drawn = torch.tensor([0, 1]), torch.tensor([0, 0])
    overall, by_class = class_tables({"real": real, "samples": drawn}, ("a", "b"))
    assert isinstance(overall, Table)
    assert isinstance(by_class, Table)
    assert overall.rows == [
        ("real", 4, "75.0 %", "+0.0 points"),
        ("samples", 2, "50.0 %", "-25.0 points"),
    ]
    assert by_class.rows == [("a", "50 %", "50 %"), ("b", "100 %", "–")]
